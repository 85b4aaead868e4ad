"""The images of a benchmark: CIFAR-100's, or random images of their size."""

import os
from pathlib import Path

import numpy as np

from src.data.array_file import load_arrays, save_arrays

CLASSES = 100
TEST_IMAGES = 500


def write_images(file: Path, count: int) -> None:
    """Write an array file of the first `count` training images of CIFAR-100, or of random images if it is missing."""
    real = cifar100_file()
    if real is None:
        write_random_images(file, max(count, TEST_IMAGES), CLASSES, TEST_IMAGES)
        return
    arrays = load_arrays(real)
    train = _first_of_each_class(arrays.train_labels.numpy(), count)
    test = _first_of_each_class(arrays.test_labels.numpy(), TEST_IMAGES)
    save_arrays(
        file,
        train_images=arrays.train_images[train].permute(0, 2, 3, 1).numpy(),
        train_labels=arrays.train_labels[train].numpy(),
        test_images=arrays.test_images[test].permute(0, 2, 3, 1).numpy(),
        test_labels=arrays.test_labels[test].numpy(),
    )


def cifar100_file() -> Path | None:
    """Return the file of CIFAR-100 in the folder AEKT_DATA, or None if it is not there."""
    file = Path(os.environ.get("AEKT_DATA", "")) / "cifar100.npz"
    return file if "AEKT_DATA" in os.environ and file.is_file() else None


def write_random_images(file: Path, count: int, classes: int, test_count: int) -> None:
    """Write an array file of `count` random training images. The first `test_count` are the test images too."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % classes
    test: dict[str, np.ndarray] = {"test_images": images[:test_count], "test_labels": labels[:test_count]}
    save_arrays(file, train_images=images, train_labels=labels, **test)


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose the positions of `count` images, the first of each class and equally many of each.

    >>> _first_of_each_class(np.array([0, 0, 0, 1, 1, 1]), 4).tolist()
    [0, 1, 3, 4]
    """
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return np.sort(np.argsort(rank, kind="stable")[:count])
