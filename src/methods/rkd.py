"""Relational knowledge distillation (RKD): Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv
1904.05068.

Of the pooled features x_i of a batch of B: the distances |x_i - x_j| over their mean over i != j, and the cosines of
the angles that x_i and x_k enclose as seen from x_j. Both follow the teacher's by the Huber loss h(a) = a^2 / 2 for
|a| < 1, else |a| - 1/2, averaged over all B^2 pairs and all B^3 triples, as in RepDistiller, whose weights are meant
for that. The batch is what one device sees of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from src.methods.features import bounded, exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, at_least_float32, cross_entropy


def differences(features: Tensor) -> Tensor:
    """x_j - x_i at [i, j], [B, B, D], of features [B, D].

    Their squares are summed, and not |x_i|^2 + |x_j|^2 - 2 <x_i, x_j>, in which close samples cancel out.
    """
    features = at_least_float32(features)
    return features[None] - features[:, None]


def relative_distances(features: Tensor) -> Tensor:
    """Distances [B, B] of features [B, D] in units of their mean; all zero, with gradient zero, where all coincide.

    The slope of a distance at zero, infinite in its square root, is taken as zero.
    """
    apart = bounded(differences(features), (0, 1, 2))
    distances = torch.linalg.vector_norm(apart, dim=2)
    pairs = max(len(features) * (len(features) - 1), 1)
    mean = distances.sum() / pairs
    return distances / torch.where(mean > 0, mean, 1)


def angle_cosines(features: Tensor) -> Tensor:
    """<e_ji, e_jk> at [j, i, k], [B, B, B], of features [B, D] with e_ji the direction from j to i; 0 where none is."""
    directions = unit(differences(features), dim=2)
    with exact_products(directions):
        return directions @ directions.transpose(1, 2)


def distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over pairs of h(difference of relative distances), features [B, D] of any two widths.

    >>> triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> distance_loss(triangle, 2 * triangle + 1).item() < 1e-12
    True
    """
    return F.smooth_l1_loss(relative_distances(student_features), relative_distances(teacher_features))


def angle_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean over triples of h(difference of cosines), features [B, D] of any two widths."""
    return F.smooth_l1_loss(angle_cosines(student_features), angle_cosines(teacher_features))


class RKD(Method):
    """cross_entropy_weight * CE + distance_weight * distances + angle_weight * angles."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, distance_weight: float, angle_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "distance": self.distance_weight,
            "angle": self.angle_weight,
        }

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, relations between the pooled features."""
        student, teacher = pooled_pair(batch)
        return {
            "cross_entropy": cross_entropy(batch),
            "distance": distance_loss(student, teacher),
            "angle": angle_loss(student, teacher),
        }
