"""Views: augmented images as a pure function of (seed, epoch, sample index).

Augmentation draws from a counter-based generator keyed by these three and nothing else: not by the worker, the batch,
the device or what ran before. Any split over processes sees the same views, and a resumed run goes on with the right
ones.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def random_bits(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """63 random bits for each index, int64 like `index`: SplitMix64 (Steele et al. 2014) chained over the four keys.

    Keys that differ in anything give independent bits; `stream` separates the uses of one (seed, epoch, index).
    """
    return _mix(index ^ _key(seed, epoch, stream)) & 0x7FFF_FFFF_FFFF_FFFF


@lru_cache(maxsize=64)
def _key(seed: int, epoch: int, stream: int) -> int:
    """What the keys that a whole batch shares come to."""
    bits = torch.zeros((), dtype=torch.int64)
    for key in (seed, epoch, stream):
        bits = _mix(bits ^ key)
    return int(bits)


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


def uniform(bits: Tensor, draw: int | Tensor) -> Tensor:
    """Number `draw` of each element's stream of random numbers, float64 in [0, 1), from its 63 random bits.

    [B] for one number and bits [B]; [D, B] for numbers [D, 1].
    """
    return _shift_right(_mix(_mix(bits) ^ draw), 11).double() * 2.0**-53


ORDER, FIRST_VIEW, BLOCK_ORDER = 0, 1, (1 << 20) + 1
BLOCKS_AT_ONCE = 16


def epoch_order(seed: int, epoch: int, count: int, blocks: Tensor | None = None) -> Tensor:
    """A permutation of 0 .. count - 1, [count] int64, for this epoch.

    `blocks` [count] int64 tells where each is stored. Then blocks come one after the other in random order, each spread
    over the stretch of BLOCKS_AT_ONCE: every block is needed for a short time once an epoch.
    """
    bits = random_bits(seed, epoch, torch.arange(count), ORDER)
    if blocks is None:
        return torch.argsort(bits, stable=True)
    stored, block_of = blocks.unique(return_inverse=True)
    place = torch.argsort(torch.argsort(random_bits(seed, epoch, stored, BLOCK_ORDER), stable=True))
    return torch.argsort(place[block_of] + BLOCKS_AT_ONCE * uniform(bits, 0), stable=True)


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
    count, channels, height, width = images.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *[padding] * 4))
    steps = torch.arange(width, device=images.device)
    columns = right[:, None] + torch.where(mirrored[:, None], width - 1 - steps, steps)
    rows = down[:, None] + torch.arange(height, device=images.device)
    first = torch.arange(count, device=images.device)[:, None] * padded.shape[1]
    places = (first + rows)[:, :, None] * padded.shape[2] + columns[:, None]
    pixels = padded.reshape(-1, channels).index_select(0, places.flatten())  # one gather, all channels of a pixel
    return pixels.view(count, height, width, channels).permute(0, 3, 1, 2)


CROP_ATTEMPTS = 10


def resized_crop_boxes(
    views: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """What each view [B] of 63 random bits cuts out of its image, which is `heights` x `widths` pixels [B] large.

    Boxes [B, 4] int64 of left, top, width and height, and whether to mirror, [B] bool: distributed as torchvision's
    RandomResizedCrop (a share of the area within `scale`, a quotient of width and height log-uniform within `ratio`,
    10 attempts at a box that fits, else the largest central one) followed by RandomHorizontalFlip.
    """
    draws = uniform(views, torch.arange(2 * CROP_ATTEMPTS + 3, device=views.device)[:, None])
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * draws[0 : 2 * CROP_ATTEMPTS : 2])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    quotient = torch.exp(low + (high - low) * draws[1 : 2 * CROP_ATTEMPTS : 2])
    width, height = (area * quotient).sqrt().round(), (area / quotient).sqrt().round()
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    first = fits.int().argmax(dim=0, keepdim=True)
    any_fits = fits.any(dim=0)
    central_width = torch.minimum(widths, (heights * ratio[1]).round())
    central_height = torch.minimum(heights, (widths / ratio[0]).round())
    width = torch.where(any_fits, width.gather(0, first)[0], central_width)
    height = torch.where(any_fits, height.gather(0, first)[0], central_height)
    left, top = (
        torch.where(any_fits, (draw * (whole - part + 1)).floor(), ((whole - part) / 2).floor())
        for draw, whole, part in ((draws[-3], widths, width), (draws[-2], heights, height))
    )
    return torch.stack([left, top, width, height], dim=1).long(), draws[-1] < 0.5


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std in float32, per channel, of uint8 images [B, C, H, W]."""
    scale = torch.tensor(std, device=images.device) * 255
    shift = torch.tensor(mean, device=images.device) * 255
    if images.stride(1) == 1:  # channels last: by whole rows, or torch would go by 3 numbers at a time
        pixels, width = images.permute(0, 2, 3, 1), images.shape[3]
        rows = pixels.flatten(2).float().sub_(shift.repeat(width)).div_(scale.repeat(width))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)
    # in place: on a processor memory is what takes time
    return images.float().sub_(shift[:, None, None]).div_(scale[:, None, None])
