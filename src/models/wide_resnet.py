"""Wide residual networks: S. Zagoruyko, N. Komodakis, arXiv 1605.07146.

Parameter counts, names in the state dict and initialisation are those of RepDistiller and mdistiller. Their checkpoints
load unchanged. Each batch norm runs once per step. In mdistiller three of them run twice, for features that nobody
asked for.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, and a shortcut.

    If the width changes, the shortcut is a 1x1 convolution after the first batch norm and ReLU.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + shortcut


class Stage(nn.Module):
    """A sequence of blocks of the same width."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(Network):
    """A stem, three stages at 32, 16 and 8 pixels, batch norm, global average pooling, a linear layer.

    The depth is 6 * blocks + 4. The features are the outputs of the stem and of the three stages, before the batch norm
    that follows.
    """

    def __init__(self, blocks: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(16, 16 * width, blocks, stride=1)
        self.block2 = Stage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = Stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and the three stages, and pooled features."""
        f0 = self.conv1(images)
        f1 = self.block1(f0)
        f2 = self.block2(f1)
        f3 = self.block3(f2)
        last = F.relu(self.bn1(f3))
        pooled = self.pool(last)
        return Output(self.fc(pooled), (f0, f1, f2, f3), pooled, unpooled=last)


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """Make a wrn_16_1: 180,916 parameters for 100 classes."""
    return WideResNet(2, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """Make a wrn_16_2: 703,284 parameters for 100 classes."""
    return WideResNet(2, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """Make a wrn_40_1: 569,780 parameters for 100 classes."""
    return WideResNet(6, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """Make a wrn_40_2: 2,255,156 parameters for 100 classes."""
    return WideResNet(6, 2, num_classes)
