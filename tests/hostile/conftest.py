"""Finished runs whose files the tests damage."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from src.data.array_file import save_arrays
from tests.helpers.place import Place


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Short runs of AEKT and of its teacher, on data of their own. Tests only read them."""
    folder = tmp_path_factory.mktemp("originals")
    place = Place(folder, folder / "data.npz")
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"class {i}" for i in range(10)])}
    for split, count in (("train", 40), ("test", 20)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    save_arrays(place.data, **arrays)
    ran = place.train("method=aekt", "network@model.teacher=resnet8")
    assert (ran.code, ran.err) == (0, ""), ran.err
    return place


@pytest.fixture
def copies(originals: Place, tmp_path: Path) -> Place:
    """Copies of the finished runs, which a test may damage."""
    shutil.copytree(originals.path, tmp_path / "copies")
    return Place(tmp_path / "copies", tmp_path / "copies" / "data.npz")
