"""Normalised knowledge distillation (NKD): Z. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation:
A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005.

    NKD = -q_t log p_t - gamma T^2 sum_{i != t} q'_i log p'_i, averaged over the batch

Notation: student logits u, teacher logits v, both [B, C], target class t [B]. p = softmax(u) and q = softmax(v) have no
temperature. Among the C - 1 non-target classes, p' = softmax(u_i / T) and q' = softmax(v_i / T), which sum to one.
"""

from pydantic import PositiveFloat
from torch import Tensor

from src.methods.decoupling import non_target_logits
from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Compute -q_t log p_t, averaged over the batch. Gradient of one sample's loss at u: q_t (p - onehot(t))."""
    log_p = log_softmax(student_logits, 1.0).gather(1, target[:, None])
    log_q = log_softmax(teacher_logits, 1.0).gather(1, target[:, None])
    return -(log_q.exp() * log_p).mean()


def non_target_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute -T^2 sum_{i != t} q'_i log p'_i, averaged over the batch: DKD's NCKD plus T^2 times the entropy of q'.

    Gradient of one sample's loss: 0 at u_t, T (p'_i - q'_i) at u_i.
    """
    log_p = log_softmax(non_target_logits(student_logits, target), temperature)
    log_q = log_softmax(non_target_logits(teacher_logits, target), temperature)
    return -(temperature**2) * (log_q.exp() * log_p).sum(dim=1).mean()


class NKD(LogitMethod):
    """cross_entropy_weight * CE + soft target + gamma * non-target."""

    def __init__(self, *, cross_entropy_weight: float, gamma: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.gamma = gamma
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "soft_target": 1.0, "non_target": self.gamma}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return both parts of NKD."""
        return {
            "soft_target": soft_target_loss(logits.student, logits.teacher, batch.target),
            "non_target": non_target_loss(logits.student, logits.teacher, batch.target, self.temperature),
        }
