from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from src.data.views import crop_and_flip, epoch_order, normalise, random_bits

MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    """SplitMix64 in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def noise(count: int, height: int = 8, width: int = 6) -> Tensor:
    """Images whose crops are all different."""
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.manual_seed(0))


def coordinates(count: int, size: int) -> Tensor:
    """Images of their own pixels' numbers from 1, so that a view tells its offsets."""
    pixels = torch.arange(1, size * size + 1, dtype=torch.uint8).view(1, 1, size, size)
    return pixels.expand(count, 3, size, size)


def test_the_mixer_is_splitmix64() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation for state 0
    keys = [(0, 0, 0, 0), (1, 2, 3, 4), (2**62, 239, 1, 49_999), (123456789, 0, 1 << 20, 7)]
    for seed, epoch, stream, index in keys:
        state = 0
        for key in (seed, epoch, stream, index):
            state = splitmix(state ^ key)
        assert int(random_bits(seed, epoch, torch.tensor([index]), stream)) == state & (MASK >> 1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**62), epoch=st.integers(0, 1000), stream=st.integers(0, 5), order=st.permutations(range(12))
)
def test_bits_are_a_function_of_the_keys_alone(seed: int, epoch: int, stream: int, order: list[int]) -> None:
    index = torch.arange(12) * 1009
    bits = random_bits(seed, epoch, index, stream)
    assert bits.dtype == torch.int64
    assert (bits >= 0).all()
    assert torch.equal(random_bits(seed, epoch, index[order], stream), bits[order])
    one_by_one = torch.cat([random_bits(seed, epoch, i[None], stream) for i in index])
    assert torch.equal(one_by_one, bits)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "epoch", "stream"])
def test_neighbouring_keys_give_independent_bits(other: tuple[int, int, int]) -> None:
    count = 20_000
    index = torch.arange(count)
    a = random_bits(0, 0, index, 0)
    seed, epoch, stream = other
    b = random_bits(seed, epoch, index, stream)
    _assert_fair(a ^ b, 5)


def test_neighbouring_indices_give_independent_bits() -> None:
    bits = random_bits(0, 0, torch.arange(20_001), 0)
    _assert_fair(bits[1:] ^ bits[:-1], 5)
    _assert_fair(bits, 5)


def _assert_fair(bits: Tensor, sigmas: float) -> None:
    """Each of the 63 bits is set in half of the numbers."""
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(63)])
    assert ((ones - 0.5).abs() < sigmas * 0.5 / len(bits) ** 0.5).all()


def test_the_order_is_another_permutation_in_each_epoch() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(orders[0], epoch_order(0, 0, 1000))
    ranks = np.stack([order.numpy() for order in orders]).astype(float)
    assert np.abs(np.corrcoef(ranks) - np.eye(4)).max() < 0.15
    fixed_points = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(fixed_points) < 10  # 1 is expected


@settings(deadline=None)
@given(order=st.permutations(range(10)), cut=st.integers(1, 9), view=st.integers(0, 2))
def test_views_do_not_depend_on_the_batch(order: list[int], cut: int, view: int) -> None:
    images, index = noise(10), torch.arange(10) * 31
    options: dict[str, Any] = {"seed": 3, "epoch": 5, "padding": 2, "flip": True, "view": view}
    views = crop_and_flip(images, index, **options)
    shuffled = torch.tensor(order)
    parts = [crop_and_flip(images[part], index[part], **options) for part in (shuffled[:cut], shuffled[cut:])]
    assert torch.equal(torch.cat(parts), views[shuffled])


def test_views_differ_by_epoch_seed_and_view() -> None:
    images, index = noise(64), torch.arange(64)
    base: dict[str, Any] = {"seed": 0, "epoch": 0, "padding": 4, "flip": True, "view": 0}
    views = crop_and_flip(images, index, **base)
    for key in ("seed", "epoch", "view"):
        other = crop_and_flip(images, index, **{**base, key: 1})
        same = (views == other).all(dim=(1, 2, 3)).float().mean()
        assert same < 0.1  # 1 of 162 is expected


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 6), (5, 9)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_view_is_one_that_torchvision_makes(
    padding: int, flip: bool, height: int, width: int, channels_last: bool
) -> None:
    images = noise(50, height, width)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    views = crop_and_flip(images, torch.arange(50), seed=1, epoch=2, padding=padding, flip=flip)
    assert views.dtype == torch.uint8
    assert views.shape == images.shape
    for image, view in zip(images, views, strict=True):
        padded = tv.pad(image, [padding] * 4)
        crops = [
            tv.crop(padded, top, left, height, width)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        possible = crops + [tv.horizontal_flip(crop) for crop in crops] * flip
        assert sum(torch.equal(view, made) for made in possible) == 1


def _view_numbers(views: Tensor, size: int, padding: int) -> Tensor:
    """Which of the 2 (2 padding + 1)^2 views each of the views of `coordinates` is, read from its middle pixels."""
    middle = size // 2
    here, right = views[:, 0, middle, middle].long() - 1, views[:, 0, middle, middle + 1].long() - 1
    flipped = (right < here).long()
    top = here // size - middle + padding
    column = torch.where(flipped == 1, size - 1 - middle, middle)
    left = here % size - column + padding
    return (flipped * (2 * padding + 1) + top) * (2 * padding + 1) + left


@pytest.mark.parametrize("view", [0, 1])
def test_all_162_views_occur_equally_often(view: int) -> None:
    count, size, padding = 162 * 200, 12, 4
    views = crop_and_flip(
        coordinates(count, size), torch.arange(count), seed=7, epoch=3, padding=padding, flip=True, view=view
    )
    numbers = _view_numbers(views, size, padding)
    seen = torch.bincount(numbers, minlength=162).double()
    assert len(seen) == 162
    chi_square = ((seen - 200) ** 2 / 200).sum()
    assert 161 - 5 * 18 < chi_square < 161 + 5 * 18  # 161 degrees of freedom: standard deviation 17.9


def test_the_same_views_as_torchvisions_transforms() -> None:
    """The reading of views used above is right: torchvision's own random views give numbers in the same range."""
    torch.manual_seed(0)
    transform = v2.Compose([v2.RandomCrop(12, padding=4), v2.RandomHorizontalFlip()])
    numbers = _view_numbers(torch.stack([transform(image) for image in coordinates(3000, 12)]), 12, 4)
    assert set(numbers.tolist()) == set(range(162))


def test_successive_epochs_are_uncorrelated() -> None:
    count, size, padding = 5000, 12, 4
    images, index = coordinates(count, size), torch.arange(count)
    numbers = [
        _view_numbers(crop_and_flip(images, index, seed=0, epoch=e, padding=padding, flip=True), size, padding).numpy()
        for e in range(4)
    ]
    assert np.abs(np.corrcoef(np.stack(numbers)) - np.eye(4)).max() < 5 / count**0.5


def test_normalise_is_torchvisions() -> None:
    images, mean, std = noise(5), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    expected = tv.normalize(tv.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    normalised = normalise(images, mean, std)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, expected, atol=2e-6, rtol=0)
