"""Multi-level logit distillation (MLKD, also MLLD): Y. Jin et al., "Multi-Level Logit Distillation", CVPR 2023.

    instance   T^2 KL(q, p), averaged over the batch
    batch      ||q q' - p p'||^2 / B, of the [B, B] products between samples (input correlation)
    class      ||q' q - p' p||^2 / C, of the [C, C] products between classes (category correlation)

Notation: p = softmax(u / T) of the student's logits u, q = softmax(v / T) of the teacher's logits v, both [B, C]. p' is
the transpose of p. Several temperatures T augment the predictions, and the three alignments are summed over them. The B
samples are a device's share of the batch.

The released code (Jin-Ying/Multi-Level-Logit-Distillation) differs from the paper:

- It trains on two views, the second with RandAugment. `views=2` with the augmentation `weak_and_strong` does so too.
- It multiplies the averaged terms by the mean of a mask over samples or classes of low confidence. This mean is a
  constant near 0.5.
- Two of five terms of the second view use the first view's logits.
- The batch and class terms of the second view are computed and dropped.
- Its numbers for some pairs come from 480 or 960 epochs.

Except for the views, this file does none of this, so do not expect the numbers of the released code.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from src.methods.features import exact_products
from src.methods.kd import kd_loss
from src.methods.method import Batch, DistillationLogits, LogitMethod, cross_entropy, log_softmax


def batch_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute ||q q' - p p'||^2 / B, a sum over all pairs of samples. Logits are [B, C]."""
    p, q = (log_softmax(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    with exact_products(p):
        return (q @ q.T - p @ p.T).square().sum() / len(p)


def class_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute ||q' q - p' p||^2 / C, a sum over all pairs of classes. Logits are [B, C]."""
    p, q = (log_softmax(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    with exact_products(p):
        return (q.T @ q - p.T @ p).square().sum() / p.shape[1]


class MLKD(LogitMethod):
    """cross_entropy_weight * CE + kd_weight * (instance + batch + class), each summed over the temperatures.

    With two `views` of each image, all terms are summed over them.
    """

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        kd_weight: float,
        temperatures: Sequence[PositiveFloat],
        views: Annotated[int, Field(ge=1, le=2)] = 1,
    ) -> None:
        super().__init__()
        self.views_per_image, self.needs_unmixed = views, views > 1
        self.cross_entropy_weight = cross_entropy_weight
        self.kd_weight = kd_weight
        self.temperatures = tuple(temperatures)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        levels = dict.fromkeys(("instance", "batch", "class"), self.kd_weight)
        return {"cross_entropy": self.cross_entropy_weight, **levels}

    def label_loss(self, batch: Batch) -> Tensor:
        """Return cross-entropy, summed over the views."""
        return torch.stack([cross_entropy(batch, view.student.logits) for view in batch.views]).sum()

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the three levels, each summed over the views and the temperatures."""
        levels = {"instance": kd_loss, "batch": batch_loss, "class": class_loss}
        pairs = [(logits.of_view(view), T) for view in range(self.views_per_image) for T in self.temperatures]
        return {
            name: torch.stack([loss(student, teacher, T) for (student, teacher), T in pairs]).sum()
            for name, loss in levels.items()
        }
