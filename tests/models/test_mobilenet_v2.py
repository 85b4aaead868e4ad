"""The blocks of MobileNetV2."""

import pytest
import torch
from torch import nn

from src.models.mobilenet_v2 import InvertedResidual
from tests.helpers.networks import randomise_vectors


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_a_block_ends_without_relu_and_adds_its_input_if_the_sizes_agree(channels: int, stride: int):
    block = randomise_vectors(InvertedResidual(8, channels, stride, expansion=6))
    projection, batch_norm = block.conv[6], block.conv[7]
    assert [type(layer) for layer in block.conv].count(nn.ReLU) == 2
    assert block.conv[3].groups == projection.in_channels == 48
    nn.init.zeros_(projection.weight)
    x = torch.randn(2, 8, 6, 6)
    constant = batch_norm.bias - batch_norm.running_mean * batch_norm.weight / (batch_norm.running_var + 1e-5).sqrt()
    residual = x if (channels, stride) == (8, 1) else torch.zeros(2, channels, 6 // stride, 6 // stride)
    torch.testing.assert_close(block(x), residual + constant[:, None, None])
