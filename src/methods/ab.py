"""Activation boundaries (AB): Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons", AAAI 2019, arXiv 1811.03233.

    first stage   loss = boundary_weight * sum_i 2^(i - n + 1) L_i over n stages of the networks, i from 0
                  L_i = sum over channels and pixels of max(0, mu - r(s))^2 where t > 0, max(0, mu + r(s))^2 elsewhere
    main stage    loss = cross_entropy_weight * CE

Notation: s and t are the features of student and teacher before their ReLU, r is the connector of the stage, and mu is
the margin. L_i is averaged over the batch.

In the first stage the student learns where the teacher's neurons are active, whatever the strength of their response.
The authors add KD to the main stage, as `method@also=kd` does.

The connectors are the paper's: a 1x1 convolution and batch norm at every stage. RepDistiller omits them if sizes agree,
and uses larger kernels if resolutions differ. Here the larger features are averaged down to the smaller.
"""

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from src.methods.features import at_one_resolution, connector, later_counts_double, preactivation_pairs, stage_shapes
from src.methods.method import Batch, Method, Networks, Stage, at_least_float32, cross_entropy


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Compute the sum of max(0, mu - s)^2 where t > 0 and max(0, mu + s)^2 elsewhere, averaged over the batch.

    `student` and `teacher` are [B, C, H, W], `margin` is mu.

    >>> student, teacher = torch.tensor([0.5, 0.5, 2.0, -2.0]), torch.tensor([9.0, -9.0, 0.1, -0.1])
    >>> boundary_loss(student.view(1, 4, 1, 1), teacher.view(1, 4, 1, 1), margin=1.0)
    tensor(2.5000)
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    signed = torch.where(teacher > 0, student, -student)
    return (margin - signed).clamp(min=0).square().sum() / len(student)


class BoundaryInitialisation(Method):
    """The first stage: boundary_weight * weighted sum of the boundary losses of all stages of the networks."""

    needs_features = True
    needs_preactivations = True

    def __init__(self, connectors: nn.ModuleList, boundary_weight: float, margin: float) -> None:
        super().__init__()
        self.connectors = connectors
        self.boundary_weight = boundary_weight
        self.margin = margin

    def weights(self, epoch: int) -> dict[str, float]:
        """Return a constant weight."""
        return {"boundary": self.boundary_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the boundary loss alone. The student's classifier stays as it is."""
        stages = zip(cast(Iterable[nn.Module], self.connectors), preactivation_pairs(batch), strict=True)
        return {"boundary": later_counts_double([self._loss(connector, *pair) for connector, pair in stages])}

    def _loss(self, connector: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = at_one_resolution(student, teacher)
        return boundary_loss(connector(student), teacher, self.margin)


class AB(Method):
    """A first stage of boundary_weight * boundary loss, then cross_entropy_weight * CE.

    The first stage lasts initial_epochs, at least one.
    """

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

    def allocate(self, networks: Networks) -> None:
        """Make a connector for each stage. Raises `UserError` if a network has no stages."""
        shapes = stage_shapes(networks, "ab")
        self.connectors = nn.ModuleList(connector(student[0], teacher[0]) for student, teacher in shapes)

    def stages(self) -> tuple[Stage, ...]:
        """List the stage that trains the student's features by the boundary loss alone."""
        initialisation = BoundaryInitialisation(self.connectors, self.boundary_weight, self.margin)
        return (Stage("boundaries", initialisation, max(1, self.initial_epochs)),)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return a constant weight."""
        return {"cross_entropy": self.cross_entropy_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits."""
        return {"cross_entropy": cross_entropy(batch)}
