"""Decoupled knowledge distillation (DKD): B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv
2203.08679.

    loss = CE + warm-up * (alpha TCKD + beta NCKD)
    TCKD = T^2 KL([q_t, 1 - q_t], [p_t, 1 - p_t])         target class against the others
    NCKD = T^2 KL(q', p')                                 among the other classes

Notation: u are the student's logits for distillation, v the teacher's logits, t is the target class, T the temperature.
p = softmax(u / T), q = softmax(v / T), and among the non-target classes p'_i = p_i / (1 - p_t), q'_i = q_i / (1 - q_t).

Hinton's loss is a sum of the two: KD = TCKD + (1 - q_t) NCKD.
"""

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.decoupling import Decoupled, decouple
from src.methods.method import Batch, DistillationLogits, LogitMethod, warm_up


def tckd_loss(decoupled: Decoupled, temperature: float) -> Tensor:
    """Compute TCKD = T^2 KL([q_t, 1 - q_t], [p_t, 1 - p_t]), averaged over the batch.

    Gradient of one sample's loss: T (p_t - q_t) at u_t, T p'_i (q_t - p_t) at u_i.
    """
    log_p, log_not_p = F.logsigmoid(decoupled.student_log_odds), F.logsigmoid(-decoupled.student_log_odds)
    log_q, log_not_q = F.logsigmoid(decoupled.teacher_log_odds), F.logsigmoid(-decoupled.teacher_log_odds)
    divergence = log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)
    return temperature**2 * divergence.mean()


def nckd_loss(decoupled: Decoupled, temperature: float) -> Tensor:
    """Compute NCKD = T^2 KL(q', p'), averaged over the batch. Exactly 0 for two classes.

    Gradient of one sample's loss: 0 at u_t, T (p'_i - q'_i) at u_i.
    """
    return temperature**2 * decoupled.non_target_kl.mean()


class DKD(LogitMethod):
    """cross_entropy_weight * CE + warm-up * (alpha * TCKD + beta * NCKD)."""

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        alpha: float,
        beta: float,
        temperature: PositiveFloat,
        warmup_epochs: NonNegativeFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.warmup_epochs = warmup_epochs

    def weights(self, epoch: int) -> dict[str, float]:
        """Warm the distillation terms up linearly. Cross-entropy has its full weight from the start."""
        warm = warm_up(epoch, self.warmup_epochs)
        return {"cross_entropy": self.cross_entropy_weight, "tckd": warm * self.alpha, "nckd": warm * self.beta}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return TCKD and NCKD."""
        decoupled = decouple(logits.student, logits.teacher, batch.target, self.temperature)
        return {"tckd": tckd_loss(decoupled, self.temperature), "nckd": nckd_loss(decoupled, self.temperature)}
