"""Flow of solution procedure: its matrix worked by hand, and the networks that it refuses."""

import pytest
import torch

from src.common.errors import UserError
from src.methods.fsp import fsp_matrix
from src.models.shufflenet_v1 import ShuffleV1
from src.models.wide_resnet import wrn_16_1
from tests.helpers.methods import assert_published_weights, configured, networks_of


def test_published_weights_of_the_main_stage():
    assert_published_weights(configured("fsp"), cross_entropy=1.0)


def test_a_matrix_worked_by_hand():
    """Two pixels: the products of channels (1, 2) and (3, 4) average to 11 / 2, those of (0, 1) to 4 / 2."""
    first = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    last = torch.tensor([[3.0, 4.0]]).view(1, 1, 1, 2)
    assert fsp_matrix(first, last).tolist() == [[[5.5], [2.0]]]


def test_networks_of_other_channels_are_refused():
    with pytest.raises(UserError, match=r"^method=fsp compares stages of the same channels .* \[.*240.*\]"):
        configured("fsp").allocate(networks_of(wrn_16_1, ShuffleV1))
