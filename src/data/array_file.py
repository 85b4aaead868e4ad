"""The array file: training and test images with their labels in one NumPy archive (.npz).

CIFAR and glyphs are converted to this format. Your own images can have this format too: `data=arrays
data.path=FILE.npz`.

Required arrays, for N training images and M test images of H x W pixels and C classes:

    train_images   uint8    [N, H, W, 3]  RGB, channels last, top row first
    train_labels   integer  [N]           the class number of each image, 0 .. C - 1
    test_images    uint8    [M, H, W, 3]  of the same height and width as the training images
    test_labels    integer  [M]           the class number of each image, 0 .. C - 1

Optional arrays:

    unlabelled_images        uint8    [U, H, W, 3]  training images without labels, for distillation alone
    val_images               uint8    [V, H, W, 3]  a validation split, which is scored after each epoch
    val_labels               integer  [V]           with val_images
    class_names              string   [C]  in the order of the class numbers, at least 2
    superclass_names         string   [S]  for data whose classes are grouped into S superclasses
    train_superclass_labels  integer  [N]  the superclass number of each image, 0 .. S - 1

- With `unlabelled_images`, the training images and labels are optional.
- Each split needs at least one image, and each image exactly one label. Labels may have any integer type, and the shape
  [N, 1] too. One-hot and soft labels are refused.
- Grey images [N, H, W] or [N, H, W, 1] become RGB. Channels may also come first: [N, 3, H, W] or [N, 1, H, W].
- Labels that run from 1 to C, without a gap and with C class names or none, are shifted to 0 .. C - 1.
- Class names may repeat: a class is identified by its number.
- Without `class_names`, the classes are called "0", "1", ... up to the largest label of the training images, or of the
  test images if no training image has a label.
- Superclasses need both of their arrays. All images of a class must have the same superclass.
- Arrays of other names are allowed and have no effect, such as `test_superclass_labels` in the file of CIFAR-100. What
  has been converted or is left unread is said in the log.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.files import atomic_write, describe_foreign, list_members
from src.data.photo_folders import named
from src.data.source import Source, Split

REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
UNLABELLED = "unlabelled_images"
KNOWN = {
    *REQUIRED, UNLABELLED, "val_images", "val_labels", "class_names", "superclass_names",
    *(f"{split}_superclass_labels" for split in ("train", "val", "test")),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageArrays(Source):
    """Images in memory."""

    train_images: Tensor
    """[N, 3, H, W] uint8. At the end are the images without a label."""
    test_images: Tensor
    """[M, 3, H, W] uint8."""
    val_images: Tensor | None = None
    """[V, 3, H, W] uint8, with `val_labels`."""

    def images(self, split: Split) -> Tensor:
        """Return the images of a split. Held-out images are among the training images."""
        if split == "val":
            assert self.val_images is not None
            return self.val_images
        return self.test_images if split == "test" else self.train_images


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
        if foreign := describe_foreign(path):
            raise UserError(f"{path} is not an .npz file, but {foreign}.") from None
        raise UserError(f"{path} is damaged, or is not an .npz file ({error}): get the file again.") from None
    return _validated(path, arrays, digest)


def _validated(path: Path, arrays: dict[str, np.ndarray], digest: str) -> ImageArrays:
    _check_members(path, arrays)
    splits = ["train", "test", *(["val"] if "val_images" in arrays else [])]
    arrays = _with_training_arrays(arrays)
    arrays, notes = _usual_shapes(arrays, splits)
    labels = {split: arrays[f"{split}_labels"] for split in splits}
    given = [each for each in labels.values() if each.size] or list(labels.values())
    names = _class_names(path, arrays, given[0])
    if _labels_start_at_1(given, arrays.get("class_names")):
        labels = {split: each.astype(np.int64) - 1 for split, each in labels.items()}
        names = names if "class_names" in arrays else names[1:]
        digest = hashlib.sha256(f"{digest} from 1".encode()).hexdigest()  # version 0.1 added an empty class
        notes.append(f"The labels of {path} run from 1 to {len(names)}, and are shifted to 0 to {len(names) - 1}.")
    unlabelled = arrays.get(UNLABELLED)
    for split in splits:
        is_optional = split == "train" and unlabelled is not None
        _check_split(path, split, arrays[f"{split}_images"], labels[split], len(names), is_optional)
    if unlabelled is not None:
        _check_images(path, UNLABELLED, unlabelled)
    read = [*(f"{split}_images" for split in splits), *([UNLABELLED] if unlabelled is not None else [])]
    _check_sizes(path, {name: arrays[name] for name in read})
    trained = np.unique(labels["train"])
    if len(trained) == 1 and unlabelled is None:
        raise UserError(f"{path}: all train_labels are {trained[0]}: add training images of another class.")
    absent = [str(name) for name in np.delete(names, trained)]
    if absent and len(trained):
        notes.append(f"Classes of {path} without a training image: {len(absent):,} ({named(absent)}).")
    superclasses = _superclass_of_classes(path, arrays, labels["train"], len(names))
    if unread := sorted(set(arrays) - KNOWN):
        notes.append(f"Arrays of {path} that are left unread: {', '.join(unread)}.")
    if unlabelled is not None:
        arrays["train_images"] = np.concatenate([arrays["train_images"], unlabelled])
        labels["train"] = np.append(labels["train"].astype(np.int64), np.full(len(unlabelled), -1))
    tensors: dict[str, Any] = {f"{split}_images": _tensor(arrays[f"{split}_images"]) for split in splits}
    tensors |= {f"{split}_labels": torch.from_numpy(labels[split].astype(np.int64)) for split in splits}
    return ImageArrays(
        **tensors,
        class_names=tuple(str(name) for name in names),
        superclass_names=tuple(str(name) for name in arrays["superclass_names"]) if superclasses else None,
        superclass_of=superclasses,
        digest=digest,
        places={split: f"{split}_images" for split in splits if "val" in splits} | {"unlabelled": UNLABELLED},
        notes=tuple(notes),
    )


def _with_training_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add empty training images and labels if all training images are without labels."""
    if "train_images" in arrays:
        return arrays
    images = np.atleast_1d(arrays[UNLABELLED])[:0]  # its shape is checked later
    return {**arrays, "train_images": images, "train_labels": np.zeros(0, dtype=np.int64)}


def _usual_shapes(arrays: dict[str, np.ndarray], splits: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Convert images to [N, H, W, 3] and labels to [N] where the shape leaves no doubt. Says what was converted."""
    usual, notes = dict(arrays), []
    names = [f"{split}_images" for split in splits]
    for name in [*names, UNLABELLED] if UNLABELLED in arrays else names:
        images = arrays[name]
        if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3, 4):
            images = images.transpose(0, 2, 3, 1)
            notes.append(f"{name} have their channels first, and are transposed.")
        if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
            images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
            notes.append(f"{name} are grey, and become RGB.")
        usual[name] = images
    for split in splits:
        labels = arrays[f"{split}_labels"]
        if labels.ndim == 2 and labels.shape[1] == 1:
            usual[f"{split}_labels"] = labels[:, 0]
            notes.append(f"{split}_labels have the shape [N, 1], and are read as [N].")
    superclasses = arrays.get("train_superclass_labels")
    if superclasses is not None and superclasses.ndim == 2 and superclasses.shape[1] == 1:
        usual["train_superclass_labels"] = superclasses[:, 0]
        notes.append("train_superclass_labels have the shape [N, 1], and are read as [N].")
    return usual, notes


def _labels_start_at_1(labels: list[np.ndarray], class_names: np.ndarray | None) -> bool:
    """Return whether labels run from 1 to the number of classes, and can mean nothing else."""
    if not all(each.ndim == 1 and each.dtype.kind in "ui" and each.size for each in labels):
        return False
    found = np.unique(np.concatenate([np.unique(each) for each in labels]))
    gapless = found[0] == 1 and found[-1] == len(found) > 1
    return bool(gapless and np.isin(found, labels[0]).all() and (class_names is None or len(class_names) == len(found)))


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _check_members(path: Path, arrays: dict[str, np.ndarray]) -> None:
    pairs = ("val_images", "val_labels")
    training = ("train_images", "train_labels")
    is_labelled = UNLABELLED not in arrays or any(name in arrays for name in training)
    required = (*(training if is_labelled else ()), *REQUIRED[2:])
    required += pairs if any(name in arrays for name in pairs) else ()
    if missing := [name for name in required if name not in arrays]:
        raise UserError(f"{path} has no array {', '.join(missing)}: see docs/data.md for the format.")
    # numpy returns the bytes of a member that does not hold an array
    if no_arrays := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path}: {', '.join(no_arrays)} is not a NumPy array: save it with numpy.savez.")


def _class_names(path: Path, arrays: dict[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    if "class_names" not in arrays:
        return np.array([str(number) for number in range(_largest_label(labels) + 1)])
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        found = f"{names.dtype} {list(names.shape)}"
        raise UserError(f"{path}: class_names must be an array of at least 2 strings, but it is {found}.")
    return names


def _largest_label(labels: np.ndarray) -> int:
    """Return the largest label, but at most the number of labels: a corrupt one must not make a billion class names."""
    countable = labels.ndim == 1 and labels.size and labels.dtype.kind in "ui"
    return max(0, min(int(labels.max()), len(labels))) if countable else 1


def _check_images(path: Path, name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: {name} must be uint8 [N, H, W, 3], but they are {found}.")


def _check_split(
    path: Path, split: str, images: np.ndarray, labels: np.ndarray, classes: int, is_optional: bool = False
) -> None:
    _check_images(path, f"{split}_images", images)
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path}: {split}_labels must be integers [N], one class per image, but they are {found}.")
    if is_optional and not len(images) + len(labels):
        return
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


def _check_sizes(path: Path, images: dict[str, np.ndarray]) -> None:
    sizes = {name: list(each.shape[1:3]) for name, each in images.items()}
    if other := [name for name, size in sizes.items() if size != sizes["train_images"]]:
        raise UserError(
            f"{path}: training images have the size {sizes['train_images']} and {other[0]} {sizes[other[0]]}: "
            "resize all images to one size."
        )


def _superclass_of_classes(
    path: Path, arrays: dict[str, np.ndarray], labels: np.ndarray, classes: int
) -> tuple[int, ...] | None:
    """Find the superclass of each class from the labels of the training images. Returns None without superclasses."""
    if "superclass_names" not in arrays or "train_superclass_labels" not in arrays or not len(labels):
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
