"""Multi-level logit distillation (MLKD, also MLLD): Y. Jin et al., "Multi-Level Logit Distillation", CVPR 2023.

Predictions of student and teacher are augmented by several temperatures T: p = softmax(u / T), q = softmax(v / T), both
[B, C]. For each of them three alignments are summed:

    instance   T^2 KL(q, p), averaged over the batch
    batch      ||q q' - p p'||^2 / B, of the [B, B] products between samples (input correlation)
    class      ||q' q - p' p||^2 / C, of the [C, C] products between classes (category correlation)

The batch is what one device sees of it.

The released code (Jin-Ying/Multi-Level-Logit-Distillation) does otherwise than the paper: it trains on two views, one
with RandAugment added; it multiplies the averaged terms by the mean of a mask over samples or classes of low
confidence, which is a constant near 0.5; two of five terms for the second view use the first view's logits; and the
second view's batch and class terms are computed and dropped. Its numbers also come from 480 or 960 epochs for some
pairs. None of this is done here, so they are not to be expected.
"""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat
from torch import Tensor

from src.methods.features import exact_products
from src.methods.kd import kd_loss
from src.methods.method import Batch, Method, cross_entropy, log_softmax


def batch_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """||q q' - p p'||^2 / B, a sum over all pairs of samples; logits [B, C]."""
    p, q = (log_softmax(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    with exact_products(p):
        return (q @ q.T - p @ p.T).square().sum() / len(p)


def class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """||q' q - p' p||^2 / C, a sum over all pairs of classes; logits [B, C]."""
    p, q = (log_softmax(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    with exact_products(p):
        return (q.T @ q - p.T @ p).square().sum() / p.shape[1]


class MLKD(Method):
    """cross_entropy_weight * CE + kd_weight * (instance + batch + class), each summed over the temperatures."""

    distils_logits = True

    def __init__(self, *, cross_entropy_weight: float, kd_weight: float, temperatures: Sequence[PositiveFloat]) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.kd_weight = kd_weight
        self.temperatures = tuple(temperatures)

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        levels = dict.fromkeys(("instance", "batch", "class"), self.kd_weight)
        return {"cross_entropy": self.cross_entropy_weight, **levels}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, the three levels on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.distillation_logits
        levels = {"instance": kd_loss, "batch": batch_loss, "class": class_loss}
        return {
            "cross_entropy": cross_entropy(batch),
            **{
                name: torch.stack([loss(student, teacher, temperature) for temperature in self.temperatures]).sum()
                for name, loss in levels.items()
            },
        }
