"""Residual networks of four stages, with a stem for images of 32 x 32 pixels: K. He et al., arXiv 1512.03385, table 1.

Parameter counts, names in the state dict and initialisation are those of RepDistiller and mdistiller. Their checkpoints
load unchanged. The stem is a 3x3 convolution without pooling. The stride of a bottleneck is in its 3x3 convolution.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. If the size changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        branch = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(branch)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and the shortcut of a basic block.

    The first two convolutions have a quarter of the channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return F.relu(self.bn3(self.conv3(branch)) + self.shortcut(x))


class DeepResNet(Network):
    """A stem, four stages at 32, 16, 8 and 4 pixels, global average pooling, a linear layer.

    The features are the outputs of the stem and of the four stages.
    """

    classifier_name = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, widths[0], blocks[0], stride=1)
        self.layer2 = _stage(block, widths[0], widths[1], blocks[1], stride=2)
        self.layer3 = _stage(block, widths[1], widths[2], blocks[2], stride=2)
        self.layer4 = _stage(block, widths[2], widths[3], blocks[3], stride=2)
        self.linear = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and the four stages, and pooled features."""
        f0 = F.relu(self.bn1(self.conv1(images)))
        f1 = self.layer1(f0)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        f4 = self.layer4(f3)
        pooled = self.pool(f4)
        return Output(self.linear(pooled), (f0, f1, f2, f3, f4), pooled, unpooled=f4)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


NARROW = (64, 128, 256, 512)
WIDE = (256, 512, 1024, 2048)


def ResNet18(num_classes: int = 100) -> DeepResNet:  # noqa: N802 (as published)
    """Make a ResNet18: 11,220,132 parameters for 100 classes."""
    return DeepResNet(BasicBlock, (2, 2, 2, 2), NARROW, num_classes)


def ResNet34(num_classes: int = 100) -> DeepResNet:  # noqa: N802 (as published)
    """Make a ResNet34: 21,328,292 parameters for 100 classes."""
    return DeepResNet(BasicBlock, (3, 4, 6, 3), NARROW, num_classes)


def ResNet50(num_classes: int = 100) -> DeepResNet:  # noqa: N802 (as published)
    """Make a ResNet50: 23,705,252 parameters for 100 classes."""
    return DeepResNet(Bottleneck, (3, 4, 6, 3), WIDE, num_classes)
