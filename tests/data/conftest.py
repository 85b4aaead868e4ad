import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.array_data import ArrayData
from src.data.arrays import save_arrays


def arrays(train: int = 60, test: int = 23, classes: int = 3, size: tuple[int, int] = (8, 6)) -> dict[str, np.ndarray]:
    """Contents of a small array file: noise, classes in turn."""
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (train, *size, 3), dtype=np.uint8),
        "train_labels": (np.arange(train) % classes).astype(np.uint8),
        "test_images": rng.integers(0, 256, (test, *size, 3), dtype=np.uint8),
        "test_labels": (np.arange(test) % classes).astype(np.uint8),
        "class_names": np.array([f"class {i}" for i in range(classes)]),
    }


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., ArrayData]:
    """An unloaded data module over a small array file; options of the file are prefixed `file_`."""

    def make(**options: Any) -> ArrayData:
        file_options = {key.removeprefix("file_"): options.pop(key) for key in list(options) if key.startswith("file_")}
        path = tmp_path / "small.npz"
        save_arrays(path, **arrays(**file_options))
        defaults: dict[str, Any] = {
            "name": "small",
            "prepare": lambda root: pytest.fail("data.path is given: nothing is to be prepared"),
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


@pytest.fixture
def real_data() -> Path:
    """The folder of the real data; skips where there is none."""
    folder = os.environ.get("AEKT_DATA")
    if folder is None:
        pytest.skip("AEKT_DATA names no folder with real data")
    return Path(folder)
