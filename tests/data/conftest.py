"""Small data modules over array files, folders and shards, and the folder of the real data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.data.array_data import ArrayData
from src.data.array_file import save_arrays
from src.data.sharding import write_shards
from tests.helpers.arrays import arrays
from tests.helpers.photo_folders import load, write_folder


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., ArrayData]:
    """A function that makes an unloaded data module over a small array file. The prefix `file_` marks its options."""

    def make(**options: Any) -> ArrayData:
        file_options = {key.removeprefix("file_"): options.pop(key) for key in list(options) if key.startswith("file_")}
        path = tmp_path / "small.npz"
        save_arrays(path, **arrays(**file_options))
        defaults: dict[str, Any] = {
            "name": "small",
            "prepare": lambda root: pytest.fail("no file should be prepared if data.path is given"),
            "root": str(tmp_path),
            "path": str(path),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "padding": 2,
            "flip": True,
            "train_size": None,
            "val_size": 0,
            "split_seed": 0,
            "workers": 0,
            "batch_size": 16,
            "seed": 0,
        }
        return ArrayData(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 42 training and 15 test photos of 3 classes. Read only."""
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of `folder` in at least a dozen shards. Read only."""
    out = tmp_path_factory.mktemp("stream") / "made" / "shards"
    write_shards(load(folder), out, shard_bytes=6000)
    assert len(list(out.glob("train-*.tar"))) >= 12
    return out


@pytest.fixture
def real_data() -> Path:
    """The folder of the real data. Skips the test if there is none."""
    folder = os.environ.get("AEKT_DATA")
    if folder is None:
        pytest.skip("AEKT_DATA names no folder with real data")
    return Path(folder)
