"""The units of ShuffleNet."""

import torch
from torch.nn import functional as F

from src.models.shufflenet_v1 import GroupedShuffleUnit


@torch.no_grad()
def test_a_unit_shuffles_the_channels_of_its_groups():
    unit = GroupedShuffleUnit(48, 48, 1)
    assert (unit.conv1.groups, unit.conv2.groups, unit.conv3.groups) == (3, 12, 3)
    # Section 3.1: write the channels in one row per group, and read them by columns. Here 12 channels in 3 groups.
    order = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    x = torch.rand(2, 48, 5, 5)
    inner = F.relu(unit.eval().bn1(unit.conv1(x)))[:, order]
    expected = F.relu(unit.bn3(unit.conv3(F.relu(unit.bn2(unit.conv2(inner))))) + x)
    torch.testing.assert_close(unit(x), expected)


@torch.no_grad()
def test_a_unit_of_stride_2_appends_its_averaged_input():
    unit = GroupedShuffleUnit(24, 72, 2).eval()
    assert (unit.conv1.groups, unit.conv3.groups, unit.conv3.out_channels) == (1, 3, 48)
    x = torch.rand(2, 24, 5, 5)
    averaged = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    torch.testing.assert_close(unit(x)[:, 48:], averaged)
