"""Teacher-free knowledge distillation by regularisation (Tf-KD_reg): L. Yuan et al., "Revisiting Knowledge Distillation
via Label Smoothing Regularization", CVPR 2020, arXiv 1909.11723.

    Tf-KD = KL(q, p), averaged over the batch

Notation: p = softmax(u) of the student's logits u [B, C]. q = softmax(d / T). The teacher d [B, C] is made by hand: it
gives the labelled class the probability a and each other class (1 - a) / (C - 1).

The form follows the authors' code for CIFAR-100. The softmax is taken of probabilities, so q is nearly uniform, and the
student has no temperature. In the paper's equation 9, the student has the temperature too. The authors explain this in
their issue 3.
"""

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def tfkd_loss(student_logits: Tensor, target: Tensor, correct_probability: float, temperature: float) -> Tensor:
    """Compute KL(q, p) of logits [B, C] and target [B]. Gradient of one sample's loss at u_i: p_i - q_i."""
    log_p = log_softmax(student_logits, 1.0)
    others = (1 - correct_probability) / (log_p.shape[1] - 1)
    teacher = torch.full_like(log_p, others).scatter(1, target[:, None], correct_probability)
    return F.kl_div(log_p, log_softmax(teacher, temperature), reduction="batchmean", log_target=True)


class TfKD(LogitMethod):
    """cross_entropy_weight * CE + tfkd_weight * Tf-KD."""

    needs_teacher = False
    needs_labels = True
    can_be_standardized = False

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
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "tfkd": self.tfkd_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the Tf-KD loss, which needs no teacher."""
        return {"tfkd": tfkd_loss(logits.student, batch.target, self.correct_probability, self.temperature)}
