"""What the methods on features share: stages side by side, and arithmetic that no scale of a feature breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.errors import UserError
from src.methods.method import Batch, Networks
from src.models.network import Network

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
    return averaged_to(student, height, width), averaged_to(teacher, height, width)


def averaged_to(features: Tensor, height: int, width: int) -> Tensor:
    """Means of [B, channels, height, width] over blocks of pixels; channels stay as they are."""
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


def preactivation_pairs(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """As `stage_pairs`, before the ReLU."""
    return list(zip(batch.student.preactivations[1:], batch.teacher.preactivations[1:], strict=False))


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm, as OFD and AB lead the student's features [B, channels, H, W] to the teacher's.

    Its weights begin as N(0, 2 / teacher_channels), as in both papers' code.
    """
    convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))


def later_counts_double(losses: Sequence[Tensor]) -> Tensor:
    """sum_i 2^(i - n + 1) loss_i, i from 0 to n - 1: the last stage counts whole, each other half of the next."""
    return torch.stack([loss * 2.0 ** (i - len(losses) + 1) for i, loss in enumerate(losses)]).sum()


def last_maps(batch: Batch) -> tuple[Tensor, Tensor]:
    """The maps [B, D, height, width] that the pooled features of student and teacher are made of."""
    student, teacher = batch.student.unpooled, batch.teacher.unpooled
    assert student is not None, "a method that reads these maps asks for their shapes first"
    assert teacher is not None
    return student, teacher


def last_map_shapes(networks: Networks, method: str) -> tuple[Shape, Shape]:
    """(D, height, width) of `last_maps`. Raises `UserError` where the pooled features are not simply such a map's."""
    teacher = networks.teacher
    assert teacher is not None
    channels, height, width = networks.image_shape
    size = (teacher.image_size, teacher.image_size) if teacher.image_size else (height, width)
    return (
        _last_map_shape(networks.student, networks.image_shape, f"method={method}: the student's"),
        _last_map_shape(teacher.network, (channels, *size), f"method={method}: the teacher's"),
    )


@torch.no_grad()
def _last_map_shape(network: Network, image_shape: Shape, whose: str) -> Shape:
    training, parameter = network.training, next(network.parameters())
    image = torch.linspace(-2, 2, math.prod(image_shape)).view(1, *image_shape).to(parameter)
    said = network.eval().forward_features(image)
    network.train(training)
    if said.unpooled is None or not torch.allclose(network.pool(said.unpooled), said.pooled, rtol=1e-3, atol=1e-5):
        raise UserError(f"{whose} classifier does not see its last feature map averaged: choose another network.")
    return tuple(said.unpooled.shape[1:])
