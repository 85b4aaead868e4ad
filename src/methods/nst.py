"""Neuron selectivity transfer (NST): Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
Transfer", arXiv 1707.01219.

    k(x, y) = <x, y>^2
    loss    = sum over stages of mean k(t, t') + mean k(s, s') - 2 mean k(s, t), averaged over the batch

Notation: s and t are channels of student and teacher at one stage, flattened and scaled to length 1. Each is a sample
of where its network looks. The loss of a stage is the squared maximum mean discrepancy of the two networks' samples
under the kernel k.
"""

import torch
from torch import Tensor

from src.methods.features import at_one_resolution, exact_products, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def selectivity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute NST of one stage, of features [B, channels, height, width]. Channels and sizes may differ.

    The larger features are first averaged down to the resolution of the smaller. A channel of zeros has no direction
    and counts as zero.

    >>> features = torch.rand(2, 3, 4, 4)
    >>> abs(selectivity_loss(features, 5 * features.flip(1)).item()) < 1e-6
    True
    """
    student, teacher = at_one_resolution(at_least_float32(student_features), at_least_float32(teacher_features))
    s, t = unit(student.flatten(2), dim=2), unit(teacher.flatten(2), dim=2)
    with exact_products(s):
        return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.transpose(1, 2)).square().mean()


class NST(Method):
    """cross_entropy_weight * CE + selectivity_weight * sum of NST of all stages."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, selectivity_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.selectivity_weight = selectivity_weight

    def allocate(self, networks: Networks) -> None:
        """Allocate nothing. Raises `UserError` if a network has no stages."""
        stage_shapes(networks, "nst")

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "selectivity": self.selectivity_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and NST at every stage after the stem."""
        losses = [selectivity_loss(student, teacher) for student, teacher in stage_pairs(batch)]
        return {
            "cross_entropy": cross_entropy(batch),
            "selectivity": torch.stack(losses).sum(),
        }
