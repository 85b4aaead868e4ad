"""FitNets: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

The student's features at a guided layer, through a regressor r that is trained with it, follow the teacher's at a hint
layer: |f_t - r(f_s)|^2. The paper trains that first and classification later; as customary since RepDistiller (whose
weights are meant for this form) both are one loss here, averaged over all elements, and r is a convolution, batch
normalisation and a ReLU.
"""

from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import UserError
from src.methods.features import Shape
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean of (r(f_s) - f_t)^2 over all elements, both [B, channels, height, width]; gradient 2 (r(f_s) - f_t) / n.

    >>> import torch
    >>> hint_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    tensor(1.)
    """
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features))


def regressor(student: Shape, teacher: Shape) -> nn.Module:
    """Maps [B, *student] to [B, *teacher], both (channels, height, width), as RepDistiller does.

    A student of twice the size is strided over, one of half the size is transposed, any other that is not smaller sees
    all that is too much in one kernel. Raises `UserError` for the rest.
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
            f"method=fitnet cannot lead the student's features of {student[1]}x{student[2]} pixels to the teacher's "
            f"{teacher[1]}x{teacher[2]}: choose another method.hint_layer, where the student's are as large, larger or "
            "half as large."
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher[0]), nn.ReLU())


class FitNet(Method):
    """cross_entropy_weight * CE + hint_weight * hint; layer 0 is the stem, 1 the first stage."""

    needs_features = True
    regressor: nn.Module

    def __init__(self, *, cross_entropy_weight: float, hint_weight: float, hint_layer: NonNegativeInt) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.hint_weight = hint_weight
        self.hint_layer = hint_layer

    def build(self, networks: Networks) -> None:
        """The regressor. Raises `UserError` where a network has no such layer, or none leads from size to size."""
        student, teacher = networks.student_shapes.features, networks.teacher_shapes.features
        if self.hint_layer >= min(len(student), len(teacher)):
            raise UserError(
                f"method.hint_layer={self.hint_layer} is too deep, the student has {len(student)} and the teacher "
                f"{len(teacher)} feature maps: choose a smaller one, counted from 0."
            )
        self.regressor = regressor(student[self.hint_layer], teacher[self.hint_layer])

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "hint": self.hint_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, the hint at one layer."""
        student, teacher = (said.features[self.hint_layer] for said in (batch.student, batch.teacher))
        return {
            "cross_entropy": cross_entropy(batch),
            "hint": hint_loss(self.regressor(student), teacher),
        }
