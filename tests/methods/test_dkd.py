"""Decoupled distillation: what each of its two losses sees, and how they make up KD. See also test_closed_forms.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.methods.kd import kd_loss
from tests.helpers.closed_forms import (
    DIVERGENCES,
    Case,
    assert_same,
    cases,
    expected_rows,
    measured,
    properties,
    target_probabilities,
)
from tests.helpers.losses import BATCH, PRECISIONS, log_softmax, observed, random_case, tckd_loss, three_logits
from tests.helpers.methods import configured


def test_terms_are_cross_entropy_and_both_losses():
    own, distilled, teacher, target = three_logits()
    terms = configured("dkd").all_terms(*observed(distilled, teacher, target, own=own, views=2))
    assert set(terms) == {"cross_entropy", "tckd", "nckd"}
    for name in ("tckd", "nckd"):
        values, gradients, *_ = expected_rows(name, distilled, teacher, target, 4.0)
        (gradient,) = torch.autograd.grad(terms[name], distilled, retain_graph=True)
        assert_same(terms[name], values.mean())
        assert_same(gradient, gradients / BATCH)


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [(0, 20, 0.05), (9, 20, 0.5), (18, 20, 0.95), (19, 20, 1), (20, 20, 1), (239, 20, 1), (0, 0, 1), (0, 1, 1)],
)
def test_distillation_warms_up(epoch: int, epochs: int, factor: float):
    """The released code counts from 1: its first of 20 epochs has the weight 0.05, its twentieth 1."""
    made = configured("dkd", "wrn40_2_to_wrn16_2", alpha=1.5, warmup_epochs=epochs)
    weights = {"cross_entropy": 1.0, "tckd": factor * 1.5, "nckd": factor * 6.0}
    assert made.weights(epoch) == pytest.approx(weights)


@properties
@given(case=cases(batch=1))
def test_kd_decouples(case: Case):
    """KD = TCKD + (1 - q_t) NCKD of each sample."""
    log_q = log_softmax(case.teacher[0].tolist(), case.temperature)
    not_q = math.fsum(math.exp(x) for i, x in enumerate(log_q) if i != case.target[0])
    whole, tckd, nckd = (measured(name, *case) for name in DIVERGENCES)
    assert_same(tckd[0] + not_q * nckd[0], whole[0], case.temperature**2)
    assert_same(tckd[1] + not_q * nckd[1], whole[1], case.temperature)


@properties
@given(case=cases(batch=1, min_classes=3))
def test_tckd_vanishes_only_at_equal_confidence(case: Case):
    """It ignores how the student distributes the rest: the second case has the teacher's p_t and the student's p'."""
    student, teacher, target, temperature = case
    p, q = (x[0, 0] for x in target_probabilities(case))
    assert tckd_loss(*case) >= temperature**2 * (2 * (p - q) ** 2 - 1e-13)

    others = torch.arange(student.shape[1]) != target[0]
    rest = [torch.logsumexp(logits[:, others] / temperature, dim=1) for logits in (student, teacher)]
    confident = student.clone()
    confident[:, target[0]] = teacher[:, target[0]] + temperature * (rest[0] - rest[1])
    value, gradient = measured("tckd", confident, teacher, target, temperature)
    assert_same(value, torch.zeros_like(value), temperature**2)
    assert_same(gradient, torch.zeros_like(gradient), temperature)


@properties
@given(case=cases(), logit=st.floats(-1e4, 1e4))
def test_nckd_does_not_see_the_target(case: Case, logit: float):
    value, gradient = measured("nckd", *case)
    column = case.target[:, None]
    moved = case._replace(
        student=case.student.scatter(1, column, logit), teacher=case.teacher.scatter(1, column, -logit)
    )
    moved_value, moved_gradient = measured("nckd", *moved)
    assert torch.equal(moved_value, value)
    assert torch.equal(moved_gradient, gradient)
    assert (gradient.gather(1, column) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, *PRECISIONS], ids=str)
def test_two_classes_have_no_dark_knowledge(dtype: torch.dtype):
    student, teacher, target = random_case(2, dtype)
    student[0], teacher[0] = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    value, gradient = measured("nckd", student, teacher, target, 4.0)
    assert value == 0
    assert (gradient == 0).all()
    assert torch.allclose(tckd_loss(student, teacher, target, 4.0), kd_loss(student, teacher, 4.0), rtol=1e-5)
