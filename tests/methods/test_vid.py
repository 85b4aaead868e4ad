"""Variational information distillation: the variance starts where it is configured and keeps its floor."""

import pytest
import torch

from src.methods.vid import Guess
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("vid"), cross_entropy=1.0, information=1.0)


@pytest.mark.parametrize(("initial", "minimum"), [(5.0, 1e-5), (0.1, 1e-5), (100.0, 1.0)])
def test_a_variance_starts_at_its_initial_value_and_keeps_its_floor(initial: float, minimum: float):
    guess = Guess(2, 3, initial, minimum)
    torch.testing.assert_close(guess.variance, torch.full((3,), initial))
    student, teacher = torch.randn(4, 2, 4, 4), torch.randn(4, 3, 2, 2)
    for extreme in (-1e4, 1e4):
        guess.variance_logit.data.fill_(extreme)
        loss = guess(student, teacher)
        gradients = torch.autograd.grad(loss, list(guess.parameters()))
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert guess.variance.min() >= torch.tensor(minimum)
