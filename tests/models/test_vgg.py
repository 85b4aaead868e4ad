"""The resolutions and the depth of VGG networks."""

import pytest
import torch
from torch import nn

from src.models import vgg


@torch.no_grad()
@pytest.mark.parametrize(("size", "expected"), [(32, [32, 16, 8, 4, 4]), (64, [64, 32, 16, 8, 4])])
def test_large_images_are_halved_once_more(size: int, expected: list[int]):
    features = vgg.vgg8(10).eval().forward_features(torch.randn(1, 3, size, size)).features
    assert [feature.shape[2] for feature in features] == expected


@pytest.mark.parametrize("depth", [8, 11, 13, 16, 19])
def test_the_name_states_the_depth(depth: int):
    with torch.device("meta"):
        network = getattr(vgg, f"vgg{depth}")()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == depth - 3  # the name counts the paper's three linear layers, of which one is left
