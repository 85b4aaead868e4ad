"""Features for tests of methods on features: arithmetic on nested lists, random features, and changes of them.

The arithmetic is plain Python on floats, for statements of losses without torch.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Nested = Any
"""Features as nested lists of floats: [samples][channels][rows][columns], [samples][D], or a list of such."""
Move = Callable[[Tensor], Tensor]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def flat(nested: Nested) -> list[float]:
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def minus(x: list[float], y: list[float]) -> list[float]:
    return [a - b for a, b in zip(x, y, strict=True)]


def direction(x: list[float]) -> list[float]:
    """Scale to length 1."""
    return [a / math.sqrt(dot(x, x)) for a in x]


def mean_square(one: Nested, other: Nested) -> float:
    """Average the squared differences of all elements."""
    return mean((a - b) ** 2 for a, b in zip(flat(one), flat(other), strict=True))


def averaged(channel: list[list[float]], size: int) -> list[list[float]]:
    """Average a square map over blocks, down to `size` x `size` pixels. Its size must be a multiple."""
    step = len(channel) // size
    return [
        [mean(channel[i * step + a][j * step + b] for a in range(step) for b in range(step)) for j in range(size)]
        for i in range(size)
    ]


def smaller(maps: Nested, size: int) -> Nested:
    """Average the maps [samples][channels] down to `size` x `size` pixels."""
    return [[averaged(channel, size) for channel in sample] for sample in maps]


def at_one_size(student: Nested, teacher: Nested) -> tuple[Nested, Nested]:
    """Average the larger of two maps [samples][channels] down to the size of the smaller."""
    size = min(len(student[0][0]), len(teacher[0][0]))
    return smaller(student, size), smaller(teacher, size)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw normal numbers, the same ones for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reverse_channels(x: Tensor) -> Tensor:
    return x.flip(1)


def reverse_rows(x: Tensor) -> Tensor:
    return x.flip(2)


def reverse_samples(x: Tensor) -> Tensor:
    return x.flip(0)


def rotate_samples(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def scale(x: Tensor) -> Tensor:
    return 7.0 * x


def negate(x: Tensor) -> Tensor:
    return -x


def rotate_features(x: Tensor) -> Tensor:
    """Rotate all features of a sample, in the same way for all samples."""
    size = x[0].numel()
    rotation, _ = torch.linalg.qr(drawn((size, size), 3))
    return (x.flatten(1) @ rotation).view_as(x)


def scale_each_sample(x: Tensor) -> Tensor:
    return x * torch.linspace(0.1, 5, len(x), dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def scale_each_channel(x: Tensor) -> Tensor:
    return x * torch.linspace(-3, 5, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


def shift(x: Tensor) -> Tensor:
    return x + drawn(tuple(x.shape[1:]), 4)
