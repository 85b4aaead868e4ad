"""Throw-away methods that use the rarely used parts of the contract in `src/methods/method.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.kd import KD
from src.methods.method import Batch, Method, Networks, cross_entropy
from src.models.network import Network


class MemoryBank(Method):
    """Keeps the student's last embedding of every training image, by index, and a learnable adapter of its own."""

    needs_features = True
    bank: Tensor
    seen: Tensor

    def allocate(self, networks: Networks) -> None:
        self.adapter = nn.Linear(networks.student_shapes.pooled, networks.teacher_shapes.pooled)
        self.register_buffer("bank", torch.zeros(networks.train_size, networks.teacher_shapes.pooled))
        self.register_buffer("seen", torch.zeros(networks.train_size, dtype=torch.int64))

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "stay": 0.1 * epoch, "hint": 0.1}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        embedding = self.adapter(batch.student.pooled)
        terms = {
            "cross_entropy": cross_entropy(batch),
            "stay": F.mse_loss(embedding, self.bank[batch.index]),
            "hint": F.mse_loss(embedding, batch.teacher.pooled),
        }
        with torch.no_grad():
            self.bank[batch.index] = embedding
            self.seen[batch.index] += 1
        return terms


class Through(nn.Module):
    """A student up to its pooled features, a projector, and a classifier."""

    def __init__(self, student: Network, projector: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.student, self.projector, self.head = student, projector, head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.projector(self.student.forward_features(images).pooled))
        return logits


class TeachersHead(Method):
    """Predicts through the teacher's classifier, as SimKD does."""

    needs_features = True

    def allocate(self, networks: Networks) -> None:
        self.projector = nn.Linear(networks.student_shapes.pooled, networks.teacher_shapes.pooled)
        self.head = networks.teacher_classifier()

    def weights(self, epoch: int) -> dict[str, float]:
        return {"match": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"match": F.mse_loss(self.projector(batch.student.pooled), batch.teacher.pooled)}

    def predictor(self, student: Network) -> nn.Module:
        return Through(student, self.projector, self.head)


class OwnGradients(KD):
    """Combines the gradients of its terms itself: it drops the gradients of distillation."""

    def __init__(self) -> None:
        super().__init__(cross_entropy_weight=1.0, kd_weight=5.0, temperature=4.0)

    def backward(self, loss: Tensor, weighted_terms: Mapping[str, Tensor]) -> None:
        weighted_terms["cross_entropy"].backward()
