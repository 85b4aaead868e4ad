"""The gradient of each loss at the student's logits, in closed form.

Notation as in `src/methods/dkd.py`: student logits u, teacher logits v, target class t, temperature T. p and q are the
softmax of u and v at T, and p' and q' are the softmax among the other classes. Every loss that depends on the student
through p_t alone pushes along one direction, p' - onehot(t). TCKD and explicit transfer differ in how hard they push.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from src.methods.aekt import Weighting, explicit_weight
from src.methods.decoupling import target_log_odds
from src.methods.method import at_least_float32, log_softmax


def kd_gradient(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute the gradient of each sample's KD loss at u, T (p - q), [B, C]."""
    p, q = log_softmax(student_logits, temperature).exp(), log_softmax(teacher_logits, temperature).exp()
    return temperature * (p - q)


def tckd_gradient(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the gradient of each sample's TCKD at u, T (q_t - p_t) (p' - onehot(t)), [B, C]."""
    student, teacher = (target_log_odds(logits, target, temperature) for logits in (student_logits, teacher_logits))
    gap = teacher.sigmoid() - student.sigmoid()
    return temperature * gap[:, None] * target_direction(student_logits, target, temperature)


def nckd_gradient(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the gradient of each sample's NCKD at u, T (p' - q') and 0 at t, [B, C]."""
    student, teacher = (_among_others(logits, target, temperature) for logits in (student_logits, teacher_logits))
    return temperature * (student - teacher)


def explicit_transfer_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    weighting: Weighting = "ratio",
    max_weight: float = 10.0,
    confidence_term: bool = True,
    weight_temperature: float | None = None,
) -> Tensor:
    """Compute the gradient of each sample's L_AEKT at u, w (1 - p_t) (p' - onehot(t)), [B, C].

    Without the confidence term (the ablation of the paper's Figure B.1) it is w (p' - onehot(t)). p_t and q_t of the
    weight w are taken at `weight_temperature` (None: at `temperature`).
    """
    log_p, log_q = (
        F.logsigmoid(target_log_odds(logits, target, weight_temperature or temperature))
        for logits in (student_logits, teacher_logits)
    )
    weight = explicit_weight(log_p, log_q, weighting, max_weight)
    student = target_log_odds(student_logits, target, temperature)
    size = weight * (-student).sigmoid() if confidence_term else weight
    return size[:, None] * target_direction(student_logits, target, temperature)


def target_direction(student_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute p' - onehot(t), [B, C].

    Descent along it raises the target logit, and lowers each other logit in proportion to p'.
    """
    others = _among_others(student_logits, target, temperature)
    return others.scatter(1, target[:, None], -1.0)


def _among_others(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute p' [B, C], with 0 at the target."""
    return log_softmax(at_least_float32(logits).scatter(1, target[:, None], -math.inf), temperature).exp()
