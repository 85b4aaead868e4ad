"""DIST: T. Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.

With p = softmax(u / T) of the student's logits u and q = softmax(v / T) of the teacher's logits v, both [B, C], and
r(x, y) Pearson's correlation,

    inter-class = T^2 mean_b (1 - r(p_b, q_b)), b a sample and its C probabilities,
    intra-class = T^2 mean_c (1 - r(p_c, q_c)), c a class and its B probabilities: of the samples that one device sees.

A correlation knows no scale, so each row or column is measured against its own largest probability: columns of classes
that nobody predicts do not underflow. Where all entries of either side are equal a correlation is undefined: 0 here,
with no gradient. The authors add 1e-8 to the product of the two lengths instead, which also shrinks the correlation of
columns that small.
"""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor

from src.methods.method import Batch, Method, cross_entropy, log_softmax


def correlation(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along `dim` of two matrices given by their logarithms, [B, C] to [B] or [C].

    exp(log_p) may be any positive numbers: r(m p + n, q) = r(p, q) for m > 0 and any n.
    """
    return (_direction(log_p, dim) * _direction(log_q, dim)).sum(dim)


def _direction(log_p: Tensor, dim: int) -> Tensor:
    """Centred and of length 1 along `dim`; zero where all entries are equal."""
    values = torch.expm1(log_p - log_p.amax(dim, keepdim=True).detach())  # minus 1: equal ones are zero, exactly
    values = values - values.mean(dim, keepdim=True)
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.where(length > 0, math.inf)


def inter_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 (1 - r) of each row of probabilities, averaged over the batch; logits [B, C]."""
    return _relation_loss(student_logits, teacher_logits, temperature, dim=1)


def intra_class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 (1 - r) of each column of probabilities, averaged over the classes; logits [B, C]."""
    return _relation_loss(student_logits, teacher_logits, temperature, dim=0)


def _relation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, dim: int) -> Tensor:
    log_p, log_q = log_softmax(student_logits, temperature), log_softmax(teacher_logits, temperature)
    return temperature**2 * (1 - correlation(log_p, log_q, dim)).mean()


class DIST(Method):
    """cross_entropy_weight * CE + inter_class_weight * inter-class + intra_class_weight * intra-class."""

    distils_logits = True

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
        """Constant weights."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "inter_class": self.inter_class_weight,
            "intra_class": self.intra_class_weight,
        }

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, both relations on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        return {
            "cross_entropy": cross_entropy(batch),
            "inter_class": inter_class_loss(student, teacher, self.temperature),
            "intra_class": intra_class_loss(student, teacher, self.temperature),
        }
