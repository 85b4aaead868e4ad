"""Images in memory, from one array file; views are made on the device, a whole batch at once."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.arrays import ImageArrays, load_arrays
from src.data.image_data import ImageData, Reader, Samples, Share, Split
from src.data.views import crop_and_flip, draw_views, view_count
from src.errors import UserError


class ArrayReader(Reader):
    """Gathers whole batches."""

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor | None) -> None:
        self.images, self.labels, self.index = images, labels, index

    def __getitem__(self, share: Share) -> Samples:
        """The batch at these positions of the split."""
        index = torch.tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        pixels = self.images.permute(0, 2, 3, 1).index_select(0, rows)  # stored like this: one copy an image
        return Samples((pixels.permute(0, 3, 1, 2),), self.labels[rows], index)


class ArrayData(ImageData):
    """`prepare` makes the array file in `root` where it is missing; `path` names a ready one instead.

    `mean` and `std` of None are those of the training images. Views are crops out of `padding` black pixels a side,
    and mirrored ones where `flip` is set.
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
        """The arrays; from now on `mean` and `std` are known."""
        if self.path:
            file = Path(self.path).expanduser()
        elif self.prepare_file is None:
            raise UserError(f"data={self.name} needs data.path=FILE.npz (the format: src/data/arrays.py).")
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
        """Batches from memory, not augmented yet."""
        if split == "test":
            return ArrayReader(self.arrays.test_images, self.arrays.test_labels, index)
        return ArrayReader(self.arrays.train_images, self.arrays.train_labels, index)

    def augment(self, batch: Samples, epoch: int) -> Samples:
        """The views of an epoch."""
        (images,) = batch.images
        draw = partial(draw_views, batch.index, seed=self.seed, epoch=epoch, padding=self.padding, flip=self.flip)
        views = tuple(draw(view=view) for view in range(self.views))
        return batch._replace(images=tuple(crop_and_flip(images, view, self.padding) for view in views), views=views)

    @cached_property
    def train_duplicates(self) -> dict[str, int]:
        """How many images of `val` and `test` are training images too, pixel for pixel."""
        train = _hashes(self.arrays.train_images)
        seen = {train[row] for row in self.train_index.tolist()}
        splits = {"val": [train[row] for row in self.val_index.tolist()], "test": _hashes(self.arrays.test_images)}
        return {split: sum(image in seen for image in images) for split, images in splits.items() if images}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        _, height, width = self.arrays.train_images.shape[1:]
        return 3, height, width

    def view_count(self, epochs: int) -> int:
        """How many different views the augmentation can make of an image, in however many epochs."""
        return view_count(self.padding, self.flip)

    @property
    def views_name(self) -> str:
        """Padding and flip."""
        return f"{self.padding}-{self.flip}"


def _hashes(images: Tensor) -> list[int]:
    """64 bits of each image [3, H, W] that only the same pixels share."""
    return [hash(image.tobytes()) for image in images.permute(0, 2, 3, 1).numpy()]


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images [N, 3, H, W], as fractions of 255, to 4 digits."""
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=0).sqrt()
    if not (std > 0).all():
        raise UserError("The training images have a channel of one single value: give data.mean and data.std.")
    return [round(float(v), 4) for v in mean], [round(float(v), 4) for v in std]
