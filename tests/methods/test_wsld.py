"""Weighted soft labels: the weight of each sample, also where cross-entropies round to zero."""

import math

import torch

from src.methods.wsld import soft_label_weight, wsld_loss
from tests.helpers.losses import observed, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("wsld").weights(0) == {"cross_entropy": 1.0, "wsld": 2.25}
    on_imagenet = configured("wsld", "resnet34_to_resnet18")
    assert on_imagenet.weights(0) == {"cross_entropy": 1.0, "wsld": 2.5}
    assert on_imagenet.temperature == 2.0


def test_the_term_is_the_loss():
    own, distilled, teacher, target = three_logits()
    terms = configured("wsld").all_terms(*observed(distilled, teacher, target, own=own))
    assert terms["wsld"] == wsld_loss(distilled, teacher, target, 4.0)


def test_the_weight_of_a_soft_label_if_both_cross_entropies_round_to_zero():
    """Log-odds of 201 against 200 give S / R = exp(-1)."""
    student = torch.tensor([[200.0, 0.0], [201.0, 0.0], [-1e4, 1e4], [1e4, -1e4], [1e4, -1e4]])
    teacher = torch.tensor([[200.0, 0.0], [200.0, 0.0], [1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]])
    weight = soft_label_weight(student, teacher, torch.zeros(5, dtype=torch.int64))
    wanted = [1 - math.exp(-1), 1 - math.exp(-math.exp(-1)), 1.0, 0.0, 1 - math.exp(-1)]
    torch.testing.assert_close(weight, torch.tensor(wanted), rtol=1e-5, atol=0.0)


def test_the_weight_of_a_soft_label_is_smooth_where_its_formula_changes():
    log_odds = torch.linspace(19, 21, 41, dtype=torch.float64)
    student = torch.stack([log_odds, torch.zeros_like(log_odds)], dim=1)
    teacher = torch.tensor([[19.5, 0.0]], dtype=torch.float64).expand(41, 2)
    ratio = [math.log1p(math.exp(-x)) / math.log1p(math.exp(-19.5)) for x in log_odds.tolist()]
    weight = soft_label_weight(student, teacher, torch.zeros(41, dtype=torch.int64))
    torch.testing.assert_close(weight, 1 - torch.tensor(ratio, dtype=torch.float64).neg().exp(), rtol=1e-7, atol=0.0)
