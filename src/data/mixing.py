"""Mixing of two views: MixUp and CutMix, by draws that are functions of a view's random bits."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from pydantic import PositiveFloat
from scipy.special import betaincinv
from torch import Tensor

from src.data.views import uniform

FIRST_DRAW = 200
"""The number of the first random number. Crops and policies use lower numbers."""
QUANTILES = 1 << 16


class Mixing(Protocol):
    """Mixes each view with a partner."""

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Mix uint8 images [B, 3, H, W] with their partners, by the 63 random `bits` [B] of each image.

        Returns the mixed images, and the share [B] float32 of each label that belongs to the image itself.
        """


@dataclass(frozen=True)
class MixUp:
    """A weighted mean of two views, rounded to uint8 (Zhang et al. 2018, arXiv 1710.09412).

    The weight of the image itself has the distribution Beta(alpha, alpha). It is drawn for each image.
    """

    alpha: PositiveFloat = 1.0

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Mix as described in `Mixing`."""
        share = draw_beta(self.alpha, bits)
        weight = (share * QUANTILES).int()[:, None, None, None]  # integers, so that all devices round alike
        mixed = weight * images.int() + (QUANTILES - weight) * partners.int()
        return ((mixed + QUANTILES // 2) // QUANTILES).byte(), share


@dataclass(frozen=True)
class CutMix:
    """A view with a rectangle of another view pasted in (Yun et al. 2019, arXiv 1905.04899).

    The rectangle has the proportions of the image and a random centre, and is cut off at the edges. Before that, the
    rest of the area has the distribution Beta(alpha, alpha).
    """

    alpha: PositiveFloat = 1.0

    def __call__(self, images: Tensor, partners: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Mix as described in `Mixing`."""
        side = (1 - draw_beta(self.alpha, bits)).sqrt()
        rows, columns = (
            _inside(uniform(bits, FIRST_DRAW + number), side, length)
            for number, length in ((1, images.shape[2]), (2, images.shape[3]))
        )
        pasted = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(pasted, partners, images), 1 - pasted.float().mean(dim=(1, 2, 3))


def draw_beta(alpha: float, bits: Tensor) -> Tensor:
    """Draw a number from Beta(alpha, alpha) for each of the `bits` [B], float32 in [0, 1].

    It is one of 65,536 quantiles, rounded to a multiple of 1 / 65,536, so that all devices draw the same number.
    """
    return _quantiles(alpha).to(bits.device)[(uniform(bits, FIRST_DRAW) * QUANTILES).long()]


@lru_cache
def _quantiles(alpha: float) -> Tensor:
    exact = torch.from_numpy(betaincinv(alpha, alpha, (np.arange(QUANTILES) + 0.5) / QUANTILES))
    return ((exact * QUANTILES).round() / QUANTILES).float()


def _inside(draw: Tensor, side: Tensor, length: int) -> Tensor:
    """Return which of `length` pixels lie inside: at most half of `side * length` pixels from a random centre.

    `draw` [B] is in [0, 1), and `side` [B] is the share of the length. The result is [B, length] bool. As in
    torchvision's CutMix, the centre is a whole number, and half a side is rounded down.
    """
    centre, half = (draw * length).long()[:, None], (side * length / 2).long()[:, None]
    pixels = torch.arange(length, device=draw.device)
    return (pixels >= centre - half) & (pixels < centre + half)
