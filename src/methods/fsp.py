"""Flow of solution procedure (FSP): Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning", CVPR 2017.

    G_ij          = sum over pixels of F1_i F2_j / (h w)
    first stage   loss = flow_weight * sum over blocks of the mean of (G_s - G_t)^2 over samples and elements
    main stage    loss = cross_entropy_weight * CE

Notation: G is the FSP matrix of a block, between its input F1 [c1, h, w] and its output F2 [c2, h, w].

In the first stage the student learns the teacher's matrices alone. The main stage continues from its weights.

Three details follow RepDistiller. The blocks are the stages. The squared difference of the matrices is averaged over
its elements, while the paper sums it. The larger map of a pair is averaged down, while the paper max-pools it.
"""

import itertools
from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.features import at_one_resolution, exact_products
from src.methods.method import Batch, Method, Networks, Stage, at_least_float32, cross_entropy


def fsp_matrix(first: Tensor, last: Tensor) -> Tensor:
    """Compute G [B, c1, c2] of features [B, c1, h1, w1] and [B, c2, h2, w2].

    >>> fsp_matrix(torch.ones(1, 2, 4, 4), 3 * torch.ones(1, 1, 2, 2)).tolist()
    [[[3.0], [3.0]]]
    """
    first, last = at_one_resolution(at_least_float32(first), at_least_float32(last))
    with exact_products(first):
        return first.flatten(2) @ last.flatten(2).transpose(1, 2) / last[0, 0].numel()


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compute the mean of (G_s - G_t)^2 over samples and elements, summed over consecutive pairs of features.

    Features are [B, C, H, W]. Channels of student and teacher must agree, resolutions need not.
    """
    matrices = ([fsp_matrix(*pair) for pair in itertools.pairwise(features)] for features in (student, teacher))
    return torch.stack([F.mse_loss(s, t) for s, t in zip(*matrices, strict=True)]).sum()


class FlowInitialisation(Method):
    """The first stage: flow_weight * FSP of the stem and all stages."""

    needs_features = True

    def __init__(self, flow_weight: float) -> None:
        super().__init__()
        self.flow_weight = flow_weight

    def weights(self, epoch: int) -> dict[str, float]:
        """Return a constant weight."""
        return {"flow": self.flow_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return FSP alone. The student's classifier stays as it is."""
        return {"flow": fsp_loss(batch.student.features, batch.teacher.features)}


class FSP(Method):
    """A first stage of flow_weight * FSP, then cross_entropy_weight * CE.

    The first stage lasts initial_epochs, at least one.
    """

    reads_teacher = False

    def __init__(self, *, cross_entropy_weight: float, flow_weight: float, initial_epochs: NonNegativeInt) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.flow_weight = flow_weight
        self.initial_epochs = initial_epochs

    def allocate(self, networks: Networks) -> None:
        """Allocate nothing. Raises `UserError` if the channels of the networks differ."""
        student, teacher = (
            [shape[0] for shape in shapes.features] for shapes in (networks.student_shapes, networks.teacher_shapes)
        )
        if student != teacher or len(student) < 2:
            raise UserError(
                f"method=fsp compares stages of the same channels and needs two or more, but the student's have "
                f"{student} and the teacher's {teacher}: choose two networks of one family and width."
            )

    def stages(self) -> tuple[Stage, ...]:
        """List the stage that trains the student's features by FSP alone."""
        return (Stage("flow", FlowInitialisation(self.flow_weight), max(1, self.initial_epochs)),)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return a constant weight."""
        return {"cross_entropy": self.cross_entropy_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits."""
        return {"cross_entropy": cross_entropy(batch)}
