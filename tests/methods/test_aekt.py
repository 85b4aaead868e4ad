"""Explicit transfer: its weight, its gradient at the teacher, and its options. See also test_closed_forms.py."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given

from src.common.errors import UserError
from src.methods.aekt import Weighting, explicit_weight
from tests.helpers.closed_forms import (
    WEIGHTINGS,
    Case,
    assert_same,
    cases,
    expected_rows,
    measured,
    properties,
    target_probabilities,
)
from tests.helpers.losses import BATCH, explicit_transfer_loss, log_softmax, observed, three_logits
from tests.helpers.methods import configured


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("max_weight", [0.5, 1.0, 10.0, 1000.0])
def test_the_weight_keeps_its_bound(weighting: Any, max_weight: float):
    logs = torch.tensor([-4e4, -200.0, -50.0, -1.0, -1e-7, 0.0])
    log_p, log_q = torch.cartesian_prod(logs, logs).T
    weight = explicit_weight(log_p, log_q, weighting, max_weight)
    bound = {"constant": 1.0, "one": 1.0, "relative": weight.max().item()}.get(weighting, max_weight)
    assert weight.isfinite().all()
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-6)
    assert (weight < 0).any() == (weighting == "log_ratio")


@properties
@given(case=cases(limit=5.0, batch=1))
def test_explicit_transfer_at_agreement(case: Case):
    """A student that has reached its teacher is still pulled up, except by the logarithm of the ratio."""
    agreed = case._replace(student=case.teacher)
    confidence = math.exp(log_softmax(case.teacher[0].tolist(), case.temperature)[case.target[0]])
    slope = {name: measured(name, *agreed)[1][0, case.target[0]].item() for name in WEIGHTINGS}
    assert slope["ratio"] == pytest.approx(-(1 - confidence), rel=1e-6)
    assert slope["constant"] == pytest.approx(-confidence * (1 - confidence), rel=1e-6)
    assert slope["log_ratio"] == 0
    assert slope["excess"] == 0
    assert slope["one"] == slope["ratio"]
    assert slope["ratio"] < 0
    assert slope["constant"] < 0


@properties
@given(case=cases(limit=5.0))
def test_below_its_bound_the_ratio_has_the_gradient_of_the_ratio_itself(case: Case):
    student = case.student.clone().requires_grad_()
    p, q = target_probabilities(case, student)
    (of_ratio,) = torch.autograd.grad(case.temperature * (q / p).mean(), student)
    loss = explicit_transfer_loss(student, case.teacher, case.target, case.temperature, "ratio", max_weight=1e12)
    (of_loss,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(of_loss, of_ratio, rtol=1e-8, atol=1e-10)


@properties
@given(case=cases(limit=5.0))
def test_beyond_its_bound_the_ratio_has_the_weight_of_the_bound(case: Case):
    """Two teachers beyond the bound teach the same."""
    p, q = target_probabilities(case)
    bound = 1e-12
    assume(bool((q / p > bound).all()))
    surer = case.teacher.scatter_add(1, case.target[:, None], torch.ones_like(p))
    losses = [
        explicit_transfer_loss(case.student, teacher, case.target, case.temperature, "ratio", bound)
        for teacher in (case.teacher, surer)
    ]
    assert losses[0] == losses[1]
    assert_same(losses[0] / bound, -case.temperature * p.log().mean())


@pytest.mark.parametrize("shift", [0.0, -4e4], ids=["likely", "impossible"])
def test_the_relative_weight_shares_a_fixed_total_out(shift: float):
    """The weights have the mean 1, and the proportions of the bounded ratio."""
    log_p = torch.tensor([-3.0, -1.0, -0.1, -6.0], dtype=torch.float64)
    log_q = torch.tensor([-0.2, -0.2, -0.5, -0.1], dtype=torch.float64) + shift
    ratio = torch.tensor([math.exp(2.8), math.exp(0.8), math.exp(-0.4), 100.0], dtype=torch.float64)
    weight = explicit_weight(log_p, log_q, "relative", 100.0 * math.exp(shift) if shift == 0 else 1e6)
    assert weight.mean().item() == pytest.approx(1.0)
    if shift:  # far below the bound, which then has no effect
        ratio[3] = math.exp(5.9)
    torch.testing.assert_close(weight, ratio / ratio.mean())


def test_the_weight_can_have_a_temperature_of_its_own():
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    options: dict[str, Any] = {"weighting": "ratio", "max_weight": 10.0, "weight_temperature": 1.5}
    term = configured("aekt", **options).all_terms(batch, logits)["explicit_transfer"]
    p, q = ((each / 1.5).softmax(dim=1).gather(1, target[:, None])[:, 0] for each in (distilled, teacher))
    log_p = (distilled / 4.0).log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    loss = -4.0 * ((q / p).clamp(max=10.0).detach() * log_p).mean()
    assert_same(term, loss)
    of_term, of_loss = (torch.autograd.grad(each, distilled)[0] for each in (term, loss))
    assert_same(of_term, of_loss)


# The method


def test_terms_are_cross_entropy_and_the_three_losses():
    own, distilled, teacher, target = three_logits()
    method = configured("aekt", weighting="ratio", max_weight=10.0)
    terms = method.all_terms(*observed(distilled, teacher, target, own=own, views=2))
    stated = {"tckd": "tckd", "nckd": "nckd", "explicit_transfer": "ratio"}
    assert set(terms) == {"cross_entropy", *stated}
    for term, name in stated.items():
        values, gradients, *_ = expected_rows(name, distilled, teacher, target, 4.0)
        (gradient,) = torch.autograd.grad(terms[term], distilled, retain_graph=True)
        assert_same(terms[term], values.mean())
        assert_same(gradient, gradients / BATCH)


@pytest.mark.parametrize(
    "options",
    [
        *({"weighting": weighting} for weighting in get_args(Weighting) if weighting not in ("ratio", "relative")),
        {"max_weight": 0.5},
        {"confidence_term": False},
    ],
    ids=str,
)
def test_every_option_of_explicit_transfer_reaches_the_loss(options: dict[str, Any]):
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    others: dict[str, Any] = {"weighting": "ratio", "max_weight": 10.0, "confidence_term": True}
    without = configured("aekt", **others).all_terms(batch, logits)["explicit_transfer"]
    chosen = {**others, **options}
    term = configured("aekt", **chosen).all_terms(batch, logits)["explicit_transfer"]
    assert term == explicit_transfer_loss(distilled, teacher, target, 4.0, **chosen)
    assert term != without


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [(0, 20, 0.05), (9, 20, 0.5), (18, 20, 0.95), (19, 20, 1), (20, 20, 1), (239, 20, 1), (0, 0, 1), (0, 1, 1)],
)
def test_distillation_warms_up_as_dkd_does(epoch: int, epochs: int, factor: float):
    pair = "wrn40_2_to_wrn16_2"
    options: dict[str, Any] = {"alpha": 1.5, "warmup_epochs": epochs}
    made = configured("aekt", pair, gamma=0.4, **options)
    weights = {"cross_entropy": 1.0, "tckd": factor * 1.5, "nckd": factor * 6.0, "explicit_transfer": factor * 0.4}
    assert made.weights(epoch) == pytest.approx(weights)
    assert configured("dkd", pair, **options).weights(epoch).items() <= made.weights(epoch).items()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weighting", "rato"),
        ("weighting", None),
        ("max_weight", math.inf),
        ("max_weight", math.nan),
        ("max_weight", 0.0),
        ("max_weight", -1.0),
    ],
)
def test_bad_options_are_refused(option: str, value: Any):
    with pytest.raises(UserError, match=rf"method\.{option}={value}"):
        configured("aekt", **{option: value})
