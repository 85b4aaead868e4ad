"""Similarity-preserving distillation (SP): Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
arXiv 1907.09682.

    G    = F F^T, each row scaled to length 1
    loss = |G_s - G_t|^2 / B^2

Notation: F [B, D] are the flattened features of the last stage, G [B, B] the similarities of the samples. The B samples
are a device's share of the batch.
"""

from torch import Tensor
from torch.nn import functional as F

from src.methods.features import bounded, exact_products, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def similarities(features: Tensor) -> Tensor:
    """Compute G [B, B] of features [B, ...]. Rows have length 1, or are zero if a sample's features are.

    Neither a rotation of the features nor their scale changes G.
    """
    rows = bounded(at_least_float32(features).flatten(1), (0, 1))
    with exact_products(rows):
        return unit(rows @ rows.T, dim=1)


def similarity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute |G_s - G_t|^2 / B^2 of features [B, ...]. The two shapes may differ.

    The student's rows in the example are (1, 0) and (0, 1), and both of the teacher's are (1, 1) / sqrt(2).

    >>> import torch
    >>> similarity_loss(torch.eye(2), torch.ones(2, 3))
    tensor(0.2929)
    """
    return F.mse_loss(similarities(student_features), similarities(teacher_features))


class SP(Method):
    """cross_entropy_weight * CE + similarity_weight * SP of the last stages."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, similarity_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.similarity_weight = similarity_weight

    def allocate(self, networks: Networks) -> None:
        """Allocate nothing. Raises `UserError` if a network has no stages."""
        stage_shapes(networks, "sp")

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "similarity": self.similarity_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and SP between the last stages of both networks."""
        return {
            "cross_entropy": cross_entropy(batch),
            "similarity": similarity_loss(batch.student.features[-1], batch.teacher.features[-1]),
        }
