"""Activation boundaries (AB): Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons", AAAI 2019, arXiv 1811.03233.

In a first stage the student, through a connector r of each stage, learns where the teacher's neurons are active and
where not, whatever their strength: with t the teacher's and s the student's features before their ReLU, the loss is
the sum over channels and pixels of max(0, mu - r(s))^2 where t > 0 and of max(0, mu + r(s))^2 elsewhere, averaged over
the batch; a stage counts half of the next. The main stage is cross-entropy (the authors add KD: `method@also=kd`).

The connectors are the paper's, a 1x1 convolution and batch norm at every stage; RepDistiller leaves them out where
sizes agree and has larger kernels where resolutions differ, which are here averaged to the smaller.
"""

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from src.methods.features import at_one_resolution, connector, later_counts_double, preactivation_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, Stage, at_least_float32, cross_entropy


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Sum of max(0, mu - s)^2 where t > 0 and max(0, mu + s)^2 elsewhere, averaged over the batch; both [B, C, H, W].

    >>> student, teacher = torch.tensor([0.5, 0.5, 2.0, -2.0]), torch.tensor([9.0, -9.0, 0.1, -0.1])
    >>> boundary_loss(student.view(1, 4, 1, 1), teacher.view(1, 4, 1, 1), margin=1.0)
    tensor(2.5000)
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    signed = torch.where(teacher > 0, student, -student)
    return (margin - signed).clamp(min=0).square().sum() / len(student)


class BoundaryInitialisation(Method):
    """The first stage: boundary_weight * weighted sum of the boundary losses of all stages."""

    needs_features = True
    needs_preactivations = True

    def __init__(self, connectors: nn.ModuleList, boundary_weight: float, margin: float) -> None:
        super().__init__()
        self.connectors = connectors
        self.boundary_weight = boundary_weight
        self.margin = margin

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weight."""
        return {"boundary": self.boundary_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The boundaries alone: the student's classifier stays as it is."""
        stages = zip(cast(Iterable[nn.Module], self.connectors), preactivation_pairs(batch), strict=True)
        return {"boundary": later_counts_double([self._loss(lead, *pair) for lead, pair in stages])}

    def _loss(self, lead: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = at_one_resolution(student, teacher)
        return boundary_loss(lead(student), teacher, self.margin)


class AB(Method):
    """A stage of boundary_weight * boundaries for initial_epochs (at least one), then cross_entropy_weight * CE."""

    reads_teacher = False
    connectors: nn.ModuleList

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        boundary_weight: float,
        margin: PositiveFloat,
        initial_epochs: NonNegativeInt,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.boundary_weight = boundary_weight
        self.margin = margin
        self.initial_epochs = initial_epochs

    def build(self, networks: Networks) -> None:
        """A connector for each stage. Raises `UserError` where a network has no stages."""
        shapes = stage_shapes(networks, "ab")
        self.connectors = nn.ModuleList(connector(student[0], teacher[0]) for student, teacher in shapes)

    def stages(self) -> tuple[Stage, ...]:
        """The student's features, by boundaries alone."""
        initialisation = BoundaryInitialisation(self.connectors, self.boundary_weight, self.margin)
        return (Stage("boundaries", initialisation, max(1, self.initial_epochs)),)

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weight."""
        return {"cross_entropy": self.cross_entropy_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits."""
        return {"cross_entropy": cross_entropy(batch)}
