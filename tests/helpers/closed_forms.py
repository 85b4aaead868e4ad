"""The losses of KD, DKD and AEKT stated once more, with their gradients in closed form.

The statement (`expected`) is plain Python on floats, one sample at a time, without torch. It also gives the error that
rounding may cause, so that tests hold the losses to the last few rounding units.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from src.methods.aekt import Weighting
from src.methods.kd import kd_loss
from tests.helpers.losses import divergence, explicit_transfer_loss, log_softmax, nckd_loss, tckd_loss

MAX_WEIGHT = 10.0
WEIGHTINGS: tuple[Weighting, ...] = ("ratio", "excess", "log_ratio", "constant", "one")
"""The weights that depend on one sample alone. `relative` depends on the batch."""
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
UNITS = 16
"""The allowed error of a loss in rounding units, for an error of 1 in `Expected`."""

Loss = Callable[..., Tensor]


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute KD, with the arguments of the other losses."""
    return kd_loss(student, teacher, temperature)


DIVERGENCES: dict[str, Loss] = {"kd": kd, "tckd": tckd_loss, "nckd": nckd_loss}
TRANSFERS: dict[str, Loss] = {
    f"{weighting}{'' if term else ' log-odds'}": partial(
        explicit_transfer_loss, weighting=weighting, max_weight=MAX_WEIGHT, confidence_term=term
    )
    for weighting in WEIGHTINGS
    for term in (True, False)
}
"""Explicit transfer with each weight: on log p_t, or on the log-odds if the name says so."""
CLOSED_FORMS = DIVERGENCES | TRANSFERS

every_closed_form = pytest.mark.parametrize("name", CLOSED_FORMS)
properties = settings(deadline=None, max_examples=20)


class Expected(NamedTuple):
    """The loss of one sample."""

    value: float
    gradient: list[float]
    value_error: float
    """The error of the value that rounding may cause, in rounding units."""
    gradient_error: float
    """The same for each entry of the gradient."""


def log_sum(logs: list[float]) -> float:
    """Compute the logarithm of the sum of exponentials."""
    top = max(logs)
    return top + math.log(math.fsum(math.exp(x - top) for x in logs))


def expected_weight(log_p: float, log_q: float, weighting: str) -> float:
    """Compute the weight of explicit transfer from log p_t and log q_t."""
    if weighting == "one":
        return 1.0
    if weighting == "constant":
        return math.exp(log_q)
    if weighting == "excess":
        gap = max(0.0, log_q - log_p)
        return math.expm1(gap) if gap < math.log1p(MAX_WEIGHT) else MAX_WEIGHT
    if weighting == "log_ratio":
        return max(-MAX_WEIGHT, min(MAX_WEIGHT, log_q - log_p))
    return math.exp(log_q - log_p) if log_q - log_p < math.log(MAX_WEIGHT) else MAX_WEIGHT


class Sample(NamedTuple):
    """Logarithms of the probabilities of one sample: of all classes, and of the other classes among themselves."""

    target: int
    log_p: list[float]
    log_q: list[float]
    log_not_p: float
    """log(1 - p_t)"""
    log_not_q: float
    others: list[int]
    log_p_others: list[float]
    log_q_others: list[float]

    @classmethod
    def of(cls, u: list[float], v: list[float], t: int, temperature: float) -> "Sample":
        """Make a sample from the logits u and v and the target class."""
        others = [i for i in range(len(u)) if i != t]
        log_p, log_q = log_softmax(u, temperature), log_softmax(v, temperature)
        log_not_p, log_not_q = log_sum([log_p[i] for i in others]), log_sum([log_q[i] for i in others])
        log_p_others = log_softmax([u[i] for i in others], temperature)
        log_q_others = log_softmax([v[i] for i in others], temperature)
        return cls(t, log_p, log_q, log_not_p, log_not_q, others, log_p_others, log_q_others)

    def gradient(self, at_target: float, elsewhere: Callable[[int], float]) -> list[float]:
        """Arrange a gradient in the order of the classes."""
        return [at_target if i == self.target else elsewhere(i) for i in range(len(self.log_p))]


def expected(name: str, u: list[float], v: list[float], t: int, temperature: float) -> Expected:
    """Compute one sample's loss and its gradient at u, both in closed form.

    Rounding: probabilities and their logarithms are off by a few units. A divergence multiplies this error by T^2, and
    its gradient multiplies it by T.
    """
    sample = Sample.of(u, v, t, temperature)
    if name not in DIVERGENCES:
        return _expected_transfer(name, sample, temperature)
    p, q = [math.exp(x) for x in sample.log_p], [math.exp(x) for x in sample.log_q]
    p_prime = {i: math.exp(x) for i, x in zip(sample.others, sample.log_p_others, strict=True)}
    q_prime = {i: math.exp(x) for i, x in zip(sample.others, sample.log_q_others, strict=True)}
    if name == "kd":
        value = divergence(sample.log_q, sample.log_p)
        slope = [temperature * (a - b) for a, b in zip(p, q, strict=True)]
    elif name == "tckd":
        value = divergence([sample.log_q[t], sample.log_not_q], [sample.log_p[t], sample.log_not_p])
        slope = sample.gradient(temperature * (p[t] - q[t]), lambda i: temperature * p_prime[i] * (q[t] - p[t]))
    else:
        value = divergence(sample.log_q_others, sample.log_p_others)
        slope = sample.gradient(0.0, lambda i: temperature * (p_prime[i] - q_prime[i]))
    return Expected(temperature**2 * value, slope, temperature**2, temperature)


def _expected_transfer(name: str, sample: Sample, temperature: float) -> Expected:
    """Compute explicit transfer of one sample.

    Rounding: the weight is at most MAX_WEIGHT. If log p_t and log q_t are close, the weight is off by as many units as
    their size. Otherwise the bound of the weight or an underflow hides the error.
    """
    log_p, log_q = sample.log_p[sample.target], sample.log_q[sample.target]
    weight = expected_weight(log_p, log_q, name.removesuffix(" log-odds"))
    if name.endswith(" log-odds"):
        confidence = log_p - sample.log_not_p
        p_prime = {i: math.exp(x) for i, x in zip(sample.others, sample.log_p_others, strict=True)}
        slope = sample.gradient(-weight, lambda i: weight * p_prime[i])
    else:
        confidence = log_p
        slope = sample.gradient(-weight * math.exp(sample.log_not_p), lambda i: weight * math.exp(sample.log_p[i]))
    error = MAX_WEIGHT * (1 + min(-log_p, -log_q))
    return Expected(-temperature * weight * confidence, slope, temperature * error * (1 + abs(confidence)), error)


def expected_rows(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> list[Tensor]:
    """Compute in float64, for each sample, the value [B], the gradient [B, C], and their errors [B] and [B, 1]."""
    rows = zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
    samples = [expected(name, u, v, t, temperature) for u, v, t in rows]
    value, gradient, value_error, gradient_error = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True)
    )
    return [value, gradient, value_error, gradient_error[:, None]]


def measured(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute value and gradient by the implementation."""
    student = student.clone().requires_grad_()
    value = CLOSED_FORMS[name](student, teacher, target, temperature)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def assert_within(actual: Tensor, wanted: Tensor, allowed: Tensor) -> None:
    """Assert that no entry is off by more than the allowed error. The message shows the worst entry."""
    error = (actual.double() - wanted).abs()
    worst = int((error / allowed).argmax())
    found, right, bound = (x.flatten()[worst].item() for x in (actual, wanted, allowed))
    assert (error <= allowed).all(), f"entry {worst} is {found}, but must be {right} within {bound}"


def assert_agrees(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> None:
    """Assert that value and gradient are the closed forms of the same inputs, within rounding.

    Each sample's value is compared separately, so that a large value cannot hide a small one. Then the mean and its
    gradient are compared. Losses are computed in float32 or float64. The gradient is then rounded to the precision of
    the inputs, and may underflow in it.
    """
    computed, inputs = torch.promote_types(student.dtype, torch.float32), torch.finfo(student.dtype)
    unit = UNITS * torch.finfo(computed).eps
    values, gradients, value_error, gradient_error = expected_rows(name, student, teacher, target, temperature)
    singly = zip(student.split(1), teacher.split(1), target.split(1), strict=True)
    actual = torch.stack([CLOSED_FORMS[name](*sample, temperature) for sample in singly])
    assert actual.dtype == computed
    allowed = unit * (values.abs() + value_error)
    assert_within(actual, values, allowed)

    value, gradient = measured(name, student, teacher, target, temperature)
    assert gradient.dtype == student.dtype
    assert_within(value, values.mean(), allowed.mean())
    rounding = inputs.eps * gradients.abs() / 2
    allowed = (unit * (gradients.abs() + gradient_error) + rounding) / len(student)
    assert_within(gradient, gradients / len(student), allowed + inputs.smallest_normal * inputs.eps)


class Case(NamedTuple):
    """The arguments of a loss."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    temperature: float


@st.composite
def cases(draw: st.DrawFn, limit: float = 30.0, min_classes: int = 2, batch: int | None = None) -> Case:
    """Draw logits in float64, up to `limit`, of up to 7 classes and 4 samples."""
    classes = draw(st.integers(min_classes, 7))
    batch = batch or draw(st.integers(1, 4))
    logits = st.lists(
        st.lists(st.floats(-limit, limit), min_size=classes, max_size=classes), min_size=batch, max_size=batch
    )
    target = draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    student, teacher = (torch.tensor(draw(logits), dtype=torch.float64) for _ in range(2))
    return Case(student, teacher, torch.tensor(target), draw(st.floats(0.5, 20.0)))


def assert_same(actual: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    """Assert equality up to rounding in float64, for numbers of the given scale."""
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10 * scale)


def target_probabilities(case: Case, student: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute p_t and q_t, each [B, 1], at the temperature of the case."""
    both = (case.student if student is None else student, case.teacher)
    p, q = (torch.softmax(logits / case.temperature, dim=1).gather(1, case.target[:, None]) for logits in both)
    return p, q
