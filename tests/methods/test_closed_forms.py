"""The losses of KD, DKD and AEKT are their closed forms, in value and gradient, to the last few rounding units."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.methods.aekt import explicit_weight
from tests.helpers.closed_forms import (
    CLOSED_FORMS,
    DIVERGENCES,
    TEMPERATURES,
    Case,
    assert_agrees,
    assert_same,
    cases,
    every_closed_form,
    expected,
    measured,
    properties,
)
from tests.helpers.losses import PRECISIONS, extreme_pairs, random_case


def test_values_worked_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), target 0. Hand-worked values test both the code and the statement."""
    temperature = 4.0
    student = temperature * torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    teacher = temperature * torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    by_hand = {
        "kd": 16 * math.log(2) / 4,
        "tckd": 16 * (math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4),
        "nckd": 16 * (2 * math.log(4 / 3) / 3 + math.log(2 / 3) / 3),
        "ratio": 4 * 0.5 * math.log(2),
        "log_ratio": -4 * math.log(2) ** 2,
        "constant": 4 * 0.25 * math.log(2),
        "excess": 0.0,
        "one": 4 * math.log(2),
        "ratio log-odds": 0.0,
        "log_ratio log-odds": 0.0,
        "constant log-odds": 0.0,
        "excess log-odds": 0.0,
        "one log-odds": 0.0,
    }
    assert by_hand.keys() == CLOSED_FORMS.keys()
    for name, value in by_hand.items():
        actual = CLOSED_FORMS[name](student, teacher, torch.tensor([0]), temperature)
        assert actual.item() == pytest.approx(value, rel=1e-12, abs=1e-12), name
        assert expected(name, student[0].tolist(), teacher[0].tolist(), 0, temperature).value == pytest.approx(
            value, rel=1e-12, abs=1e-12
        ), name


@every_closed_form
@pytest.mark.parametrize("dtype", [torch.float64, *PRECISIONS], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_value_and_gradient_are_the_closed_forms(name: str, dtype: torch.dtype, classes: int):
    for temperature in TEMPERATURES:
        assert_agrees(name, *random_case(classes, dtype), temperature)


@every_closed_form
def test_autocast_does_not_reach_the_losses(name: str):
    case = random_case(10, torch.bfloat16)
    value, gradient = measured(name, *case, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside_value, inside_gradient = measured(name, *case, 4.0)
    assert torch.equal(inside_value, value)
    assert torch.equal(inside_gradient, gradient)


@every_closed_form
def test_autograd_is_the_numerical_gradient(name: str):
    """The stop-gradient hides the weight's own slope from autograd alone, so the weight is held at a bound here."""
    student, teacher, target = random_case(classes=4, dtype=torch.float64, batch=3)
    loss = CLOSED_FORMS[name]
    if name not in DIVERGENCES and not name.startswith(("constant", "one")):
        loss = partial(loss, max_weight=0.05)
        log_p, log_q = (logits.log_softmax(1).gather(1, target[:, None]) for logits in (student / 4, teacher / 4))
        weight = explicit_weight(log_p, log_q, name.removesuffix(" log-odds"), 0.05)  # type: ignore[arg-type]
        size = weight.abs() if not name.startswith("excess") else weight[weight > 0]  # the excess has the bound 0 too
        torch.testing.assert_close(size, torch.full_like(size, 0.05))
    assert torch.autograd.gradcheck(lambda u: loss(u, teacher, target, 4.0), student.requires_grad_())


@every_closed_form
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_closed_forms_hold_at_extreme_logits(name: str, temperature: float, dtype: torch.dtype):
    assert_agrees(name, *extreme_pairs(dtype), temperature)


# Properties, in float64


@every_closed_form
@properties
@given(case=cases())
def test_closed_forms_hold_for_any_logits(name: str, case: Case):
    assert_agrees(name, *case)


@pytest.mark.parametrize("name", [*DIVERGENCES, "ratio", "excess", "constant", "one"])
@properties
@given(case=cases())
def test_no_loss_is_negative(name: str, case: Case):
    assert CLOSED_FORMS[name](*case) >= -1e-12 * case.temperature**2


@every_closed_form
@properties
@given(case=cases(), data=st.data())
def test_the_order_of_classes_does_not_matter(name: str, case: Case, data: st.DataObject):
    order = torch.tensor(data.draw(st.permutations(range(case.student.shape[1]))))
    permuted = case._replace(
        student=case.student[:, order], teacher=case.teacher[:, order], target=order.argsort()[case.target]
    )
    value, gradient = measured(name, *case)
    permuted_value, permuted_gradient = measured(name, *permuted)
    assert_same(permuted_value, value, case.temperature**2)
    assert_same(permuted_gradient, gradient[:, order], case.temperature)


@every_closed_form
@properties
@given(case=cases(), shifts=st.tuples(st.floats(-100, 100), st.floats(-100, 100)))
def test_a_constant_added_to_all_logits_does_not_matter(name: str, case: Case, shifts: tuple[float, float]):
    shifted = case._replace(student=case.student + shifts[0], teacher=case.teacher + shifts[1])
    value, gradient = measured(name, *case)
    shifted_value, shifted_gradient = measured(name, *shifted)
    assert_same(shifted_value, value, case.temperature**2)
    assert_same(shifted_gradient, gradient, case.temperature)


@every_closed_form
@properties
@given(case=cases())
def test_a_loss_is_a_mean_over_the_batch(name: str, case: Case):
    twice = case._replace(
        student=case.student.repeat(2, 1), teacher=case.teacher.repeat(2, 1), target=case.target.repeat(2)
    )
    value, gradient = measured(name, *case)
    twice_value, twice_gradient = measured(name, *twice)
    assert_same(twice_value, value, case.temperature**2)
    assert_same(twice_gradient, gradient.repeat(2, 1) / 2, case.temperature)
