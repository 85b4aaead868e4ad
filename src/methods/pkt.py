"""Probabilistic knowledge transfer (PKT): Passalis and Tefas, "Learning Deep Representations with Probabilistic
Knowledge Transfer", ECCV 2018, arXiv 1803.10837.

    K_ij = (1 + cos(x_i, x_j)) / 2
    p_ij = K_ij / sum_k K_ik
    loss = KL(p of the teacher, p of the student), as a mean over all B^2 elements

Notation: x_i are the pooled features of sample i, out of a device's share of B samples. p_ij tells how near sample j is
to sample i.

The mean includes i = j, as in the authors' and RepDistiller's code.
"""

from torch import Tensor

from src.methods.features import exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, at_least_float32, cross_entropy

FLOOR = 1e-7
"""Added to both probabilities, as in the authors' code.

If the student's features of two samples are opposite and the teacher's are not, p is 0 and the divergence would be
infinite.
"""


def nearness(features: Tensor) -> Tensor:
    """Compute p [B, B] of features [B, D]. Rows sum to 1.

    Neither the scale of a sample nor a rotation of all features changes p. A sample of zeros is at right angles to all.
    """
    directions = unit(at_least_float32(features), dim=1)
    with exact_products(directions):
        kernel = ((1 + directions @ directions.T) / 2).clamp(min=0)  # rounding can make a cosine less than -1
    return kernel / kernel.sum(dim=1, keepdim=True)


def transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean of q log((q + FLOOR) / (p + FLOOR)), p the student's and q the teacher's.

    Features are [B, D], and D may differ.

    >>> import torch
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
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "transfer": self.transfer_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and PKT between the pooled features."""
        student, teacher = pooled_pair(batch)
        return {
            "cross_entropy": cross_entropy(batch),
            "transfer": transfer_loss(student, teacher),
        }
