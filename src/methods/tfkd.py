"""Teacher-free knowledge distillation by regularisation (Tf-KD_reg): L. Yuan et al., "Revisiting Knowledge Distillation
via Label Smoothing Regularization", CVPR 2020, arXiv 1909.11723.

The teacher is made by hand: it gives the labelled class the probability a and each of the others (1 - a) / (C - 1).
With d this distribution [B, C], q = softmax(d / T) and p = softmax(u) of the student's logits u [B, C],

    Tf-KD = KL(q, p), averaged over the batch.

As in the authors' code for CIFAR-100: the softmax is taken of probabilities, so that q is nearly uniform, and the
student has no temperature (the paper's equation 9 softens it too; the authors explain this in their issue 3).
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, Method, cross_entropy, log_softmax


def tfkd_loss(student_logits: Tensor, target: Tensor, correct_probability: float, temperature: float) -> Tensor:
    """KL(q, p); logits [B, C], target [B]. Gradient of one sample's loss at u_i: p_i - q_i."""
    log_p = log_softmax(student_logits, 1.0)
    others = (1 - correct_probability) / (log_p.shape[1] - 1)
    teacher = torch.full_like(log_p, others).scatter(1, target[:, None], correct_probability)
    return F.kl_div(log_p, log_softmax(teacher, temperature), reduction="batchmean", log_target=True)


class TfKD(Method):
    """cross_entropy_weight * CE + tfkd_weight * Tf-KD."""

    needs_teacher = False
    distils_logits = True

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        tfkd_weight: float,
        correct_probability: Annotated[float, Field(gt=0, le=1)],
        temperature: PositiveFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.tfkd_weight = tfkd_weight
        self.correct_probability = correct_probability
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "tfkd": self.tfkd_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, Tf-KD on its logits for distillation."""
        student = batch.student.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "tfkd": tfkd_loss(student, batch.target, self.correct_probability, self.temperature),
        }
