"""The units of ShuffleNet V2."""

from typing import Any

import torch
from torch import nn

from src.models.shufflenet_v2 import DownUnit, SplitUnit


def identity(module: nn.Module) -> Any:
    """Set the weights such that each branch returns its input: channel i becomes channel i, pixels stay in place."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.zeros_(child.weight)
            centre = child.kernel_size[0] // 2
            inputs, outputs = (size // child.groups for size in (child.in_channels, child.out_channels))
            for index in range(child.out_channels):
                child.weight.data[index, index % outputs % inputs, centre, centre] = 1
        if isinstance(child, nn.BatchNorm2d):
            child.eps = 0
    return module.eval()


@torch.no_grad()
def test_a_unit_interleaves_the_halves_of_its_channels():
    x = torch.rand(2, 6, 6, 6)
    split = identity(SplitUnit(6))
    torch.testing.assert_close(split(x), x[:, [0, 3, 1, 4, 2, 5]])


@torch.no_grad()
def test_only_one_half_of_the_channels_is_computed():
    x = torch.rand(2, 6, 6, 6)
    split = identity(SplitUnit(6))
    nn.init.zeros_(split.conv3.weight)
    torch.testing.assert_close(split(x)[:, ::2], x[:, :3])
    assert not split(x)[:, 1::2].any()


@torch.no_grad()
def test_a_unit_that_halves_the_size_interleaves_its_branches():
    x = torch.rand(2, 6, 6, 6)
    down = identity(DownUnit(6, 12))
    nn.init.constant_(down.bn5.bias, 1)
    expected = torch.stack([x, x + 1], 2).flatten(1, 2)[:, :, ::2, ::2]
    torch.testing.assert_close(down(x), expected)
