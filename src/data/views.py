"""Views: augmented images as a pure function of (seed, epoch, sample index).

Augmentation draws from a counter-based generator keyed by these three and nothing else: not by the worker, the batch,
the device or what ran before. Any split over processes sees the same views, and a resumed run goes on with the right
ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def random_bits(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """63 random bits for each index, int64 like `index`: SplitMix64 (Steele et al. 2014) chained over the four keys.

    Keys that differ in anything give independent bits; `stream` separates the uses of one (seed, epoch, index).
    """
    bits = torch.zeros_like(index)
    for key in (seed, epoch, stream):
        bits = _mix(bits ^ key)
    return _mix(bits ^ index) & 0x7FFF_FFFF_FFFF_FFFF


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step: add the golden ratio, then two rounds of shift, xor and multiply, modulo 2^64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


ORDER, FIRST_VIEW = 0, 1


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """A permutation of 0 .. count - 1, [count] int64, for this epoch."""
    return torch.argsort(random_bits(seed, epoch, torch.arange(count), ORDER), stable=True)


def view_count(padding: int, flip: bool) -> int:
    """How many different views an image has: 162 under the customary padding of 4 and flip."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def draw_views(index: Tensor, *, seed: int, epoch: int, padding: int, flip: bool, view: int = 0) -> Tensor:
    """The number of each image's view, [B] int64 in 0 .. view_count - 1, uniform over them.

    `index` [B] holds the images' positions in the training data; `view` numbers independent views of one epoch.
    """
    return random_bits(seed, epoch, index, FIRST_VIEW + view) % view_count(padding, flip)


def crop_and_flip(images: Tensor, views: Tensor, padding: int) -> Tensor:
    """Views of uint8 images [B, C, H, W] by their numbers [B].

    With uniform numbers this is torchvision's RandomCrop(size, padding) followed by RandomHorizontalFlip; the border is
    black, as in the customary order of crop before normalisation.
    """
    offsets = 2 * padding + 1
    down, right, mirrored = views % offsets, views // offsets % offsets, views >= offsets**2
    if padding:
        height, width = images.shape[2:]
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images), device=images.device), :, down, right]
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std in float32, per channel, of uint8 images [B, C, H, W]."""
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    return (images.float() - shift) / scale
