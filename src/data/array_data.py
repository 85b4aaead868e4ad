"""Images in memory, from an array file. Whole batches are augmented on the device."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.common.errors import UserError
from src.data.array_file import ImageArrays, load_arrays
from src.data.image_data import ImageData, Reader, Samples, Share, Split
from src.data.views import crop_and_flip, draw_views, view_count


class ArrayReader(Reader):
    """Gathers a batch from images [N, 3, H, W] in memory. `index` selects and orders the images of the split."""

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor | None) -> None:
        self.images, self.labels, self.index = images, labels, index

    def __getitem__(self, share: Share) -> Samples:
        """Return the batch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, rows)  # NHWC: one block of memory per image
        return Samples((pixels.permute(0, 3, 1, 2),), self.labels[rows], index)


class ArrayData(ImageData):
    """Images from an array file: the file `path`, or the file in `root`, which `prepare` makes if it is missing.

    If `mean` or `std` is None, it is measured on the training images. A view is a random crop of the image with
    `padding` black pixels on each side. With `flip`, half of the views are mirrored.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[Path], Path] | None,
        root: str,
        path: str | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        padding: int,
        flip: bool,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.prepare_file, self.root, self.path = prepare, root, path
        self.given_mean, self.given_std = mean, std
        self.padding, self.flip = padding, flip

    def read(self) -> ImageArrays:
        """Read the arrays, and set `mean` and `std`. Raises `UserError` if there is no valid array file."""
        if self.path:
            file = Path(self.path).expanduser()
        elif self.prepare_file is None:
            raise UserError(f"data={self.name} needs data.path=FILE.npz (see docs/data.md for the format).")
        else:
            file = self.prepare_file(Path(self.root).expanduser())
        self.arrays = load_arrays(file)
        self.mean, self.std = self._normalisation()
        return self.arrays

    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.given_mean is not None and self.given_std is not None:
            return self.given_mean, self.given_std
        mean, std = channel_statistics(self.arrays.train_images)
        return self.given_mean or mean, self.given_std or std

    def reader(self, split: Split, index: Tensor | None = None) -> ArrayReader:
        """Return a reader of a split. It does not augment."""
        if split == "test":
            return ArrayReader(self.arrays.test_images, self.arrays.test_labels, index)
        return ArrayReader(self.arrays.train_images, self.arrays.train_labels, index)

    def augment(self, batch: Samples, epoch: int) -> Samples:
        """Replace the images by their views in `epoch`."""
        (images,) = batch.images
        draw = partial(draw_views, batch.index, seed=self.seed, epoch=epoch, padding=self.padding, flip=self.flip)
        numbers = tuple(draw(view=view) for view in range(self.views_per_image))
        views = tuple(crop_and_flip(images, number, self.padding) for number in numbers)
        return batch._replace(images=views, view_numbers=numbers)

    @cached_property
    def train_duplicates(self) -> dict[str, int]:
        """The number of images in `val` and `test` that are also training images, pixel for pixel."""
        train = _hashes(self.arrays.train_images)
        seen = {train[row] for row in self.train_index.tolist()}
        splits = {"val": [train[row] for row in self.val_index.tolist()], "test": _hashes(self.arrays.test_images)}
        return {split: sum(image in seen for image in images) for split, images in splits.items() if images}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of an image."""
        _, height, width = self.arrays.train_images.shape[1:]
        return 3, height, width

    def view_count(self, epochs: int) -> int:
        """Return how many different views an image has. The number of epochs does not matter."""
        return view_count(self.padding, self.flip)

    @property
    def views_name(self) -> str:
        """Padding and flip, as part of a file name."""
        return f"{self.padding}-{self.flip}"


def _hashes(images: Tensor) -> list[int]:
    """Hash each of the images [N, 3, H, W] to 64 bits."""
    return [hash(image.tobytes()) for image in images.permute(0, 2, 3, 1).numpy()]


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel of uint8 images [N, 3, H, W].

    They are fractions of 255, rounded to 4 digits. Raises `UserError` if a channel has a single value everywhere.

    >>> channel_statistics(torch.tensor([[[0, 255]]] * 3, dtype=torch.uint8)[None])
    ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    """
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=0).sqrt()
    if not (std > 0).all():
        raise UserError("A channel of the training images has a single value: set data.mean and data.std.")
    return [round(float(v), 4) for v in mean], [round(float(v), 4) for v in std]
