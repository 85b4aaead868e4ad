"""A small classifier, images and metadata, for the tests of exported files."""

from typing import Any

import torch
from torch import Tensor

from src.exporting.forms import Classifier
from src.models.resnet import resnet8
from tests.helpers.tiny import CLASSES, MEAN, STD

METADATA: dict[str, Any] = {
    "network": "resnet8",
    "class_names": ["red", "a|b", "<i>", "yellow"],
    "image_size": [16, 16],
    "resize": [16, 16],
    "mean": list(MEAN),
    "std": list(STD),
    "data": {"name": "tiny", "digest": "1234"},
    "versions": {"torch": "2"},
    "source": "here",
    "method": None,
    "initial_weights": None,
    "teacher": None,
    "test": None,
}
"""As `describe` collects it for a bare checkpoint."""


def random_images(count: int = 7, size: int = 16) -> Tensor:
    """Make noise, uint8 [count, 3, size, size]."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_classifier(new_network: Any = resnet8, size: int = 16) -> Classifier:
    """Make a classifier with random weights, whose batch norms hold the statistics of one batch."""
    torch.manual_seed(0)
    network = new_network(CLASSES)
    network.train()(torch.randn(16, 3, size, size))
    return Classifier(network, MEAN, STD)
