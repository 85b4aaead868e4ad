"""SlimNet, a plain stack of 13 convolutions: S. H. Hasanpour et al., "Towards Principled Design of Deep Convolutional
Networks: Introducing SimpNet", arXiv 1802.06205. Its published CIFAR-100 checkpoints load unchanged."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output

STAGES = (5, 10, 13)
"""Convolutions up to the end of each resolution: 32, 16 and 8 pixels."""


class SlimNet(Network):
    """13 times 3x3 convolution, batch norm, ReLU; max-pooling after the 5th and 10th; global max-pooling; linear.

    Features: the first convolution block's output and the last one's at each resolution.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels = (3, *widths)
        self.features = nn.ModuleList(
            nn.Sequential(
                OrderedDict(conv=nn.Conv2d(channels[i], channels[i + 1], 3, 1, 1), bn=nn.BatchNorm2d(channels[i + 1]))
            )
            for i in range(len(widths))
        )
        self.classifier = nn.Linear(widths[-1], num_classes)

    @staticmethod
    def pool(unpooled: Tensor) -> Tensor:
        """The largest over all pixels."""
        return unpooled.amax((2, 3))

    @property
    def classifier_layer(self) -> nn.Linear:
        """`classifier`."""
        return self.classifier

    def forward_features(self, images: Tensor) -> Output:
        """Logits, features of the first block and of the three resolutions, pooled features."""
        x, features = images, []
        for i, block in enumerate(self.features, start=1):
            x = F.relu(block(x))
            if i == 1 or i in STAGES:
                features.append(x)
            if i in STAGES[:-1]:
                x = F.max_pool2d(x, 2)
        pooled = self.pool(x)
        return Output(self.classifier(pooled), tuple(features), pooled, unpooled=x)


def slimnet_600k(num_classes: int = 100) -> SlimNet:
    """611,911 parameters for 100 classes."""
    return SlimNet((40, 60, 60, 60, 72, 73, 73, 73, 75, 81, 82, 90, 120), num_classes)


def slimnet_300k(num_classes: int = 100) -> SlimNet:
    """309,154 parameters for 100 classes."""
    return SlimNet((30, 40, 40, 40, 50, 50, 50, 50, 50, 58, 58, 70, 90), num_classes)
