"""Transformed teacher matching (TTM): K. Zheng and E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher
Matching", ICLR 2024, arXiv 2402.11148.

    q'_i = q_i^gamma / sum_j q_j^gamma, which is softmax(v / T) with T = 1 / gamma
    TTM  = KL(q', p), averaged over the batch

Notation: p = softmax(u) of the student's logits u, q = softmax(v) of the teacher's logits v, both [B, C]. q' is the
power transform of q. TTM is KD without a temperature on the student's side.

The paper reads it as KD plus a reward for the student's entropy:

    KL(q', p) = T KL(q', p') - (T - 1) (H_gamma(p) - H(q'))

p' is the same transform of p, and H_gamma(p) = log(sum_j p_j^gamma) / (1 - gamma) its Renyi entropy.
"""

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def transformed_divergence(student_logits: Tensor, teacher_logits: Tensor, exponent: float) -> Tensor:
    """Compute KL(q', p) of each sample: logits [B, C] to [B]. Gradient at u_i: p_i - q'_i."""
    log_p, log_q = log_softmax(student_logits, 1.0), log_softmax(teacher_logits, 1 / exponent)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)


class TTM(LogitMethod):
    """cross_entropy_weight * CE + ttm_weight * TTM. `exponent` is the paper's gamma."""

    def __init__(self, *, cross_entropy_weight: float, ttm_weight: float, exponent: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.ttm_weight = ttm_weight
        self.exponent = exponent

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "ttm": self.ttm_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the TTM loss."""
        return {"ttm": transformed_divergence(logits.student, logits.teacher, self.exponent).mean()}
