"""Weighted soft labels (WSLD): H. Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
Tradeoff Perspective", ICLR 2021, arXiv 2102.00650.

With p = softmax(u / T) of the student's logits u, q = softmax(v / T) of the teacher's logits v, both [B, C], and the
cross-entropies S and R of student and teacher with the label, both at temperature 1,

    WSLD = w T^2 (-sum_i q_i log p_i), averaged over the batch, w = 1 - exp(-S / R),

where no gradient flows through w: the soft label counts for less the better the student already knows the sample than
the teacher does. S and R are the softplus of minus the target's log-odds; their ratio is taken between logarithms, so
that it holds where both round to zero. The authors add 1e-7 to R instead.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.decoupling import target_log_odds
from src.methods.method import Batch, Method, cross_entropy, log_softmax


def _log_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """log(-log softmax(logits)_t) of each sample, [B]."""
    log_odds = target_log_odds(logits, target, 1.0)
    sure = log_odds > 20  # there softplus(-l) is exp(-l), to all digits of float32
    return torch.where(sure, -log_odds, F.softplus(-log_odds.masked_fill(sure, 0)).log())


@torch.no_grad()
def soft_label_weight(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """w = 1 - exp(-S / R) of each sample, in [0, 1]: logits [B, C] and target [B] to [B]."""
    log_ratio = _log_cross_entropy(student_logits, target) - _log_cross_entropy(teacher_logits, target)
    return -torch.expm1(-log_ratio.exp())


def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """WSLD; logits [B, C], target [B]. Gradient of one sample's loss at u_i: w T (p_i - q_i)."""
    log_p, log_q = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    soft = -(log_q.exp() * log_p).sum(dim=1)
    return temperature**2 * (soft_label_weight(student_logits, teacher_logits, target) * soft).mean()


class WSLD(Method):
    """cross_entropy_weight * CE + wsld_weight * WSLD."""

    distils_logits = True

    def __init__(self, *, cross_entropy_weight: float, wsld_weight: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.wsld_weight = wsld_weight
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "wsld": self.wsld_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, WSLD on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "wsld": wsld_loss(student, teacher, batch.target, self.temperature),
        }
