"""Photos in folders, decoded and augmented by the loader's workers."""

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

from src.data.image_data import ImageData, Reader, Samples, Share, Split
from src.data.photos import SUFFIXES, Photo, centre, crop_and_resize, reduction
from src.data.source import Source
from src.data.views import FIRST_VIEW, random_bits, resized_crop_boxes
from src.errors import UserError

RATIO = (3 / 4, 4 / 3)
"""Width over height of training crops: torchvision's and everybody's."""


class Photos(Protocol):
    """The encoded photos of a split, by row."""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Their bytes. Raises `UserError` where one cannot be had."""

    def name(self, row: int) -> str:
        """What to call a photo in a complaint."""


@dataclass
class FolderPhotos:
    """Files below a folder; their names are one array, which workers share without copies."""

    folder: str
    names: np.ndarray
    """[N] relative to `folder`, as bytes."""
    sizes: np.ndarray
    """[N] int64, in bytes"""

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Whole files."""
        return [self._read(self.name(row)) for row in rows]

    def name(self, row: int) -> str:
        """The path."""
        return os.path.join(self.folder, self.relative(row))

    def relative(self, row: int) -> str:
        """The path within `folder`."""
        return os.fsdecode(self.names[row])

    def _read(self, file: str) -> bytes:
        try:
            return Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): mend or remove it.") from None


@dataclass
class EvaluationReader(Reader):
    """The picture of each photo that evaluation looks at."""

    photos: Photos
    labels: Tensor
    index: Tensor | None
    resize: int
    size: int

    def __getitem__(self, share: Share) -> Samples:
        """The batch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        images, put = _batch(len(rows), self.size)
        for place, photo in enumerate(_opened(self.photos, rows)):
            put[place] = centre(photo, self.resize, self.size)
        return Samples((images,), self.labels[rows], index)


@dataclass
class TrainingReader(Reader):
    """Random crops of each photo, by 63 random bits; a view's number counts those of earlier epochs."""

    photos: Photos
    labels: Tensor
    index: Tensor | None
    size: int
    scale: tuple[float, float]
    flip: bool
    views: int
    seed: int

    def __getitem__(self, share: Share) -> Samples:
        """The views of the share's epoch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        photos = _opened(self.photos, rows)
        heights, widths = torch.tensor([(photo.height, photo.width) for photo in photos]).T
        bits = [random_bits(self.seed, share.epoch, index, FIRST_VIEW + view) for view in range(self.views)]
        cuts = [_cuts(*resized_crop_boxes(drawn, heights, widths, self.scale, RATIO)) for drawn in bits]
        batches = [_batch(len(rows), self.size) for _ in bits]
        for place, photo in enumerate(photos):
            decoded: dict[int, tuple[Image.Image, int]] = {}
            for view, (_, put) in zip(cuts, batches, strict=True):
                box, mirrored = view[place]
                reduced = reduction(min(box[2:]), self.size)
                if reduced not in decoded:
                    decoded[reduced] = photo.decode(reduced)
                put[place] = crop_and_resize(*decoded[reduced], box, self.size, mirrored and self.flip)
        numbers = tuple(torch.full_like(index, share.epoch * self.views + view) for view in range(self.views))
        return Samples(tuple(images for images, _ in batches), self.labels[rows], index, numbers)


def _opened(photos: Photos, rows: Tensor) -> list[Photo]:
    wanted = rows.tolist()
    return [Photo(encoded, photos.name(row)) for row, encoded in zip(wanted, photos.read(wanted), strict=True)]


def _cuts(boxes: Tensor, mirrored: Tensor) -> list[tuple[list[int], bool]]:
    return list(zip(boxes.tolist(), mirrored.tolist(), strict=True))


def _batch(count: int, size: int) -> tuple[Tensor, np.ndarray]:
    """Empty images, uint8 [count, 3, size, size], and the array [count, size, size, 3] of the same memory, which takes
    decoded images as they are.
    """
    put = np.empty((count, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(put).permute(0, 3, 1, 2), put


class FolderData(ImageData):
    """Photos as `root`/train/<class>/... and `root`/val/<class>/..., or test/ for val/ (which is taken if both are
    there); a class is named by its folder, and below it folders may be nested.

    Training: a crop with a share of the area within `scale`, resized to `image_size`, and mirrored or not where `flip`
    is set. Evaluation: the short side resized to `resize`, then the central crop of `image_size`.
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
        """Raises `UserError` also where sizes of pictures do not fit together."""
        if not 0 < self.image_size <= self.resize:
            raise UserError(
                f"data.image_size={self.image_size} does not fit: evaluation crops it out of pictures whose short side "
                f"is data.resize={self.resize}."
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"data.scale={list(self.scale)} does not fit: it is a range of shares of the area.")
        super().load()

    def read(self) -> Source:
        """Lists the files. `files_digest` is of their names and sizes, not of what is in them: reading it all would
        take as long as an epoch.
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
        """Of the files and of what evaluation sees of them."""
        return hashlib.sha256(f"{self.files_digest} {self.resize} {self.image_size}".encode()).hexdigest()

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """Views in training, else the evaluation's pictures."""
        labels = self.source.test_labels if split == "test" else self.source.train_labels
        if split == "train":
            return TrainingReader(
                self.photos[split], labels, index, self.image_size, self.scale, self.flip, self.views, self.seed
            )
        return EvaluationReader(self.photos[split], labels, index, self.resize, self.image_size)

    @property
    def views_name(self) -> str:
        """What decides the crops; a view's number is (epoch, view)."""
        low, high = self.scale
        return f"{self.image_size}-{low}-{high}-{self.flip}-{self.views}-seed{self.seed}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, image_size, image_size)."""
        return 3, self.image_size, self.image_size


Listed = dict[str, list[tuple[str, int]]]
"""Relative names and sizes of a split's photos by class, all sorted."""


def _split_folders(root: Path) -> tuple[Path, Path]:
    """The folders of training and test photos."""
    train = root / "train"
    test = root / "test" if _folders(root / "test") else root / "val"  # ImageNet's test/ holds photos without classes
    for folder in (train, test):
        if not _folders(folder):
            raise UserError(
                f"There are no class folders in {folder}: data.root={root} should hold photos as train/<class>/... and "
                "val/<class>/... (or test/ for val/)."
            )
    return train, test


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, sorted; none where it is not there."""
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
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}): mend or remove it.") from None


def _files(folder: str) -> Iterator[tuple[str, int]]:
    """Photos at any depth with their sizes; hidden files, such as a Mac leaves behind, are none."""
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
            raise UserError(f"There are no photos in {folder / empty[0]} ({', '.join(sorted(SUFFIXES))}).")
    for folder, other in ((train, test), (test, train)):
        here, there = (train_listed, test_listed) if folder == train else (test_listed, train_listed)
        if extra := sorted(here.keys() - there.keys()):
            named = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            raise UserError(f"{folder} has classes that {other} has not ({named}): both need the same class folders.")


def _labels(listed: Listed) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(files) for files in listed.values()]))


def _photos(folder: Path, listed: Listed) -> FolderPhotos:
    files = [file for of_class in listed.values() for file in of_class]
    names = np.array([os.fsencode(name) for name, _ in files])
    return FolderPhotos(str(folder), names, np.array([size for _, size in files]))
