import shutil
import sys
import tarfile
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

from src.convert import convert
from src.data.stream_data import INDEX, StreamData
from src.errors import UserError
from tests.commands import run
from tests.data.photo_folders import load, write_folder
from tests.data.test_folder_data import assert_equal, by_index
from tests.data.test_image_data import as_rank, batches, joined

SHARD_BYTES = 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 training and 15 test photos of 3 classes."""
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a dozen shards or more."""
    out = tmp_path_factory.mktemp("stream") / "made" / "shards"
    convert(load(folder), out, SHARD_BYTES)
    assert len(list(out.glob("train-*.tar"))) >= 12
    return out


class Remote:
    """Shards in an object storage; remembers what is fetched whole and what in parts."""

    url = "memory://bucket/shards"

    def __init__(self) -> None:
        self.whole: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()


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
    return load(root, StreamData, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_show_what_the_folder_shows(folder: Path, shards: Path, workers: int) -> None:
    original, streamed = load(folder, val_size=6), stream(shards, val_size=6, workers=workers)
    assert streamed.class_names == original.class_names
    assert streamed.source.digest == original.source.digest
    assert torch.equal(streamed.source.train_labels, original.source.train_labels)
    assert torch.equal(streamed.val_index, original.val_index)
    loader = streamed.train_dataloader()
    for epoch in (0, 1):
        seen = batches(loader, epoch)
        assert_equal(by_index(seen), by_index(batches(original.train_dataloader(), epoch)))
        for batch in seen:
            assert torch.equal(batch.target, original.source.train_labels[batch.index])
    for split in ("val", "test"):
        for ours, theirs in zip(streamed.evaluation_loader(split), original.evaluation_loader(split), strict=True):
            assert torch.equal(ours.images[0], theirs.images[0])
            assert torch.equal(ours.target, theirs.target)


def test_the_order_is_one_of_an_epoch_for_any_number_of_devices(shards: Path) -> None:
    alone = batches(stream(shards).train_dataloader(), 2)
    shares = [batches(as_rank(stream(shards), rank, 2).train_dataloader(), 2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(joined(parts).sort().values, whole.index.sort().values)
    assert not torch.equal(joined(alone), joined(batches(stream(shards).train_dataloader(), 3)))


def test_the_order_follows_the_shards_of_the_photos_that_are_trained_on(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.data.views.BLOCKS_AT_ONCE", 1)
    data = stream(shards, train_size=30)
    order = data.blocks[joined(batches(data.train_dataloader()))]
    assert len(order) == 30
    changes = int((order[1:] != order[:-1]).sum())
    assert changes == len(order.unique()) - 1


def test_unpacked_shards_are_the_folder_again(folder: Path, shards: Path, tmp_path: Path) -> None:
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path, filter="data")
    contents = [
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (folder, tmp_path)
    ]
    assert contents[0] == contents[1]


def test_a_shard_holds_several_classes(shards: Path) -> None:
    data = stream(shards)
    classes = [len(data.source.train_labels[data.blocks == shard].unique()) for shard in data.blocks.unique()]
    assert np.mean(classes) > 1.5


def test_conversion_is_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    data = load(own)
    (own / "val/cat/a.jpg").unlink()
    with pytest.raises(UserError, match=r"val/cat/a\.jpg cannot be read"):
        convert(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with pytest.raises(UserError, match="own is there already"):
        convert(load(folder), own)


def test_each_shard_is_fetched_once(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"))
    assert not remote.whole, "labels are known before a shard is fetched"
    for epoch in (0, 1):
        seen = by_index(batches(data.train_dataloader(), epoch))
        assert_equal(seen, by_index(batches(load(folder).train_dataloader(), epoch)))
    assert set(remote.whole.values()) == {1}
    assert not remote.parts
    assert {name for name in remote.whole if name.startswith("train")} == set(remote.whole)
    assert {file.name for file in tmp_path.glob("cache/*/*.tar")} == set(remote.whole)
    list(stream(remote.url, cache=str(tmp_path / "cache")).train_dataloader())
    assert set(remote.whole.values()) == {1}, "another run finds them"


def test_the_cache_stays_small(remote: Remote, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.views.BLOCKS_AT_ONCE", 2)
    limit = 60_000
    data = stream(remote.url, cache=str(tmp_path / "cache"), cache_gigabytes=limit / 1e9, batch_size=3)
    largest = 0
    seen = []
    for batch in data.train_dataloader():
        seen.append(batch)
        largest = max(largest, sum(file.stat().st_size for file in tmp_path.glob("cache/*/*.tar")))
    assert limit / 2 < largest <= limit
    assert_equal(by_index(seen), by_index(batches(load(folder).train_dataloader())))
    assert len(remote.whole) > len(list(tmp_path.glob("cache/*/*.tar")))
    assert set(remote.whole.values()) == {1}, "a shard that is needed again soon was thrown away"


def test_workers_share_the_cache(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"), workers=2)
    assert_equal(by_index(batches(data.train_dataloader())), by_index(batches(load(folder).train_dataloader())))
    assert len(list(tmp_path.glob("cache/*/*.tar"))) == len(data.blocks.unique())
    assert not list(tmp_path.glob("cache/*/*.part"))


def test_a_shard_on_its_way_is_not_waited_for(remote: Remote, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"))
    place = tmp_path / "cache" / data.files_digest[:16]
    place.mkdir(parents=True)
    with FileLock(place / "train-00000.lock"):
        photos = data.photos["train"].read(range(42))
    assert photos == stream(remote.url, cache=str(tmp_path / "other")).photos["train"].read(range(42))
    assert remote.whole["train-00000.tar"] == 1, "fetched by the second alone"
    assert set(remote.parts) == {"train-00000.tar"}


def test_held_out_photos_are_read_where_they_are(remote: Remote, folder: Path, tmp_path: Path) -> None:
    data = stream(remote.url, cache=str(tmp_path / "cache"), val_size=6)
    (ours,), (theirs,) = data.evaluation_loader("val"), load(folder, val_size=6).evaluation_loader("val")
    assert torch.equal(ours.images[0], theirs.images[0])
    assert not remote.whole
    assert sum(remote.parts.values()) == 6
    list(data.evaluation_loader("test"))
    assert all(name.startswith("test") for name in remote.whole)


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def test_a_folder_without_index(folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.npz: make shards by python -m src\.convert"):
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
def test_an_index_that_does_not_fit(own_shards: Path, change: dict[str, np.ndarray | None]) -> None:
    with np.load(own_shards / INDEX) as arrays:
        index = {**arrays, **change}
    np.savez(own_shards / INDEX, **{key: value for key, value in index.items() if value is not None})
    with pytest.raises(UserError, match=r"index\.npz is not what python -m src\.convert writes"):
        stream(own_shards)


def test_a_damaged_index(own_shards: Path) -> None:
    (own_shards / INDEX).write_bytes(b"PK no archive")
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
    with pytest.raises(UserError, match=r"^[^\n]*train-00001\.tar (is shorter|cannot be read)[^\n]*$"):
        list(stream(own_shards, workers=workers).train_dataloader())


def test_a_storage_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"data\.root=s3://bucket/shards cannot be opened here: Install s3fs"):
        stream("s3://bucket/shards")
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        stream("nosuch://bucket/shards")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ran = run("convert", f"data.root={folder}", f"out={out}")
    assert ran.code == 0, ran.err
    assert f"data=stream data.root={out}" in ran.out
    assert stream(out).source.digest == load(folder).source.digest
    again = run("convert", f"data.root={folder}", f"out={out}")
    assert (again.code, again.err.strip()) == (
        1,
        f"error: out={out} is there already: choose another folder, or remove it.",
    )
    assert run("convert", f"data.root={folder}").code == 1
    arrays = run("convert", "data=cifar100", f"out={tmp_path / 'other'}")
    assert (arrays.code, arrays.err.count("\n")) == (1, 1)
    assert "data=imagefolder" in arrays.err
