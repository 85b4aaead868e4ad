"""Logits for tests of losses: random and extreme cases, exact softmax in plain Python, and the input of a method.

It also has the losses of decoupled logits (DKD, AEKT) as functions of the logits themselves.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from src.methods import aekt, dkd
from src.methods.decoupling import decouple
from src.methods.method import Batch, DistillationLogits, LogitPair, View, logits_only
from src.models.network import Output

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    """Compute log softmax(logits / T) in plain Python, exact even if one class has nearly all of the probability.

    The logarithm of the largest probability is -log1p of the sum over the other classes.
    """
    top = max(range(len(logits)), key=logits.__getitem__)
    gaps = [(x - logits[top]) / temperature for x in logits]
    rest = math.fsum(math.exp(gap) for i, gap in enumerate(gaps) if i != top)
    return [gap - math.log1p(rest) for gap in gaps]


def divergence(log_q: list[float], log_p: list[float]) -> float:
    """Compute KL(q, p) from logarithms."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_q, log_p, strict=True))


def random_case(classes: int, dtype: torch.dtype, batch: int = 6, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits of student and teacher [B, C] and target classes [B], the same ones in every call."""
    generator = torch.Generator().manual_seed(classes)
    student = spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (batch,), generator=generator)
    return student.to(dtype), teacher.to(dtype), target


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
"""Logits of five classes. The target is class 0."""


def extreme_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Pair each of `EXTREMES` as the student's logits with each as the teacher's. The target is class 0."""
    rows = torch.tensor(list(EXTREMES.values())).to(dtype)
    student, teacher = rows.repeat_interleave(len(rows), dim=0), rows.repeat(len(rows), 1)
    return student, teacher, torch.zeros(len(student), dtype=torch.int64)


BATCH = 5
"""The number of samples of `three_logits`."""


def three_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's own logits, its logits for distillation, the teacher's, all [B, 10], and target classes [B].

    The first two are leaves, so that gradients tell which of them a term reads.
    """
    distilled, teacher, target = random_case(10, dtype, BATCH)
    own, _, _ = random_case(10, dtype, BATCH)
    return own.flip(0).requires_grad_(), distilled.requires_grad_(), teacher, target


def observed(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor,
    *,
    own: Tensor | None = None,
    epoch: int = 0,
    views: int = 1,
) -> tuple[Batch, DistillationLogits]:
    """Make the input of a logit method: `method.all_terms(*observed(...))`.

    `student` and `teacher` are the logits [B, C] for distillation. `own` are the student's own logits, by default
    the same. Views after the first have the negative of all logits, which no method with one view may read.
    """
    own = student if own is None else own
    images = torch.zeros(len(target), 3, 2, 2, dtype=torch.promote_types(student.dtype, torch.float32))
    found, pairs = [], []
    for sign in (1, *[-1] * (views - 1)):
        answer = None if teacher is None else sign * teacher
        output = cast(Output, logits_only(sign * own))
        found.append(View(images, output, None if answer is None else logits_only(answer)))
        pairs.append(LogitPair(sign * student, answer))
    batch = Batch(tuple(found), target, torch.arange(len(target)), epoch=epoch, step=0)
    return batch, DistillationLogits(tuple(pairs))


def of_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a loss of decoupled logits into one of logits: loss(student, teacher, target, temperature, ...)."""

    def from_logits(
        student: Tensor, teacher: Tensor, target: Tensor, temperature: float, *args: Any, **options: Any
    ) -> Tensor:
        return loss(decouple(student, teacher, target, temperature), temperature, *args, **options)

    return from_logits


tckd_loss, nckd_loss = of_logits(dkd.tckd_loss), of_logits(dkd.nckd_loss)


def explicit_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    weighting: aekt.Weighting = "ratio",
    max_weight: float = 10.0,
    confidence_term: bool = True,
) -> Tensor:
    """Compute explicit transfer with its weight from the logits themselves."""
    decoupled = decouple(student, teacher, target, temperature)
    log_p, log_q = (F.logsigmoid(each) for each in (decoupled.student_log_odds, decoupled.teacher_log_odds))
    weight = aekt.explicit_weight(log_p, log_q, weighting, max_weight)
    return aekt.explicit_transfer_loss(decoupled, weight, temperature, confidence_term)
