"""ReviewKD: P. Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.

    ABF   z = a_1 x + a_2 y, a = sigmoid(1x1 convolution of [x, y]), s = 3x3 convolution and batch norm of z
    HCL   (|s - t|^2 + sum_k 2^-k |s_k - t_k|^2) / (1 + sum_k 2^-k), s_k averaged to 4x4, 2x2 and 1x1 pixels

Notation: x are the student's features of a level, mapped to the middle width by a 1x1 convolution and batch norm. y is
the z of the deeper level, enlarged to the size of x. z is resized to the size of the teacher's features t before s is
computed. |.|^2 is the mean over all elements. The sum runs only over sizes that are coarser than the level itself.

The review goes from the deepest level up. Each level fuses the student's features with the result of the deeper levels
(attention-based fusion, ABF). It then compares them with the teacher's features of the level (hierarchical context
loss, HCL). The loss is the sum of HCL over the levels.

Levels are the stages after the stem, and the pooled features as one more level of 1x1 pixel. The review starts at the
pooled features, as in the authors' code. Stages are paired in order. If one network has more stages, its last ones are
left out.

The teacher's features are taken before their ReLU. On ImageNet, the student's are too. The code of the authors and of
mdistiller does the same.
"""

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.features import averaged_to, pooled_pair, preactivation_pairs, stage_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy, warm_up

GREATEST_WIDTH = 512
"""Upper limit of the middle width, min(512, the student's pooled width), as in the authors' code."""
CONTEXTS = (4, 2, 1)


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute HCL of one level, both [B, channels, height, width].

    >>> context_loss(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    tensor(1.)
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    losses = [F.mse_loss(student, teacher)]
    for size in CONTEXTS:
        if size < min(student.shape[2:]):
            losses.append(F.mse_loss(averaged_to(student, size, size), averaged_to(teacher, size, size)))
    weights = [2.0**-k for k in range(len(losses))]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """ABF of one level. The deepest level has nothing to fuse with: `fuses` is False there."""

    def __init__(self, student_channels: int, width: int, teacher_channels: int, fuses: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        self.expand = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(cast(nn.Conv2d, convolution).weight, a=1)

    def forward(self, student: Tensor, below: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the map that is compared with the teacher, and the map for the next level up.

        `student` is [B, student_channels, height, width]. `below` [B, width, ...] is the map from the deeper level, or
        None at the deepest. Returns [B, teacher_channels, *size] and [B, width, *size].
        """
        fused = self.reduce(student)
        if self.attention is not None:
            assert below is not None
            below = F.interpolate(below, fused.shape[2:], mode="nearest")
            attention = self.attention(torch.cat([fused, below], dim=1))
            fused = fused * attention[:, :1] + below * attention[:, 1:]
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.expand(fused), fused


class ReviewKD(Method):
    """cross_entropy_weight * CE + warm-up * review_weight * sum of the context losses of all levels."""

    needs_features = True
    needs_preactivations = True
    fusions: nn.ModuleList

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        review_weight: float,
        warmup_epochs: NonNegativeFloat,
        student_preactivations: bool,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.review_weight = review_weight
        self.warmup_epochs = warmup_epochs
        self.student_preactivations = student_preactivations

    def allocate(self, networks: Networks) -> None:
        """Make a fusion for each level, the pooled one last. Raises `UserError` if a network has no stages."""
        student, teacher = networks.student_shapes.pooled, networks.teacher_shapes.pooled
        width = min(GREATEST_WIDTH, student)
        self.fusions = nn.ModuleList(
            Fusion(ours[0], width, theirs[0], fuses=True) for ours, theirs in stage_shapes(networks, "reviewkd")
        )
        self.fusions.append(Fusion(student, width, teacher, fuses=False))

    def weights(self, epoch: int) -> dict[str, float]:
        """Warm the review up linearly. Cross-entropy has its full weight from the start."""
        review = warm_up(epoch, self.warmup_epochs) * self.review_weight
        return {"cross_entropy": self.cross_entropy_weight, "review": review}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and the review of all levels."""
        return {
            "cross_entropy": cross_entropy(batch),
            "review": self.review(self._levels(batch)),
        }

    def review(self, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the sum of all context losses. Levels are features [B, channels, height, width], the deepest last."""
        losses, below = [], None
        fusions = cast(Iterable[Fusion], reversed(self.fusions))
        for fusion, (student, teacher) in zip(fusions, reversed(levels), strict=True):
            compared, below = fusion(student, below, teacher.shape[2:])
            losses.append(context_loss(compared, teacher))
        return torch.stack(losses).sum()

    def _levels(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        before, after = preactivation_pairs(batch), stage_pairs(batch)
        student = before if self.student_preactivations else after
        levels = [(ours[0], theirs[1]) for ours, theirs in zip(student, before, strict=True)]
        ours, theirs = pooled_pair(batch)
        levels.append((ours[:, :, None, None], theirs[:, :, None, None]))
        if len(batch.target) > 1:
            return levels
        # Batch norm refuses the pooled level of a single sample. Two copies of the sample have the same statistics.
        return [(torch.cat([ours, ours]), torch.cat([theirs, theirs])) for ours, theirs in levels]
