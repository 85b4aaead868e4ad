"""MobileNetV1 for ImageNet: A. Howard et al., arXiv 1704.04861, table 1.

Parameter counts, names in the state dict and initialisation (PyTorch's own) are those of mdistiller.
"""

from torch import Tensor, nn

from src.models.network import Network, Output

STAGE_ENDS = (1, 3, 5, 11, 13)
"""Index of the last block of each resolution: 112, 56, 28, 14 and 7 pixels for images of 224."""


class MobileNetV1(Network):
    """A stem, thirteen depthwise separable convolutions, global average pooling, a linear layer.

    The features are the last output of each resolution, with 64, 128, 256, 512 and 1024 channels. The features of
    mdistiller are the same without the first.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
            _separable(32, 64, 1),
            _separable(64, 128, 2),
            _separable(128, 128, 1),
            _separable(128, 256, 2),
            _separable(256, 256, 1),
            _separable(256, 512, 2),
            *(_separable(512, 512, 1) for _ in range(5)),
            _separable(512, 1024, 2),
            _separable(1024, 1024, 1),
        )
        self.fc = nn.Linear(1024, num_classes)

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of each resolution, and pooled features."""
        features = []
        x = images
        for index, block in enumerate(self.model):
            x = block(x)
            if index in STAGE_ENDS:
                features.append(x)
        pooled = self.pool(x)
        return Output(self.fc(pooled), tuple(features), pooled, unpooled=x)


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Make a depthwise separable convolution: a 3x3 depthwise convolution, then a 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def mobilenet_v1(num_classes: int = 1000) -> MobileNetV1:
    """Make a mobilenet_v1: 4,231,976 parameters for 1000 classes."""
    return MobileNetV1(num_classes)
