"""CIFAR-10 and CIFAR-100 (A. Krizhevsky 2009). torchvision downloads and verifies them. They are converted once."""

from pathlib import Path
from typing import Any

import numpy as np

from src.common.errors import UserError
from src.common.files import one_process_at_a_time
from src.data.array_file import save_arrays


def cifar10(root: Path) -> Path:
    """Return the array file of CIFAR-10 in `root`. Make it if it is missing."""
    return _array_file(root, "CIFAR10")


def cifar100(root: Path) -> Path:
    """Return the array file of CIFAR-100 in `root`, with the 20 superclasses. Make it if it is missing."""
    return _array_file(root, "CIFAR100")


def _array_file(root: Path, name: str) -> Path:
    """Return the array file of a data set. Raises `UserError` if it is missing and cannot be downloaded."""
    file = root / f"{name.lower()}.npz"
    if file.is_file():
        return file
    try:
        with one_process_at_a_time(file):
            if not file.is_file():
                _make(file, name)
    except Exception as error:  # no network, a wrong checksum, a read-only folder: torchvision raises many exceptions
        raise UserError(
            f"{name} is neither at {file}, nor can it be downloaded ({error}): put the array file or torchvision's "
            "archive there, or set data.path to an array file or data.root to another folder."
        ) from error
    return file


def _make(file: Path, name: str) -> None:
    splits = {split: _download(file.parent, name, train=split == "train") for split in ("train", "test")}
    arrays = {f"{split}_{key}": value for split, data in splits.items() for key, value in _arrays(data).items()}
    save_arrays(file, class_names=np.array(splits["train"].classes), **arrays, **_superclass_names(splits["train"]))


def _download(root: Path, name: str, train: bool) -> Any:
    from torchvision import datasets

    return getattr(datasets, name)(root, train=train, download=True)


def _arrays(data: Any) -> dict[str, np.ndarray]:
    labels = np.array(data.targets, dtype=np.uint8)
    arrays = {"images": np.ascontiguousarray(data.data), "labels": labels}
    if len(data.classes) == 100:
        arrays["superclass_labels"] = SUPERCLASS_OF[labels]
    return arrays


def _superclass_names(data: Any) -> dict[str, np.ndarray]:
    return {"superclass_names": np.array(SUPERCLASSES)} if len(data.classes) == 100 else {}


SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates", "people", "reptiles",
    "small_mammals", "trees", "vehicles_1", "vehicles_2",
)  # fmt: skip
SUPERCLASS_OF = np.array(
    [4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
     12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12,
     16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8,
     14, 13],
    dtype=np.uint8,
)  # fmt: skip
"""The superclass of each CIFAR-100 class, in alphabetical order, as in the archive's coarse labels."""
