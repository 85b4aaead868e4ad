"""The one format that all data ends in: an array file (.npz), read without executing anything.

Keys: train_images, test_images uint8 [N, H, W, 3] RGB; train_labels, test_labels integers [N], a class each;
class_names (optional); for data with superclasses also train_superclass_labels, test_superclass_labels,
superclass_names.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.data.source import Source
from src.errors import UserError
from src.files import believable_members, written_whole


@dataclass(frozen=True, kw_only=True)
class ImageArrays(Source):
    """Images in memory."""

    train_images: Tensor
    """[N, 3, H, W] uint8"""
    test_images: Tensor


def load_arrays(path: Path) -> ImageArrays:
    """Read an array file. Raises `UserError` where it is missing, damaged, or not of the format above."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give an array file (.npz) by data.path.")
    try:
        listed = sorted((member.filename, member.file_size, member.CRC) for member in believable_members(path))
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()  # reading verifies the CRC-32 sums
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # damage makes zipfile, zlib and numpy raise nearly anything
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects, which could execute code: refused; save plain arrays."
            ) from None
        raise UserError(f"{path} is damaged or no .npz file ({error}): get it again.") from None
    return _checked(path, arrays, digest)


def _checked(path: Path, arrays: dict[str, np.ndarray], digest: str) -> ImageArrays:
    missing = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    missing = [name for name in missing if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: see src/data/arrays.py for the format.")
    no_arrays = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if no_arrays:
        raise UserError(f"{path}: {', '.join(no_arrays)} is no array: save it by numpy.savez.")
    labels = {split: arrays[f"{split}_labels"] for split in ("train", "test")}
    names = arrays.get("class_names", np.array([str(i) for i in range(_highest(labels["train"]) + 1)]))
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        raise UserError(f"{path}: class_names must be a list of at least 2 strings, it is {names.dtype} {names.shape}.")
    for split in labels:
        _check_split(path, split, arrays[f"{split}_images"], labels[split], len(names))
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise UserError(f"{path}: training and test images differ in size.")
    superclasses = _superclasses(path, arrays, labels["train"], len(names))
    return ImageArrays(
        train_images=torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2),
        train_labels=torch.from_numpy(labels["train"].astype(np.int64)),
        test_images=torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2),
        test_labels=torch.from_numpy(labels["test"].astype(np.int64)),
        class_names=tuple(str(name) for name in names),
        superclass_names=tuple(str(name) for name in arrays["superclass_names"]) if superclasses else None,
        superclass_of=superclasses,
        digest=digest,
    )


def _highest(labels: np.ndarray) -> int:
    """The largest label; at most the number of labels, so that a wild one makes no billion class names."""
    counted = labels.ndim == 1 and labels.size and labels.dtype.kind in "ui"
    return max(1, min(int(labels.max()), len(labels))) if counted else 1


def _check_split(path: Path, split: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: {split}_images must be uint8 [N, H, W, 3], they are {found}.")
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path}: {split}_labels must be one target class per image, an integer; they are {found}.")
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"{path}: there are {len(images)} {split}_images and {len(labels)} {split}_labels.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: {split}_labels reach from {labels.min()} to {labels.max()}, with {classes} classes.")


def _superclasses(
    path: Path, arrays: dict[str, np.ndarray], labels: np.ndarray, classes: int
) -> tuple[int, ...] | None:
    if "superclass_names" not in arrays or "train_superclass_labels" not in arrays:
        return None
    names, of_images = arrays["superclass_names"], arrays["train_superclass_labels"]
    fit = (
        names.ndim == 1 and names.dtype.kind == "U" and of_images.dtype.kind in "ui" and of_images.shape == labels.shape
    )
    if not fit or of_images.min() < 0 or of_images.max() >= len(names):
        raise UserError(
            f"{path}: train_superclass_labels must be one superclass per image, an index of superclass_names."
        )
    of = np.zeros(classes, dtype=np.int64)
    of[labels] = of_images
    if (of[labels] != of_images).any():
        raise UserError(f"{path}: train_superclass_labels put images of one class into several superclasses.")
    return tuple(int(superclass) for superclass in of)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an array file as a whole or not at all. Raises `UserError` where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}): choose another folder by data.root or AEKT_DATA."
        ) from None
