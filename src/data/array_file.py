"""The array file: training and test images with their labels in one NumPy archive (.npz).

CIFAR and glyphs are converted to this format. Your own images can have this format too: `data=arrays
data.path=FILE.npz`.

Required arrays, for N training images and M test images of H x W pixels and C classes:

    train_images   uint8    [N, H, W, 3]  RGB, channels last, top row first
    train_labels   integer  [N]           the class number of each image, 0 .. C - 1
    test_images    uint8    [M, H, W, 3]  of the same height and width as the training images
    test_labels    integer  [M]           the class number of each image, 0 .. C - 1

Optional arrays:

    class_names              string   [C]  in the order of the class numbers, at least 2
    superclass_names         string   [S]  for data whose classes are grouped into S superclasses
    train_superclass_labels  integer  [N]  the superclass number of each image, 0 .. S - 1

- Each split needs at least one image, and each image exactly one label. Labels may have any integer type. One-hot and
  soft labels are refused.
- Without `class_names`, the classes are called "0", "1", ... up to the largest training label.
- Superclasses need both of their arrays. All images of a class must have the same superclass.
- Arrays of other names are allowed and have no effect, such as `test_superclass_labels` in the file of CIFAR-100.
- `numpy.savez` and `numpy.savez_compressed` both write the format. The digest of the content is the same for both, and
  for any order of the arrays.

Reading a file never executes code: pickled objects are refused. Files that claim an implausible size are refused too. A
checksum of each array detects damage.

To write a file (see also `save_arrays`):

    numpy.savez("mine.npz", train_images=..., train_labels=..., test_images=..., test_labels=...,
                class_names=numpy.array(["cat", "dog"]))
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.files import atomic_write, list_members
from src.data.source import Source

REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, kw_only=True)
class ImageArrays(Source):
    """Images in memory."""

    train_images: Tensor
    """[N, 3, H, W] uint8."""
    test_images: Tensor
    """[M, 3, H, W] uint8."""


def load_arrays(path: Path) -> ImageArrays:
    """Read an array file and check that it follows the format.

    Raises `UserError` if the file is missing or damaged, holds pickled objects, or does not follow the format.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: set data.path to an array file (.npz).")
    try:
        listed = sorted((member.filename, member.file_size, member.CRC) for member in list_members(path))
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()  # reading verifies the CRC-32 checksums
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UserError:
        raise
    except Exception as error:  # damage makes zipfile, zlib and numpy raise nearly any exception
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects, which could execute code when read: save plain arrays instead."
            ) from None
        raise UserError(f"{path} is damaged, or is not an .npz file ({error}): get the file again.") from None
    return _validated(path, arrays, digest)


def _validated(path: Path, arrays: dict[str, np.ndarray], digest: str) -> ImageArrays:
    _check_members(path, arrays)
    labels = {split: arrays[f"{split}_labels"] for split in ("train", "test")}
    names = _class_names(path, arrays, labels["train"])
    for split in labels:
        _check_split(path, split, arrays[f"{split}_images"], labels[split], len(names))
    train_size, test_size = (arrays[f"{split}_images"].shape[1:3] for split in ("train", "test"))
    if train_size != test_size:
        raise UserError(
            f"{path}: training images have the size {list(train_size)} and test images {list(test_size)}: "
            "resize all images to one size."
        )
    superclasses = _superclass_of_classes(path, arrays, labels["train"], len(names))
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


def _check_members(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if missing := [name for name in REQUIRED if name not in arrays]:
        raise UserError(f"{path} has no array {', '.join(missing)}: see docs/data.md for the format.")
    # numpy returns the bytes of a member that does not hold an array
    if no_arrays := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path}: {', '.join(no_arrays)} is not a NumPy array: save it with numpy.savez.")


def _class_names(path: Path, arrays: dict[str, np.ndarray], train_labels: np.ndarray) -> np.ndarray:
    names = arrays.get("class_names", np.array([str(i) for i in range(_largest_label(train_labels) + 1)]))
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        found = f"{names.dtype} {list(names.shape)}"
        raise UserError(f"{path}: class_names must be an array of at least 2 strings, but it is {found}.")
    return names


def _largest_label(labels: np.ndarray) -> int:
    """Return the largest label, but at most the number of labels: a corrupt one must not make a billion class names."""
    countable = labels.ndim == 1 and labels.size and labels.dtype.kind in "ui"
    return max(1, min(int(labels.max()), len(labels))) if countable else 1


def _check_split(path: Path, split: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: {split}_images must be uint8 [N, H, W, 3], but they are {found}.")
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path}: {split}_labels must be integers [N], one class per image, but they are {found}.")
    if len(images) != len(labels) or not len(labels):
        raise UserError(
            f"{path}: there are {len(images)} {split}_images and {len(labels)} {split}_labels: "
            "give each image one label, and each split at least one image."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path}: {split}_labels range from {labels.min()} to {labels.max()}, but the {classes} classes are "
            f"numbered from 0 to {classes - 1}: correct the labels or class_names."
        )


def _superclass_of_classes(
    path: Path, arrays: dict[str, np.ndarray], labels: np.ndarray, classes: int
) -> tuple[int, ...] | None:
    """Find the superclass of each class from the labels of the training images. Returns None without superclasses."""
    if "superclass_names" not in arrays or "train_superclass_labels" not in arrays:
        return None
    names, of_images = arrays["superclass_names"], arrays["train_superclass_labels"]
    fit = (
        names.ndim == 1 and names.dtype.kind == "U" and of_images.dtype.kind in "ui" and of_images.shape == labels.shape
    )
    if not fit or of_images.min() < 0 or of_images.max() >= len(names):
        raise UserError(
            f"{path}: train_superclass_labels must be integers [N], one per training image, each the position of a "
            "string in superclass_names."
        )
    of = np.zeros(classes, dtype=np.int64)
    of[labels] = of_images
    if (of[labels] != of_images).any():
        raise UserError(
            f"{path}: train_superclass_labels put images of one class into several superclasses: "
            "give all images of a class the same one."
        )
    return tuple(int(superclass) for superclass in of)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an array file atomically, and its folder if necessary.

    Raises `UserError` if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}): choose another folder with data.root or AEKT_DATA."
        ) from None
