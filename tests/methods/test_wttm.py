"""Weighted transformed teacher matching: its weight of each sample."""

import pytest
import torch

from src.methods.ttm import transformed_divergence
from src.methods.wttm import power_sum, wttm_loss
from tests.helpers.logit_losses import EXPONENT
from tests.helpers.losses import observed, random_case, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("wttm").weights(0) == {"cross_entropy": 1.0, "wttm": 4.0}


def test_the_term_is_the_loss():
    own, distilled, teacher, target = three_logits()
    terms = configured("wttm").all_terms(*observed(distilled, teacher, target, own=own))
    assert terms["wttm"] == wttm_loss(distilled, teacher, 0.2)


def test_the_power_sum_grows_with_the_uncertainty_of_the_teacher():
    teacher = torch.tensor([[1e4, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    certain, between, uniform = power_sum(teacher, EXPONENT).tolist()
    assert certain == pytest.approx(1.0)
    assert certain < between < uniform
    assert uniform == pytest.approx(4 ** (1 - EXPONENT))


def test_a_certain_teacher_gives_ttm():
    student, _, _ = random_case(4, torch.float64)
    certain = 1e4 * torch.eye(4, dtype=torch.float64)[torch.arange(len(student)) % 4]
    torch.testing.assert_close(
        wttm_loss(student, certain, EXPONENT), transformed_divergence(student, certain, EXPONENT).mean()
    )
