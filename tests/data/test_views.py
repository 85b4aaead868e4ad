"""Random bits, orders and views: independent, uniform, and distributed as torchvision's."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as tv

from src.data.views import (
    BLOCKS_AT_ONCE,
    ORDER,
    crop_and_flip,
    draw_fixed_view,
    draw_view,
    draw_views,
    epoch_order,
    normalise,
    random_bits,
    resized_crop_boxes,
    uniform,
    view_count,
)

MASK = (1 << 64) - 1


def splitmix(x: int) -> int:
    """Make one step of SplitMix64 with Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def noise(count: int, height: int = 8, width: int = 6) -> Tensor:
    """Make images whose crops are all different."""
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.manual_seed(0))


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
def test_bits_depend_on_the_keys_only(seed: int, epoch: int, stream: int, order: list[int]) -> None:
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
    """Check that each of the 63 bits is set in half of the numbers."""
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(63)])
    assert ((ones - 0.5).abs() < sigmas * 0.5 / len(bits) ** 0.5).all()


def test_each_epoch_has_a_different_order() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(orders[0], epoch_order(0, 0, 1000))
    ranks = np.stack([order.numpy() for order in orders]).astype(float)
    assert np.abs(np.corrcoef(ranks) - np.eye(4)).max() < 0.15
    fixed_points = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(fixed_points) < 10  # 1 is expected


def test_the_order_without_blocks_sorts_the_random_bits() -> None:
    expected = torch.argsort(random_bits(3, 7, torch.arange(500), ORDER))
    assert torch.equal(epoch_order(3, 7, 500), expected)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**62), epoch=st.integers(0, 500), blocks=st.lists(st.integers(0, 40), min_size=1, max_size=300)
)
def test_the_order_with_blocks_reads_few_blocks_at_a_time(seed: int, epoch: int, blocks: list[int]) -> None:
    of = torch.tensor(blocks) * 17
    order = epoch_order(seed, epoch, len(blocks), of)
    assert torch.equal(order.sort().values, torch.arange(len(blocks)))
    seen = of[order].tolist()
    first = {block: seen.index(block) for block in set(seen)}
    last = {block: len(seen) - 1 - seen[::-1].index(block) for block in set(seen)}
    at_once = [sum(first[block] <= place <= last[block] for block in first) for place in range(len(seen))]
    assert max(at_once) <= 2 * BLOCKS_AT_ONCE  # the first block of a stretch may end last


def test_each_epoch_has_a_different_order_of_blocks() -> None:
    blocks = torch.arange(20_000) % 200
    orders = [epoch_order(seed, epoch, 20_000, blocks) for seed in (0, 1) for epoch in (0, 1)]
    ranks = np.stack([order.argsort().numpy() for order in orders]).astype(float)
    assert np.abs(np.corrcoef(ranks) - np.eye(4)).max() < 0.3  # 200 blocks: a standard deviation of 0.07
    within = np.stack([order[blocks[order] == 7].argsort().numpy() for order in orders]).astype(float)
    assert np.abs(np.corrcoef(within) - np.eye(4)).max() < 0.5  # 100 images in a block: a standard deviation of 0.1
    batch = blocks[orders[0]][10_000:10_256]
    assert 10 <= len(batch.unique()) <= 2 * BLOCKS_AT_ONCE


def test_uniform_numbers_are_uniform_and_independent() -> None:
    bits, count = random_bits(0, 0, torch.arange(20_000), 1), 20_000
    draws = uniform(bits, torch.arange(4)[:, None])
    assert draws.dtype == torch.float64
    assert torch.equal(draws[2], uniform(bits, 2))
    assert ((draws >= 0) & (draws < 1)).all()
    for draw in draws:
        assert _distance(draw.numpy(), (np.arange(count) + 0.5) / count) < KOLMOGOROV * (2 / count) ** 0.5
    assert np.abs(np.corrcoef(draws.numpy()) - np.eye(4)).max() < 5 / count**0.5
    assert np.abs(np.corrcoef(draws[0, 1:].numpy(), draws[0, :-1].numpy())[0, 1]) < 5 / count**0.5


KOLMOGOROV = 2.2
"""The distance of two samples of n values from one distribution exceeds this times sqrt(2 / n) once in 8,000 times."""


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the largest difference of two empirical distribution functions."""
    values = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


IMAGENET_SCALE, IMAGENET_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes_of(count: int, height: int, width: int, scale: tuple[float, float] = IMAGENET_SCALE) -> tuple[Tensor, Tensor]:
    views = random_bits(0, 0, torch.arange(count), 1)
    heights, widths = torch.full((count,), height), torch.full((count,), width)
    return resized_crop_boxes(views, heights, widths, scale, IMAGENET_RATIO)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (40, 31), (60, 240)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 3000
    boxes, mirrored = boxes_of(count, height, width)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, list(IMAGENET_SCALE), list(IMAGENET_RATIO)) for _ in range(count)]
    top, left, tall, wide = np.array(drawn).T
    ours = dict(zip(("left", "top", "wide", "tall"), boxes.T.numpy(), strict=True))
    theirs = {"left": left, "top": top, "wide": wide, "tall": tall}
    for crops in (ours, theirs):
        crops |= {"area": crops["wide"] * crops["tall"], "ratio": crops["wide"] / crops["tall"]}
        crops |= {"right": width - crops["left"] - crops["wide"], "bottom": height - crops["top"] - crops["tall"]}
    for name in ours:
        assert _distance(ours[name], theirs[name]) < KOLMOGOROV * (2 / count) ** 0.5, name
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / count**0.5
    for name in ours:
        assert abs(np.corrcoef(mirrored.numpy(), ours[name])[0, 1]) < 5 / count**0.5, name
    assert abs(np.corrcoef(ours["left"] - ours["right"], ours["top"] - ours["bottom"])[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 7), (7, 1), (30, 39), (39, 30)])
def test_if_no_crop_fits_the_central_crop_equals_torchvisions(height: int, width: int) -> None:
    scale = (1.5, 2.0)
    boxes, _ = boxes_of(50, height, width, scale)
    top, left, tall, wide = RandomResizedCrop.get_params(
        torch.empty(3, height, width), list(scale), list(IMAGENET_RATIO)
    )
    assert torch.equal(boxes, torch.tensor([left, top, wide, tall]).expand(50, -1))


@settings(deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    seed=st.integers(0, 2**62),
    low=st.floats(0.001, 1),
)
def test_crops_lie_inside_the_image_and_do_not_depend_on_the_batch(
    sides: list[tuple[int, int]], seed: int, low: float
) -> None:
    heights, widths = torch.tensor(sides).T
    views = random_bits(seed, 0, torch.arange(len(sides)), 1)
    boxes, mirrored = resized_crop_boxes(views, heights, widths, (low, 1.0), IMAGENET_RATIO)
    left, top, wide, tall = boxes.T
    assert boxes.dtype == torch.int64
    assert mirrored.dtype == torch.bool
    assert ((left >= 0) & (top >= 0) & (wide >= 1) & (tall >= 1)).all()
    assert ((left + wide <= widths) & (top + tall <= heights)).all()
    alone = [
        resized_crop_boxes(views[i : i + 1], heights[i : i + 1], widths[i : i + 1], (low, 1.0), IMAGENET_RATIO)
        for i in range(len(sides))
    ]
    assert torch.equal(torch.cat([box for box, _ in alone]), boxes)
    assert torch.equal(torch.cat([flip for _, flip in alone]), mirrored)


@settings(deadline=None)
@given(order=st.permutations(range(10)), cut=st.integers(1, 9), view=st.integers(0, 2))
def test_views_do_not_depend_on_the_batch(order: list[int], cut: int, view: int) -> None:
    images, index = noise(10), torch.arange(10) * 31

    def made(rows: Tensor) -> Tensor:
        numbers = draw_views(index[rows], seed=3, epoch=5, padding=2, flip=True, view=view)
        return crop_and_flip(images[rows], numbers, padding=2)

    together = made(torch.arange(10))
    shuffled = torch.tensor(order)
    assert torch.equal(torch.cat([made(shuffled[:cut]), made(shuffled[cut:])]), together[shuffled])


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 6), (5, 9)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_view_numbers_enumerate_torchvisions_views(
    padding: int, flip: bool, height: int, width: int, channels_last: bool
) -> None:
    image = noise(1, height, width)
    count = view_count(padding, flip)
    images = image.repeat(count, 1, 1, 1)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    views = crop_and_flip(images, torch.arange(count), padding)
    assert views.dtype == torch.uint8

    padded = tv.pad(image[0], [padding] * 4)
    offsets = range(2 * padding + 1)
    crops = [tv.crop(padded, top, left, height, width) for left in offsets for top in offsets]
    expected = torch.stack(crops + [tv.horizontal_flip(crop) for crop in crops] * flip)
    assert torch.equal(views, expected)
    assert len({view.numpy().tobytes() for view in views}) == count


def test_torchvisions_random_views_are_among_our_162() -> None:
    image = noise(1, 32, 32)
    views = crop_and_flip(image.expand(162, -1, -1, -1), torch.arange(162), 4)
    torch.manual_seed(0)
    transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    assert view_count(4, True) == 162
    known = {view.numpy().tobytes() for view in views}
    assert {transform(image[0]).numpy().tobytes() for _ in range(300)} <= known


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_all_views_occur_equally_often(view: int, flip: bool) -> None:
    count = view_count(4, flip)
    numbers = draw_views(torch.arange(count * 200), seed=7, epoch=3, padding=4, flip=flip, view=view)
    seen = torch.bincount(numbers, minlength=count).double()
    assert len(seen) == count
    chi_square = float(((seen - 200) ** 2 / 200).sum())
    freedom = count - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("key", ["seed", "epoch", "view"])
def test_views_of_neighbouring_keys_are_uncorrelated(key: str) -> None:
    count, index = 5000, torch.arange(5000)
    base: dict[str, Any] = {"seed": 0, "epoch": 0, "padding": 4, "flip": True, "view": 0}
    numbers = [draw_views(index, **{**base, key: value}).numpy() for value in range(4)]
    assert np.abs(np.corrcoef(np.stack(numbers)) - np.eye(4)).max() < 5 / count**0.5
    same = np.mean(numbers[0] == numbers[1])
    assert same < 2 / 162


def test_normalisation_equals_torchvisions() -> None:
    images, mean, std = noise(5), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    expected = tv.normalize(tv.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    normalised = normalise(images, mean, std)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, expected, atol=2e-6, rtol=0)


def test_fixed_views_are_a_few_views_in_all_epochs_and_for_all_seeds() -> None:
    index, padding = torch.arange(400), 4
    options: dict[str, Any] = {"padding": padding, "flip": True}
    seen: dict[int, set[int]] = {int(i): set() for i in index}
    for seed, epoch, view in itertools.product(range(2), range(20), range(2)):
        numbers = draw_views(index, seed=seed, epoch=epoch, view=view, fixed_views=3, **options)
        for i, number in zip(index.tolist(), numbers.tolist(), strict=True):
            seen[i].add(number)
    assert {len(numbers) for numbers in seen.values()} <= {2, 3}  # two of the three may be equal
    assert sum(len(numbers) == 3 for numbers in seen.values()) > 380
    assert len({frozenset(numbers) for numbers in seen.values()}) > 390  # each image has views of its own


def test_an_image_has_had_all_its_fixed_views_after_as_many_draws() -> None:
    index = torch.arange(50)
    keys: dict[str, Any] = {"seed": 1, "views_per_image": 2, "fixed_views": 4}
    epochs = [[draw_view(index, epoch=epoch, view=view, **keys).number for view in (0, 1)] for epoch in range(4)]
    for first in (epochs[:2], epochs[1:3], epochs[2:]):
        drawn = torch.stack([number for views in first for number in views]).T
        assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(50, 4))
    assert set(epochs[0][0].tolist()) == set(range(4))  # images start at different views


def test_more_fixed_views_add_to_the_fewer() -> None:
    index = torch.arange(50)
    bits: dict[int, dict[tuple[int, int], int]] = {}
    for fixed_views, draw in itertools.product((2, 5), range(5)):
        number, drawn = draw_fixed_view(index, fixed_views, seed=1, draw=draw)
        assert number.max() < fixed_views
        found = zip(zip(index.tolist(), number.tolist(), strict=True), drawn.tolist(), strict=True)
        bits.setdefault(fixed_views, {}).update(found)
    assert len(bits[2]) == 50 * 2
    assert len(bits[5]) == 50 * 5
    assert bits[2].items() <= bits[5].items()
    assert len(set(bits[5].values())) == 50 * 5
