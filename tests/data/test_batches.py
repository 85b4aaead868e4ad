"""Which images are in which batch, without data. With data: test_image_data.py and test_unlabelled_images.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.batches import EpochBatches, MixedBatches
from tests.helpers.batches import positions


@settings(deadline=None)
@given(size=st.integers(1, 70), per_device=st.integers(1, 9), world_size=st.integers(1, 4), epoch=st.integers(0, 3))
def test_training_batches_are_divided_evenly_among_devices(
    size: int, per_device: int, world_size: int, epoch: int
) -> None:
    shares = []
    for rank in range(world_size):
        share = EpochBatches(size, per_device * world_size, seed=5, rank=rank, world_size=world_size)
        share.set_epoch(epoch)
        shares.append(positions(share))
        assert len(shares[-1]) == len(share)
    for parts in zip(*shares, strict=True):
        assert len({len(part) for part in parts}) == 1
    read = [position for share in shares for batch in share for position in batch]
    assert len(set(read)) == len(read) == size - size % world_size
    assert set(read) <= set(range(size))


@pytest.mark.parametrize(
    ("size", "per_device", "world_size", "lengths"),
    [
        (65, 64, 1, [65]),
        (129, 64, 1, [64, 65]),
        (66, 64, 1, [64, 2]),
        (64, 64, 1, [64]),
        (66, 32, 2, [33]),
        (67, 32, 2, [33]),
        (68, 32, 2, [32, 2]),
        (65, 32, 2, [32]),
        (5, 1, 1, [1, 1, 1, 1, 1]),
        (7, 1, 2, [1, 1, 1]),
    ],
)
def test_no_device_trains_on_a_rest_of_one_image(
    size: int, per_device: int, world_size: int, lengths: list[int]
) -> None:
    for rank in range(world_size):
        share = EpochBatches(size, per_device * world_size, seed=5, rank=rank, world_size=world_size)
        assert [len(batch) for batch in positions(share)] == lengths
        assert len(share) == len(lengths)
        resumed = EpochBatches(size, per_device * world_size, seed=5, rank=rank, world_size=world_size, done=1)
        assert positions(resumed) == positions(share)[1:]


@settings(deadline=None)
@given(size=st.integers(8, 70), batch_size=st.integers(8, 40), world_size=st.integers(1, 4))
def test_evaluation_reads_every_image_once(size: int, batch_size: int, world_size: int) -> None:
    shares = [EpochBatches(size, batch_size, seed=None, rank=rank, world_size=world_size) for rank in range(world_size)]
    read = [positions(share) for share in shares]
    assert {len(share) for share in read} == {len(share) for share in shares}
    assert len({len(share) for share in read}) == 1, "a device with fewer batches would block the others"
    assert sorted(position for share in read for batch in share for position in batch) == list(range(size))
    if world_size == 1:
        assert [position for batch in read[0] for position in batch] == list(range(size))


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "without", "count"),
    [
        (50_000, 10, 1, 793),
        (100, 49_900, 63, 792),
        (500, 49_500, 63, 785),
        (100, 49_900, 32, 1559),
        (40, 0, 0, 0),
        (0, 640, 64, 10),
        (10, 1000, 32, 0),
    ],
)
def test_an_epoch_reads_the_larger_kind_once(labelled: int, unlabelled: int, without: int, count: int) -> None:
    batches = MixedBatches(
        labelled,
        64,
        seed=0,
        index=torch.arange(labelled),
        unlabelled=torch.arange(labelled, labelled + unlabelled),
        unlabelled_per_batch=without,
    )
    read = positions(batches)
    assert len(batches) == len(read) == count
    for batch in read:
        assert sum(position >= labelled for position in batch) == without
        assert len(batch) == 64
