"""Correlation congruence (CC): Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv
1904.01802.

    d_i  = |s_i - t_i|, element by element
    loss = mean over i of <d_i, d_{i+1}>

Notation: s_i and t_i are the embeddings of sample i, trained linear maps of the pooled features of student and teacher.
The mean is over neighbours in a device's share of the batch.

The paper compares the kernel matrices of a batch's embeddings instead. The form here is that of RepDistiller, which has
it from the authors. The weight and the published numbers belong to this form.
"""

from pydantic import PositiveInt
from torch import Tensor, nn

from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def congruence_loss(student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
    """Compute the mean of <d_i, d_{i+1}> over the B - 1 neighbours in a batch of embeddings [B, D].

    A batch of one gives 0.

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

    def allocate(self, networks: Networks) -> None:
        """Make a trained embedding for each network."""
        self.student_embedding = nn.Linear(networks.student_shapes.pooled, self.embedding_size)
        self.teacher_embedding = nn.Linear(networks.teacher_shapes.pooled, self.embedding_size)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "congruence": self.congruence_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and CC between the pooled features."""
        student, teacher = self.student_embedding(batch.student.pooled), self.teacher_embedding(batch.teacher.pooled)
        return {
            "cross_entropy": cross_entropy(batch),
            "congruence": congruence_loss(student, teacher),
        }
