"""DIST: T. Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

    inter-class = T^2 mean_b (1 - r(p_b, q_b)), b a sample with its C probabilities
    intra-class = T^2 mean_c (1 - r(p_c, q_c)), c a class with its B probabilities

Notation: p = softmax(u / T) of the student's logits u, q = softmax(v / T) of the teacher's logits v, both [B, C].
r(x, y) is Pearson's correlation. The B samples are a device's share of the batch.

A correlation does not depend on scale. Each row or column is therefore divided by its largest probability, so that the
columns of classes that no sample predicts do not underflow. If all entries of either side are equal, the correlation is
undefined. Here it is 0, with no gradient. The authors instead add 1e-8 to the product of the two lengths, which also
shrinks the correlation of very small columns.
"""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor

from src.methods.method import Batch, DistillationLogits, LogitMethod, log_softmax


def correlation(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """Compute Pearson's correlation along `dim` of two matrices given by their logarithms, [B, C] to [B] or [C].

    exp(log_p) may be any positive numbers: r(m p + n, q) = r(p, q) for m > 0 and any n.
    """
    return (_direction(log_p, dim) * _direction(log_q, dim)).sum(dim)


def _direction(log_p: Tensor, dim: int) -> Tensor:
    """Centre exp(log_p) and scale it to length 1 along `dim`. Zero if all entries are equal."""
    values = torch.expm1(log_p - log_p.amax(dim, keepdim=True).detach())  # expm1 makes equal entries exactly zero
    values = values - values.mean(dim, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.where(length > 0, math.inf)


def inter_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 (1 - r) of each row of probabilities, averaged over the batch. Logits are [B, C]."""
    return _relation_loss(student_logits, teacher_logits, temperature, dim=1)


def intra_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 (1 - r) of each column of probabilities, averaged over the classes. Logits are [B, C]."""
    return _relation_loss(student_logits, teacher_logits, temperature, dim=0)


def _relation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, dim: int) -> Tensor:
    log_p, log_q = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    return temperature**2 * (1 - correlation(log_p, log_q, dim)).mean()


class DIST(LogitMethod):
    """cross_entropy_weight * CE + inter_class_weight * inter-class + intra_class_weight * intra-class."""

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        inter_class_weight: float,
        intra_class_weight: float,
        temperature: PositiveFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.inter_class_weight = inter_class_weight
        self.intra_class_weight = intra_class_weight
        self.temperature = temperature

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "inter_class": self.inter_class_weight,
            "intra_class": self.intra_class_weight,
        }

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return both relations."""
        return {
            "inter_class": inter_class_loss(logits.student, logits.teacher, self.temperature),
            "intra_class": intra_class_loss(logits.student, logits.teacher, self.temperature),
        }
