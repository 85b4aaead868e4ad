"""Weighted soft labels (WSLD): H. Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
Tradeoff Perspective", ICLR 2021, arXiv 2102.00650.

    w    = 1 - exp(-S / R), without a gradient
    WSLD = w T^2 (-sum_i q_i log p_i), averaged over the batch

Notation: p = softmax(u / T) of the student's logits u, q = softmax(v / T) of the teacher's logits v, both [B, C]. S and
R are the cross-entropies of student and teacher with the label, both at temperature 1.

The better the student knows a sample compared with the teacher, the less its soft label counts.

S and R are the softplus of minus the log-odds of the target. Their ratio is computed from their logarithms, so that it
is exact even if both round to zero. The authors add 1e-7 to R instead.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.decoupling import target_log_odds
from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def _log_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute log(-log softmax(logits)_t) of each sample, [B]."""
    log_odds = target_log_odds(logits, target, 1.0)
    certain = log_odds > 20  # there softplus(-l) is exp(-l), to all digits of float32
    return torch.where(certain, -log_odds, F.softplus(-log_odds.masked_fill(certain, 0)).log())


@torch.no_grad()
def soft_label_weight(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Compute w = 1 - exp(-S / R) of each sample, in [0, 1]: logits [B, C] and target [B] to [B]."""
    log_ratio = _log_cross_entropy(student_logits, target) - _log_cross_entropy(teacher_logits, target)
    return -torch.expm1(-log_ratio.exp())


def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute WSLD of logits [B, C] and target [B]. Gradient of one sample's loss at u_i: w T (p_i - q_i)."""
    log_p, log_q = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    soft = -(log_q.exp() * log_p).sum(dim=1)
    return temperature**2 * (soft_label_weight(student_logits, teacher_logits, target) * soft).mean()


class WSLD(LogitMethod):
    """cross_entropy_weight * CE + wsld_weight * WSLD."""

    def __init__(self, *, cross_entropy_weight: float, wsld_weight: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.wsld_weight = wsld_weight
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "wsld": self.wsld_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the WSLD loss."""
        return {"wsld": wsld_loss(logits.student, logits.teacher, batch.target, self.temperature)}
