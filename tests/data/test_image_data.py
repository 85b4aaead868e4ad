"""Splits, batches and devices. Array data stands for any data."""

import dataclasses
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from src.common.errors import UserError
from src.data.array_data import ArrayData
from src.data.array_file import save_arrays
from src.data.image_data import Samples, _ignore_signals, with_wrong_labels
from src.runs.signals import SIGNALS
from tests.helpers.arrays import arrays
from tests.helpers.batches import as_rank, batches, fit, indices_of
from tests.helpers.tiny import tiny_data

Make = Callable[..., ArrayData]
ROOT = Path(__file__).parents[2]


def test_the_order_is_a_function_of_seed_and_epoch(make_data: Make) -> None:
    data = make_data()
    data.load()
    loader = data.train_dataloader()
    orders = {epoch: indices_of(batches(loader, epoch)) for epoch in (0, 1)}
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(indices_of(batches(loader, 0)), orders[0])
    other = make_data(seed=1)
    other.load()
    assert not torch.equal(indices_of(batches(other.train_dataloader())), orders[0])


@pytest.mark.parametrize("val_size", [0, 12])
def test_workers_do_not_change_the_batches(make_data: Make, val_size: int) -> None:
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
def test_several_devices_read_the_batches_of_one_device(make_data: Make, world_size: int) -> None:
    data = make_data()
    data.load()
    alone = batches(data.train_dataloader(), 2)
    shares = [batches(as_rank(data, rank, world_size).train_dataloader(), 2) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(alone)}
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {len(part.target) for part in parts} == {len(whole.target) // world_size}
        assert torch.equal(indices_of(parts).sort().values, whole.index.sort().values)


def test_a_merged_batch_is_mentioned(make_data: Make) -> None:
    data = make_data(file_train=61, batch_size=20)
    data.load()
    assert [len(batch.target) for batch in data.train_dataloader()] == [20, 20, 21]
    assert data.notes()[-1] == "The last batch has 21 images, because batch norm cannot train on a rest of one image."
    assert len(data.notes(2)) == 1


def test_too_few_images_for_batch_norm_are_refused(make_data: Make) -> None:
    data = make_data(file_train=3, file_classes=2, train_size=None, val_size=2)
    data.load()
    with pytest.raises(UserError, match=r"too few training images \(1\).* use at least 2"):
        data.notes()
    with pytest.raises(UserError, match="too few training images"):
        data.train_dataloader()


def test_the_log_says_what_is_used_for_what(make_data: Make) -> None:
    plain, held_out = make_data(), make_data(val_size=12)
    plain.load()
    held_out.load()
    used = "Data: 60 training images, 23 test images."
    assert plain.notes() == [f"{used} The test images are the validation images, too."]
    assert held_out.notes() == [
        "Data: 48 training images, 12 validation images (held out of them), 23 test images. The test images are scored "
        "once, at the end."
    ]


def test_the_datas_own_validation_split_is_scored_after_each_epoch(make_data: Make, tmp_path: Path) -> None:
    data = make_data()
    own = arrays(test=7)
    save_arrays(tmp_path / "own.npz", **arrays(), val_images=own["test_images"], val_labels=own["test_labels"])
    data.path = str(tmp_path / "own.npz")
    data.load()
    assert (data.validates_on, data.split_size("val"), len(data.train_index)) == ("val", 7, 60)
    (batch,) = data.val_dataloader()
    val_images = data.arrays.images("val")
    assert torch.equal(batch.images[0], val_images)
    assert batch.target.tolist() == own["test_labels"].tolist()
    on_device: Any = data.device_reader("val", None, torch.device("cpu"))
    assert torch.equal(on_device.images, val_images)
    assert "7 validation images (val_images)" in data.notes()[0]
    assert data.train_duplicates == {"val": 0, "test": 0}
    assert len(data.val_digest) == 8
    assert all(torch.equal(images, val_images) for images in fit(data, tmp_path / "run", 1).validated)
    data.val_size = 12
    with pytest.raises(UserError, match=r"data.val_size=12 holds .* val_images has .* set data.val_size=0 to use them"):
        data.load()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_is_evaluated_in_order(make_data: Make, split: str) -> None:
    data = make_data(val_size=12)
    data.load()
    assert data.validates_on == "val"
    (batch,) = data.evaluation_loader(split)
    expected = data.arrays.train_images[data.val_index] if split == "val" else data.arrays.test_images
    assert torch.equal(batch.images[0], expected)
    assert torch.equal(batch.index, torch.arange(data.split_size(split)))
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    assert torch.equal(next(iter(loader)).images[0], expected)


def test_without_held_out_images_each_epoch_is_evaluated_on_the_test_set(make_data: Make) -> None:
    data = make_data()
    data.load()
    assert data.validates_on == "test"
    assert data.split_size("val") == 0
    (batch,) = data.val_dataloader()
    assert torch.equal(batch.images[0], data.arrays.test_images)


def test_splits_are_stratified_and_disjoint(make_data: Make) -> None:
    data = make_data(val_size=12, train_size=30)
    data.load()
    labels = data.arrays.train_labels
    assert labels[data.val_index].bincount().tolist() == [4, 4, 4]
    assert labels[data.train_index].bincount().tolist() == [10, 10, 10]
    assert not set(data.val_index.tolist()) & set(data.train_index.tolist())
    assert torch.equal(indices_of(batches(data.train_dataloader())).sort().values, data.train_index)
    trained_on = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, data.train_index, True)
    assert torch.equal(data.trained_labels, labels.where(trained_on, -1))


@pytest.mark.parametrize(("val_size", "counts"), [(3, {1}), (4, {1, 2}), (10, {3, 4}), (59, {19, 20})])
def test_class_sizes_of_an_uneven_split_differ_by_at_most_one(make_data: Make, val_size: int, counts: set[int]) -> None:
    data = make_data(val_size=val_size)
    data.load()
    assert len(data.val_index) == val_size
    assert set(data.arrays.train_labels[data.val_index].bincount().tolist()) == counts
    assert len(data.train_index) == 60 - val_size


def test_sizes_can_be_shares_of_the_images(make_data: Make) -> None:
    """The share of training images is one of those that are not held out."""
    data = make_data(val_size=0.2, train_size=0.25)
    data.load()
    assert (len(data.val_index), len(data.train_index)) == (12, 12)
    counted = make_data(val_size=12, train_size=12)
    counted.load()
    assert torch.equal(data.val_index, counted.val_index)
    assert torch.equal(data.train_index, counted.train_index)


def test_splits_depend_on_their_own_seed_only(make_data: Make) -> None:
    def split(**options: Any) -> ArrayData:
        data = make_data(val_size=12, **options)
        data.load()
        return data

    base, other_run, other_split = split(), split(seed=1), split(split_seed=1)
    assert torch.equal(base.val_index, other_run.val_index)
    assert base.val_digest == other_run.val_digest
    assert not torch.equal(base.val_index, other_split.val_index)
    assert base.val_digest != other_split.val_digest


def test_a_smaller_training_set_is_part_of_a_larger_one(make_data: Make) -> None:
    indices = []
    for size in (12, 30, 45):
        data = make_data(train_size=size)
        data.load()
        indices.append(set(data.train_index.tolist()))
    assert indices[0] < indices[1] < indices[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": -1}, "data.val_size=-1"),
        ({"val_size": 2}, "data.val_size=2"),
        ({"val_size": 61}, "data.val_size=61"),
        ({"val_size": 0.03}, "data.val_size=2"),
        ({"val_size": 60}, "No training images"),
        ({"train_size": 0}, "No training images"),
        ({"train_size": 2}, "data.train_size=2"),
        ({"val_size": 12, "train_size": 49}, "data.train_size=49"),
        ({"path": "/nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_impossible_sizes_are_refused(make_data: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_data(**options).load()


def test_a_batch_size_that_the_devices_cannot_share_is_refused(make_data: Make) -> None:
    data = make_data(batch_size=15)
    data.load()
    with pytest.raises(UserError, match=r"batch_size=15 .* not divisible by 2 devices"):
        as_rank(data, 0, 2).train_dataloader()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_views_of_its_epoch_and_so_does_a_resumed_training(
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


def test_workers_ignore_all_signals_that_ask_a_command_to_end() -> None:
    def handlers(_: Any) -> list[Any]:
        return [signal.getsignal(number) for number in SIGNALS]

    loader: DataLoader[Any] = DataLoader([0], num_workers=1, worker_init_fn=_ignore_signals, collate_fn=handlers)  # type: ignore[arg-type]
    assert list(loader) == [[signal.SIG_IGN] * len(SIGNALS)]


@pytest.mark.slow
def test_a_process_with_a_live_loader_ends(tmp_path: Path) -> None:
    """Loader workers ignore SIGTERM. A process that still refers to a loader must end nevertheless."""
    script = """
        from pathlib import Path
        from tests.helpers.tiny import tiny_data

        batches = iter(tiny_data(Path("{folder}"), workers=1).train_dataloader())
        next(batches)
    """
    source = textwrap.dedent(script).format(folder=tmp_path)
    ran = subprocess.run([sys.executable, "-c", source], cwd=ROOT, timeout=240, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_data_of_one_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data(tmp_path)
    labels = torch.zeros_like(data.source.train_labels)
    one_class = dataclasses.replace(data.source, class_names=("cat",), train_labels=labels)
    monkeypatch.setattr(data, "read", lambda: one_class)
    with pytest.raises(UserError, match=r"^The data has one class only \(cat\): add images of another class\.$"):
        data.load()


def test_wrong_labels_reach_training_alone(make_data: Make, tmp_path: Path) -> None:
    data = make_data(val_size=12, wrong_labels=0.4)
    data.load()
    clean = data.source.train_labels
    wrong = data.train_labels != clean
    assert 0.2 < wrong.double().mean() < 0.6
    trained: dict[int, int] = {}

    class Reading(L.LightningModule):
        def training_step(self, batch: Samples, batch_idx: int) -> None:
            trained.update(zip(batch.index.tolist(), batch.target.tolist(), strict=True))

        def validation_step(self, batch: Samples, batch_idx: int) -> None:
            assert torch.equal(batch.target, clean[data.val_index][batch.index])

        def configure_optimizers(self) -> None:
            return None

    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Reading(), datamodule=data)
    assert trained == {i: int(data.train_labels[i]) for i in data.train_index.tolist()}
    assert torch.equal(data.trained_labels[data.train_index], data.train_labels[data.train_index])
    count = int(wrong[data.train_index].sum())
    assert f"{count} training images have a wrong label, because of data.wrong_labels." in data.notes()


def test_wrong_labels_depend_on_the_split_seed_alone() -> None:
    labels = torch.arange(2000) % 5
    some, more = (with_wrong_labels(labels, 5, share, seed=0) for share in (0.1, 0.3))
    changed = some != labels
    assert torch.equal(more[changed], some[changed])
    assert int(changed.sum()) == pytest.approx(200, abs=40)
    assert int((more != labels).sum()) == pytest.approx(600, abs=60)
    pairs = torch.stack([labels, more])[:, more != labels].unique(dim=1)
    assert pairs.shape[1] == 5 * 4  # each class is taken for each other class
    assert not torch.equal(with_wrong_labels(labels, 5, 0.3, seed=1), more)
    assert torch.equal(with_wrong_labels(labels, 5, 0.0, seed=0), labels)
