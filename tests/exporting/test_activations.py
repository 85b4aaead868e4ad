"""The peak memory of activations, against sums by hand."""

import torch
from torch import Tensor, nn

from src.exporting.activations import peak_activation_bytes
from src.models.resnet import resnet8

IMAGE = torch.zeros(1, 3, 10, 10)
MAP = 4 * 10 * 10
"""Bytes of a channel."""


def test_a_shortcut_stays_alive_until_it_is_added() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return (images + self.norm(self.second(self.first(images).relu()))).relu()

    assert peak_activation_bytes(Residual().eval(), IMAGE) == (3 + 8 + 3) * MAP


def test_a_pointwise_operator_overwrites_only_what_nothing_reads_later() -> None:
    class Kept(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            positive = images.relu()
            return positive.sigmoid() * positive

    assert peak_activation_bytes(nn.Sequential(nn.ReLU(), nn.Sigmoid()), IMAGE) == 3 * MAP
    assert peak_activation_bytes(Kept(), IMAGE) == 6 * MAP


def test_views_need_no_memory_and_weights_do_not_count() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 7))
    assert peak_activation_bytes(network, IMAGE) == 3 * MAP + 4 * 7


def test_features_that_only_training_reads_do_not_count() -> None:
    """Three maps of 16 channels at 32 x 32 pixels: a block's shortcut, and input and output of its last convolution."""
    assert peak_activation_bytes(resnet8(10).eval(), torch.zeros(1, 3, 32, 32)) == 3 * 4 * 16 * 32**2
