"""Residual networks for images of 32 x 32 pixels: K. He et al., arXiv 1512.03385, section 4.2.

Parameter counts, names in the state dict and initialisation are those of RepDistiller and mdistiller. Their checkpoints
load unchanged. Their shortcuts are the paper's option B.

Networks named `option_a` have option A, the paper's choice for CIFAR-10. Their names in the state dict are those of
Y. Idelbayev's implementation, whose checkpoints load unchanged.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output


class PaddedShortcut(nn.Module):
    """Option A of section 3.3, a shortcut without parameters: every stride-th pixel, padded with zero channels.

    Half of the zero channels come before the others, half after them.

    >>> import torch
    >>> PaddedShortcut(in_channels=1, channels=3, stride=2)(torch.ones(1, 1, 2, 2)).flatten()
    tensor([0., 1., 0.])
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. If the size changes, the shortcut is a 1x1 convolution or option A."""

    def __init__(self, in_channels: int, channels: int, stride: int, option_a: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if option_a and (stride != 1 or in_channels != channels):
            self.downsample = PaddedShortcut(in_channels, channels, stride)
        elif stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(Network):
    """A stem, three stages of `blocks` basic blocks at 32, 16 and 8 pixels, global average pooling, a linear layer.

    The depth is 6 * blocks + 2. The features are the outputs of the stem and of the three stages.
    """

    def __init__(
        self, blocks: int, widths: tuple[int, int, int, int], num_classes: int, option_a: bool = False
    ) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, first, blocks, 1, option_a)
        self.layer2 = _stage(first, second, blocks, 2, option_a)
        self.layer3 = _stage(second, third, blocks, 2, option_a)
        self.classifier_name = "linear" if option_a else "fc"
        self.add_module(self.classifier_name, nn.Linear(third, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and the three stages, and pooled features."""
        f0 = F.relu(self.bn1(self.conv1(images)))
        f1 = self.layer1(f0)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        pooled = self.pool(f3)
        return Output(self.classifier_layer(pooled), (f0, f1, f2, f3), pooled, unpooled=f3)


def _stage(in_channels: int, channels: int, blocks: int, stride: int, option_a: bool) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, option_a)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


def resnet8(num_classes: int = 100) -> CifarResNet:
    """Make a resnet8: 83,892 parameters for 100 classes."""
    return CifarResNet(1, NARROW, num_classes)


def resnet14(num_classes: int = 100) -> CifarResNet:
    """Make a resnet14: 181,108 parameters for 100 classes."""
    return CifarResNet(2, NARROW, num_classes)


def resnet20(num_classes: int = 100) -> CifarResNet:
    """Make a resnet20: 278,324 parameters for 100 classes."""
    return CifarResNet(3, NARROW, num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """Make a resnet32: 472,756 parameters for 100 classes."""
    return CifarResNet(5, NARROW, num_classes)


def resnet44(num_classes: int = 100) -> CifarResNet:
    """Make a resnet44: 667,188 parameters for 100 classes."""
    return CifarResNet(7, NARROW, num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """Make a resnet56: 861,620 parameters for 100 classes."""
    return CifarResNet(9, NARROW, num_classes)


def resnet110(num_classes: int = 100) -> CifarResNet:
    """Make a resnet110: 1,736,564 parameters for 100 classes."""
    return CifarResNet(18, NARROW, num_classes)


def resnet8x4(num_classes: int = 100) -> CifarResNet:
    """Make a resnet8x4: 1,233,540 parameters for 100 classes. It is a resnet8, four times as wide."""
    return CifarResNet(1, WIDE, num_classes)


def resnet32x4(num_classes: int = 100) -> CifarResNet:
    """Make a resnet32x4: 7,433,860 parameters for 100 classes. It is a resnet32, four times as wide."""
    return CifarResNet(5, WIDE, num_classes)


def resnet20_option_a(num_classes: int = 10) -> CifarResNet:
    """Make a resnet20_option_a: 269,722 parameters for 10 classes."""
    return CifarResNet(3, NARROW, num_classes, option_a=True)


def resnet32_option_a(num_classes: int = 10) -> CifarResNet:
    """Make a resnet32_option_a: 464,154 parameters for 10 classes."""
    return CifarResNet(5, NARROW, num_classes, option_a=True)


def resnet44_option_a(num_classes: int = 10) -> CifarResNet:
    """Make a resnet44_option_a: 658,586 parameters for 10 classes."""
    return CifarResNet(7, NARROW, num_classes, option_a=True)


def resnet56_option_a(num_classes: int = 10) -> CifarResNet:
    """Make a resnet56_option_a: 853,018 parameters for 10 classes."""
    return CifarResNet(9, NARROW, num_classes, option_a=True)


def resnet110_option_a(num_classes: int = 10) -> CifarResNet:
    """Make a resnet110_option_a: 1,727,962 parameters for 10 classes."""
    return CifarResNet(18, NARROW, num_classes, option_a=True)
