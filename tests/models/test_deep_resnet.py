"""The blocks of the residual networks of four stages."""

import pytest
import torch
from torch.nn import functional as F

from src.models.deep_resnet import BasicBlock, Bottleneck
from tests.helpers.networks import randomise_vectors


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 1), (8, 2)])
def test_a_basic_block_has_its_stride_in_its_first_convolution(channels: int, stride: int):
    block = randomise_vectors(BasicBlock(8, channels, stride))
    x = torch.randn(2, 8, 6, 6)
    inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    shortcut = x
    if (channels, stride) != (8, 1):
        convolution, batch_norm = block.shortcut
        shortcut = batch_norm(F.conv2d(x, convolution.weight, stride=stride))
    torch.testing.assert_close(block(x), F.relu(block.bn2(F.conv2d(inner, block.conv2.weight, padding=1)) + shortcut))


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 1), (8, 2)])
def test_a_bottleneck_has_its_stride_in_its_3x3_convolution(channels: int, stride: int):
    block = randomise_vectors(Bottleneck(8, channels, stride))
    assert [layer.kernel_size[0] for layer in (block.conv1, block.conv2, block.conv3)] == [1, 3, 1]
    x = torch.randn(2, 8, 6, 6)
    inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    inner = F.relu(block.bn2(F.conv2d(inner, block.conv2.weight, stride=stride, padding=1)))
    shortcut = x
    if (channels, stride) != (8, 1):
        convolution, batch_norm = block.shortcut
        shortcut = batch_norm(F.conv2d(x, convolution.weight, stride=stride))
    torch.testing.assert_close(block(x), F.relu(block.bn3(F.conv2d(inner, block.conv3.weight)) + shortcut))
