"""Normalised knowledge distillation (NKD): Z. Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation:
A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005.

NKD = -q_t log p_t - gamma T^2 sum_{i != t} q'_i log p'_i, averaged over the batch.

Notation: student logits u, teacher logits v, both [B, C], target class t [B]; p = softmax(u), q = softmax(v) without a
temperature; among the C - 1 non-target classes p' = softmax(u_i / T), q' = softmax(v_i / T), which sum to one.
"""

from pydantic import PositiveFloat
from torch import Tensor

from src.methods.decoupling import non_target_logits
from src.methods.method import Batch, Method, cross_entropy, log_softmax


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """-q_t log p_t, averaged over the batch. Gradient of one sample's loss at u: q_t (p - onehot(t))."""
    log_p = log_softmax(student_logits, 1.0).gather(1, target[:, None])
    log_q = log_softmax(teacher_logits, 1.0).gather(1, target[:, None])
    return -(log_q.exp() * log_p).mean()


def non_target_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-T^2 sum_{i != t} q'_i log p'_i, averaged over the batch: DKD's NCKD and the entropy of q'.

    Gradient of one sample's loss at u_t: 0, at u_i: T (p'_i - q'_i).
    """
    log_p = log_softmax(non_target_logits(student_logits, target), temperature)
    log_q = log_softmax(non_target_logits(teacher_logits, target), temperature)
    return -(temperature**2) * (log_q.exp() * log_p).sum(dim=1).mean()


class NKD(Method):
    """cross_entropy_weight * CE + soft target + gamma * non-target."""

    distils_logits = True

    def __init__(self, *, cross_entropy_weight: float, gamma: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.gamma = gamma
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "soft_target": 1.0, "non_target": self.gamma}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, both parts of NKD on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "soft_target": soft_target_loss(student, teacher, batch.target),
            "non_target": non_target_loss(student, teacher, batch.target, self.temperature),
        }
