"""Weighted transformed teacher matching (WTTM): K. Zheng and E.-H. Yang, "Knowledge Distillation Based on Transformed
Teacher Matching", ICLR 2024, arXiv 2402.11148.

With the notation of `ttm`, WTTM = U KL(q', p), averaged over the batch, where U = sum_j q_j^gamma is the power sum of
each teacher's probabilities: 1 for a certain teacher, C^(1 - gamma) for one that does not know.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from src.methods.method import Batch, Method, cross_entropy, log_softmax
from src.methods.ttm import transformed_divergence


def power_sum(teacher_logits: Tensor, exponent: float) -> Tensor:
    """U = sum_j q_j^gamma of each sample: logits [B, C] to [B]."""
    return torch.logsumexp(exponent * log_softmax(teacher_logits, 1.0), dim=1).exp()


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float) -> Tensor:
    """U KL(q', p), averaged over the batch; logits [B, C]. Gradient of one sample's loss at u_i: U (p_i - q'_i)."""
    divergence = transformed_divergence(student_logits, teacher_logits, exponent)
    return (power_sum(teacher_logits, exponent) * divergence).mean()


class WTTM(Method):
    """cross_entropy_weight * CE + wttm_weight * WTTM; `exponent` is the paper's gamma."""

    distils_logits = True

    def __init__(self, *, cross_entropy_weight: float, wttm_weight: float, exponent: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.wttm_weight = wttm_weight
        self.exponent = exponent

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "wttm": self.wttm_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, WTTM on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "wttm": wttm_loss(student, teacher, self.exponent),
        }
