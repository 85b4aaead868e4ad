"""Relational knowledge distillation (RKD): Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv
1904.05068.

    distance   mean over pairs of h(d_s - d_t), d_ij = |x_i - x_j| / mean of |x_i - x_j| over i != j
    angle      mean over triples of h(c_s - c_t), c_ijk = cosine of the angle between x_i and x_k as seen from x_j
    h(a)       a^2 / 2 if |a| < 1, else |a| - 1/2 (Huber)

Notation: x_i are the pooled features of sample i, out of a device's share of B samples.

The means are over all B^2 pairs and all B^3 triples, as in RepDistiller, whose weights are meant for them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from src.methods.features import bounded, exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, at_least_float32, cross_entropy


def differences(features: Tensor) -> Tensor:
    """Compute x_j - x_i at [i, j], [B, B, D], of features [B, D].

    Distances are computed from these differences. In |x_i|^2 + |x_j|^2 - 2 <x_i, x_j>, close samples would cancel out.
    """
    features = at_least_float32(features)
    return features[None] - features[:, None]


def relative_distances(features: Tensor) -> Tensor:
    """Compute distances [B, B] of features [B, D], divided by their mean.

    If all samples coincide, all distances are zero, with gradient zero. The square root would make the gradient of a
    distance of zero infinite. It counts as zero instead.
    """
    apart = bounded(differences(features), (0, 1, 2))
    distances: Tensor = torch.linalg.vector_norm(apart, dim=2)
    pairs = max(len(features) * (len(features) - 1), 1)
    mean = distances.sum() / pairs
    return distances / torch.where(mean > 0, mean, 1)


def angle_cosines(features: Tensor) -> Tensor:
    """Compute <e_ji, e_jk> at [j, i, k], [B, B, B], of features [B, D].

    e_ji is the direction from j to i. It is 0 if the two coincide.
    """
    directions = unit(differences(features), dim=2)
    with exact_products(directions):
        return directions @ directions.transpose(1, 2)


def distance_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean over pairs of h(difference of relative distances). Features are [B, D], and D may differ.

    >>> triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> distance_loss(triangle, 2 * triangle + 1).item() < 1e-12
    True
    """
    return F.smooth_l1_loss(relative_distances(student_features), relative_distances(teacher_features))


def angle_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean over triples of h(difference of cosines). Features are [B, D], and D may differ."""
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
        """Return constant weights."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "distance": self.distance_weight,
            "angle": self.angle_weight,
        }

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and both relations between the pooled features."""
        student, teacher = pooled_pair(batch)
        return {
            "cross_entropy": cross_entropy(batch),
            "distance": distance_loss(student, teacher),
            "angle": angle_loss(student, teacher),
        }
