"""Knowledge distillation (KD): Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    loss = cross_entropy_weight * CE + kd_weight * KD,  KD = T^2 KL(q, p)

Notation: p = softmax(u / T) of the student's logits u, q = softmax(v / T) of the teacher's logits v, temperature T.
"""

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute KD = T^2 KL(q, p), averaged over the batch.

    p = softmax(u / T) of the student's logits u and q = softmax(v / T) of the teacher's logits v, both [B, C]. Gradient
    of one sample's loss at u_i: T (p_i - q_i). Both sides are log-probabilities, because log(softmax) would be -inf
    if softmax underflows.

    >>> import torch
    >>> kd_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), temperature=4.0)
    tensor(0.)
    """
    log_p = log_softmax(student_logits, temperature)
    log_q = log_softmax(teacher_logits, temperature)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class KD(LogitMethod):
    """cross_entropy_weight * CE + kd_weight * KD."""

    def __init__(self, *, cross_entropy_weight: float, kd_weight: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.kd_weight = kd_weight
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "kd": self.kd_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the KD loss."""
        return {"kd": kd_loss(logits.student, logits.teacher, self.temperature)}
