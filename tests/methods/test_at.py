"""Attention transfer: maps worked by hand, zero features, and sizes that do not divide."""

import math

import torch

from src.methods.at import attention_loss, attention_map
from tests.helpers.features import drawn
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("at"), cross_entropy=1.0, attention=1000.0)


def test_a_map_worked_by_hand():
    """Squares of (3, 4) in two channels sum to (9, 16), whose length is sqrt(337)."""
    features = torch.tensor([[[[3.0, 0.0]], [[0.0, -4.0]]]], dtype=torch.float64)
    wanted = torch.tensor([[9.0, 16.0]], dtype=torch.float64) / math.sqrt(337)
    torch.testing.assert_close(attention_map(features, 2.0), wanted)


def test_zero_features_have_a_zero_map_without_gradient():
    features = torch.zeros(1, 2, 3, 3, requires_grad=True)
    maps = attention_map(features, 2.0)
    assert (maps == 0).all()
    assert (torch.autograd.grad(maps.sum(), features)[0] == 0).all()


def test_sizes_that_do_not_divide_are_averaged_down_too():
    student = drawn((2, 3, 7, 5), 1).requires_grad_()
    value = attention_loss(student, drawn((2, 2, 3, 8), 2), 2.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert value > 0
    assert torch.isfinite(gradient).all()
