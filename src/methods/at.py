"""Attention transfer (AT): Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    Q    = sum_c |A_c|^p, flattened and scaled to length 1
    loss = sum over stages of the mean of (Q_s - Q_t)^2 over samples and pixels

Notation: A [channels, height, width] are the features of a stage, Q is their attention map, and p is `power`.

The mean follows the authors' and RepDistiller's code, and the weight 1000 belongs to it. The paper instead has half a
weight times the norm of the difference.
"""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from src.methods.features import at_one_resolution, bounded, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def attention_map(features: Tensor, power: float) -> Tensor:
    """Compute Q [B, height * width], each of length 1, of features [B, channels, height, width]. All zeros give zeros.

    Neither the scale of a sample's features nor the order of channels changes Q.
    """
    magnitudes = bounded(at_least_float32(features), (1, 2, 3)).abs()
    return unit(magnitudes.pow(power).mean(dim=1).flatten(1), dim=1)


def attention_loss(student_features: Tensor, teacher_features: Tensor, power: float) -> Tensor:
    """Compute the mean of (Q_s - Q_t)^2 over samples and pixels, of features [B, channels, height, width].

    Channels and sizes may differ. The larger features are averaged down to the resolution of the smaller before the
    maps are made.

    >>> features = torch.rand(2, 3, 4, 4)
    >>> attention_loss(5 * features, features.flip(1), power=2.0).item() < 1e-12
    True
    """
    student, teacher = at_one_resolution(at_least_float32(student_features), at_least_float32(teacher_features))
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


class AT(Method):
    """cross_entropy_weight * CE + attention_weight * sum of the attention losses of all stages."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, attention_weight: float, power: Annotated[float, Ge(1)]) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.attention_weight = attention_weight
        self.power = power

    def allocate(self, networks: Networks) -> None:
        """Allocate nothing. Raises `UserError` if a network has no stages."""
        stage_shapes(networks, "at")

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "attention": self.attention_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and attention at every stage after the stem."""
        losses = [attention_loss(student, teacher, self.power) for student, teacher in stage_pairs(batch)]
        return {
            "cross_entropy": cross_entropy(batch),
            "attention": torch.stack(losses).sum(),
        }
