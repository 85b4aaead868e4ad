"""Knowledge distillation (KD): Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531."""

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, Method, cross_entropy, log_softmax


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KD = T^2 KL(q, p), averaged over the batch.

    With p = softmax(u / T) of the student's logits u and q = softmax(v / T) of the teacher's logits v, both [B, C].
    Gradient of one sample's loss at u_i: T (p_i - q_i). Both sides are log-probabilities: log(softmax) would be -inf
    where softmax underflows.

    >>> import torch
    >>> kd_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), temperature=4.0)
    tensor(0.)
    """
    log_p = log_softmax(student_logits, temperature)
    log_q = log_softmax(teacher_logits, temperature)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class KD(Method):
    """cross_entropy_weight * CE + kd_weight * KD."""

    distils_logits = True

    def __init__(self, *, cross_entropy_weight: float, kd_weight: float, temperature: PositiveFloat) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.kd_weight = kd_weight
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "kd": self.kd_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, KD on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "kd": kd_loss(student, teacher, self.temperature),
        }
