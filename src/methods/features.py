"""Helpers of methods on features: stages in pairs, and arithmetic that is exact at every scale of the features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.method import Batch, Networks
from src.models.network import Network

Shape = tuple[int, ...]


def stage_pairs(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Pair the features of student and teacher stage by stage, without the stems.

    Stages are paired in order, as in RepDistiller. If one network has more stages, its last ones are left out.
    """
    return list(zip(batch.student.features[1:], batch.teacher.features[1:], strict=False))


def pooled_pair(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the pooled features [B, D] of student and teacher."""
    return batch.student.pooled, batch.teacher.pooled


def stage_shapes(networks: Networks, method: str) -> list[tuple[Shape, Shape]]:
    """Return (channels, height, width) of both networks for each pair of `stage_pairs`.

    `method` names the method in the message. Raises `UserError` if a network has no stage after its stem.
    """
    student, teacher = networks.student_shapes.features, networks.teacher_shapes.features
    if len(student) < 2 or len(teacher) < 2:
        raise UserError(
            f"method={method} compares the stages after the stem, but the student has {len(student)} and the teacher "
            f"{len(teacher)} feature maps, the stem included: choose networks with two or more."
        )
    return list(zip(student[1:], teacher[1:], strict=False))


def at_one_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two maps [B, channels, height, width] down to the resolution of the smaller.

    Both keep their channels.
    """
    height, width = (min(student.shape[i], teacher.shape[i]) for i in (2, 3))
    return averaged_to(student, height, width), averaged_to(teacher, height, width)


def averaged_to(features: Tensor, height: int, width: int) -> Tensor:
    """Average [B, channels, H, W] over blocks of pixels, down to `height` x `width` pixels. Channels are kept."""
    if features.shape[2:] == (height, width):
        return features
    rows, columns = features.shape[2] / height, features.shape[3] / width
    # Adaptive pooling would compute the same means, but its gradient is not deterministic on a GPU. Under
    # `trainer.deterministic=true`, the backward pass would raise an error.
    if rows.is_integer() and columns.is_integer():
        return F.avg_pool2d(features, (int(rows), int(columns)))
    return _window_means(_window_means(features, height, 2), width, 3)


def _window_means(features: Tensor, count: int, dim: int) -> Tensor:
    """Average `dim`, of size n, over the windows of adaptive pooling.

    Window i runs from floor(i n / count) to ceil((i + 1) n / count). Where count does not divide n, windows overlap.
    """
    size = features.shape[dim]
    windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return torch.stack([features.narrow(dim, start, end - start).mean(dim) for start, end in windows], dim)


def bounded(features: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide features by their largest magnitude along `dim`, which counts as a constant.

    All zeros stay zeros and get no gradient. A largest magnitude below the smallest normal number counts as zero.

    This is for losses that do not depend on the scale of `features` along `dim`. The loss and its gradient are then
    exact, and squares neither overflow nor vanish.

    >>> bounded(torch.tensor([[3e30, -6e30], [0.0, 0.0]]), dim=1)
    tensor([[ 0.5000, -1.0000],
            [ 0.0000,  0.0000]])
    """
    largest = features.detach().abs().amax(dim, keepdim=True)
    positive = largest >= torch.finfo(features.dtype).smallest_normal
    return torch.where(positive, features / torch.where(positive, largest, 1), 0)


def unit(features: Tensor, dim: int) -> Tensor:
    """Scale features to length 1 along `dim`: x / |x|, exact at every scale. Zero stays zero, with gradient zero.

    `F.normalize` would shorten vectors below its floor of 1e-12, and its gradient at zero is the inverse of the floor.

    >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]), dim=1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    features = bounded(features, dim)
    norm = torch.linalg.vector_norm(features, dim=dim, keepdim=True)
    return features / torch.where(norm > 0, norm, 1)


def exact_products(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context without mixed precision, in which matrix products are as precise as their inputs allow.

    The device is that of `tensor`.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def preactivation_pairs(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Pair the features before their ReLU, in the same way as `stage_pairs`."""
    return list(zip(batch.student.preactivations[1:], batch.teacher.preactivations[1:], strict=False))


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Make a 1x1 convolution and batch norm that map the student's features [B, channels, H, W] to the teacher's width.

    The weights start from N(0, 2 / teacher_channels), as in the code of OFD and AB.
    """
    convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher_channels))


def later_counts_double(losses: Sequence[Tensor]) -> Tensor:
    """Compute sum_i 2^(i - n + 1) loss_i of n stages, with i from 0.

    The last stage has weight 1, and each other stage half the weight of the next.

    >>> later_counts_double([torch.tensor(4.0), torch.tensor(4.0), torch.tensor(4.0)])
    tensor(7.)
    """
    return torch.stack([loss * 2.0 ** (i - len(losses) + 1) for i, loss in enumerate(losses)]).sum()


def last_maps(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the maps [B, D, height, width] of student and teacher from which their pooled features are made."""
    student, teacher = batch.student.unpooled, batch.teacher.unpooled
    assert student is not None, "call last_map_shapes in allocate: it raises UserError if there is no such map"
    assert teacher is not None
    return student, teacher


def last_map_shapes(networks: Networks, method: str) -> tuple[Shape, Shape]:
    """Return (D, height, width) of both `last_maps`.

    `method` names the method in the message. Raises `UserError` if a network's pooled features are not simply the
    pooled last map.
    """
    teacher = networks.required_teacher
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
    output = network.eval().forward_features(image)
    network.train(training)
    if output.unpooled is None or not torch.allclose(
        network.pool(output.unpooled), output.pooled, rtol=1e-3, atol=1e-5
    ):
        raise UserError(f"{whose} classifier does not read its pooled last feature map: choose another network.")
    return tuple(output.unpooled.shape[1:])
