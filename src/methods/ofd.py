"""Overhaul of feature distillation (OFD): Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
arXiv 1904.01866.

    m   = E[t | t < 0], for each channel
    L_i = sum over channels and pixels of (r(s) - max(t, m))^2, except where r(s) <= max(t, m) <= 0
    OFD = sum_i 2^(i - n + 1) L_i over n stages, i from 0

Notation: s and t are the features of student and teacher before their ReLU. r is a connector, and max(t, m) a margin
ReLU. L_i is the partial distance of stage i, averaged over the batch. It leaves out elements whose target is not
positive and whose student value is not above the target.

m is the mean of all negative responses that training has seen so far, as the paper defines it. The paper names two ways
to compute m, and this is the first. The code of the authors and of mdistiller uses the second: a Gaussian with the
parameters of the batch norm before the ReLU. The Gaussian ignores the shortcut of a residual block, and other people's
networks may not have such a batch norm.

Stages are paired from the first. mdistiller pairs them from the last, which differs if one network has more.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from src.methods.features import at_one_resolution, connector, later_counts_double, preactivation_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Compute the sum over channels and pixels of (s - T)^2, except where s <= T <= 0, averaged over the batch.

    T = max(t, m) of teacher t and margin m [C]. Student and teacher are [B, C, H, W]. Positions that do not count get
    no gradient.

    >>> student, teacher = torch.tensor([[-3.0], [-1.0], [2.0]]), torch.tensor([[-9.0], [-9.0], [4.0]])
    >>> partial_distance(student.view(3, 1, 1, 1), teacher.view(3, 1, 1, 1), torch.tensor([-2.0]))
    tensor(1.6667)
    """
    student, teacher, margin = at_least_float32(student), at_least_float32(teacher), at_least_float32(margin)
    target = teacher.maximum(margin.view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return torch.where(counts, student - target, 0).square().sum() / len(student)


class Transfer(nn.Module):
    """One stage: the student's connector, and the margin [C] of the teacher's channels, a running mean."""

    margin: Tensor
    count: Tensor

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.connector = connector(student_channels, teacher_channels)
        self.register_buffer("margin", torch.zeros(teacher_channels))
        self.register_buffer("count", torch.zeros(teacher_channels, dtype=torch.int64))

    @torch.no_grad()
    def note(self, teacher: Tensor) -> None:
        """Include the negative responses among [B, C, H, W] in the margin. A channel without any keeps 0."""
        teacher = at_least_float32(teacher)
        negative = (teacher < 0).sum((0, 2, 3))
        self.count += negative
        excess = (teacher - self.margin.view(1, -1, 1, 1)).where(teacher < 0, 0).sum((0, 2, 3))
        self.margin += excess / self.count.clamp(min=1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one stage.

        The larger features are first averaged down to the resolution of the smaller.
        """
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

    def allocate(self, networks: Networks) -> None:
        """Make a connector and margins for each stage. Raises `UserError` if a network has no stages."""
        self.transfers = nn.ModuleList(
            Transfer(student[0], teacher[0]) for student, teacher in stage_shapes(networks, "ofd")
        )

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "distance": self.distance_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and the distance at every stage after the stem."""
        stages = zip(cast(Iterable[Transfer], self.transfers), preactivation_pairs(batch), strict=True)
        return {
            "cross_entropy": cross_entropy(batch),
            "distance": later_counts_double([transfer(student, teacher) for transfer, (student, teacher) in stages]),
        }
