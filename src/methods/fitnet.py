"""FitNets: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

    hint = |f_t - r(f_s)|^2, averaged over all elements

Notation: f_s are the student's features at the guided layer and f_t the teacher's at the hint layer. r is a regressor
that is trained with the student.

The paper trains the hint first and classification later. Here both are one loss, and r is a convolution, batch
norm and a ReLU. This form has been customary since RepDistiller, and the weights belong to it.
"""

from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.features import Shape
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean of (r(f_s) - f_t)^2 over all elements, both [B, channels, height, width].

    Gradient: 2 (r(f_s) - f_t) / n at each of n elements.

    >>> import torch
    >>> hint_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    tensor(1.)
    """
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features))


def regressor(student: Shape, teacher: Shape) -> nn.Module:
    """Make a module that maps [B, *student] to [B, *teacher], both (channels, height, width), as RepDistiller does.

    A student of twice the size gets a strided convolution, and a student of half the size a transposed convolution. Any
    other student that is not smaller gets one kernel that covers the excess. Raises `UserError` for all other sizes.
    """
    channels, sizes = (student[0], teacher[0]), list(zip(student[1:], teacher[1:], strict=True))
    convolution: nn.Module
    if all(s == 2 * t for s, t in sizes):
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1)
    elif all(2 * s == t for s, t in sizes):
        convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    elif all(s >= t for s, t in sizes):
        convolution = nn.Conv2d(*channels, (1 + student[1] - teacher[1], 1 + student[2] - teacher[2]))
    else:
        raise UserError(
            f"method=fitnet cannot map the student's features of {student[1]}x{student[2]} pixels to the teacher's "
            f"{teacher[1]}x{teacher[2]}: choose a method.hint_layer at which the student's features are as large, "
            "larger or half as large."
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU())


class FitNet(Method):
    """cross_entropy_weight * CE + hint_weight * hint. Layer 0 is the stem, layer 1 the first stage."""

    needs_features = True
    regressor: nn.Module

    def __init__(self, *, cross_entropy_weight: float, hint_weight: float, hint_layer: NonNegativeInt) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.hint_weight = hint_weight
        self.hint_layer = hint_layer

    def allocate(self, networks: Networks) -> None:
        """Make the regressor.

        Raises `UserError` if a network has no such layer, or if no regressor leads from one size to the other.
        """
        student, teacher = networks.student_shapes.features, networks.teacher_shapes.features
        if self.hint_layer >= min(len(student), len(teacher)):
            raise UserError(
                f"method.hint_layer={self.hint_layer} is too deep: the student has {len(student)} and the teacher "
                f"{len(teacher)} feature maps, counted from 0. Choose a smaller layer."
            )
        self.regressor = regressor(student[self.hint_layer], teacher[self.hint_layer])

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "hint": self.hint_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and the hint at one layer."""
        student, teacher = (output.features[self.hint_layer] for output in (batch.student, batch.teacher))
        return {
            "cross_entropy": cross_entropy(batch),
            "hint": hint_loss(self.regressor(student), teacher),
        }
