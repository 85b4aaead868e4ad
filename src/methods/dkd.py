"""Decoupled knowledge distillation (DKD): B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv
2203.08679.

Student logits u, teacher logits v, target class t, temperature T; p = softmax(u / T), q = softmax(v / T), and among the
non-target classes p'_i = p_i / (1 - p_t), q'_i = q_i / (1 - q_t). KD = TCKD + (1 - q_t) NCKD.
"""

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.decoupling import Decoupled, decouple
from src.methods.method import Batch, Method, cross_entropy, warm_up


def tckd_loss(decoupled: Decoupled, temperature: float) -> Tensor:
    """TCKD = T^2 KL([q_t, 1 - q_t], [p_t, 1 - p_t]), averaged over the batch.

    Gradient of one sample's loss at u_t: T (p_t - q_t), at u_i: T p'_i (q_t - p_t).
    """
    log_p, log_not_p = F.logsigmoid(decoupled.student), F.logsigmoid(-decoupled.student)
    log_q, log_not_q = F.logsigmoid(decoupled.teacher), F.logsigmoid(-decoupled.teacher)
    divergence = log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)
    return temperature**2 * divergence.mean()


def nckd_loss(decoupled: Decoupled, temperature: float) -> Tensor:
    """NCKD = T^2 KL(q', p'), averaged over the batch. Exactly 0 for two classes.

    Gradient of one sample's loss at u_t: 0, at u_i: T (p'_i - q'_i).
    """
    return temperature**2 * decoupled.divergence.mean()


class DKD(Method):
    """cross_entropy_weight * CE + warm-up * (alpha * TCKD + beta * NCKD)."""

    distils_logits = True

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
        """The distillation terms warm up linearly, cross-entropy does not."""
        warm = warm_up(epoch, self.warmup_epochs)
        return {"cross_entropy": self.cross_entropy_weight, "tckd": warm * self.alpha, "nckd": warm * self.beta}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, all distillation on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        labels = cross_entropy(batch)  # first, so that its gradient comes last, when p' and q' are no longer kept
        decoupled = decouple(student, teacher, batch.target, self.temperature)
        return {"cross_entropy": labels, **self.distillation(decoupled)}

    def distillation(self, decoupled: Decoupled) -> dict[str, Tensor]:
        """TCKD and NCKD."""
        return {"tckd": tckd_loss(decoupled, self.temperature), "nckd": nckd_loss(decoupled, self.temperature)}
