"""Batch norms that differ from the identity, and the accuracy of published networks on real images."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src.models.network import Network


def randomise_vectors(module: nn.Module) -> Any:
    """Draw every parameter and buffer of one dimension from 0.5 to 1.5, so that no batch norm is the identity.

    Returns the module in evaluation mode.
    """
    for value in module.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return module.eval()


@torch.no_grad()
def accuracy_on_test_images(network: Network, arrays_file: Path, mean: Iterable[float], std: Iterable[float]) -> float:
    """Measure the top-1 accuracy in percent on the first 1,000 test images of an array file."""
    network.eval().to(memory_format=torch.channels_last)
    with np.load(arrays_file, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["test_images"][:1000]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(arrays["test_labels"][:1000]).long()
    mean, std = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
    predicted = torch.cat([network((part - mean) / std).argmax(1) for part in images.split(250)])
    return 100 * (predicted == labels).float().mean().item()
