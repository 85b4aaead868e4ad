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


def crop_and_flip(
    images: Tensor, index: Tensor, *, seed: int, epoch: int, padding: int, flip: bool, view: int = 0
) -> Tensor:
    """One view of each image, equal in distribution to torchvision's RandomCrop(size, padding) and
    RandomHorizontalFlip.

    `images` uint8 [B, C, H, W] and `index` int64 [B], the images' positions in the training data; the border is black,
    as in the customary order of crop before normalisation. `view` numbers independent views of one epoch.
    """
    bits = random_bits(seed, epoch, index, FIRST_VIEW + view)
    if padding:
        height, width = images.shape[2:]
        offsets = 2 * padding + 1
        down, right = bits % offsets, (bits // offsets) % offsets
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images), device=images.device), :, down, right]
    if flip:
        mirrored = ((bits >> 40) & 1).bool()
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std in float32, per channel, of uint8 images [B, C, H, W]."""
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    return (images.float() - shift) / scale
