"""Photos in folders. The loader's workers decode and augment them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.common.errors import UserError
from src.data.image_data import ImageData, Reader, Samples, Share, Split
from src.data.photos import SUFFIXES, Photo, centre, crop_and_resize, reduction
from src.data.source import Source
from src.data.views import FIRST_VIEW, random_bits, resized_crop_boxes

RATIO = (3 / 4, 4 / 3)
"""Range of width / height of training crops. torchvision's default, which everybody uses."""


class Photos(Protocol):
    """The encoded photos of a split, numbered by row."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the bytes of photos. Raises `UserError` if one cannot be read."""

    def name(self, row: int) -> str:
        """Return the name of a photo for error messages."""


@dataclass
class FolderPhotos:
    """Files below a folder. Their names are one array, which forked workers share without copies."""

    folder: str
    names: np.ndarray
    """[N] paths relative to `folder`, as bytes."""
    sizes: np.ndarray
    """[N] int64, file sizes in bytes."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the contents of files. Raises `UserError` if a file cannot be read."""
        return [self._read(self.name(row)) for row in rows]

    def name(self, row: int) -> str:
        """Return the path of a photo."""
        return os.path.join(self.folder, self.relative(row))

    def relative(self, row: int) -> str:
        """Return the path of a photo within `folder`."""
        return os.fsdecode(self.names[row])

    def _read(self, file: str) -> bytes:
        try:
            return Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): repair or remove it.") from None


@dataclass
class EvaluationReader(Reader):
    """Reads the resized central crop of each photo. `index` selects and orders the photos of the split."""

    photos: Photos
    labels: Tensor
    index: Tensor | None
    resize: int
    size: int

    def __getitem__(self, share: Share) -> Samples:
        """Return the batch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        images, pixels = _empty_images(len(rows), self.size)
        for i, photo in enumerate(_open_photos(self.photos, rows)):
            pixels[i] = centre(photo, self.resize, self.size)
        return Samples((images,), self.labels[rows], index)


@dataclass
class TrainingReader(Reader):
    """Reads random crops of each photo.

    A crop is determined by 63 random bits of (seed, epoch, position, view). View v of an epoch has the number
    epoch * views_per_image + v.
    """

    photos: Photos
    labels: Tensor
    index: Tensor | None
    size: int
    scale: tuple[float, float]
    flip: bool
    views_per_image: int
    seed: int

    def __getitem__(self, share: Share) -> Samples:
        """Return the views of the share's epoch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        photos = _open_photos(self.photos, rows)
        heights, widths = torch.tensor([(photo.height, photo.width) for photo in photos]).T
        bits = [random_bits(self.seed, share.epoch, index, FIRST_VIEW + view) for view in range(self.views_per_image)]
        crops = [_as_lists(*resized_crop_boxes(drawn, heights, widths, self.scale, RATIO)) for drawn in bits]
        batches = [_empty_images(len(rows), self.size) for _ in bits]
        for i, photo in enumerate(photos):
            decoded: dict[int, tuple[Image.Image, int]] = {}  # by reduction: views of the same reduction share it
            for crops_of_view, (_, pixels) in zip(crops, batches, strict=True):
                box, mirrored = crops_of_view[i]
                reduced = reduction(min(box[2:]), self.size)
                if reduced not in decoded:
                    decoded[reduced] = photo.decode(reduced)
                pixels[i] = crop_and_resize(*decoded[reduced], box, self.size, mirrored and self.flip)
        numbers = tuple(
            torch.full_like(index, share.epoch * self.views_per_image + view) for view in range(self.views_per_image)
        )
        return Samples(tuple(images for images, _ in batches), self.labels[rows], index, numbers)


def _open_photos(photos: Photos, rows: Tensor) -> list[Photo]:
    wanted = rows.tolist()
    return [Photo(encoded, photos.name(row)) for row, encoded in zip(wanted, photos.read(wanted), strict=True)]


def _as_lists(boxes: Tensor, mirrored: Tensor) -> list[tuple[list[int], bool]]:
    return list(zip(boxes.tolist(), mirrored.tolist(), strict=True))


def _empty_images(count: int, size: int) -> tuple[Tensor, np.ndarray]:
    """Allocate images, uint8 [count, 3, size, size].

    Also returns a NumPy view of the same memory, [count, size, size, 3]. Decoded images can be assigned to it.
    """
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), pixels


class FolderData(ImageData):
    """Photos in the folders `root`/train/<class>/... and `root`/val/<class>/...

    Test photos may also be in `root`/test/<class>/..., which takes precedence over val/. A class is named after its
    folder, which may contain further folders.

    Training: a random crop that covers a share of the area within `scale`, resized to `image_size`. With `flip`, half
    of the crops are mirrored. Evaluation: the short side is resized to `resize`, then the central `image_size` x
    `image_size` pixels are cropped.
    """

    evaluation_batch_size = 100
    photos: dict[Split, Photos]
    files_digest: str

    def __init__(
        self,
        *,
        root: str,
        image_size: int,
        resize: int,
        scale: tuple[float, float],
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = root
        self.image_size, self.resize, self.scale, self.flip = image_size, resize, (scale[0], scale[1]), flip
        self.mean, self.std = mean, std

    def load(self) -> None:
        """Check the options, read the labels and draw the splits.

        Raises `UserError` if the sizes or the scale are inconsistent, or if `ImageData.load` raises it.
        """
        if not 0 < self.image_size <= self.resize:
            raise UserError(
                f"data.image_size={self.image_size} does not fit: choose a size from 1 to data.resize={self.resize}, "
                "the short side of the photos from which evaluation crops the centre."
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(
                f"data.scale={list(self.scale)} does not fit: choose the smallest and the largest share of the area, "
                "above 0 and at most 1."
            )
        super().load()

    def read(self) -> Source:
        """List the files.

        `files_digest` covers their names and sizes, but not their contents: reading the contents would take as
        long as an epoch. Raises `UserError` if folders are missing or empty, or the splits have different classes.
        """
        root = Path(self.root).expanduser()
        train, test = _split_folders(root)
        listed = {folder: _listed(folder) for folder in (train, test)}
        _check_classes(train, listed[train], test, listed[test])
        self.photos = {"train": _photos(train, listed[train]), "test": _photos(test, listed[test])}
        self.photos["val"] = self.photos["train"]
        self.files_digest = hashlib.sha256(repr([listed[train], listed[test]]).encode()).hexdigest()
        return Source(
            train_labels=_labels(listed[train]),
            test_labels=_labels(listed[test]),
            class_names=tuple(listed[train]),
            digest=self.digest(),
        )

    def digest(self) -> str:
        """Hash the list of files and the image sizes of evaluation."""
        return hashlib.sha256(f"{self.files_digest} {self.resize} {self.image_size}".encode()).hexdigest()

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """Return a reader of random crops for `train`, and of central crops for `val` and `test`."""
        labels = self.source.test_labels if split == "test" else self.source.train_labels
        if split == "train":
            return TrainingReader(
                self.photos[split],
                labels,
                index,
                self.image_size,
                self.scale,
                self.flip,
                self.views_per_image,
                self.seed,
            )
        return EvaluationReader(self.photos[split], labels, index, self.resize, self.image_size)

    @property
    def views_name(self) -> str:
        """The settings that determine the crops, as part of a file name. They include the seed."""
        low, high = self.scale
        return f"{self.image_size}-{low}-{high}-{self.flip}-{self.views_per_image}-seed{self.seed}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, image_size, image_size) of a view."""
        return 3, self.image_size, self.image_size


Listed = dict[str, list[tuple[str, int]]]
"""The photos of a split by class: relative path and size in bytes, all sorted."""


def _split_folders(root: Path) -> tuple[Path, Path]:
    """Return the folders of training and test photos."""
    train = root / "train"
    test = root / "test" if _folders(root / "test") else root / "val"  # ImageNet's test/ has no class folders
    for folder in (train, test):
        if not _folders(folder):
            raise UserError(
                f"There are no class folders in {folder}: arrange the photos in data.root={root} as train/<class>/... "
                "and val/<class>/... (or test/ instead of val/)."
            )
    return train, test


def _folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden folders. `folder` need not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _listed(folder: Path) -> Listed:
    try:
        return {
            name: sorted((file[len(str(folder)) + 1 :], size) for file, size in _files(str(folder / name)))
            for name in _folders(folder)
        }
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}): repair or remove it.") from None


def _files(folder: str) -> Iterator[tuple[str, int]]:
    """List photos at any depth with their sizes. Hidden files are skipped: macOS leaves such files behind."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield entry.path, entry.stat().st_size


def _check_classes(train: Path, train_listed: Listed, test: Path, test_listed: Listed) -> None:
    for folder, listed in ((train, train_listed), (test, test_listed)):
        if empty := [name for name, files in listed.items() if not files]:
            raise UserError(
                f"There are no photos in {folder / empty[0]} ({', '.join(sorted(SUFFIXES))}): "
                "add some, or remove the folder."
            )
    for folder, other in ((train, test), (test, train)):
        here, there = (train_listed, test_listed) if folder == train else (test_listed, train_listed)
        if extra := sorted(here.keys() - there.keys()):
            named = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            raise UserError(f"{folder} has classes that {other} lacks ({named}): both need the same class folders.")


def _labels(listed: Listed) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(files) for files in listed.values()]))


def _photos(folder: Path, listed: Listed) -> FolderPhotos:
    files = [file for of_class in listed.values() for file in of_class]
    names = np.array([os.fsencode(name) for name, _ in files])
    return FolderPhotos(str(folder), names, np.array([size for _, size in files]))
