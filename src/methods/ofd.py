"""Overhaul of feature distillation (OFD): Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
arXiv 1904.01866.

The teacher's features before their ReLU, t, pass a margin ReLU, max(t, m), where m of each channel is the mean of the
teacher's negative responses in it; the student's, before their ReLU too, pass a connector r. The partial distance
between them leaves out what both sides of a ReLU would make zero: it is the sum over channels and pixels of
(r(s) - max(t, m))^2 except where r(s) <= max(t, m) <= 0, averaged over the batch. A stage counts half of the next.

m is what the paper defines it to be, E[t | t < 0], taken over all that training has seen so far: the first of the two
ways the paper names. The authors' code and mdistiller's take the other, a Gaussian with the parameters of the batch
norm before the ReLU, which leaves a residual block's shortcut out and which other people's networks may not have.
Stages are paired from the first, mdistiller pairs them from the last: it differs where one network has more.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from src.methods.features import at_one_resolution, connector, later_counts_double, preactivation_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Sum over channels and pixels of (s - T)^2 but for s <= T <= 0, T = max(t, m), averaged over the batch.

    Both [B, C, H, W], margin [C]; no gradient where nothing counts.

    >>> student, teacher = torch.tensor([[-3.0], [-1.0], [2.0]]), torch.tensor([[-9.0], [-9.0], [4.0]])
    >>> partial_distance(student.view(3, 1, 1, 1), teacher.view(3, 1, 1, 1), torch.tensor([-2.0]))
    tensor(1.6667)
    """
    student, teacher, margin = at_least_float32(student), at_least_float32(teacher), at_least_float32(margin)
    target = teacher.maximum(margin.view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return torch.where(counts, student - target, 0).square().sum() / len(student)


class Transfer(nn.Module):
    """One stage: the student's connector, and the margin [C] of the teacher's channels, a mean that grows with use."""

    margin: Tensor
    count: Tensor

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.connector = connector(student_channels, teacher_channels)
        self.register_buffer("margin", torch.zeros(teacher_channels))
        self.register_buffer("count", torch.zeros(teacher_channels, dtype=torch.int64))

    @torch.no_grad()
    def note(self, teacher: Tensor) -> None:
        """Take negative responses among [B, C, H, W] into the margin; a channel that never has one keeps 0."""
        teacher = at_least_float32(teacher)
        negative = (teacher < 0).sum((0, 2, 3))
        self.count += negative
        excess = (teacher - self.margin.view(1, -1, 1, 1)).where(teacher < 0, 0).sum((0, 2, 3))
        self.margin += excess / self.count.clamp(min=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss; the larger features are first averaged down to the resolution of the smaller."""
        student, teacher = at_one_resolution(student, teacher)
        self.note(teacher)
        return partial_distance(self.connector(student), teacher, self.margin)


class OFD(Method):
    """cross_entropy_weight * CE + distance_weight * weighted sum of the partial distances of all stages."""

    needs_features = True
    needs_preactivations = True
    transfers: nn.ModuleList

    def __init__(self, *, cross_entropy_weight: float, distance_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.distance_weight = distance_weight

    def build(self, networks: Networks) -> None:
        """A connector and margins for each stage. Raises `UserError` where a network has no stages."""
        self.transfers = nn.ModuleList(
            Transfer(student[0], teacher[0]) for student, teacher in stage_shapes(networks, "ofd")
        )

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "distance": self.distance_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, the distance at every stage behind the stem."""
        stages = zip(cast(Iterable[Transfer], self.transfers), preactivation_pairs(batch), strict=True)
        return {
            "cross_entropy": cross_entropy(batch),
            "distance": later_counts_double([transfer(student, teacher) for transfer, (student, teacher) in stages]),
        }
