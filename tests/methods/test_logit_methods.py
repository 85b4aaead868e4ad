"""The losses of the further logit methods against an independent statement, and what their papers claim of them.

The statement of each loss is plain Python on float64 rows; its gradient is a central difference of it. A statement gets
the student's rows twice: those that move, and those that stand still where the paper stops the gradient.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from src.methods.ctkd import CTKD, ctkd_loss, curriculum
from src.methods.dist import DIST, correlation, inter_class_loss, intra_class_loss
from src.methods.kd import kd_loss
from src.methods.method import Method
from src.methods.mlkd import MLKD, batch_loss, class_loss
from src.methods.nkd import NKD, non_target_loss, soft_target_loss
from src.methods.tfkd import TfKD, tfkd_loss
from src.methods.ttm import TTM, transformed_divergence
from src.methods.wsld import WSLD, soft_label_weight, wsld_loss
from src.methods.wttm import WTTM, power_sum, wttm_loss
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network
from src.models.resnet import resnet8, resnet14
from src.models.shufflenet_v2 import ShuffleV2
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from tests.methods.test_losses import (
    EXTREMES,
    PRECISIONS,
    batch_of,
    divergence,
    log_softmax,
    nckd_loss,
    random_case,
    three_logits,
)  # fmt: skip
from tests.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

Rows = list[list[float]]
Statement = Callable[[Rows, Rows, Rows, list[int]], float]
NewNetwork = Callable[..., Network]
TEMPERATURE, EXPONENT, CORRECT = 3.0, 0.2, 0.99
PAIRS = [(resnet14, resnet8), (wrn_16_1, ShuffleV2), (vgg8, MobileNetV2)]


class Loss(NamedTuple):
    implementation: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of student logits, teacher logits and target."""
    statement: Statement
    """Of the student's rows, the same standing still, the teacher's, and the targets."""


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def without(row: list[float], t: int) -> list[float]:
    return [x for i, x in enumerate(row) if i != t]


def cross_entropy(log_q: list[float], log_p: list[float]) -> float:
    return -math.fsum(math.exp(b) * a for a, b in zip(log_p, log_q, strict=True))


def soft_target(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    samples = zip(us, vs, target, strict=True)
    return mean([-math.exp(log_softmax(v, 1.0)[t]) * log_softmax(u, 1.0)[t] for u, v, t in samples])


def non_target(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    samples = zip(us, vs, target, strict=True)
    return TEMPERATURE**2 * mean(
        [
            cross_entropy(log_softmax(without(v, t), TEMPERATURE), log_softmax(without(u, t), TEMPERATURE))
            for u, v, t in samples
        ]
    )


def pearson(x: list[float], y: list[float]) -> float:
    x, y = ([value - mean(values) for value in values] for values in (x, y))
    products = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return products / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def softmax_rows(rows: Rows) -> Rows:
    return [[math.exp(x) for x in log_softmax(row, TEMPERATURE)] for row in rows]


def inter_class(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    pairs = zip(softmax_rows(us), softmax_rows(vs), strict=True)
    return TEMPERATURE**2 * mean([1 - pearson(p, q) for p, q in pairs])


def intra_class(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    columns = zip(zip(*softmax_rows(us), strict=True), zip(*softmax_rows(vs), strict=True), strict=True)
    return TEMPERATURE**2 * mean([1 - pearson(list(p), list(q)) for p, q in columns])


def powers(v: list[float]) -> list[float]:
    return [math.exp(x) ** EXPONENT for x in log_softmax(v, 1.0)]


def ttm_sample(u: list[float], v: list[float]) -> float:
    log_q = [math.log(x / math.fsum(powers(v))) for x in powers(v)]
    return divergence(log_q, log_softmax(u, 1.0))


def ttm(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return mean([ttm_sample(u, v) for u, v in zip(us, vs, strict=True)])


def wttm(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return mean([math.fsum(powers(v)) * ttm_sample(u, v) for u, v in zip(us, vs, strict=True)])


def wsld(us: Rows, still: Rows, vs: Rows, target: list[int]) -> float:
    losses = []
    for u, fixed, v, t in zip(us, still, vs, target, strict=True):
        weight = 1 - math.exp(-log_softmax(fixed, 1.0)[t] / log_softmax(v, 1.0)[t])
        losses.append(weight * cross_entropy(log_softmax(v, TEMPERATURE), log_softmax(u, TEMPERATURE)))
    return TEMPERATURE**2 * mean(losses)


def tfkd(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    losses = []
    for u, t in zip(us, target, strict=True):
        by_hand = [CORRECT if i == t else (1 - CORRECT) / (len(u) - 1) for i in range(len(u))]
        losses.append(divergence(log_softmax(by_hand, TEMPERATURE), log_softmax(u, 1.0)))
    return mean(losses)


def ctkd(us: Rows, _: Rows, vs: Rows, target: list[int], temperature: float = TEMPERATURE) -> float:
    return temperature**2 * mean(
        [divergence(log_softmax(v, temperature), log_softmax(u, temperature)) for u, v in zip(us, vs, strict=True)]
    )


def product(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def squared_gaps(p: Rows, q: Rows) -> float:
    """Of the products of all pairs of rows."""
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p))]
    return math.fsum((product(q[i], q[j]) - product(p[i], p[j])) ** 2 for i, j in pairs)


def batch_level(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return squared_gaps(softmax_rows(us), softmax_rows(vs)) / len(us)


def class_level(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    p, q = ([list(column) for column in zip(*softmax_rows(rows), strict=True)] for rows in (us, vs))
    return squared_gaps(p, q) / len(p)


LOSSES: dict[str, Loss] = {
    "nkd soft target": Loss(soft_target_loss, soft_target),
    "nkd non-target": Loss(lambda u, v, t: non_target_loss(u, v, t, TEMPERATURE), non_target),
    "dist inter-class": Loss(lambda u, v, t: inter_class_loss(u, v, TEMPERATURE), inter_class),
    "dist intra-class": Loss(lambda u, v, t: intra_class_loss(u, v, TEMPERATURE), intra_class),
    "ttm": Loss(lambda u, v, t: transformed_divergence(u, v, EXPONENT).mean(), ttm),
    "wttm": Loss(lambda u, v, t: wttm_loss(u, v, EXPONENT), wttm),
    "wsld": Loss(lambda u, v, t: wsld_loss(u, v, t, TEMPERATURE), wsld),
    "tfkd": Loss(lambda u, v, t: tfkd_loss(u, t, CORRECT, TEMPERATURE), tfkd),
    "ctkd": Loss(lambda u, v, t: ctkd_loss(u, v, torch.tensor(TEMPERATURE)), ctkd),
    "mlkd batch": Loss(lambda u, v, t: batch_loss(u, v, TEMPERATURE), batch_level),
    "mlkd class": Loss(lambda u, v, t: class_loss(u, v, TEMPERATURE), class_level),
}
CTKD_OPTIONS: dict[str, Any] = {
    "cross_entropy_weight": 0.1,
    "kd_weight": 0.9,
    "temperature_min": 1.0,
    "temperature_range": 20.0,
    "theta": 1.0,
    "curriculum_epochs": 10,
    "instance": False,
}


def ctkd_method(**options: Any) -> CTKD:
    """Built for the ten classes of `three_logits`."""
    made = CTKD(**CTKD_OPTIONS | options)
    networks: Any = SimpleNamespace(student_shapes=SimpleNamespace(logits=10))
    made.build(networks)
    return made


METHODS: dict[str, Callable[[], Method]] = {
    "nkd": lambda: NKD(cross_entropy_weight=1.0, gamma=3.5, temperature=TEMPERATURE),
    "dist": lambda: DIST(
        cross_entropy_weight=1.0, inter_class_weight=2.0, intra_class_weight=2.0, temperature=TEMPERATURE
    ),
    "ttm": lambda: TTM(cross_entropy_weight=1.0, ttm_weight=45.0, exponent=EXPONENT),
    "wttm": lambda: WTTM(cross_entropy_weight=1.0, wttm_weight=4.0, exponent=EXPONENT),
    "wsld": lambda: WSLD(cross_entropy_weight=1.0, wsld_weight=2.25, temperature=TEMPERATURE),
    "tfkd": lambda: TfKD(
        cross_entropy_weight=0.9, tfkd_weight=0.1, correct_probability=CORRECT, temperature=TEMPERATURE
    ),
    "ctkd": ctkd_method,
    "ctkd instance": lambda: ctkd_method(instance=True),
    "mlkd": lambda: MLKD(cross_entropy_weight=0.1, kd_weight=0.9, temperatures=(2.0, TEMPERATURE, 4.0)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
every_method = pytest.mark.parametrize("method", METHODS)


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss.implementation(student, teacher, target)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def difference_quotients(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor, step: float = 1e-5) -> Tensor:
    still, others, labels = student.tolist(), teacher.tolist(), target.tolist()

    def at(i: int, j: int, offset: float) -> float:
        moved = [list(row) for row in still]
        moved[i][j] += offset
        return loss.statement(moved, still, others, labels)

    return torch.tensor(
        [[(at(i, j, step) - at(i, j, -step)) / (2 * step) for j in range(len(row))] for i, row in enumerate(still)],
        dtype=torch.float64,
    )


# Values and gradients


@every_loss
@pytest.mark.parametrize("classes", [3, 7])
def test_value_and_gradient_are_those_of_the_statement(loss: Loss, classes: int):
    student, teacher, target = random_case(classes, torch.float64, batch=5)
    wanted = loss.statement(student.tolist(), student.tolist(), teacher.tolist(), target.tolist())
    value, gradient = value_and_gradient(loss, student, teacher, target)
    assert value.item() == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    quotients = difference_quotients(loss, student, teacher, target)
    torch.testing.assert_close(gradient, quotients, rtol=1e-6, atol=1e-8)
    assert gradient.abs().max() > 1e-3

    in_float32, gradient_in_float32 = value_and_gradient(loss, student.float(), teacher.float(), target)
    assert in_float32.item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(gradient_in_float32.double(), gradient, rtol=1e-4, atol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_extreme_logits_are_finite(loss: Loss, dtype: torch.dtype):
    """Each student meets each teacher, in one batch and in one of each student."""
    rows = torch.tensor(list(EXTREMES.values())).to(dtype)
    student, teacher = rows.repeat_interleave(len(rows), dim=0), rows.repeat(len(rows), 1)
    target = torch.zeros(len(student), dtype=torch.int64)
    size = len(rows)
    singly = zip(student.split(size), teacher.split(size), target.split(size), strict=True)
    for batch in ((student, teacher, target), *singly):
        value, gradient = value_and_gradient(loss, *batch)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_only_in_the_inputs(loss: Loss, dtype: torch.dtype):
    student, teacher, target = random_case(10, dtype)
    value, gradient = value_and_gradient(loss, student, teacher, target)
    wanted, gradient_in_float32 = value_and_gradient(loss, student.float(), teacher.float(), target)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, wanted)
    assert torch.equal(gradient, gradient_in_float32.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.implementation(student, teacher, target), value)


# NKD


def test_the_non_target_part_does_not_see_the_target():
    student, teacher, target = random_case(6, torch.float64)
    value, gradient = value_and_gradient(LOSSES["nkd non-target"], student, teacher, target)
    column = target[:, None]
    moved = (student.scatter(1, column, 50.0), teacher.scatter(1, column, -50.0), target)
    assert torch.equal(value_and_gradient(LOSSES["nkd non-target"], *moved)[0], value)
    assert (gradient.gather(1, column) == 0).all()


def test_the_non_target_part_is_nckd_and_an_entropy():
    """The entropy is the loss of a student that has reached its teacher."""
    student, teacher, target = random_case(6, torch.float64)
    entropy = non_target_loss(teacher, teacher, target, TEMPERATURE)
    torch.testing.assert_close(
        non_target_loss(student, teacher, target, TEMPERATURE),
        nckd_loss(student, teacher, target, TEMPERATURE) + entropy,
    )


# DIST


@pytest.mark.parametrize("dim", [0, 1])
def test_a_correlation_knows_neither_scale_nor_shift(dim: int):
    """Of each row (dim 1) or each column (dim 0) of probabilities; a negative scale turns it around."""
    student, teacher, _ = random_case(6, torch.float64)
    p, q = student.softmax(1), teacher.softmax(1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 6) if dim == 0 else (len(p), 1)
    scale, shift = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    relation = correlation(p.log(), q.log(), dim)
    torch.testing.assert_close(correlation((scale * p + shift).log(), q.log(), dim), relation)
    torch.testing.assert_close(correlation((2 - p).log(), q.log(), dim), -relation)
    assert relation.shape == (p.shape[1 - dim],)
    assert not torch.allclose(
        correlation((scale * p + shift).log(), q.log(), 1 - dim), correlation(p.log(), q.log(), 1 - dim)
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_a_student_at_its_teacher_has_no_loss(dim: int):
    _, teacher, _ = random_case(6, torch.float64)
    torch.testing.assert_close(
        correlation(teacher.log_softmax(1), teacher.log_softmax(1), dim).sum(), torch.tensor(6.0).double()
    )


def test_columns_that_nobody_predicts_still_count():
    """Their probabilities, 1e-22 and less, have squares that float32 does not know."""
    student, teacher, _ = random_case(6, torch.float64, spread=1.0)
    student[:, 0] -= 200.0
    teacher[:, 0] -= 200.0
    exact = correlation(student.log_softmax(1), teacher.log_softmax(1), 0)
    in_float32 = correlation(student.float().log_softmax(1), teacher.float().log_softmax(1), 0)
    torch.testing.assert_close(in_float32.double(), exact, rtol=1e-3, atol=1e-3)
    assert exact[0].abs() > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_student_that_says_the_same_of_all_has_neither_correlation_nor_gradient(dtype: torch.dtype):
    _, teacher, target = random_case(6, dtype)
    for name in ("dist inter-class", "dist intra-class"):
        value, gradient = value_and_gradient(LOSSES[name], torch.full_like(teacher, 0.3), teacher, target)
        assert value == TEMPERATURE**2
        assert (gradient == 0).all()


# TTM and WTTM


def test_ttm_is_kd_and_a_renyi_entropy():
    student, teacher, _ = random_case(6, torch.float64)
    temperature = 1 / EXPONENT
    renyi = torch.logsumexp(EXPONENT * student.log_softmax(1), dim=1) / (1 - EXPONENT)
    q = (teacher / temperature).softmax(1)
    shannon = -(q * q.log()).sum(1)
    kd = torch.stack([kd_loss(u, v, temperature) for u, v in zip(student.split(1), teacher.split(1), strict=True)])
    wanted = kd / temperature - (temperature - 1) * (renyi - shannon)
    torch.testing.assert_close(transformed_divergence(student, teacher, EXPONENT), wanted)


def test_the_power_sum_grows_with_what_a_teacher_does_not_know():
    teacher = torch.tensor([[1e4, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    certain, between, uniform = power_sum(teacher, EXPONENT).tolist()
    assert certain == pytest.approx(1.0)
    assert certain < between < uniform
    assert uniform == pytest.approx(4 ** (1 - EXPONENT))


# WSLD


def test_the_weight_of_a_soft_label_where_both_cross_entropies_round_to_zero():
    """Log-odds 201 against 200: S / R = exp(-1)."""
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


# Teacher-free KD


def test_the_hand_made_teacher_is_where_the_loss_vanishes():
    target = torch.tensor([2, 0])
    by_hand = torch.full((2, 5), (1 - CORRECT) / 4, dtype=torch.float64).scatter(1, target[:, None], CORRECT)
    value, gradient = value_and_gradient(LOSSES["tfkd"], by_hand / TEMPERATURE + 7.0, by_hand, target)
    torch.testing.assert_close(value, torch.zeros_like(value))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_teacher_free_means_without_a_teacher():
    assert not TfKD.needs_teacher
    own, distilled, _, target = three_logits()
    views = tuple(view._replace(teacher=None) for view in batch_of(own, distilled, own, target).views)
    batch = dataclasses.replace(batch_of(own, distilled, own, target), views=views)
    assert torch.isfinite(METHODS["tfkd"]().terms(batch)["tfkd"])


# CTKD


@pytest.mark.parametrize("epochs", [10, 5])
def test_the_curriculum_is_that_of_the_released_code(epochs: int):
    """There the factor of the gradient falls from 0 to -1 with epochs counted from 1."""
    for epoch in range(20):
        factor = (math.cos(min(epoch + 1, epochs) * math.pi / epochs) + 1) / 2 * (0 - -1) + -1
        assert curriculum(epoch, epochs) == pytest.approx(-factor)
    assert curriculum(0, 10) == pytest.approx(0.0245, abs=1e-4)
    assert curriculum(0, 0) == 1


def test_the_temperature_has_the_gradient_of_the_loss():
    student, teacher, target = random_case(6, torch.float64)
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ctkd_loss(student, teacher, temperature), temperature)
    rows = (student.tolist(), student.tolist(), teacher.tolist(), target.tolist())
    quotient = (ctkd(*rows, TEMPERATURE + 1e-5) - ctkd(*rows, TEMPERATURE - 1e-5)) / 2e-5
    assert gradient.item() == pytest.approx(quotient, rel=1e-6)


def test_a_temperature_for_each_sample():
    student, teacher, _ = random_case(6, torch.float64)
    temperatures = torch.linspace(1, 20, len(student), dtype=torch.float64)
    singly = zip(student.split(1), teacher.split(1), temperatures.tolist(), strict=True)
    wanted = torch.stack([kd_loss(u, v, temperature) for u, v, temperature in singly]).mean()
    torch.testing.assert_close(ctkd_loss(student, teacher, temperatures), wanted)


@pytest.mark.parametrize("instance", [False, True])
def test_the_temperature_starts_where_the_released_code_does(instance: bool):
    _, distilled, teacher, _ = three_logits(torch.float32)
    temperature = ctkd_method(instance=instance).temperature(distilled, teacher, 1.0)
    assert temperature.shape == ((len(teacher),) if instance else ())
    torch.testing.assert_close(temperature, torch.full_like(temperature, 1 + 20 / (1 + math.exp(-1))))


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("theta", [1.0, -3.0])
def test_the_temperature_ascends(instance: bool, theta: float):
    """A step of plain descent on the method's own parameters makes the loss larger, the student's makes it smaller."""
    made = ctkd_method(instance=instance, theta=theta)
    own, distilled, teacher, target = three_logits(torch.float32)
    batch = batch_of(own, distilled, teacher, target)
    loss, parameters = made.terms(batch)["kd"], list(made.parameters())
    of_student, *gradients = torch.autograd.grad(loss, [distilled, *parameters])
    slope = torch.stack([gradient.abs().sum() for gradient in gradients]).sum()
    assert slope > 0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(1e-2 / slope * gradient)
        ascended = made.terms(batch)["kd"]
        descended = made.terms(batch_of(own, distilled - 1e-2 * of_student, teacher, target))["kd"]
    assert ascended > loss
    assert descended < ascended


def test_the_ascent_grows_with_the_curriculum():
    batch = batch_of(*three_logits())
    gradients = []
    for epoch in (0, 4, 9, 100):
        made = ctkd_method().double()
        loss = made.terms(dataclasses.replace(batch, epoch=epoch))["kd"]
        gradients.append(torch.autograd.grad(loss, made.theta)[0].item())
    wanted = [gradients[-1] * curriculum(epoch, 10) for epoch in (0, 4, 9, 100)]
    assert gradients == pytest.approx(wanted)


def test_the_student_does_not_learn_through_the_temperature():
    """Instance-wise, its gradient is that of KD at the temperatures that were said."""
    made = ctkd_method(instance=True).double()
    torch.nn.init.normal_(made.perceptron[-1].weight)
    own, distilled, teacher, target = three_logits()
    (gradient,) = torch.autograd.grad(made.terms(batch_of(own, distilled, teacher, target))["kd"], distilled)
    said = made.temperature(distilled, teacher, 1.0).detach()
    assert said.std() > 0
    (wanted,) = torch.autograd.grad(ctkd_loss(distilled, teacher, said), distilled)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("instance", [False, True])
def test_the_temperature_survives_a_checkpoint(instance: bool, tmp_path):
    def built() -> CTKD:
        return CTKD(**CTKD_OPTIONS | {"instance": instance})

    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, built(), teacher=tiny_teacher())
    fresh = weights(distiller.method)
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    learned = weights(distiller.method)
    assert fresh
    assert not same(fresh, learned)
    loaded = tiny_distiller(data, built(), teacher=tiny_teacher())
    loaded.load_state_dict(distiller.state_dict())
    assert same(weights(loaded.method), learned)


# MLKD


def test_each_level_sums_over_its_temperatures():
    own, distilled, teacher, target = three_logits()
    terms = METHODS["mlkd"]().terms(batch_of(own, distilled, teacher, target))
    for name, loss in (("instance", kd_loss), ("batch", batch_loss), ("class", class_loss)):
        wanted = sum(loss(distilled, teacher, temperature) for temperature in (2.0, TEMPERATURE, 4.0))
        torch.testing.assert_close(terms[name], wanted)


def test_levels_do_not_see_the_order_of_samples_and_classes():
    student, teacher, _ = random_case(7, torch.float64)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for loss in (batch_loss, class_loss):
        wanted = loss(student, teacher, TEMPERATURE)
        torch.testing.assert_close(loss(student[:, shuffled], teacher[:, shuffled], TEMPERATURE), wanted)
        torch.testing.assert_close(loss(student.flip(0), teacher.flip(0), TEMPERATURE), wanted)
        assert loss(teacher, teacher, TEMPERATURE) == 0


# The methods


@every_method
def test_terms_read_their_own_logits(method: str):
    """Cross-entropy the student's own, every other those after serialization; none but the first view's."""
    own, distilled, teacher, target = three_logits()
    made = METHODS[method]()
    terms = made.terms(batch_of(own, distilled, teacher, target))
    assert made.distils_logits
    assert set(terms) == set(made.weights(0))
    assert len(terms) > 1
    for name, term in terms.items():
        of_own, of_distilled = torch.autograd.grad(term, (own, distilled), retain_graph=True, allow_unused=True)
        read, unread = (of_own, of_distilled) if name == "cross_entropy" else (of_distilled, of_own)
        assert read.abs().sum() > 0
        assert unread is None


@every_method
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_terms_are_float32_scalars_whatever_the_network_runs_in(method: str, dtype: torch.dtype):
    for name, term in METHODS[method]().terms(batch_of(*three_logits(dtype))).items():
        assert term.dtype == torch.float32, name
        assert term.shape == (), name


@every_method
@pytest.mark.parametrize(("new_teacher", "new_student"), PAIRS, ids=lambda make: make.__name__)
def test_two_steps_of_training(new_teacher: NewNetwork, new_student: NewNetwork, method: str, tmp_path):
    made = METHODS[method]()
    data = tiny_data(tmp_path)
    teacher = tiny_teacher(new_teacher) if made.needs_teacher else None
    distiller = tiny_distiller(data, made, teacher=teacher, new_student=new_student)
    before = weights(distiller.student)
    trainer = tiny_trainer(1, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(distiller, datamodule=data)
    assert trainer.global_step == 2
    assert not same(before, weights(distiller.student))
    assert all(torch.isfinite(value).all() for value in distiller.state_dict().values())
