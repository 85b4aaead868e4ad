"""MobileNetV2 of half width for images of 32 x 32 pixels: M. Sandler et al., arXiv 1801.04381, table 2.

Parameter count, names in the state dict, feature points and initialisation are those of `mobile_half` in RepDistiller
and mdistiller. Their checkpoints load unchanged. The network differs from the paper in three points: strides fit 32
pixels, the first block has an expanding convolution too, and ReLU has no upper bound.
"""

from torch import Tensor, nn

from src.models.network import Network, Output

STAGES = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
"""Expansion factor, channels (half the paper's), number of blocks and first stride of each stage."""


class InvertedResidual(nn.Module):
    """A 1x1 convolution that expands, a 3x3 depthwise convolution, and a 1x1 convolution that projects, without ReLU.

    If the sizes agree, the input is added to the output.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.is_residual else out


class InvertedResidualNetwork(Network):
    """A stem that halves the image, seven stages, a 1x1 convolution, global average pooling, a linear layer.

    The features are the outputs of the stem and of stages 1, 2, 4 and 6, counted from 0. No ReLU follows a stage.
    """

    classifier_name = "classifier.0"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList()
        for expansion, width, blocks, stride in STAGES:
            first = InvertedResidual(channels, width, stride, expansion)
            rest = (InvertedResidual(width, width, 1, expansion) for _ in range(blocks - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            channels = width
        self.conv2 = nn.Sequential(nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        nn.init.normal_(self.classifier_layer.weight, 0, 0.01)
        nn.init.zeros_(self.classifier_layer.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the stem and four stages, and pooled features."""
        x = stem = self.conv1(images)
        stages = []
        for stage in self.blocks:
            x = stage(x)
            stages.append(x)
        last = self.conv2(x)
        pooled = self.pool(last)
        features = (stem, stages[1], stages[2], stages[4], stages[6])
        return Output(self.classifier(pooled), features, pooled, unpooled=last)


def MobileNetV2(num_classes: int = 100) -> InvertedResidualNetwork:  # noqa: N802 (as published)
    """Make a MobileNetV2: 812,836 parameters for 100 classes."""
    return InvertedResidualNetwork(num_classes)
