"""Correlation congruence (CC): Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv
1904.01802.

The paper compares the kernel matrices of a batch's embeddings. The form in use, which RepDistiller has from the authors
and which its weight and published numbers belong to, is another: with d_i = |s_i - t_i|, element by element, of the
embeddings s and t of sample i, both linear and both trained, it is the mean over i of <d_i, d_{i+1}>. The batch is what
one device sees of it.
"""

from pydantic import PositiveInt
from torch import Tensor, nn

from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def congruence_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Mean of <d_i, d_{i+1}> over the B - 1 neighbours in a batch, embeddings [B, D]; 0 for a batch of one.

    >>> import torch
    >>> congruence_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2))
    tensor(11.)
    """
    distance = (at_least_float32(student_embeddings) - at_least_float32(teacher_embeddings)).abs()
    return (distance[:-1] * distance[1:]).sum() / max(len(distance) - 1, 1)


class CC(Method):
    """cross_entropy_weight * CE + congruence_weight * CC of the embedded pooled features."""

    needs_features = True
    student_embedding: nn.Linear
    teacher_embedding: nn.Linear

    def __init__(self, *, cross_entropy_weight: float, congruence_weight: float, embedding_size: PositiveInt) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.congruence_weight = congruence_weight
        self.embedding_size = embedding_size

    def build(self, networks: Networks) -> None:
        """A trained embedding for each network."""
        self.student_embedding = nn.Linear(networks.student_shapes.pooled, self.embedding_size)
        self.teacher_embedding = nn.Linear(networks.teacher_shapes.pooled, self.embedding_size)

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "congruence": self.congruence_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, CC between the pooled features."""
        student, teacher = self.student_embedding(batch.student.pooled), self.teacher_embedding(batch.teacher.pooled)
        return {
            "cross_entropy": cross_entropy(batch),
            "congruence": congruence_loss(student, teacher),
        }
