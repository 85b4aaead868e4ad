"""Contrastive representation distillation (CRD): Tian et al., "Contrastive Representation Distillation", ICLR 2020,
arXiv 1910.10699.

    h    = e / (e + N / M), e = exp(g_T . g_S / tau)                                  (equation 19)
    loss = -log h of the sample's own pair - sum of log(1 - h) over N negatives       (equation 18)

Notation: g_T and g_S are embeddings of the pooled features of teacher and student, linear, trained and scaled to length
1. h is a critic's probability that two embeddings are of the same image. The N negatives are images of other classes,
out of M training images. tau is the temperature.

The loss counts twice: the student's embedding is compared with a memory of the teacher's embeddings of all images, and
the teacher's embedding with a memory of the student's. A memory moves towards each embedding that is seen.

As in RepDistiller, to which the weight 0.8 belongs, e is divided by M times its mean over the first batch. M then
cancels:

    h    = sigmoid(g_T . g_S / tau - log(N mean e))

RepDistiller adds 1e-7 to some denominators. This code does not.
"""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.features import exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def contrast_loss(scores: Tensor, log_mean: Tensor) -> Tensor:
    """Compute -log h of column 0 minus the sum of log(1 - h) of the other columns, averaged over the batch.

    `scores` [B, 1 + N] are g_T . g_S / tau, `log_mean` [] is log(mean e).

    >>> contrast_loss(torch.zeros(2, 2), torch.zeros(()))
    tensor(1.3863)
    """
    logits = scores - log_mean - math.log(scores.shape[1] - 1)
    return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(dim=1)).mean()


def draw_negatives(labels: Tensor, target: Tensor, count: int, *, always_enough: bool = False) -> Tensor:
    """Draw positions [B, count] in `labels` [M] whose class differs from `target` [B]. Labels of -1 are left out.

    No image is drawn twice for one sample, unless there are fewer than `count`. This is RepDistiller's mode "exact".
    If every class is known to have `count` negatives, `always_enough` saves the check, which waits for the device.
    """
    others = (labels >= 0) & (labels != target[:, None])
    if not always_enough and (others.sum(dim=1) < count).any():
        return torch.multinomial(others.float(), count, replacement=True)
    keys = torch.rand(others.shape, device=others.device).masked_fill(~others, -1)
    return keys.topk(count, sorted=False).indices


def moved(memory: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """Move the rows `index` [B] of a `memory` [M, D] towards `embeddings` [B, D].

    A row becomes momentum * row + (1 - momentum) * embedding, scaled to length 1. Returns a new memory.
    """
    rows = momentum * memory[index] + (1 - momentum) * embeddings
    return memory.index_copy(0, index, unit(rows, dim=1))  # not in place: the backward pass needs the old memory


def gathered(share: Tensor) -> Tensor:
    """Gather a batch from all devices, each of which has an equal share [B, ...]."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return share
    shares = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shares, share.contiguous())
    return torch.cat(shares)


class CRD(Method):
    """cross_entropy_weight * CE + contrast_weight * CRD. `negatives` is N and `temperature` is tau."""

    needs_features = True
    needs_labels = True
    student_embedding: nn.Linear
    teacher_embedding: nn.Linear
    labels: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    log_means: Tensor

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        contrast_weight: float,
        embedding_size: PositiveInt,
        negatives: PositiveInt,
        temperature: PositiveFloat,
        momentum: Annotated[float, Ge(0), Lt(1)],
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.contrast_weight = contrast_weight
        self.embedding_size = embedding_size
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum

    def allocate(self, networks: Networks) -> None:
        """Make the embeddings, and memories of random rows of length about 1.

        Raises `UserError` if all training images are of one class.
        """
        labels = networks.train_labels
        if len(labels[labels >= 0].unique()) < 2:
            raise UserError(
                "method=crd contrasts images of different classes, but all training images are of one class: choose "
                "data with two or more."
            )
        self.register_buffer("labels", labels, persistent=False)
        images_of_class = labels[labels >= 0].bincount()
        self.always_enough = int(images_of_class.sum() - images_of_class.max()) >= self.negatives
        self.is_measured = False
        bound = math.sqrt(3 / self.embedding_size)
        self.student_embedding = nn.Linear(networks.student_shapes.pooled, self.embedding_size)
        self.teacher_embedding = nn.Linear(networks.teacher_shapes.pooled, self.embedding_size)
        for memory in ("student_memory", "teacher_memory"):
            rows = torch.empty(len(labels), self.embedding_size).uniform_(-bound, bound)
            self.register_buffer(memory, rows)
        self.register_buffer("log_means", torch.full((2,), math.nan))

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "contrast": self.contrast_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and CRD between the pooled features.

        Updates the memories.
        """
        student, teacher = pooled_pair(batch)
        student = unit(at_least_float32(self.student_embedding(student)), dim=1)
        teacher = unit(at_least_float32(self.teacher_embedding(teacher)), dim=1)
        negatives = draw_negatives(self.labels, batch.target, self.negatives, always_enough=self.always_enough)
        chosen = torch.cat([batch.index[:, None], negatives], dim=1)
        scores = [
            self.scores(student, self.teacher_memory, chosen),
            self.scores(teacher, self.student_memory, chosen),
        ]
        self._measure(scores)
        self._remember(batch.index, student.detach(), teacher.detach())
        losses = [contrast_loss(score, log_mean) for score, log_mean in zip(scores, self.log_means, strict=True)]
        return {
            "cross_entropy": cross_entropy(batch),
            "contrast": torch.stack(losses).sum(),
        }

    def scores(self, embeddings: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
        """Compute cosines over tau [B, 1 + N] of embeddings [B, D] with rows of a memory [M, D].

        `chosen` [B, 1 + N] are the positions of the rows.

        The cosines of all M rows are computed, which takes less memory than a copy of the chosen rows for each sample.
        """
        with exact_products(embeddings):
            return (embeddings @ memory.T).gather(1, chosen) / self.temperature

    @torch.no_grad()
    def _measure(self, scores: list[Tensor]) -> None:
        """Set log(mean e) on the first batch. Only the first step of a process waits for the device to look."""
        if not self.is_measured and self.log_means.isnan().any():
            shares = torch.stack([score.logsumexp((0, 1)) - math.log(score.numel()) for score in scores])[None]
            shares = gathered(shares)
            self.log_means = shares.logsumexp(dim=0) - math.log(len(shares))
        self.is_measured = True

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        index = gathered(index)
        self.student_memory = moved(self.student_memory, index, gathered(student), self.momentum)
        self.teacher_memory = moved(self.teacher_memory, index, gathered(teacher), self.momentum)
