"""Augmentation policies: random operations on the colours and the geometry of each view.

The operations and their strengths are torchvision's. The draws are functions of each view's random bits, whereas
torchvision draws from one generator. The images are Pillow's, on which torchvision's operations are faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from src.data.views import uniform

BINS = 31
"""The number of strengths of an operation, as in torchvision."""
FIRST_DRAW = 100
"""The number of a policy's first random number. Crops use lower numbers."""


class Space(NamedTuple):
    """The largest strength of each kind of operation. The smallest strength is 0, which changes nothing."""

    shear: float
    """A tangent."""
    shift: float
    """In pixels, or in shares of a side if `shift_is_share` is set."""
    shift_is_share: bool
    rotation: float
    """In degrees."""
    factor: float
    """Of brightness, colour, contrast and sharpness: 1 - factor to 1 + factor."""
    dropped_bits: int


Operation = Callable[[Image.Image, int, int, Space], Image.Image]
"""Maps an image, a strength from 0 to `BINS` - 1, a sign of 1 or -1, and the largest strengths to an image."""


@lru_cache
def _steps(first: float, last: float) -> list[float]:
    steps: list[float] = torch.linspace(first, last, BINS).tolist()  # in float32, as torchvision's
    return steps


def _affine(image: Image.Image, shift: list[int], shear: list[float], centre: list[float] | None) -> Image.Image:
    moved: Image.Image = F.affine(image, angle=0.0, translate=shift, scale=1.0, shear=shear, center=centre)
    return moved


def _shear(image: Image.Image, strength: int, sign: int, space: Space, axis: int) -> Image.Image:
    angles = [0.0, 0.0]
    angles[axis] = math.degrees(math.atan(sign * _steps(0, space.shear)[strength]))
    return _affine(image, [0, 0], angles, [0, 0])


def _shift(image: Image.Image, strength: int, sign: int, space: Space, axis: int) -> Image.Image:
    side = image.size[axis] if space.shift_is_share else 1
    pixels = [0, 0]
    pixels[axis] = int(sign * _steps(0, space.shift * side)[strength])
    return _affine(image, pixels, [0.0, 0.0], None)


def _rotate(image: Image.Image, strength: int, sign: int, space: Space) -> Image.Image:
    turned: Image.Image = F.rotate(image, sign * _steps(0, space.rotation)[strength])
    return turned


def _enhance(adjust: Callable[[Image.Image, float], Image.Image]) -> Operation:
    return lambda image, strength, sign, space: adjust(image, 1.0 + sign * _steps(0, space.factor)[strength])


@lru_cache
def _table(map_values: Callable[[Image.Image, float], Image.Image], argument: float) -> list[int]:
    """Compute what an operation makes of each value. Looking values up is faster than the operation itself."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    return list(map_values(ramp, argument).tobytes()) * 3


def _posterize(image: Image.Image, strength: int, sign: int, space: Space) -> Image.Image:
    return image.point(_table(F.posterize, round(8 - strength / ((BINS - 1) / space.dropped_bits))))


def _solarize(image: Image.Image, strength: int, sign: int, space: Space) -> Image.Image:
    return image.point(_table(F.solarize, 255 * _steps(1, 0)[strength]))


OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, sign, space: image,
    lambda image, strength, sign, space: _shear(image, strength, sign, space, axis=0),
    lambda image, strength, sign, space: _shear(image, strength, sign, space, axis=1),
    lambda image, strength, sign, space: _shift(image, strength, sign, space, axis=0),
    lambda image, strength, sign, space: _shift(image, strength, sign, space, axis=1),
    _rotate,
    _enhance(F.adjust_brightness),
    _enhance(F.adjust_saturation),
    _enhance(F.adjust_contrast),
    _enhance(F.adjust_sharpness),
    _posterize,
    _solarize,
    lambda image, strength, sign, space: F.autocontrast(image),
    lambda image, strength, sign, space: F.equalize(image),
)
"""In the order of torchvision's tables."""
TRIVIAL = Space(shear=0.99, shift=32.0, shift_is_share=False, rotation=135.0, factor=0.99, dropped_bits=6)
RANDAUGMENT = Space(shear=0.3, shift=150 / 331, shift_is_share=True, rotation=30.0, factor=0.9, dropped_bits=4)


@dataclass(frozen=True)
class TrivialAugment:
    """One random operation of random strength (TrivialAugment "wide", Müller and Hutter 2021, arXiv 2103.10158)."""

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Augment uint8 images [B, 3, H, W] on the CPU by their 63 random `bits` [B]."""
        operation, strength, sign = _draws(bits, 3)
        strengths = (strength * BINS).long()
        return _apply(images, [(operation, strengths, sign)], TRIVIAL)


@dataclass(frozen=True)
class RandAugment:
    """Several random operations of one strength (RandAugment, Cubuk et al. 2020, arXiv 1909.13719).

    `strength` is from 0 to 30. The paper calls it the magnitude.
    """

    operations: PositiveInt = 2
    strength: Annotated[int, Field(ge=0, lt=BINS)] = 9

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Augment uint8 images [B, 3, H, W] on the CPU by their 63 random `bits` [B]."""
        draws = _draws(bits, 2 * self.operations)
        strengths = torch.full_like(bits, self.strength)
        steps = [(operation, strengths, sign) for operation, sign in zip(draws[::2], draws[1::2], strict=True)]
        return _apply(images, steps, RANDAUGMENT)


def _draws(bits: Tensor, count: int) -> Tensor:
    """Draw `count` random numbers in [0, 1) for each image: [count, B] for bits [B]."""
    return uniform(bits, torch.arange(FIRST_DRAW, FIRST_DRAW + count)[:, None])


def _apply(images: Tensor, steps: list[tuple[Tensor, Tensor, Tensor]], space: Space) -> Tensor:
    """Apply the steps one after the other. A step is the draw of an operation, a strength and the draw of a sign."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(each) for each in pixels]
    for operation, strength, sign in steps:
        numbers = (operation * len(OPERATIONS)).long().tolist()
        signs = torch.where(sign < 0.5, -1, 1).tolist()
        chosen = zip(pictures, numbers, strength.tolist(), signs, strict=True)
        pictures = [OPERATIONS[number](picture, level, sign_of, space) for picture, number, level, sign_of in chosen]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
