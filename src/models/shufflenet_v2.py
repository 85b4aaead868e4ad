"""ShuffleNet V2 of width 1 for images of 32 x 32 pixels: N. Ma et al., arXiv 1807.11164, figure 3 and table 5.

Parameter count, names in the state dict and initialisation (PyTorch's own) are those of RepDistiller and mdistiller.
Their checkpoints load unchanged. The network differs from the paper in one point: the stem is a 1x1 convolution without
pooling.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output


class SplitUnit(nn.Module):
    """Three convolutions on one half of the channels, the identity on the other half, then a channel shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, H, W] to the same shape."""
        left, right = x.chunk(2, 1)
        right = F.relu(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


class DownUnit(nn.Module):
    """Two branches that both see the whole input, then a channel shuffle.

    Each branch makes half of the output channels, at half of the input's height and width.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / 2, W / 2]."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNetV2(Network):
    """A stem, three stages at 16, 8 and 4 pixels, a 1x1 convolution, global average pooling, a linear layer.

    The features are the outputs of the stem and of the three stages.
    """

    classifier_name = "linear"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, 3)
        self.layer2 = _stage(116, 232, 7)
        self.layer3 = _stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and the three stages, and pooled features."""
        f0 = F.relu(self.bn1(self.conv1(images)))
        f1 = self.layer1(f0)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        last = F.relu(self.bn2(self.conv2(f3)))
        pooled = self.pool(last)
        return Output(self.linear(pooled), (f0, f1, f2, f3), pooled, unpooled=last)


def _stage(in_channels: int, channels: int, split_units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, channels), *(SplitUnit(channels) for _ in range(split_units)))


def ShuffleV2(num_classes: int = 100) -> ShuffleNetV2:  # noqa: N802 (as published)
    """Make a ShuffleV2: 1,355,528 parameters for 100 classes."""
    return ShuffleNetV2(num_classes)
