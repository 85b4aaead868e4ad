"""Evaluation images that are training images too are counted."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.array_file import save_arrays
from tests.helpers.tiny import CLASSES, tiny_data


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_duplicates_are_counted_pixel_for_pixel(
    tmp_path_factory: pytest.TempPathFactory, seed: int, train: int, test: int, hold_out: bool
) -> None:
    folder = tmp_path_factory.mktemp("duplicates")
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {
        "train_images": random.integers(0, 2, (train * 4, 1, 1, 3), dtype=np.uint8),
        "test_images": random.integers(0, 2, (test, 1, 1, 3), dtype=np.uint8),
        "train_labels": np.arange(train * 4) % CLASSES,
        "test_labels": np.arange(test) % CLASSES,
    }
    save_arrays(folder / "tiny.npz", **arrays)
    data = tiny_data(folder)
    if hold_out:
        data.val_size = 4 * (train - 1)
        data.load()
    trained_on = {image.tobytes() for image in arrays["train_images"][data.train_index]}
    held_out = arrays["train_images"][data.val_index]
    expected = {"test": sum(image.tobytes() in trained_on for image in arrays["test_images"])}
    if len(held_out):
        expected["val"] = sum(image.tobytes() in trained_on for image in held_out)
    assert data.train_duplicates == expected


def test_cifar100_has_ten_duplicates() -> None:
    folder = os.environ.get("AEKT_DATA")
    if folder is None:
        pytest.skip("AEKT_DATA names no folder with real data")
    data = tiny_data(Path(folder))
    data.path = str(Path(folder) / "cifar100.npz")
    data.load()
    assert data.train_duplicates == {"test": 10}
