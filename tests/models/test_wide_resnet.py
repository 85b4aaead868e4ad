"""The blocks of the wide residual networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src.models.wide_resnet import PreActivationBlock
from tests.helpers.networks import randomise_vectors


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2), (16, 1)])
def test_the_shortcut_sees_raw_inputs_if_the_widths_agree_and_activated_ones_if_not(channels, stride):
    block = randomise_vectors(PreActivationBlock(8, channels, stride))
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 8, 6, 6)
    expected = x if channels == 8 else F.conv2d(F.relu(block.bn1(x)), block.convShortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_batch_norm_and_relu_precede_both_convolutions():
    block = randomise_vectors(PreActivationBlock(8, 8, 1))
    x = torch.randn(2, 8, 6, 6)
    inner = block.conv1(F.relu(block.bn1(x)))
    torch.testing.assert_close(block(x), x + block.conv2(F.relu(block.bn2(inner))))
