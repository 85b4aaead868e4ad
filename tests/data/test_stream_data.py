"""Photos in shards: the same images as from the folder, the cache of remote shards, and damaged shards."""

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from src.common.errors import UserError
from src.data.augmentation import Augmentation
from src.data.mixing import CutMix
from src.data.stream_data import INDEX, StreamData
from tests.helpers.batches import (
    as_rank,
    assert_same_images,
    batches,
    images_by_index,
    indices_of,
    message_of_unreadable,
)
from tests.helpers.photo_folders import load


class Remote:
    """Shards in a mocked object storage that counts accesses."""

    url = "memory://bucket/shards"

    def __init__(self) -> None:
        self.whole: Counter[str] = Counter()
        """Downloads of each shard."""
        self.parts: Counter[str] = Counter()
        """Photos that were read from each shard without downloading it."""


@pytest.fixture
def remote(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    storage, remote = fsspec.filesystem("memory"), Remote()
    storage.put(str(shards), "/bucket/shards", recursive=True)
    get_file, cat_ranges = MemoryFileSystem.get_file, MemoryFileSystem.cat_ranges

    def counted_get(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        remote.whole[path.rpartition("/")[2]] += 1
        return get_file(self, path, *arguments, **options)

    def counted_ranges(self: Any, paths: list[str], *arguments: Any, **options: Any) -> Any:
        remote.parts.update(path.rpartition("/")[2] for path in paths)
        return cat_ranges(self, paths, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted_get)
    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", counted_ranges)
    yield remote
    storage.rm("/bucket", recursive=True)


def stream(root: Path | str, **options: Any) -> Any:
    """Load a data module over shards."""
    return load(root, StreamData, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_images_of_the_folder(folder: Path, shards: Path, workers: int) -> None:
    original, streamed = load(folder, val_size=6), stream(shards, val_size=6, workers=workers)
    assert streamed.class_names == original.class_names
    assert streamed.source.digest == original.source.digest
    assert torch.equal(streamed.source.train_labels, original.source.train_labels)
    assert torch.equal(streamed.val_index, original.val_index)
    loader = streamed.train_dataloader()
    for epoch in (0, 1):
        seen = batches(loader, epoch)
        assert_same_images(images_by_index(seen), images_by_index(batches(original.train_dataloader(), epoch)))
        for batch in seen:
            assert torch.equal(batch.target, original.source.train_labels[batch.index])
    for split in ("val", "test"):
        for ours, theirs in zip(streamed.evaluation_loader(split), original.evaluation_loader(split), strict=True):
            assert torch.equal(ours.images[0], theirs.images[0])
            assert torch.equal(ours.target, theirs.target)


def test_the_order_depends_on_the_epoch_and_not_on_the_number_of_devices(shards: Path) -> None:
    alone = batches(stream(shards, batch_size=12).train_dataloader(), 2)
    shares = [batches(as_rank(stream(shards, batch_size=12), rank, 2).train_dataloader(), 2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(indices_of(parts).sort().values, whole.index.sort().values)
    assert not torch.equal(indices_of(alone), indices_of(batches(stream(shards, batch_size=12).train_dataloader(), 3)))


def test_the_order_follows_the_shards_of_the_training_photos(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.views.BLOCKS_AT_ONCE", 1)
    data = stream(shards, train_size=30)
    order = data.blocks[indices_of(batches(data.train_dataloader()))]
    assert len(order) == 30
    changes = int((order[1:] != order[:-1]).sum())
    assert changes == len(order.unique()) - 1


def test_each_shard_is_downloaded_once(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"))
    assert not remote.whole, "labels are known before a shard is downloaded"
    for epoch in (0, 1):
        seen = images_by_index(batches(data.train_dataloader(), epoch))
        assert_same_images(seen, images_by_index(batches(load(folder).train_dataloader(), epoch)))
    assert set(remote.whole.values()) == {1}
    assert not remote.parts
    assert {name for name in remote.whole if name.startswith("train")} == set(remote.whole)
    assert {file.name for file in tmp_path.glob("cache/*/*.tar")} == set(remote.whole)
    list(stream(remote.url, cache=str(tmp_path / "cache")).train_dataloader())
    assert set(remote.whole.values()) == {1}, "another run finds them in the cache"


def test_the_cache_stays_within_its_limit(
    remote: Remote, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.data.views.BLOCKS_AT_ONCE", 2)
    limit = 60_000
    data = stream(remote.url, cache=str(tmp_path / "cache"), cache_gigabytes=limit / 1e9, batch_size=3)
    largest = 0
    seen = []
    for batch in data.train_dataloader():
        seen.append(batch)
        largest = max(largest, sum(file.stat().st_size for file in tmp_path.glob("cache/*/*.tar")))
    assert limit / 2 < largest <= limit
    assert_same_images(images_by_index(seen), images_by_index(batches(load(folder).train_dataloader())))
    assert len(remote.whole) > len(list(tmp_path.glob("cache/*/*.tar")))
    assert set(remote.whole.values()) == {1}, "a shard was deleted that was needed again soon"


def test_the_cache_deletes_no_other_archives(remote: Remote, tmp_path: Path) -> None:
    own = [tmp_path / "cache" / name for name in ("imagenet/ILSVRC2012_img_train.tar", "shards/train-00000.tar")]
    for file in own:
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(100_000))
    batches(stream(remote.url, cache=str(tmp_path / "cache"), cache_gigabytes=1e-5).train_dataloader())
    assert all(file.is_file() for file in own)
    assert len(list(tmp_path.glob("cache/*/*.tar"))) == len(own) + 1, "the cache itself has room for no other shard"


def test_a_view_store_of_mixed_photos_is_not_that_of_the_folder(folder: Path, shards: Path) -> None:
    """The photos that one is mixed with come from its shard, and from the whole folder."""
    mixing = Augmentation(mixing=CutMix(alpha=1.0))
    assert stream(shards).views_name == load(folder).views_name
    assert stream(shards, augmentation=mixing).views_name != load(folder, augmentation=mixing).views_name


def test_workers_share_the_cache(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"), workers=2)
    streamed, original = (images_by_index(batches(loaded.train_dataloader())) for loaded in (data, load(folder)))
    assert_same_images(streamed, original)
    assert len(list(tmp_path.glob("cache/*/*.tar"))) == len(data.blocks.unique())
    assert not list(tmp_path.glob("cache/*/*.part"))


def test_a_shard_that_another_process_downloads_is_read_remotely(remote: Remote, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"))
    cache = tmp_path / "cache" / data.files_digest[:16]
    cache.mkdir(parents=True)
    with FileLock(cache / "train-00000.lock"):
        photos = data.photos["train"].read(range(42))
    assert photos == stream(remote.url, cache=str(tmp_path / "other")).photos["train"].read(range(42))
    assert remote.whole["train-00000.tar"] == 1, "only the second data module downloads it"
    assert set(remote.parts) == {"train-00000.tar"}


def test_held_out_photos_are_read_remotely(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"), val_size=6)
    (ours,), (theirs,) = data.evaluation_loader("val"), load(folder, val_size=6).evaluation_loader("val")
    assert torch.equal(ours.images[0], theirs.images[0])
    assert not remote.whole
    assert sum(remote.parts.values()) == 6
    list(data.evaluation_loader("test"))
    assert all(name.startswith("test") for name in remote.whole)


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of `shards` that a test may change."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def test_a_folder_without_an_index_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no index\.npz: make shards with python -m src\.convert"):
        stream(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"train_labels": np.array([3] * 42)},
        {"test_sizes": np.zeros(3)},
        {"train_labels": np.array([])},
        {"digest": None},
    ],
    ids=["label", "length", "empty", "missing"],
)
def test_an_inconsistent_index_is_refused(own_shards: Path, change: dict[str, np.ndarray | None]) -> None:
    with np.load(own_shards / INDEX) as arrays:
        index = {**arrays, **change}
    np.savez(own_shards / INDEX, **{key: value for key, value in index.items() if value is not None})
    with pytest.raises(UserError, match=r"index\.npz was not written by python -m src\.convert"):
        stream(own_shards)


def test_a_damaged_index_is_refused(own_shards: Path) -> None:
    (own_shards / INDEX).write_bytes(b"PK not an archive")
    with pytest.raises(UserError, match=r"index\.npz cannot be read \("):
        stream(own_shards)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "short", "overwritten"])
def test_a_damaged_shard_is_named(own_shards: Path, workers: int, damage: str) -> None:
    shard = own_shards / "train-00001.tar"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"" if damage == "short" else b"\0" * shard.stat().st_size)
    message = message_of_unreadable(stream(own_shards, workers=workers).train_dataloader())
    assert re.fullmatch(r"[^\n]*train-00001\.tar (is shorter|cannot be read)[^\n]*", message)


def test_a_missing_package_for_a_storage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"data\.root=s3://bucket/shards cannot be opened here: Install s3fs"):
        stream("s3://bucket/shards")
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        stream("nosuch://bucket/shards")
