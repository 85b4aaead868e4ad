"""SlimNet, a plain stack of 13 convolutions: S. H. Hasanpour et al., arXiv 1802.06205.

The paper is "Towards Principled Design of Deep Convolutional Networks: Introducing SimpNet". The published checkpoints
for CIFAR-100 load unchanged.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Output

STAGES = (5, 10, 13)
"""Number of the last convolution at each resolution: 32, 16 and 8 pixels."""


class SlimNet(Network):
    """13 blocks of 3x3 convolution, batch norm and ReLU, global max-pooling, a linear layer.

    Max-pooling follows the 5th and the 10th block. The features are the output of the first block and that of the last
    block at each resolution.
    """

    classifier_name = "classifier"

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
        """Take the maximum of the last map [B, D, height, width] over its pixels as the classifier's input [B, D]."""
        return unpooled.amax((2, 3))

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of the first block and of the three resolutions, and pooled features."""
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
    """Make a slimnet_600k: 611,911 parameters for 100 classes."""
    return SlimNet((40, 60, 60, 60, 72, 73, 73, 73, 75, 81, 82, 90, 120), num_classes)


def slimnet_300k(num_classes: int = 100) -> SlimNet:
    """Make a slimnet_300k: 309,154 parameters for 100 classes."""
    return SlimNet((30, 40, 40, 40, 50, 50, 50, 50, 50, 58, 58, 70, 90), num_classes)
