"""What the methods on features share: stages side by side, and arithmetic that no scale of a feature breaks."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import UserError
from src.methods.method import Batch, Networks

Shape = tuple[int, ...]


def stage_pairs(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The features of student and teacher stage by stage, without the stems'.

    As in RepDistiller stages are paired in order, and where one network has more of them its last ones take no part.
    """
    return list(zip(batch.student.features[1:], batch.teacher.features[1:], strict=False))


def pooled_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """The pooled features [B, D] of student and teacher."""
    student, teacher = batch.student.pooled, batch.teacher.pooled
    assert student is not None, "a method that reads features says needs_features"
    assert teacher is not None
    return student, teacher


def stage_shapes(networks: Networks, method: str) -> list[tuple[Shape, Shape]]:
    """(channels, height, width) of `stage_pairs`. Raises `UserError` where a network has no stage behind its stem."""
    student, teacher = networks.student_shapes.features, networks.teacher_shapes.features
    if len(student) < 2 or len(teacher) < 2:
        raise UserError(
            f"method={method} compares the stages behind the stem, but the student has {len(student)} and the teacher "
            f"{len(teacher)} feature maps in all: choose networks with two or more."
        )
    return list(zip(student[1:], teacher[1:], strict=False))


def at_one_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, channels, height, width], the larger averaged down to the smaller; channels stay as they are."""
    height, width = (min(student.shape[i], teacher.shape[i]) for i in (2, 3))
    return _pooled(student, height, width), _pooled(teacher, height, width)


def _pooled(features: Tensor, height: int, width: int) -> Tensor:
    if features.shape[2:] == (height, width):
        return features
    rows, columns = features.shape[2] / height, features.shape[3] / width
    if rows.is_integer() and columns.is_integer():  # the same means, but adaptive pooling is not reproducible on a GPU
        return F.avg_pool2d(features, (int(rows), int(columns)))
    return F.adaptive_avg_pool2d(features, (height, width))


def bounded(features: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Over the largest magnitude along `dim`, which counts as a constant; all zeros stay so and get no gradient.

    For losses that do not change with the scale of `features` along `dim`: there it is exact, also in the gradient,
    and squares neither overflow nor vanish. A largest magnitude below the smallest normal number is taken for zero.
    """
    largest = features.detach().abs().amax(dim, keepdim=True)
    positive = largest >= torch.finfo(features.dtype).smallest_normal
    return torch.where(positive, features / torch.where(positive, largest, 1), 0)


def unit(features: Tensor, dim: int) -> Tensor:
    """x / |x| along `dim`, at any scale; zero where x is, with gradient zero.

    `F.normalize` would shorten what is smaller than its floor of 1e-12, and its slope at zero is the floor's inverse.
    """
    features = bounded(features, dim)
    norm = torch.linalg.vector_norm(features, dim=dim, keepdim=True)
    return features / torch.where(norm > 0, norm, 1)


def exact_products(tensor: Tensor) -> AbstractContextManager[None]:
    """Within it mixed precision leaves matrix products alone: a loss is computed as precisely as its inputs allow."""
    return torch.autocast(tensor.device.type, enabled=False)
