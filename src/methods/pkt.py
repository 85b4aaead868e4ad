"""Probabilistic knowledge transfer (PKT): Passalis and Tefas, "Learning Deep Representations with Probabilistic
Knowledge Transfer", ECCV 2018, arXiv 1803.10837.

With the kernel K_ij = (1 + cos(x_i, x_j)) / 2 of the pooled features of a batch of B, p_ij = K_ij / sum_k K_ik says how
near sample j is to sample i. The loss is KL(p of the teacher, p of the student), as in the authors' and RepDistiller's
code with i = j included and the mean over all B^2 elements. The batch is what one device sees of it.
"""

from torch import Tensor

from src.methods.features import exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, at_least_float32, cross_entropy

FLOOR = 1e-7
"""Added to both probabilities, as in the authors' code: where the student's features of two samples are opposite and
the teacher's are not, p is 0 and the divergence infinite."""


def nearness(features: Tensor) -> Tensor:
    """p [B, B] of features [B, D], its rows sums of 1; neither the scale of a sample nor a rotation changes it.

    A sample whose features are zero is at right angles to all.
    """
    directions = unit(at_least_float32(features), dim=1)
    with exact_products(directions):
        kernel = ((1 + directions @ directions.T) / 2).clamp(min=0)  # rounding makes cosines less than -1
    return kernel / kernel.sum(dim=1, keepdim=True)


def transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """PKT = mean of q log((q + FLOOR) / (p + FLOOR)), p the student's, q the teacher's; features [B, D], any widths.

    >>> features = torch.rand(3, 4)
    >>> abs(transfer_loss(features, 2 * features).item()) < 1e-6
    True
    """
    p, q = nearness(student_features), nearness(teacher_features)
    return (q * ((q + FLOOR).log() - (p + FLOOR).log())).mean()


class PKT(Method):
    """cross_entropy_weight * CE + transfer_weight * PKT."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, transfer_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.transfer_weight = transfer_weight

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "transfer": self.transfer_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, PKT between the pooled features."""
        student, teacher = pooled_pair(batch)
        return {
            "cross_entropy": cross_entropy(batch),
            "transfer": transfer_loss(student, teacher),
        }
