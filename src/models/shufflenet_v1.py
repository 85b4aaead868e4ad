"""ShuffleNet of 3 groups for images of 32 x 32 pixels: X. Zhang et al., arXiv 1707.01083, table 1.

Parameter count, names in the state dict and initialisation (PyTorch's own) are those of RepDistiller and mdistiller.
Their checkpoints load unchanged. The network differs from the paper in two points: the stem is a 1x1 convolution
without pooling, and a ReLU follows the depthwise convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output

STEM = 24
GROUPS = 3


class GroupedShuffleUnit(nn.Module):
    """A 1x1 grouped convolution, channel shuffle, a 3x3 depthwise and a 1x1 grouped convolution, and a shortcut.

    With stride 1 the input is added to the output. With stride 2 the averaged input is concatenated with it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # The stem has too few channels for a grouped convolution (section 3.2 of the paper).
        self.groups = 1 if in_channels == STEM else GROUPS
        branch = channels - in_channels if stride == 2 else channels
        middle = branch // 4
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        branch = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(branch)))))
        if self.stride == 1:
            return F.relu(branch + x)
        return F.relu(torch.cat([branch, F.avg_pool2d(x, 3, 2, 1)], 1))


class ShuffleNetV1(Network):
    """A stem, three stages at 16, 8 and 4 pixels, global average pooling, a linear layer.

    The features are the outputs of the stem and of the three stages.
    """

    classifier_name = "linear"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, 240, 4)
        self.layer2 = _stage(240, 480, 8)
        self.layer3 = _stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and the three stages, and pooled features."""
        f0 = F.relu(self.bn1(self.conv1(images)))
        f1 = self.layer1(f0)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        pooled = self.pool(f3)
        return Output(self.linear(pooled), (f0, f1, f2, f3), pooled, unpooled=f3)


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = GroupedShuffleUnit(in_channels, channels, 2)
    return nn.Sequential(first, *(GroupedShuffleUnit(channels, channels, 1) for _ in range(blocks - 1)))


def ShuffleV1(num_classes: int = 100) -> ShuffleNetV1:  # noqa: N802 (as published)
    """Make a ShuffleV1: 949,258 parameters for 100 classes."""
    return ShuffleNetV1(num_classes)
