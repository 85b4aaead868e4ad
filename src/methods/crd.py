"""Contrastive representation distillation (CRD): Tian et al., "Contrastive Representation Distillation", ICLR 2020,
arXiv 1910.10699.

A critic tells pairs of one image's teacher and student embeddings from pairs of two images'. With g_T and g_S the
linear, normalised embeddings of the pooled features, both trained, its probability that a pair is of one image is

    h = e / (e + N / M), e = exp(g_T . g_S / tau)                                     (equation 19)

for N negatives of M training images, and the loss of a sample is -log h of its own pair less the sum of log(1 - h) over
N images of other classes (equation 18). It counts twice: the student's embedding against a memory of the teacher's
embeddings of all images, and the other way round. A memory moves towards each embedding that is seen.

As in RepDistiller, which the weight 0.8 belongs to, e is divided by M times its mean over the first batch, so that
h = sigmoid(g_T . g_S / tau - log(N mean e)) and M cancels; RepDistiller adds 1e-7 to some denominators, this does not.
"""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from src.errors import UserError
from src.methods.features import exact_products, pooled_pair, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def contrast_loss(scores: Tensor, log_mean: Tensor) -> Tensor:
    """-log h of column 0 less the sum of log(1 - h) of the others, averaged over the batch.

    `scores` [B, 1 + N] are g_T . g_S / tau, `log_mean` [] is log(mean e).

    >>> contrast_loss(torch.zeros(2, 2), torch.zeros(()))
    tensor(1.3863)
    """
    logits = scores - log_mean - math.log(scores.shape[1] - 1)
    return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(dim=1)).mean()


def draw_negatives(labels: Tensor, target: Tensor, count: int) -> Tensor:
    """Positions [B, count] in `labels` [M] of other classes than `target` [B]; those labelled -1 are left out.

    No image twice for one sample, unless there are fewer than `count`: RepDistiller's mode "exact".
    """
    others = (labels >= 0) & (labels != target[:, None])
    if (others.sum(dim=1) < count).any():
        return torch.multinomial(others.float(), count, replacement=True)
    keys = torch.rand(others.shape, device=others.device).masked_fill(~others, -1)
    return keys.topk(count, sorted=False).indices


def moved(memory: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """`memory` [M, D] with rows momentum * row + (1 - momentum) * embedding, brought to length 1, at `index` [B]."""
    rows = momentum * memory[index] + (1 - momentum) * embeddings
    return memory.index_copy(0, index, unit(rows, dim=1))  # no change in place: the backward pass wants the old one


def gathered(share: Tensor) -> Tensor:
    """What all devices have of a batch, each an equal share [B, ...]."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return share
    shares = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shares, share.contiguous())
    return torch.cat(shares)


class CRD(Method):
    """cross_entropy_weight * CE + contrast_weight * CRD; `negatives` is N, `temperature` tau."""

    needs_features = True
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

    def build(self, networks: Networks) -> None:
        """Embeddings, and memories of random rows of length about 1. Raises `UserError` where all are of one class."""
        labels = networks.train_labels
        if len(labels[labels >= 0].unique()) < 2:
            raise UserError("method=crd contrasts images of different classes, and all training images are of one.")
        self.register_buffer("labels", labels, persistent=False)
        bound = math.sqrt(3 / self.embedding_size)
        self.student_embedding = nn.Linear(networks.student_shapes.pooled, self.embedding_size)
        self.teacher_embedding = nn.Linear(networks.teacher_shapes.pooled, self.embedding_size)
        for memory in ("student_memory", "teacher_memory"):
            rows = torch.empty(len(labels), self.embedding_size).uniform_(-bound, bound)
            self.register_buffer(memory, rows)
        self.register_buffer("log_means", torch.full((2,), math.nan))

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "contrast": self.contrast_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, CRD between the pooled features; the memories move."""
        student, teacher = pooled_pair(batch)
        student = unit(at_least_float32(self.student_embedding(student)), dim=1)
        teacher = unit(at_least_float32(self.teacher_embedding(teacher)), dim=1)
        negatives = draw_negatives(self.labels, batch.target, self.negatives)
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
        """Cosines over tau [B, 1 + N] of embeddings [B, D] with the rows `chosen` [B, 1 + N] of a memory [M, D].

        All M are computed: that takes less memory than a copy of the chosen rows for each sample.
        """
        with exact_products(embeddings):
            return (embeddings @ memory.T).gather(1, chosen) / self.temperature

    @torch.no_grad()
    def _measure(self, scores: list[Tensor]) -> None:
        """Set log(mean e) once, on the first batch."""
        if self.log_means.isnan().any():
            shares = torch.stack([score.logsumexp((0, 1)) - math.log(score.numel()) for score in scores])[None]
            shares = gathered(shares)
            self.log_means = shares.logsumexp(dim=0) - math.log(len(shares))

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        index = gathered(index)
        self.student_memory = moved(self.student_memory, index, gathered(student), self.momentum)
        self.teacher_memory = moved(self.teacher_memory, index, gathered(teacher), self.momentum)
