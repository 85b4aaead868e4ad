"""Photos in folders. The loader's workers decode and augment them."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.common.errors import UserError
from src.data.batches import Share
from src.data.image_data import ImageData, Reader, Samples
from src.data.photo_check import Checked, check_photos, describe_unreadable
from src.data.photo_folders import (
    UNLABELLED_PLACE,
    Listing,
    check_classes,
    list_photos,
    list_unlabelled,
    listing_digest,
    split_folders,
    unread_notes,
)
from src.data.photos import Photo, centre, crop_and_resize, reduction
from src.data.source import Source, Split
from src.data.view_reader import ViewReader
from src.data.views import resized_crop_boxes

UNLABELLED = "unlabelled"
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
        images = _centres(_open_photos(self.photos, rows), self.resize, self.size)
        return Samples((images,), self.labels[rows], index)


@dataclass
class TrainingReader(ViewReader):
    """Reads random crops of each photo, or its centre if the augmentation does not crop."""

    photos: Photos
    resize: int
    size: int
    scale: tuple[float, float]
    flip: bool

    def crops(self, index: Tensor, bits: Sequence[Tensor]) -> list[Tensor]:
        """Read, crop and resize photos, as described in `ViewReader`."""
        photos = _open_photos(self.photos, index)
        if not self.augmentation.crop_and_flip:
            return [_centres(photos, self.resize, self.size)] * len(bits)
        heights, widths = torch.tensor([(photo.height, photo.width) for photo in photos]).T
        crops = [_as_lists(*resized_crop_boxes(each, heights, widths, self.scale, RATIO)) for each in bits]
        batches = [_empty_images(len(photos), self.size) for _ in bits]
        for i, photo in enumerate(photos):
            decoded: dict[int, tuple[Image.Image, int]] = {}  # by reduction: views of the same reduction share it
            for crops_of_view, (_, pixels) in zip(crops, batches, strict=True):
                box, mirrored = crops_of_view[i]
                reduced = reduction(min(box[2:]), self.size)
                if reduced not in decoded:
                    decoded[reduced] = photo.decode(reduced)
                pixels[i] = crop_and_resize(*decoded[reduced], box, self.size, mirrored and self.flip)
        return [images for images, _ in batches]


@dataclass
class JoinedPhotos:
    """The photos of two sources, one after the other."""

    first: Photos
    second: Photos
    size_of_first: int

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the bytes of photos. Raises `UserError` if one cannot be read."""
        of_first = [row for row in rows if row < self.size_of_first]
        of_second = [row for row in rows if row >= self.size_of_first]
        encoded = dict(zip(of_first, self.first.read(of_first), strict=True))
        read = self.second.read([row - self.size_of_first for row in of_second])
        encoded.update(zip(of_second, read, strict=True))
        return [encoded[row] for row in rows]

    def name(self, row: int) -> str:
        """Return the name of a photo for error messages."""
        number = row - self.size_of_first
        return self.first.name(row) if number < 0 else self.second.name(number)


def _open_photos(photos: Photos, rows: Tensor) -> list[Photo]:
    wanted = rows.tolist()
    return [Photo(encoded, photos.name(row)) for row, encoded in zip(wanted, photos.read(wanted), strict=True)]


def _centres(photos: Sequence[Photo], resize: int, size: int) -> Tensor:
    """Crop the centres of photos as in evaluation, uint8 [B, 3, size, size]."""
    images, pixels = _empty_images(len(photos), size)
    for i, photo in enumerate(photos):
        pixels[i] = centre(photo, resize, size)
    return images


def _as_lists(boxes: Tensor, mirrored: Tensor) -> list[tuple[list[int], bool]]:
    return list(zip(boxes.tolist(), mirrored.tolist(), strict=True))


def _empty_images(count: int, size: int) -> tuple[Tensor, np.ndarray]:
    """Allocate images, uint8 [count, 3, size, size].

    Also returns a NumPy view of the same memory, [count, size, size, 3]. Decoded images can be assigned to it.
    """
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), pixels


class FolderData(ImageData):
    """Photos in the folders `root`/train/<class>/... and `root`/val/<class>/..., or test/ instead of val/.

    Photos in the folder `unlabelled`, at any depth, are training photos without labels. train/ is optional then.

    With val/ and test/, val/ is the validation split. `train_folder`, `val_folder` and `test_folder` name other folders
    in `root`. A class is named after its folder, which may contain further folders.

    Each photo is decoded once before training. The result is kept in the folder `cache`. With `skip_corrupt`, photos
    that cannot be read are left out.

    Training: a random crop that covers a share of the area within `scale`, resized to `image_size`. With `flip`, half
    of the crops are mirrored. Evaluation: the short side is resized to `resize`, then the central `image_size` x
    `image_size` pixels are cropped.
    """

    evaluation_batch_size = 100
    how_to_ignore_val = ", or set data.test_folder to leave them unread"
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
        train_folder: str | None = None,
        val_folder: str | None = None,
        test_folder: str | None = None,
        skip_corrupt: bool = False,
        cache: str = "~/.cache/aekt",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root, self.cache = root, cache
        self.train_folder, self.val_folder, self.test_folder = train_folder, val_folder, test_folder
        self.skip_corrupt = skip_corrupt
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
        """List the files, and check that all photos can be read.

        Raises `UserError` if folders are missing or empty, if the splits have different classes, or if photos cannot be
        read and are not to be skipped.
        """
        root = Path(self.root).expanduser()
        folder = self.unlabelled_folder
        folders = split_folders(root, self.train_folder, self.val_folder, self.test_folder, needs_train=folder is None)
        listings = {split: list_photos(each, root) for split, each in folders.items()}
        check_classes(listings)
        if folder is not None:
            listings[UNLABELLED] = list_unlabelled(folder, folders)
            folders[UNLABELLED] = folder
        listings, found, notes = self._read_all(root, listings)
        self.files_digest = listing_digest(listings, found.adjusted, found.checksums)
        labelled = {split: listing for split, listing in listings.items() if split != UNLABELLED}
        unlabelled = listings.get(UNLABELLED)
        if unlabelled is not None and not unlabelled.files:
            raise UserError(f"No photo in data.unlabelled={folder} can be read: repair them, or leave the option out.")
        check_classes(labelled)
        self.photos = {split: _photos(listing) for split, listing in listings.items()}  # type: ignore[misc]
        labels = {split: _labels(listing) for split, listing in listings.items()}
        labels.setdefault("train", torch.zeros(0, dtype=torch.int64))
        labels["train"] = self._join_unlabelled(labels["train"], unlabelled)
        self.photos["held_out"] = self.photos["train"]
        return Source(
            train_labels=labels["train"],
            val_labels=labels.get("val"),
            test_labels=labels["test"],
            class_names=tuple(listings["test"].classes),
            digest=self.digest(self.files_digest),
            labelled_digest=self._labelled_digest(labelled, found) if unlabelled is not None else None,
            places={split: f"{each}{os.sep}" for split, each in folders.items()},
            notes=tuple(notes),
        )

    def _read_all(self, root: Path, listings: dict[str, Listing]) -> tuple[dict[str, Listing], Checked, list[str]]:
        """Read all photos once.

        Returns the listings of the readable photos, the result of the check, and notes. Raises `UserError` if a photo
        cannot be read and is not to be skipped.
        """
        found = check_photos(root, listings, self.workers, Path(self.cache).expanduser())
        described = describe_unreadable(found, sum(len(listing.files) for listing in listings.values()))
        if found.unreadable and not self.skip_corrupt:
            raise UserError(
                f"In data.root={root}, {described}. Repair or remove them, or set data.skip_corrupt=true to leave them "
                "out."
            )
        notes = [*unread_notes(root, listings), *([f"Left out of {root}: {described}."] if found.unreadable else [])]
        readable = {split: listing.without(found.unreadable) for split, listing in listings.items()}
        return readable, found, notes

    def _labelled_digest(self, labelled: Mapping[str, Listing], found: Checked) -> str:
        adjusted = [photo for photo in found.adjusted if not photo.startswith(UNLABELLED_PLACE)]
        return self.digest(listing_digest(labelled, adjusted, found.checksums))

    def _join_unlabelled(self, labels: Tensor, unlabelled: Listing | None) -> Tensor:
        """Append the photos without labels to the training photos. Returns the labels [N], with -1 for them."""
        if unlabelled is None:
            return labels
        photos, own = _photos(unlabelled), self.photos.get("train")
        self.photos["train"] = photos if own is None else JoinedPhotos(own, photos, len(labels))
        return torch.cat([labels, torch.full((len(unlabelled.files),), -1)])

    def digest(self, files_digest: str) -> str:
        """Hash the digest of the files and the image sizes of evaluation."""
        return hashlib.sha256(f"{files_digest} {self.resize} {self.image_size}".encode()).hexdigest()

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """Return a reader of views for `train`, and of central crops for the other splits."""
        if split == "train":
            return TrainingReader(
                **self.view_options(),
                labels=self.train_labels,
                blocks=self.blocks,
                photos=self.photos[split],
                resize=self.resize,
                size=self.image_size,
                scale=self.scale,
                flip=self.flip,
            )
        return EvaluationReader(self.photos[split], self.source.labels(split), index, self.resize, self.image_size)

    @property
    def views_name(self) -> str:
        """The settings that determine the crops, as part of a file name. Fixed views are the same for all seeds."""
        low, high = self.scale
        return self.drawn_name(f"{self.image_size}-{low}-{high}-{self.flip}{self.augmentation_key}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, image_size, image_size) of a view."""
        return 3, self.image_size, self.image_size


def _labels(listing: Listing) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(files) for files in listing.classes.values()]))


def _photos(listing: Listing) -> FolderPhotos:
    names = np.array([os.fsencode(file.name) for file in listing.files])
    return FolderPhotos(str(listing.folder), names, np.array([file.size for file in listing.files]))
