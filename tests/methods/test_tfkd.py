"""Teacher-free distillation: its teacher made by hand, and that it needs no other."""

import torch

from tests.helpers.logit_losses import CORRECT, LOGIT_LOSSES, TEMPERATURE, value_and_gradient
from tests.helpers.losses import observed, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("tfkd").weights(0) == {"cross_entropy": 0.9, "tfkd": 0.1}


def test_the_loss_vanishes_at_the_teacher_made_by_hand():
    target = torch.tensor([2, 0])
    by_hand = torch.full((2, 5), (1 - CORRECT) / 4, dtype=torch.float64).scatter(1, target[:, None], CORRECT)
    value, gradient = value_and_gradient(LOGIT_LOSSES["tfkd"], by_hand / TEMPERATURE + 7.0, by_hand, target)
    torch.testing.assert_close(value, torch.zeros_like(value))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_teacher_free_means_without_a_teacher():
    made = configured("tfkd")
    own, distilled, _, target = three_logits()
    assert not made.needs_teacher
    assert torch.isfinite(made.all_terms(*observed(distilled, None, target, own=own))["tfkd"])
