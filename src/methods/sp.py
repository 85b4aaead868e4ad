"""Similarity-preserving distillation (SP): Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
arXiv 1907.09682.

With the features of the last stage flattened, F [B, D], the similarities of a batch are G = F F^T, each row brought to
length 1; the loss is |G_s - G_t|^2 / B^2. The batch is what one device sees of it.
"""

from torch import Tensor
from torch.nn import functional as F

from src.methods.features import bounded, exact_products, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def similarities(features: Tensor) -> Tensor:
    """G [B, B] of features [B, ...]: rows of length 1, or zero where a sample's features are.

    Neither a rotation of the features nor their scale changes it.
    """
    rows = bounded(at_least_float32(features).flatten(1), (0, 1))
    with exact_products(rows):
        return unit(rows @ rows.T, dim=1)


def similarity_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """SP = |G_s - G_t|^2 / B^2 of features [B, ...] of any two shapes.

    >>> import torch
    >>> similarity_loss(torch.eye(2), torch.ones(2, 3)).item()  # rows (1, 0) and (0, 1) against (1, 1) / sqrt(2)
    0.2928932309150696
    """
    return F.mse_loss(similarities(student_features), similarities(teacher_features))


class SP(Method):
    """cross_entropy_weight * CE + similarity_weight * SP of the last stages."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, similarity_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.similarity_weight = similarity_weight

    def build(self, networks: Networks) -> None:
        """Nothing of its own. Raises `UserError` where a network has no stages."""
        stage_shapes(networks, "sp")

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "similarity": self.similarity_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, SP between the last stage of each network."""
        return {
            "cross_entropy": cross_entropy(batch),
            "similarity": similarity_loss(batch.student.features[-1], batch.teacher.features[-1]),
        }
