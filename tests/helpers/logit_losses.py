"""The losses on logits, each beside an independent statement of its formula: the registry of the loss tests.

A statement is plain Python on float64 rows, and tests take its gradient by central differences. A statement gets the
student's rows twice: rows that the differences move, and fixed rows for the parts whose gradient the paper stops.

A new method on logits is entered in `LOGIT_LOSSES` under its name in `conf/method`, or "name, part".
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.methods.ctkd import ctkd_loss
from src.methods.dist import inter_class_loss, intra_class_loss
from src.methods.kd import kd_loss
from src.methods.method import cross_entropy
from src.methods.mlkd import batch_loss, class_loss
from src.methods.nkd import non_target_loss, soft_target_loss
from src.methods.tfkd import tfkd_loss
from src.methods.ttm import transformed_divergence
from src.methods.wsld import wsld_loss
from src.methods.wttm import wttm_loss
from tests.helpers.losses import divergence, explicit_transfer_loss, log_softmax, nckd_loss, observed, tckd_loss

Rows = list[list[float]]
Statement = Callable[[Rows, Rows, Rows, list[int]], float]
TEMPERATURE, EXPONENT, CORRECT, MAX_WEIGHT = 3.0, 0.2, 0.99, 1.5


class LogitLoss(NamedTuple):
    """A loss and its statement."""

    implementation: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Takes the student's logits, the teacher's logits and the target."""
    statement: Statement
    """Takes the student's rows, the same rows fixed, the teacher's rows, and the targets."""


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def without(row: list[float], t: int) -> list[float]:
    return [x for i, x in enumerate(row) if i != t]


def soft_cross_entropy(log_q: list[float], log_p: list[float]) -> float:
    return -math.fsum(math.exp(b) * a for a, b in zip(log_p, log_q, strict=True))


def hard_cross_entropy(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return mean([-log_softmax(u, 1.0)[t] for u, t in zip(us, target, strict=True)])


def kd(us: Rows, _: Rows, vs: Rows, target: list[int], temperature: float = TEMPERATURE) -> float:
    return temperature**2 * mean(
        [divergence(log_softmax(v, temperature), log_softmax(u, temperature)) for u, v in zip(us, vs, strict=True)]
    )


def mutual(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return kd(us, us, vs, target, 1.0)


def confidence(row: list[float], t: int) -> list[float]:
    """Compute log p_t and log(1 - p_t)."""
    log_p = log_softmax(row, TEMPERATURE)
    return [log_p[t], math.log(math.fsum(math.exp(x) for x in without(log_p, t)))]


def tckd(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    samples = zip(us, vs, target, strict=True)
    return TEMPERATURE**2 * mean([divergence(confidence(v, t), confidence(u, t)) for u, v, t in samples])


def nckd(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return TEMPERATURE**2 * mean(
        [
            divergence(log_softmax(without(v, t), TEMPERATURE), log_softmax(without(u, t), TEMPERATURE))
            for u, v, t in zip(us, vs, target, strict=True)
        ]
    )


def explicit_transfer(us: Rows, still: Rows, vs: Rows, target: list[int]) -> float:
    losses = []
    for u, fixed, v, t in zip(us, still, vs, target, strict=True):
        weight = min(math.exp(confidence(v, t)[0] - confidence(fixed, t)[0]), MAX_WEIGHT)
        losses.append(-TEMPERATURE * weight * confidence(u, t)[0])
    return mean(losses)


def soft_target(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    samples = zip(us, vs, target, strict=True)
    return mean([-math.exp(log_softmax(v, 1.0)[t]) * log_softmax(u, 1.0)[t] for u, v, t in samples])


def non_target(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    samples = zip(us, vs, target, strict=True)
    return TEMPERATURE**2 * mean(
        [
            soft_cross_entropy(log_softmax(without(v, t), TEMPERATURE), log_softmax(without(u, t), TEMPERATURE))
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
        losses.append(weight * soft_cross_entropy(log_softmax(v, TEMPERATURE), log_softmax(u, TEMPERATURE)))
    return TEMPERATURE**2 * mean(losses)


def tfkd(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    losses = []
    for u, t in zip(us, target, strict=True):
        by_hand = [CORRECT if i == t else (1 - CORRECT) / (len(u) - 1) for i in range(len(u))]
        losses.append(divergence(log_softmax(by_hand, TEMPERATURE), log_softmax(u, 1.0)))
    return mean(losses)


def product(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def squared_gaps(p: Rows, q: Rows) -> float:
    """Sum the squared differences between the products of all pairs of rows."""
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p))]
    return math.fsum((product(q[i], q[j]) - product(p[i], p[j])) ** 2 for i, j in pairs)


def batch_level(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    return squared_gaps(softmax_rows(us), softmax_rows(vs)) / len(us)


def class_level(us: Rows, _: Rows, vs: Rows, target: list[int]) -> float:
    p, q = ([list(column) for column in zip(*softmax_rows(rows), strict=True)] for rows in (us, vs))
    return squared_gaps(p, q) / len(p)


LOGIT_LOSSES: dict[str, LogitLoss] = {
    "vanilla": LogitLoss(lambda u, v, t: cross_entropy(observed(u, None, t)[0]), hard_cross_entropy),
    "kd": LogitLoss(lambda u, v, t: kd_loss(u, v, TEMPERATURE), kd),
    "dkd, tckd": LogitLoss(lambda u, v, t: tckd_loss(u, v, t, TEMPERATURE), tckd),
    "dkd, nckd": LogitLoss(lambda u, v, t: nckd_loss(u, v, t, TEMPERATURE), nckd),
    "aekt": LogitLoss(
        lambda u, v, t: explicit_transfer_loss(u, v, t, TEMPERATURE, "ratio", MAX_WEIGHT), explicit_transfer
    ),
    "dml": LogitLoss(lambda u, v, t: kd_loss(u, v, 1.0), mutual),
    "nkd, soft target": LogitLoss(soft_target_loss, soft_target),
    "nkd, non-target": LogitLoss(lambda u, v, t: non_target_loss(u, v, t, TEMPERATURE), non_target),
    "dist, inter-class": LogitLoss(lambda u, v, t: inter_class_loss(u, v, TEMPERATURE), inter_class),
    "dist, intra-class": LogitLoss(lambda u, v, t: intra_class_loss(u, v, TEMPERATURE), intra_class),
    "ttm": LogitLoss(lambda u, v, t: transformed_divergence(u, v, EXPONENT).mean(), ttm),
    "wttm": LogitLoss(lambda u, v, t: wttm_loss(u, v, EXPONENT), wttm),
    "wsld": LogitLoss(lambda u, v, t: wsld_loss(u, v, t, TEMPERATURE), wsld),
    "tfkd": LogitLoss(lambda u, v, t: tfkd_loss(u, t, CORRECT, TEMPERATURE), tfkd),
    "ctkd": LogitLoss(lambda u, v, t: ctkd_loss(u, v, torch.tensor(TEMPERATURE)), kd),
    "mlkd, instance": LogitLoss(lambda u, v, t: kd_loss(u, v, TEMPERATURE), kd),
    "mlkd, batch": LogitLoss(lambda u, v, t: batch_loss(u, v, TEMPERATURE), batch_level),
    "mlkd, class": LogitLoss(lambda u, v, t: class_loss(u, v, TEMPERATURE), class_level),
}


def value_and_gradient(loss: LogitLoss, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a loss and its gradient at the student's logits by the implementation."""
    student = student.clone().requires_grad_()
    value = loss.implementation(student, teacher, target)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def difference_quotients(
    loss: LogitLoss, student: Tensor, teacher: Tensor, target: Tensor, step: float = 1e-5
) -> Tensor:
    """Compute the gradient [B, C] of the statement by central differences."""
    still, others, labels = student.tolist(), teacher.tolist(), target.tolist()

    def at(i: int, j: int, offset: float) -> float:
        moved = [list(row) for row in still]
        moved[i][j] += offset
        return loss.statement(moved, still, others, labels)

    return torch.tensor(
        [[(at(i, j, step) - at(i, j, -step)) / (2 * step) for j in range(len(row))] for i, row in enumerate(still)],
        dtype=torch.float64,
    )
