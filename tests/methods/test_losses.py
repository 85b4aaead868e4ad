"""The losses against an independent statement of their formulas, and the methods that weigh them.

The statement (`expected`) is plain Python on floats, one sample at a time; torch's part in it is none.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.errors import UserError
from src.methods import aekt, dkd
from src.methods.aekt import AEKT, Weighting, explicit_weight
from src.methods.decoupling import decouple
from src.methods.dkd import DKD
from src.methods.kd import KD, kd_loss
from src.methods.method import Batch, Method, Prediction, View, warm_up
from src.methods.vanilla import Vanilla

MAX_WEIGHT = 10.0
WEIGHTINGS: tuple[Weighting, ...] = ("ratio", "log_ratio", "constant")
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
UNITS = 16
"""How many rounding units are a few."""

Loss = Callable[..., Tensor]


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    return kd_loss(student, teacher, temperature)


def of_logits(loss: Callable[..., Tensor]) -> Loss:
    """A loss of decoupled logits, from the logits on."""

    def from_logits(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, *args: Any, **options: Any):
        return loss(decouple(student, teacher, target, temperature), temperature, *args, **options)

    return from_logits


tckd_loss, nckd_loss = of_logits(dkd.tckd_loss), of_logits(dkd.nckd_loss)
explicit_transfer_loss = of_logits(aekt.explicit_transfer_loss)
LOSSES: dict[str, Loss] = {"kd": kd, "tckd": tckd_loss, "nckd": nckd_loss} | {
    f"{weighting}{'' if term else ' log-odds'}": partial(
        explicit_transfer_loss, weighting=weighting, max_weight=MAX_WEIGHT, confidence_term=term
    )
    for weighting in WEIGHTINGS
    for term in (True, False)
}
DIVERGENCES = ("kd", "tckd", "nckd")

every_loss = pytest.mark.parametrize("name", LOSSES)
properties = settings(deadline=None, max_examples=20)


# The formulas, stated once more


class Expected(NamedTuple):
    value: float
    gradient: list[float]
    value_error: float
    """What rounding may add to the value, in rounding units; the same for each entry of the gradient below."""
    gradient_error: float


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    """Exact also where one class takes all: its log is -log1p of what the others have."""
    top = max(range(len(logits)), key=logits.__getitem__)
    gaps = [(x - logits[top]) / temperature for x in logits]
    rest = math.fsum(math.exp(gap) for i, gap in enumerate(gaps) if i != top)
    return [gap - math.log1p(rest) for gap in gaps]


def log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(x - top) for x in logs))


def divergence(log_q: list[float], log_p: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_q, log_p, strict=True))


def expected_weight(log_p: float, log_q: float, weighting: str) -> float:
    if weighting == "constant":
        return math.exp(log_q)
    if weighting == "log_ratio":
        return max(-MAX_WEIGHT, min(MAX_WEIGHT, log_q - log_p))
    return math.exp(log_q - log_p) if log_q - log_p < math.log(MAX_WEIGHT) else MAX_WEIGHT


def expected(name: str, u: list[float], v: list[float], t: int, temperature: float) -> Expected:
    """One sample's loss and its gradient with respect to u, both in closed form.

    Rounding: a probability, and the logarithm of one large enough to matter, is off by a few units. A divergence
    multiplies that by T^2, its gradient by T. Explicit transfer weighs by at most MAX_WEIGHT, and its weight is off by
    as many units as log p_t and log q_t are large where they are close (elsewhere the bound or an underflow hides it).
    """
    others = [i for i in range(len(u)) if i != t]
    log_p, log_q = log_softmax(u, temperature), log_softmax(v, temperature)
    log_not_p, log_not_q = log_sum([log_p[i] for i in others]), log_sum([log_q[i] for i in others])
    log_p_others = log_softmax([u[i] for i in others], temperature)
    log_q_others = log_softmax([v[i] for i in others], temperature)
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    p_prime = {i: math.exp(x) for i, x in zip(others, log_p_others, strict=True)}
    q_prime = {i: math.exp(x) for i, x in zip(others, log_q_others, strict=True)}

    def gradient(at_target: float, elsewhere: Callable[[int], float]) -> list[float]:
        return [at_target if i == t else elsewhere(i) for i in range(len(u))]

    if name == "kd":
        value = temperature**2 * divergence(log_q, log_p)
        slope = [temperature * (a - b) for a, b in zip(p, q, strict=True)]
        return Expected(value, slope, temperature**2, temperature)
    if name == "tckd":
        value = temperature**2 * divergence([log_q[t], log_not_q], [log_p[t], log_not_p])
        slope = gradient(temperature * (p[t] - q[t]), lambda i: temperature * p_prime[i] * (q[t] - p[t]))
        return Expected(value, slope, temperature**2, temperature)
    if name == "nckd":
        value = temperature**2 * divergence(log_q_others, log_p_others)
        slope = gradient(0.0, lambda i: temperature * (p_prime[i] - q_prime[i]))
        return Expected(value, slope, temperature**2, temperature)
    weight = expected_weight(log_p[t], log_q[t], name.removesuffix(" log-odds"))
    if name.endswith(" log-odds"):
        confidence = log_p[t] - log_not_p
        slope = gradient(-weight, lambda i: weight * p_prime[i])
    else:
        confidence = log_p[t]
        slope = gradient(-weight * math.exp(log_not_p), lambda i: weight * p[i])
    error = MAX_WEIGHT * (1 + min(-log_p[t], -log_q[t]))
    return Expected(-temperature * weight * confidence, slope, temperature * error * (1 + abs(confidence)), error)


def expected_rows(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> list[Tensor]:
    """Of each sample, in float64: the value [B], the gradient [B, C], and the error of either, [B] and [B, 1]."""
    rows = zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True)
    samples = [expected(name, u, v, t, temperature) for u, v, t in rows]
    value, gradient, value_error, gradient_error = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True)
    )
    return [value, gradient, value_error, gradient_error[:, None]]


def measured(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Value and gradient by the implementation."""
    student = student.clone().requires_grad_()
    value = LOSSES[name](student, teacher, target, temperature)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def assert_within(actual: Tensor, wanted: Tensor, allowed: Tensor) -> None:
    error = (actual.double() - wanted).abs()
    worst = int((error / allowed).argmax())
    found, right, bound = (x.flatten()[worst].item() for x in (actual, wanted, allowed))
    assert (error <= allowed).all(), f"{found} at {worst} where {right} is right, within {bound}"


def assert_agrees(name: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> None:
    """Values and gradients of the implementation within rounding of the closed forms for the very same inputs.

    Each sample's value on its own, so that no large one hides a small one; then their mean and its gradient. Losses are
    computed in float32 or float64; the gradient is then rounded to the precision of the inputs, which has a smallest
    number too.
    """
    computed, inputs = torch.promote_types(student.dtype, torch.float32), torch.finfo(student.dtype)
    unit = UNITS * torch.finfo(computed).eps
    values, gradients, value_error, gradient_error = expected_rows(name, student, teacher, target, temperature)
    singly = zip(student.split(1), teacher.split(1), target.split(1), strict=True)
    actual = torch.stack([LOSSES[name](*sample, temperature) for sample in singly])
    assert actual.dtype == computed
    allowed = unit * (values.abs() + value_error)
    assert_within(actual, values, allowed)

    value, gradient = measured(name, student, teacher, target, temperature)
    assert gradient.dtype == student.dtype
    assert_within(value, values.mean(), allowed.mean())
    rounding = inputs.eps * gradients.abs() / 2
    allowed = (unit * (gradients.abs() + gradient_error) + rounding) / len(student)
    assert_within(gradient, gradients / len(student), allowed + inputs.smallest_normal * inputs.eps)


def random_case(classes: int, dtype: torch.dtype, batch: int = 6, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    student = spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


# Values and gradients


def test_values_worked_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), target 0: so neither code nor statement is its own judge."""
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
        "ratio log-odds": 0.0,
        "log_ratio log-odds": 0.0,
        "constant log-odds": 0.0,
    }
    for name, value in by_hand.items():
        actual = LOSSES[name](student, teacher, torch.tensor([0]), temperature)
        assert actual.item() == pytest.approx(value, rel=1e-12, abs=1e-12), name
        assert expected(name, student[0].tolist(), teacher[0].tolist(), 0, temperature).value == pytest.approx(
            value, rel=1e-12, abs=1e-12
        ), name


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, *PRECISIONS], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_value_and_gradient_are_the_closed_forms(name: str, dtype: torch.dtype, classes: int):
    for temperature in TEMPERATURES:
        assert_agrees(name, *random_case(classes, dtype), temperature)


@every_loss
def test_autocast_does_not_reach_the_losses(name: str):
    case = random_case(10, torch.bfloat16)
    value, gradient = measured(name, *case, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside_value, inside_gradient = measured(name, *case, 4.0)
    assert torch.equal(inside_value, value)
    assert torch.equal(inside_gradient, gradient)


@every_loss
def test_autograd_is_the_numerical_gradient(name: str):
    """The stop-gradient hides the weight's own slope from autograd alone, so here the weight stands at its bound."""
    student, teacher, target = random_case(classes=4, dtype=torch.float64, batch=3)
    loss = LOSSES[name]
    if name not in DIVERGENCES and not name.startswith("constant"):
        loss = partial(loss, max_weight=0.05)
        log_p, log_q = (logits.log_softmax(1).gather(1, target[:, None]) for logits in (student / 4, teacher / 4))
        weight = explicit_weight(log_p, log_q, name.removesuffix(" log-odds"), 0.05)  # type: ignore[arg-type]
        torch.testing.assert_close(weight.abs(), torch.full_like(weight, 0.05))
    assert torch.autograd.gradcheck(lambda u: loss(u, teacher, target, 4.0), student.requires_grad_())


# Extreme logits: classes 0 to 4, target 0

TAIL = [0.3, -1.2, 0.7, 0.1]
EXTREMES = {
    "target takes all": [1e4, *TAIL],
    "target has nothing, others tie": [-1e4, 1e4, 1e4, -1e4, -1e4],
    "target has nothing, ordinary tail": [-1e4, *TAIL],
    "target ties": [1e4, 1e4, -1e4, -1e4, -1e4],
    "all equal": [1e4] * 5,
    "ordinary": [1.0, *TAIL],
    "ordinary, far from zero": [9992.0, 9984.0, 10000.0, 9976.0, 9992.0],
    "target nearly takes all": [60.0, *TAIL],
    "target has nearly nothing": [-60.0, *TAIL],
}


@every_loss
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_extreme_logits(name: str, temperature: float, dtype: torch.dtype):
    """Each student meets each teacher."""
    rows = torch.tensor(list(EXTREMES.values())).to(dtype)
    student, teacher = rows.repeat_interleave(len(rows), dim=0), rows.repeat(len(rows), 1)
    assert_agrees(name, student, teacher, torch.zeros(len(student), dtype=torch.int64), temperature)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("max_weight", [0.5, 1.0, 10.0, 1000.0])
def test_the_weight_keeps_its_bound(weighting: Any, max_weight: float):
    logs = torch.tensor([-4e4, -200.0, -50.0, -1.0, -1e-7, 0.0])
    log_p, log_q = torch.cartesian_prod(logs, logs).T
    weight = explicit_weight(log_p, log_q, weighting, max_weight)
    bound = 1.0 if weighting == "constant" else max_weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-6)
    assert (weight < 0).any() == (weighting == "log_ratio")


# Properties, in float64


class Case(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor
    temperature: float


@st.composite
def cases(draw: st.DrawFn, limit: float = 30.0, min_classes: int = 2, batch: int | None = None) -> Case:
    classes = draw(st.integers(min_classes, 7))
    batch = batch or draw(st.integers(1, 4))
    logits = st.lists(
        st.lists(st.floats(-limit, limit), min_size=classes, max_size=classes), min_size=batch, max_size=batch
    )
    target = draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    student, teacher = (torch.tensor(draw(logits), dtype=torch.float64) for _ in range(2))
    return Case(student, teacher, torch.tensor(target), draw(st.floats(0.5, 20.0)))


def same(actual: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10 * scale)


@every_loss
@properties
@given(case=cases())
def test_any_logits_agree_with_the_statement(name: str, case: Case):
    assert_agrees(name, *case)


@properties
@given(case=cases(batch=1))
def test_kd_decouples(case: Case):
    """KD = TCKD + (1 - q_t) NCKD of each sample."""
    log_q = log_softmax(case.teacher[0].tolist(), case.temperature)
    not_q = math.fsum(math.exp(x) for i, x in enumerate(log_q) if i != case.target[0])
    whole, tckd, nckd = (measured(name, *case) for name in DIVERGENCES)
    same(tckd[0] + not_q * nckd[0], whole[0], case.temperature**2)
    same(tckd[1] + not_q * nckd[1], whole[1], case.temperature)


@properties
@given(case=cases(batch=1))
def test_kd_vanishes_only_at_agreement(case: Case):
    """Pinsker: KL(q, p) is at least half the squared total difference."""
    p, q = (torch.softmax(logits / case.temperature, dim=1) for logits in (case.student, case.teacher))
    bound = 0.5 * (p - q).abs().sum() ** 2
    assert kd(*case) >= case.temperature**2 * (bound - 1e-13)
    value, gradient = measured("kd", case.teacher + 3.0, case.teacher, case.target, case.temperature)
    same(value, torch.zeros_like(value), case.temperature**2)
    same(gradient, torch.zeros_like(gradient), case.temperature)


@properties
@given(case=cases(batch=1, min_classes=3))
def test_tckd_vanishes_only_at_equal_confidence(case: Case):
    """It ignores how the student deals the rest out: here the teacher's p_t with the student's own p'."""
    student, teacher, target, temperature = case
    p, q = (torch.softmax(logits / temperature, dim=1)[0, target[0]] for logits in (student, teacher))
    assert tckd_loss(*case) >= temperature**2 * (2 * (p - q) ** 2 - 1e-13)

    others = torch.arange(student.shape[1]) != target[0]
    rest = [torch.logsumexp(logits[:, others] / temperature, dim=1) for logits in (student, teacher)]
    confident = student.clone()
    confident[:, target[0]] = teacher[:, target[0]] + temperature * (rest[0] - rest[1])
    value, gradient = measured("tckd", confident, teacher, target, temperature)
    same(value, torch.zeros_like(value), temperature**2)
    same(gradient, torch.zeros_like(gradient), temperature)


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


@pytest.mark.parametrize("name", [*DIVERGENCES, "ratio", "constant"])
@properties
@given(case=cases())
def test_no_loss_is_negative(name: str, case: Case):
    assert LOSSES[name](*case) >= -1e-12 * case.temperature**2


@every_loss
@properties
@given(case=cases(), data=st.data())
def test_the_order_of_classes_does_not_matter(name: str, case: Case, data: st.DataObject):
    order = torch.tensor(data.draw(st.permutations(range(case.student.shape[1]))))
    permuted = case._replace(
        student=case.student[:, order], teacher=case.teacher[:, order], target=order.argsort()[case.target]
    )
    value, gradient = measured(name, *case)
    permuted_value, permuted_gradient = measured(name, *permuted)
    same(permuted_value, value, case.temperature**2)
    same(permuted_gradient, gradient[:, order], case.temperature)


@every_loss
@properties
@given(case=cases(), shifts=st.tuples(st.floats(-100, 100), st.floats(-100, 100)))
def test_a_constant_added_to_all_logits_does_not_matter(name: str, case: Case, shifts: tuple[float, float]):
    shifted = case._replace(student=case.student + shifts[0], teacher=case.teacher + shifts[1])
    value, gradient = measured(name, *case)
    shifted_value, shifted_gradient = measured(name, *shifted)
    same(shifted_value, value, case.temperature**2)
    same(shifted_gradient, gradient, case.temperature)


@every_loss
@properties
@given(case=cases())
def test_a_loss_is_a_mean_over_the_batch(name: str, case: Case):
    twice = case._replace(
        student=case.student.repeat(2, 1), teacher=case.teacher.repeat(2, 1), target=case.target.repeat(2)
    )
    value, gradient = measured(name, *case)
    twice_value, twice_gradient = measured(name, *twice)
    same(twice_value, value, case.temperature**2)
    same(twice_gradient, gradient.repeat(2, 1) / 2, case.temperature)


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
    assert slope["ratio"] < 0
    assert slope["constant"] < 0


@properties
@given(case=cases(limit=5.0))
def test_below_its_bound_the_ratio_has_the_gradient_of_the_ratio_itself(case: Case):
    student = case.student.clone().requires_grad_()
    p, q = (
        torch.softmax(logits / case.temperature, dim=1).gather(1, case.target[:, None])
        for logits in (student, case.teacher)
    )
    (of_ratio,) = torch.autograd.grad(case.temperature * (q / p).mean(), student)
    loss = explicit_transfer_loss(student, case.teacher, case.target, case.temperature, "ratio", max_weight=1e12)
    (of_loss,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(of_loss, of_ratio, rtol=1e-8, atol=1e-10)


@properties
@given(case=cases(limit=5.0))
def test_beyond_its_bound_the_ratio_weighs_as_the_bound(case: Case):
    """Two teachers beyond the bound teach the same."""
    p, q = (
        torch.softmax(logits / case.temperature, dim=1).gather(1, case.target[:, None])
        for logits in (case.student, case.teacher)
    )
    bound = 1e-12
    assume(bool((q / p > bound).all()))
    surer = case.teacher.scatter_add(1, case.target[:, None], torch.ones_like(p))
    losses = [
        explicit_transfer_loss(case.student, teacher, case.target, case.temperature, "ratio", bound)
        for teacher in (case.teacher, surer)
    ]
    assert losses[0] == losses[1]
    same(losses[0] / bound, -case.temperature * p.log().mean())


# The methods

BATCH = 5
AEKT_OPTIONS: dict[str, Any] = {
    "cross_entropy_weight": 1.0,
    "alpha": 1.5,
    "beta": 6.0,
    "temperature": 4.0,
    "warmup_epochs": 20,
    "gamma": 0.4,
    "weighting": "ratio",
    "max_weight": MAX_WEIGHT,
    "confidence_term": True,
}
DKD_OPTIONS = {key: AEKT_OPTIONS[key] for key in ("cross_entropy_weight", "alpha", "beta", "temperature")}
METHODS: dict[str, Callable[[], Method]] = {
    "vanilla": Vanilla,
    "kd": lambda: KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0),
    "dkd": lambda: DKD(**DKD_OPTIONS, warmup_epochs=20),
    "aekt": lambda: AEKT(**AEKT_OPTIONS),
}


def prediction(logits: Tensor, distillation_logits: Tensor) -> Prediction:
    return Prediction(logits, distillation_logits, (), None)


def batch_of(own: Tensor, distilled: Tensor, teacher: Tensor, target: Tensor) -> Batch:
    """The view behind the first says something else: no method here may look at it."""
    images = torch.zeros(BATCH, 3, 2, 2)
    views = (
        View(images, prediction(own, distilled), prediction(teacher, teacher)),
        View(images, prediction(-own, -distilled), prediction(-teacher, -teacher)),
    )
    return Batch(views, target, torch.arange(BATCH), epoch=0, step=0)


def three_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    distilled, teacher, target = random_case(10, dtype, BATCH)
    own, _, _ = random_case(10, dtype, BATCH)
    return own.flip(0).requires_grad_(), distilled.requires_grad_(), teacher, target


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("vanilla", {"cross_entropy"}),
        ("kd", {"cross_entropy", "kd"}),
        ("dkd", {"cross_entropy", "tckd", "nckd"}),
        ("aekt", {"cross_entropy", "tckd", "nckd", "explicit_transfer"}),
    ],
)
def test_terms_read_their_own_logits(method: str, names: set[str]):
    """Cross-entropy the student's own, distillation those after serialization, and no term the other's."""
    own, distilled, teacher, target = three_logits()
    made = METHODS[method]()
    terms = made.terms(batch_of(own, distilled, teacher, target))
    assert set(terms) == names == set(made.weights(0))
    for name, term in terms.items():
        of_own, of_distilled = torch.autograd.grad(term, (own, distilled), retain_graph=True, allow_unused=True)
        if name == "cross_entropy":
            log_p = torch.tensor([log_softmax(row, 1.0) for row in own.tolist()], dtype=torch.float64)
            same(term, -log_p.gather(1, target[:, None]).mean())
            same(of_own, (log_p.exp() - torch.eye(10)[target]) / BATCH)
            assert of_distilled is None
        else:
            stated = "ratio" if name == "explicit_transfer" else name
            values, gradients, *_ = expected_rows(stated, distilled, teacher, target, 4.0)
            same(term, values.mean())
            same(of_distilled, gradients / BATCH)
            assert of_own is None


@pytest.mark.parametrize(
    "options",
    [{"weighting": "log_ratio"}, {"weighting": "constant"}, {"max_weight": 0.5}, {"confidence_term": False}],
    ids=str,
)
def test_every_option_of_explicit_transfer_reaches_the_loss(options: dict[str, Any]):
    batch = batch_of(*three_logits())
    default = AEKT(**AEKT_OPTIONS).terms(batch)["explicit_transfer"]
    term = AEKT(**AEKT_OPTIONS | options).terms(batch)["explicit_transfer"]
    chosen = {key: AEKT_OPTIONS[key] for key in ("weighting", "max_weight", "confidence_term")} | options
    wanted = explicit_transfer_loss(
        batch.student.distillation_logits, batch.teacher.logits, batch.target, 4.0, **chosen
    )
    assert term == wanted
    assert term != default


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_terms_are_float32_scalars_whatever_the_network_runs_in(method: str, dtype: torch.dtype):
    for name, term in METHODS[method]().terms(batch_of(*three_logits(dtype))).items():
        assert term.dtype == torch.float32, name
        assert term.shape == (), name


def test_vanilla_needs_no_teacher():
    own, distilled, _, target = three_logits()
    view = View(torch.zeros(BATCH, 3, 2, 2), prediction(own, distilled), None)
    assert not Vanilla.needs_teacher
    assert not Vanilla.distils_logits
    terms = Vanilla().terms(Batch((view,), target, torch.arange(BATCH), epoch=0, step=0))
    assert torch.isfinite(terms["cross_entropy"])


@pytest.mark.parametrize("method", ["kd", "dkd", "aekt"])
def test_distillation_asks_for_a_teacher_and_its_logits(method: str):
    made = METHODS[method]()
    assert made.needs_teacher
    assert made.distils_logits
    assert not made.needs_features
    assert made.views == 1


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [(0, 20, 0.05), (9, 20, 0.5), (18, 20, 0.95), (19, 20, 1), (20, 20, 1), (239, 20, 1), (0, 0, 1), (0, 1, 1)],
)
def test_warm_up(epoch: int, epochs: int, factor: float):
    """DKD's released code counts from 1: its first of 20 epochs weighs 0.05, its twentieth 1."""
    assert warm_up(epoch, epochs) == pytest.approx(factor, rel=1e-12)
    weights = {"cross_entropy": 1.0, "tckd": factor * 1.5, "nckd": factor * 6.0}
    assert DKD(**DKD_OPTIONS, warmup_epochs=epochs).weights(epoch) == pytest.approx(weights)
    made = AEKT(**AEKT_OPTIONS | {"warmup_epochs": epochs})
    assert made.weights(epoch) == pytest.approx(weights | {"explicit_transfer": factor * 0.4})


@pytest.mark.parametrize("epoch", [0, 19, 239])
def test_weights_without_warm_up(epoch: int):
    assert METHODS["kd"]().weights(epoch) == {"cross_entropy": 0.1, "kd": 0.9}
    assert Vanilla().weights(epoch) == {"cross_entropy": 1.0}


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
        AEKT(**AEKT_OPTIONS | {option: value})
