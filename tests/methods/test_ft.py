"""Factor transfer: the sizes of its factors, its first stage, and the maps that it refuses."""

import pytest
import torch

from src.common.errors import UserError
from src.methods.ft import Paraphrasing
from src.models.mobilenet_v2 import MobileNetV2
from src.models.resnet import resnet8
from src.models.vgg import vgg8
from tests.helpers.methods import assert_published_weights, configured, networks_of


def test_published_weights_of_the_main_stage():
    assert_published_weights(configured("ft"), cross_entropy=1.0, factor=200.0)


def test_a_map_of_one_pixel_is_refused_because_all_of_them_have_the_same_direction():
    with pytest.raises(UserError, match=r"^method=ft compares maps .* method\.whole_factor=true"):
        configured("ft").allocate(networks_of(vgg8, MobileNetV2))
    configured("ft", whole_factor=True).allocate(networks_of(vgg8, MobileNetV2))


def test_a_factor_has_half_of_the_teachers_channels():
    made = configured("ft")
    made.allocate(networks_of(vgg8, resnet8))
    assert made.paraphraser(torch.randn(2, 512, 4, 4)).shape == made.translator(torch.randn(2, 64, 4, 4)).shape
    assert made.paraphraser(torch.randn(2, 512, 4, 4)).shape == (2, 256, 4, 4)
    assert made.decoder(torch.randn(2, 256, 4, 4)).shape == (2, 512, 4, 4)


def test_the_first_stage_trains_the_paraphraser():
    made = configured("ft")
    made.allocate(networks_of())
    assert isinstance(made.stages()[0].method, Paraphrasing)
