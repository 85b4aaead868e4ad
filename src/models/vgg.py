"""VGG networks with batch norm for images of 32 x 32 pixels: K. Simonyan, A. Zisserman, arXiv 1409.1556, table 1.

Parameter counts, names in the state dict, feature points and initialisation are those of RepDistiller and mdistiller.
Their checkpoints (there named `vgg13_bn` and so on) load unchanged. vgg8, with one convolution per block, is not in the
paper but comes from RepDistiller and mdistiller.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Network):
    """Five blocks of 3x3 convolutions at 32, 16, 8, 4 and 4 pixels, global average pooling, a linear layer.

    The features are the outputs of the five blocks after ReLU. If images have 64 pixels or more, their maps are halved
    once more before the last block, as mdistiller does for Tiny ImageNet.
    """

    classifier_name = "classifier"

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, WIDTHS[0], convolutions[0])
        self.block1 = _block(WIDTHS[0], WIDTHS[1], convolutions[1])
        self.block2 = _block(WIDTHS[1], WIDTHS[2], convolutions[2])
        self.block3 = _block(WIDTHS[2], WIDTHS[3], convolutions[3])
        self.block4 = _block(WIDTHS[3], WIDTHS[4], convolutions[4])
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the five blocks, and pooled features."""
        f0 = F.relu(self.block0(images))
        f1 = F.relu(self.block1(F.max_pool2d(f0, 2)))
        f2 = F.relu(self.block2(F.max_pool2d(f1, 2)))
        f3 = F.relu(self.block3(F.max_pool2d(f2, 2)))
        f4 = F.relu(self.block4(F.max_pool2d(f3, 2) if images.shape[2] >= 64 else f3))
        pooled = self.pool(f4)
        return Output(self.classifier(pooled), (f0, f1, f2, f3, f4), pooled, unpooled=f4)


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        convolution = nn.Conv2d(channels if index else in_channels, channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg8(num_classes: int = 100) -> VGG:
    """Make a vgg8: 3,965,028 parameters for 100 classes."""
    return VGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes: int = 100) -> VGG:
    """Make a vgg11: 9,277,284 parameters for 100 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int = 100) -> VGG:
    """Make a vgg13: 9,462,180 parameters for 100 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes)


def vgg16(num_classes: int = 100) -> VGG:
    """Make a vgg16: 14,774,436 parameters for 100 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int = 100) -> VGG:
    """Make a vgg19: 20,086,692 parameters for 100 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes)
