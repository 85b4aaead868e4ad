"""Variational information distillation (VID): Ahn et al., "Variational Information Distillation for Knowledge
Transfer", CVPR 2019, arXiv 1904.05835.

    v    = softplus(a) + a floor
    loss = sum over stages of the mean of ((t - m(s))^2 / v + log v) / 2 over all elements

Notation: s and t are the features of student and teacher at one stage. A Gaussian predicts t from s. Its mean m(s)
comes from three 1x1 convolutions, v is its variance for each channel, and m and a are trained. The loss is the negative
log-likelihood without its constant.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.features import at_one_resolution, stage_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def gaussian_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Compute ((target - mean)^2 / v + log v) / 2, averaged over all elements.

    `mean` and `target` are [B, C, H, W], `variance` v is [C]. The loss has no lower bound as v goes to 0, hence the
    floor of the variance.

    >>> gaussian_loss(torch.zeros(1, 2, 1, 1), torch.ones(2), torch.ones(1, 2, 1, 1))
    tensor(0.5000)
    """
    mean, target = at_least_float32(mean), at_least_float32(target)
    variance = at_least_float32(variance).view(1, -1, 1, 1)
    return ((target - mean).square() / variance + variance.log()).mean() / 2


class Guess(nn.Module):
    """The Gaussian of one stage, which predicts the teacher's features from [B, student_channels, H, W]."""

    def __init__(
        self, student_channels: int, teacher_channels: int, initial_variance: float, minimum_variance: float
    ) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        above = initial_variance - minimum_variance
        inverse_softplus = above + math.log(-math.expm1(-above))
        self.variance_logit = nn.Parameter(torch.full((teacher_channels,), inverse_softplus))
        self.minimum_variance = minimum_variance

    @property
    def variance(self) -> Tensor:
        """The variance of each channel, [teacher_channels]."""
        return F.softplus(self.variance_logit) + self.minimum_variance

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of one stage.

        The larger features are first averaged down to the resolution of the smaller.
        """
        student, teacher = at_one_resolution(student, teacher)
        return gaussian_loss(self.mean(student), self.variance, teacher)


class VID(Method):
    """cross_entropy_weight * CE + information_weight * sum of the negative log-likelihoods of all stages."""

    needs_features = True
    guesses: nn.ModuleList

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        information_weight: float,
        initial_variance: PositiveFloat,
        minimum_variance: PositiveFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.information_weight = information_weight
        self.initial_variance = initial_variance
        self.minimum_variance = minimum_variance

    def allocate(self, networks: Networks) -> None:
        """Make a Gaussian for each stage. Raises `UserError` if a network has no stages."""
        self.guesses = nn.ModuleList(
            Guess(student[0], teacher[0], self.initial_variance, self.minimum_variance)
            for student, teacher in stage_shapes(networks, "vid")
        )

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "information": self.information_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and information at every stage after the stem."""
        stages = zip(cast(Iterable[Guess], self.guesses), stage_pairs(batch), strict=True)
        return {
            "cross_entropy": cross_entropy(batch),
            "information": torch.stack([guess(student, teacher) for guess, (student, teacher) in stages]).sum(),
        }
