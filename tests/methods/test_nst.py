"""Neuron selectivity transfer: values worked by hand, and channels that are zero."""

import torch

from src.methods.nst import selectivity_loss
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("nst"), cross_entropy=1.0, selectivity=50.0)


def channels(*rows: list[float]) -> torch.Tensor:
    """One sample of channels of 1 x 2 pixels."""
    return torch.tensor(rows, dtype=torch.float64).view(1, len(rows), 1, 2)


def test_values_worked_by_hand():
    """Kernels of one channel with itself are 1, at right angles 0, at 45 degrees 1/2."""
    left, right, between = channels([1.0, 0.0]), channels([0.0, 5.0]), channels([2.0, 2.0])
    torch.testing.assert_close(selectivity_loss(left, right), torch.tensor(2.0).double())
    torch.testing.assert_close(selectivity_loss(left, between), torch.tensor(1.0).double())
    torch.testing.assert_close(selectivity_loss(left, left), torch.tensor(0.0).double())


def test_a_channel_of_zeros_counts_as_zero():
    """Its kernel with every channel is 0: the student's mean kernel with itself is 1/4, with the teacher's 1/2."""
    loss = selectivity_loss(channels([1.0, 0.0], [0.0, 0.0]), channels([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(1 + 1 / 4 - 2 / 2).double())
