"""Shards written from folders: complete, mixed by class, and atomic."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from src.common.errors import UserError
from src.data.sharding import SHARD_BYTES, write_shards
from src.data.stream_data import INDEX, StreamData
from tests.helpers.photo_folders import load


def test_unpacking_the_shards_restores_the_folder(folder: Path, shards: Path, tmp_path: Path) -> None:
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path, filter="data")
    contents = [
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (folder, tmp_path)
    ]
    assert contents[0] == contents[1]


def test_a_shard_contains_several_classes(shards: Path) -> None:
    data = load(shards, StreamData)
    classes = [len(data.source.train_labels[data.blocks == shard].unique()) for shard in data.blocks.unique()]
    assert np.mean(classes) > 1.5


@pytest.mark.parametrize("limit", [6000, 20_000])
def test_shards_exceed_the_limit_by_less_than_one_photo(folder: Path, tmp_path: Path, limit: int) -> None:
    write_shards(load(folder), tmp_path / "out", limit)
    with np.load(tmp_path / "out" / INDEX) as index:
        for split in ("train", "test"):
            sizes, shards = index[f"{split}_sizes"], index[f"{split}_shards"]
            bytes_of_shard = np.bincount(shards, weights=sizes)
            assert (bytes_of_shard > 0).all()
            assert bytes_of_shard.max() < limit + sizes.max()


def test_a_validation_split_becomes_shards_too(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    shutil.copytree(own / "val", own / "test")
    for name in ("ant", "bee", "cat"):
        (own / "val" / name / "a.jpg").unlink()
    original = load(own)
    write_shards(original, tmp_path / "shards")
    streamed = load(tmp_path / "shards", StreamData)
    assert (streamed.validates_on, streamed.split_size("val"), streamed.split_size("test")) == ("val", 12, 15)
    assert streamed.source.digest == original.source.digest
    for loader in ("val_dataloader", "test_dataloader"):
        (ours,), (theirs,) = (getattr(data, loader)() for data in (streamed, original))
        assert torch.equal(ours.images[0], theirs.images[0])
        assert torch.equal(ours.target, theirs.target)


def test_a_small_folder_becomes_one_shard_per_split(folder: Path, tmp_path: Path) -> None:
    assert SHARD_BYTES == 64_000_000
    write_shards(load(folder), tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [INDEX, "test-00000.tar", "train-00000.tar"]


def test_shards_are_written_atomically(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    data = load(own)
    (own / "val/cat/a.jpg").unlink()
    with pytest.raises(UserError, match=r"val/cat/a\.jpg cannot be read"):
        write_shards(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(UserError, match=f"out={folder} exists already"):
        write_shards(load(folder), folder)
