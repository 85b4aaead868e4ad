from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from src.data.array_data import ArrayData
from src.data.arrays import save_arrays
from src.data.image_data import EpochBatches, Samples
from src.data.views import crop_and_flip, draw_views
from src.errors import UserError
from tests.data.conftest import arrays

Make = Callable[..., ArrayData]


def batches(loader: Any, epoch: int = 0) -> list[Samples]:
    """All batches of an epoch."""
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def as_rank(data: ArrayData, rank: int, world_size: int) -> ArrayData:
    trainer = Mock(global_rank=rank, world_size=world_size)
    trainer.fit_loop.epoch_progress.current.processed = 0
    data.trainer = trainer
    return data


def positions(batches: EpochBatches) -> list[list[int]]:
    return [share.positions for share in batches]


def joined(parts: list[Samples]) -> Tensor:
    return torch.cat([part.index for part in parts])


def test_a_batch_holds_the_images_of_its_indices(make_data: Make) -> None:
    data = make_data()
    data.load()
    seen = batches(data.train_dataloader())
    assert [len(batch.target) for batch in seen] == [16, 16, 16, 12]
    for batch in seen:
        (images,) = batch.images
        assert images.dtype == torch.uint8
        assert torch.equal(images, data.arrays.train_images[batch.index])
        assert torch.equal(batch.target, data.arrays.train_labels[batch.index])
    assert torch.equal(joined(seen).sort().values, torch.arange(60))
    assert data.image_shape == (3, 8, 6)
    assert data.num_classes == 3
    assert data.class_names == ("class 0", "class 1", "class 2")


def test_the_source_is_prepared_where_no_path_is_given(make_data: Make, tmp_path: Path) -> None:
    def prepare(root: Path) -> Path:
        save_arrays(root / "prepared.npz", **arrays(train=9))
        return root / "prepared.npz"

    data = make_data(path=None, prepare=prepare)
    data.load()
    assert len(data.train_index) == 9


def test_order_is_a_function_of_seed_and_epoch(make_data: Make) -> None:
    data = make_data()
    data.load()
    loader = data.train_dataloader()
    orders = {epoch: joined(batches(loader, epoch)) for epoch in (0, 1)}
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(joined(batches(loader, 0)), orders[0])
    other = make_data(seed=1)
    other.load()
    assert not torch.equal(joined(batches(other.train_dataloader())), orders[0])


@pytest.mark.parametrize("val_size", [0, 12])
def test_workers_change_nothing(make_data: Make, val_size: int) -> None:
    seen = []
    for workers in (0, 2):
        data = make_data(workers=workers, val_size=val_size)
        data.load()
        train = data.train_dataloader()
        seen.append([*batches(train, 0), *batches(train, 1), *data.val_dataloader()])
    for alone, helped in zip(*seen, strict=True):
        assert torch.equal(alone.images[0], helped.images[0])
        assert torch.equal(alone.target, helped.target)
        assert torch.equal(alone.index, helped.index)


@pytest.mark.parametrize("world_size", [2, 4])
def test_devices_share_the_batches_of_one_process(make_data: Make, world_size: int) -> None:
    data = make_data()
    data.load()
    alone = batches(data.train_dataloader(), 2)
    shares = [batches(as_rank(data, rank, world_size).train_dataloader(), 2) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(alone)}
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {len(part.target) for part in parts} == {len(whole.target) // world_size}
        assert torch.equal(joined(parts).sort().values, whole.index.sort().values)


@settings(deadline=None)
@given(size=st.integers(1, 70), per_device=st.integers(1, 9), world_size=st.integers(1, 4), epoch=st.integers(0, 3))
def test_training_batches_are_dealt_evenly(size: int, per_device: int, world_size: int, epoch: int) -> None:
    shares = []
    for rank in range(world_size):
        share = EpochBatches(size, per_device * world_size, seed=5, rank=rank, world_size=world_size)
        share.set_epoch(epoch)
        shares.append(positions(share))
        assert len(shares[-1]) == len(share)
    for parts in zip(*shares, strict=True):
        assert len({len(part) for part in parts}) == 1
    dealt = [position for share in shares for batch in share for position in batch]
    assert len(set(dealt)) == len(dealt) == size - size % world_size
    assert set(dealt) <= set(range(size))


@settings(deadline=None)
@given(size=st.integers(8, 70), batch_size=st.integers(8, 40), world_size=st.integers(1, 4))
def test_evaluation_counts_every_image_once(size: int, batch_size: int, world_size: int) -> None:
    shares = [EpochBatches(size, batch_size, seed=None, rank=rank, world_size=world_size) for rank in range(world_size)]
    dealt = [positions(share) for share in shares]
    assert {len(share) for share in dealt} == {len(share) for share in shares}
    assert len({len(share) for share in dealt}) == 1, "a device with fewer batches would hang the others"
    assert sorted(position for share in dealt for batch in share for position in batch) == list(range(size))
    if world_size == 1:
        assert [position for batch in dealt[0] for position in batch] == list(range(size))


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_loaders(make_data: Make, split: str) -> None:
    data = make_data(val_size=12)
    data.load()
    assert data.validates_on == "val"
    (batch,) = data.evaluation_loader(split)
    expected = data.arrays.train_images[data.val_index] if split == "val" else data.arrays.test_images
    assert torch.equal(batch.images[0], expected)
    assert torch.equal(batch.index, torch.arange(data.split_size(split)))
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    assert torch.equal(next(iter(loader)).images[0], expected)


def test_without_held_out_images_the_test_set_validates(make_data: Make) -> None:
    data = make_data()
    data.load()
    assert data.validates_on == "test"
    assert data.split_size("val") == 0
    (batch,) = data.val_dataloader()
    assert torch.equal(batch.images[0], data.arrays.test_images)


def test_splits_are_stratified_exactly_and_disjoint(make_data: Make) -> None:
    data = make_data(val_size=12, train_size=30)
    data.load()
    labels = data.arrays.train_labels
    assert labels[data.val_index].bincount().tolist() == [4, 4, 4]
    assert labels[data.train_index].bincount().tolist() == [10, 10, 10]
    assert not set(data.val_index.tolist()) & set(data.train_index.tolist())
    assert torch.equal(joined(batches(data.train_dataloader())).sort().values, data.train_index)
    takes_part = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, data.train_index, True)
    assert torch.equal(data.trained_labels, labels.where(takes_part, -1))


@pytest.mark.parametrize(("val_size", "counts"), [(3, {1}), (4, {1, 2}), (10, {3, 4}), (59, {19, 20})])
def test_uneven_sizes_differ_by_one(make_data: Make, val_size: int, counts: set[int]) -> None:
    data = make_data(val_size=val_size)
    data.load()
    assert len(data.val_index) == val_size
    assert set(data.arrays.train_labels[data.val_index].bincount().tolist()) == counts
    assert len(data.train_index) == 60 - val_size


def test_splits_follow_their_own_seed(make_data: Make) -> None:
    def split(**options: Any) -> ArrayData:
        data = make_data(val_size=12, **options)
        data.load()
        return data

    base, other_run, other_split = split(), split(seed=1), split(split_seed=1)
    assert torch.equal(base.val_index, other_run.val_index)
    assert base.val_digest == other_run.val_digest
    assert not torch.equal(base.val_index, other_split.val_index)
    assert base.val_digest != other_split.val_digest


def test_a_smaller_training_set_is_part_of_a_larger(make_data: Make) -> None:
    indices = []
    for size in (12, 30, 45):
        data = make_data(train_size=size)
        data.load()
        indices.append(set(data.train_index.tolist()))
    assert indices[0] < indices[1] < indices[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_size": -1}, "data.val_size=-1"),
        ({"val_size": 2}, "data.val_size=2"),
        ({"val_size": 61}, "data.val_size=61"),
        ({"val_size": 60}, "No training images"),
        ({"train_size": 0}, "No training images"),
        ({"train_size": 2}, "data.train_size=2"),
        ({"val_size": 12, "train_size": 49}, "data.train_size=49"),
        ({"path": "/nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_sizes_that_do_not_fit(make_data: Make, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_data(**options).load()


def test_a_batch_that_does_not_divide_by_the_devices(make_data: Make) -> None:
    data = make_data(batch_size=15)
    data.load()
    with pytest.raises(UserError, match="batch_size=15"):
        as_rank(data, 0, 2).train_dataloader()


def test_augmentation_makes_the_views_asked_for(make_data: Make) -> None:
    data = make_data()
    data.load()
    data.views = 2
    batch = batches(data.train_dataloader())[0]
    augmented = data.augment(batch, 7)
    assert data.view_count(epochs=3) == 5 * 5 * 2
    assert len(augmented.images) == len(augmented.views) == 2
    for view, (images, numbers) in enumerate(zip(augmented.images, augmented.views, strict=True)):
        assert torch.equal(numbers, draw_views(batch.index, seed=0, epoch=7, padding=2, flip=True, view=view))
        assert torch.equal(images, crop_and_flip(batch.images[0], numbers, padding=2))
    assert not torch.equal(*augmented.views)


class Recorder(L.LightningModule):
    """Remembers what it is shown."""

    def __init__(self, data: ArrayData) -> None:
        super().__init__()
        self.data, self.layer = data, nn.Linear(1, 1)
        self.trained: list[tuple[int, Tensor, Tensor]] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: Samples) -> Tensor:
        self.trained.append((self.current_epoch, batch.index, batch.images[0]))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Samples) -> None:
        self.validated.append(batch.images[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ArrayData, folder: Path, epochs: int) -> Recorder:
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    recorder = Recorder(data)
    last = folder / "last.ckpt"
    trainer.fit(recorder, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    return recorder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_sees_the_views_of_its_epoch_also_after_a_resume(
    make_data: Make, tmp_path: Path, workers: int
) -> None:
    def fresh() -> ArrayData:
        data = make_data(workers=workers, batch_size=8)
        data.load()
        return data

    first = fit(fresh(), tmp_path / "checkpoints", 1)
    resumed = fit(fresh(), tmp_path / "checkpoints", 3)
    seen = first.trained + resumed.trained
    assert [epoch for epoch, _, _ in seen] == [0] * 8 + [1] * 8 + [2] * 8

    data = fresh()
    loader = data.train_dataloader()
    expected = [(epoch, data.augment(batch, epoch)) for epoch in range(3) for batch in batches(loader, epoch)]
    for (epoch, index, images), (true_epoch, batch) in zip(seen, expected, strict=True):
        assert epoch == true_epoch
        assert torch.equal(index, batch.index)
        assert torch.equal(images, batch.images[0])
    assert all(torch.equal(images, data.arrays.test_images) for images in resumed.validated)
