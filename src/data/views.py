"""Views: augmented images as a pure function of (seed, epoch, index of the image).

A counter-based generator draws the views from these three keys and a stream, which separates its uses. Workers,
batches, devices and earlier draws have no influence. Any number of processes therefore sees the same views, and so
does a resumed run.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# All streams of random bits. Two uses of one (seed, epoch, index) need different streams.
ORDER = 0
"""The order of the images in an epoch."""
FIRST_VIEW = 1
"""The view number v of an epoch, counted from 0, has stream FIRST_VIEW + v."""
SPLIT_STREAM = 1 << 20
"""The choice of held-out images."""
BLOCK_ORDER = (1 << 20) + 1
"""The order of the storage blocks in an epoch."""
FIXED_VIEWS = (1 << 20) + 2
"""The fixed views of an image, if it has only a few."""
WRONG_LABELS = (1 << 20) + 3
"""The choice of wrong labels."""
PEER_STREAM = 1 << 21
"""The initial weights of further students."""
LABELLED_PASS = 1 << 22
"""Pass number p over the images with labels in an epoch that also has images without, has stream LABELLED_PASS + p."""
UNLABELLED_PASS = 1 << 23
"""The same for the images without labels."""


def random_bits(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """Compute 63 random bits for each index, int64 of the shape of `index`.

    SplitMix64 (Steele et al. 2014) is chained over the four keys. The bits are independent for any two different keys.
    `stream` separates the uses of one (seed, epoch, index).
    """
    return _mix(index ^ _key(seed, epoch, stream)) & 0x7FFF_FFFF_FFFF_FFFF


@lru_cache(maxsize=64)
def _key(seed: int, epoch: int, stream: int) -> int:
    """Hash the keys that a whole batch shares."""
    bits = torch.zeros((), dtype=torch.int64)
    for key in (seed, epoch, stream):
        bits = _mix(bits ^ key)
    return int(bits)


def _mix(x: Tensor) -> Tensor:
    """Make one step of SplitMix64: add the golden ratio, then shift, xor and multiply twice, modulo 2^64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(constant: int) -> int:
    """Return the signed 64-bit integer with the bits of an unsigned one, because torch has no unsigned integers."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(bits: Tensor, draw: int | Tensor) -> Tensor:
    """Compute random number `draw` of each element, float64 in [0, 1), from the element's 63 random bits.

    The result is [B] for bits [B] and one draw, and [D, B] for draws [D, 1].
    """
    return _shift_right(_mix(_mix(bits) ^ draw), 11).double() * 2.0**-53


def further_bits(bits: Tensor, draw: int) -> Tensor:
    """Compute other 63 random bits of each element from its 63 random `bits`. Use each `draw` only once."""
    return _mix(_mix(bits) ^ draw) & 0x7FFF_FFFF_FFFF_FFFF


BLOCKS_AT_ONCE = 16
"""Number of storage blocks that an epoch reads at the same time."""


def epoch_order(
    seed: int,
    epoch: int,
    count: int,
    blocks: Tensor | None = None,
    device: torch.device | None = None,
    stream: int = ORDER,
) -> Tensor:
    """Draw the permutation of 0 .. count - 1 for an epoch, [count] int64, on `device` (None: the CPU).

    `blocks` [count] int64 is the storage block of each position. With it, the blocks come one after the other in random
    order, each spread over a stretch of BLOCKS_AT_ONCE blocks. Each block is then needed only once per epoch, for a
    short time.
    """
    bits = random_bits(seed, epoch, torch.arange(count, device=device), stream)
    if blocks is None:
        return torch.argsort(bits, stable=True)
    stored, block_of = blocks.unique(return_inverse=True)
    place = torch.argsort(torch.argsort(random_bits(seed, epoch, stored, BLOCK_ORDER), stable=True))
    return torch.argsort(place[block_of] + BLOCKS_AT_ONCE * uniform(bits, 0), stable=True)


def view_count(padding: int, flip: bool) -> int:
    """Return the number of different views of an image.

    >>> view_count(padding=4, flip=True)  # the usual augmentation of CIFAR
    162
    """
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


class DrawnView(NamedTuple):
    """A view of each image: its number, and the random bits that determine it."""

    number: Tensor
    """[B] int64, from 0."""
    bits: Tensor
    """[B] int64, 63 random bits."""


def draw_fixed_view(index: Tensor, fixed_views: int, *, seed: int, draw: int) -> DrawnView:
    """Choose one of the `fixed_views` views that each image has in all epochs and for all seeds.

    Draw by draw, an image gets its views in turn, from a random one on. After `fixed_views` draws it has had all of
    them. View number k of an image is the same for any larger `fixed_views`.
    """
    number = (random_bits(seed, 0, index, FIRST_VIEW) % fixed_views + draw) % fixed_views
    return DrawnView(number, random_bits(0, 0, index + (number << 40), FIXED_VIEWS))


def draw_view(
    index: Tensor, *, seed: int, epoch: int, view: int, views_per_image: int, fixed_views: int | None
) -> DrawnView:
    """Draw a view of each image, of a kind that has too many views to number them all, such as crops of photos.

    View v of an epoch has the number epoch * views_per_image + v. With `fixed_views`, it is a view of
    `draw_fixed_view`.
    """
    draw = epoch * views_per_image + view
    if fixed_views is not None:
        return draw_fixed_view(index, fixed_views, seed=seed, draw=draw)
    return DrawnView(torch.full_like(index, draw), random_bits(seed, epoch, index, FIRST_VIEW + view))


def draw_views(
    index: Tensor,
    *,
    seed: int,
    epoch: int,
    padding: int,
    flip: bool,
    view: int = 0,
    views_per_image: int = 1,
    fixed_views: int | None = None,
) -> Tensor:
    """Draw the view number of each image, [B] int64, uniformly from 0 .. view_count - 1.

    `index` [B] are the positions of the images in the training data. `view` numbers the independent views of an epoch.
    With `fixed_views`, the number is one of so many numbers that the image has in all epochs. Some may be equal.
    """
    drawn = draw_view(
        index, seed=seed, epoch=epoch, view=view, views_per_image=views_per_image, fixed_views=fixed_views
    )
    return drawn.bits % view_count(padding, flip)


def crop_and_flip(images: Tensor, view_numbers: Tensor, padding: int) -> Tensor:
    """Make the views with `view_numbers` [B] of uint8 images [B, C, H, W].

    With uniform numbers this equals torchvision's RandomCrop(size, padding), followed by RandomHorizontalFlip. The
    border is black, because images are usually cropped before they are normalised.
    """
    offsets = 2 * padding + 1
    down, right = view_numbers % offsets, view_numbers // offsets % offsets
    mirrored = view_numbers >= offsets**2
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
"""As in torchvision's RandomResizedCrop."""


def resized_crop_boxes(
    bits: Tensor, heights: Tensor, widths: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Compute the crop of each view from its 63 random `bits` [B].

    The images are `heights` [B] x `widths` [B] pixels large. Returns the boxes of left, top, width and height, [B, 4]
    int64, and whether to mirror the crops, [B] bool.

    The distribution is that of torchvision's RandomResizedCrop, followed by RandomHorizontalFlip. The share of the area
    is uniform within `scale`, and width / height is log-uniform within `ratio`. If none of 10 attempts fits into the
    image, the largest central crop within `ratio` is taken.
    """
    draws = uniform(bits, torch.arange(2 * CROP_ATTEMPTS + 3, device=bits.device)[:, None])
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


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Compute (images / 255 - mean) / std in float32, per channel, for uint8 images [B, C, H, W].

    On a GPU, give `mean` and `std` as float32 tensors [C] on the same device. Numbers would be copied there at each
    call, and the host would wait for the copies.

    >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), mean=[0.5], std=[0.25]).item()
    2.0
    """
    scale = torch.as_tensor(std, device=images.device) * 255
    shift = torch.as_tensor(mean, device=images.device) * 255
    if images.stride(1) == 1:  # channels last: by whole rows, because torch would loop over 3 numbers at a time
        pixels, width = images.permute(0, 2, 3, 1), images.shape[3]
        rows = pixels.flatten(2).float().sub_(shift.repeat(width)).div_(scale.repeat(width))
        return rows.view(pixels.shape).permute(0, 3, 1, 2)
    # In place, because memory traffic limits the speed on a CPU.
    return images.float().sub_(shift[:, None, None]).div_(scale[:, None, None])
