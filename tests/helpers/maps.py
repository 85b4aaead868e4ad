"""Batches of last feature maps, for the methods that read them (SimKD, SRRL)."""

import torch
from torch import Tensor

from src.methods.method import Batch, View
from src.models.network import Output
from tests.helpers.features import drawn


def batch_of_maps(student: Tensor, teacher: Tensor, teacher_logits: Tensor | None = None) -> Batch:
    """Make a batch of last maps [B, D, height, width], their means as pooled features, and three classes."""
    outputs = [Output(drawn((len(x), 3), 9), (), x.mean((2, 3)), unpooled=x) for x in (student, teacher)]
    if teacher_logits is not None:
        outputs[1] = outputs[1]._replace(logits=teacher_logits)
    index = torch.arange(len(student))
    return Batch((View(torch.zeros(len(index), 3, 4, 4), *outputs),), index % 3, index, epoch=0, step=0)
