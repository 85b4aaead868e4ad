"""Hinton's distillation: its terms, and agreement of student and teacher. See also test_closed_forms.py."""

import pytest
import torch
from hypothesis import given

from tests.helpers.closed_forms import Case, assert_same, cases, expected_rows, kd, measured, properties
from tests.helpers.losses import BATCH, log_softmax, observed, three_logits
from tests.helpers.methods import configured


def test_terms_are_cross_entropy_and_kd():
    own, distilled, teacher, target = three_logits()
    made = configured("kd")
    terms = made.all_terms(*observed(distilled, teacher, target, own=own, views=2))
    assert set(terms) == {"cross_entropy", "kd"}
    log_p = torch.tensor([log_softmax(row, 1.0) for row in own.tolist()], dtype=torch.float64)
    assert_same(terms["cross_entropy"], -log_p.gather(1, target[:, None]).mean())
    values, gradients, *_ = expected_rows("kd", distilled, teacher, target, 4.0)
    assert_same(terms["kd"], values.mean())
    (gradient,) = torch.autograd.grad(terms["kd"], distilled)
    assert_same(gradient, gradients / BATCH)


@pytest.mark.parametrize("epoch", [0, 19, 239])
def test_published_weights(epoch: int):
    assert configured("kd").weights(epoch) == {"cross_entropy": 0.1, "kd": 0.9}
    assert configured("kd", "resnet34_to_resnet18").weights(epoch) == {"cross_entropy": 0.5, "kd": 0.5}


@properties
@given(case=cases(batch=1))
def test_kd_vanishes_only_at_agreement(case: Case):
    """Pinsker's inequality: KL(q, p) is at least half the squared total difference."""
    p, q = (torch.softmax(logits / case.temperature, dim=1) for logits in (case.student, case.teacher))
    bound = 0.5 * (p - q).abs().sum() ** 2
    assert kd(*case) >= case.temperature**2 * (bound - 1e-13)
    value, gradient = measured("kd", case.teacher + 3.0, case.teacher, case.target, case.temperature)
    assert_same(value, torch.zeros_like(value), case.temperature**2)
    assert_same(gradient, torch.zeros_like(gradient), case.temperature)
