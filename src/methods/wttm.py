"""Weighted transformed teacher matching (WTTM): K. Zheng and E.-H. Yang, "Knowledge Distillation Based on Transformed
Teacher Matching", ICLR 2024, arXiv 2402.11148.

    U    = sum_j q_j^gamma
    WTTM = U KL(q', p), averaged over the batch

Notation: as in `src/methods/ttm.py`. U is the power sum of the teacher's probabilities for each sample: 1 for a certain
teacher, C^(1 - gamma) for a uniform prediction.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax
from src.methods.ttm import transformed_divergence


def power_sum(teacher_logits: Tensor, exponent: float) -> Tensor:
    """Compute U = sum_j q_j^gamma of each sample: logits [B, C] to [B].

    >>> power_sum(torch.zeros(1, 4), exponent=0.5)
    tensor([2.])
    """
    return torch.logsumexp(exponent * log_softmax(teacher_logits, 1.0), dim=1).exp()


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float) -> Tensor:
    """Compute U KL(q', p), averaged over the batch. Logits are [B, C].

    Gradient of one sample's loss at u_i: U (p_i - q'_i).
    """
    divergence = transformed_divergence(student_logits, teacher_logits, exponent)
    return (power_sum(teacher_logits, exponent) * divergence).mean()


class WTTM(LogitMethod):
    """cross_entropy_weight * CE + wttm_weight * WTTM. `exponent` is the paper's gamma."""

    def __init__(self, *, cross_entropy_weight: float, wttm_weight: float, exponent: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.wttm_weight = wttm_weight
        self.exponent = exponent

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "wttm": self.wttm_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the WTTM loss."""
        return {"wttm": wttm_loss(logits.student, logits.teacher, self.exponent)}
