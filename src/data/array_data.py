"""Images in memory, from an array file. Whole batches are augmented on the device."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from src.common.devices import fits_in_memory
from src.common.errors import UserError, describe_error
from src.data.array_file import ImageArrays, load_arrays
from src.data.batches import Share
from src.data.image_data import ImageData, Reader, Samples
from src.data.source import Split
from src.data.view_reader import ViewReader
from src.data.views import crop_and_flip, draw_view, draw_views, view_count


class ArrayReader(Reader):
    """Gathers a batch from images [N, 3, H, W] in the memory of the host or of a device.

    `index` selects and orders the images of the split. It lies in the same memory.
    """

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor | None) -> None:
        self.images, self.labels, self.index = images, labels, index

    def __getitem__(self, share: Share) -> Samples:
        """Return the batch at these positions of the split."""
        index = torch.as_tensor(share.positions)
        rows = index if self.index is None else self.index[index]
        return Samples((_gather(self.images, rows),), self.labels[rows], index)


def _gather(images: Tensor, rows: Tensor) -> Tensor:
    """Select images [B, 3, H, W]. Their memory is NHWC: one block per image."""
    return images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


@dataclass
class ArrayViewReader(ViewReader):
    """Makes the views of images [N, 3, H, W] in the memory of the host or of a device when it reads them."""

    images: Tensor
    padding: int
    flip: bool

    def crops(self, index: Tensor, bits: Sequence[Tensor]) -> list[Tensor]:
        """Gather images and crop them, as described in `ViewReader`."""
        images = _gather(self.images, index)
        if not self.augmentation.crop_and_flip:
            return [images] * len(bits)
        views = view_count(self.padding, self.flip)
        return [crop_and_flip(images, each % views, self.padding) for each in bits]


class ArrayData(ImageData):
    """Images from an array file: the file `path`, or the file in `root`, which `prepare` makes if it is missing.

    If `mean` or `std` is None, it is measured on the training images. A view is a random crop of the image with
    `padding` black pixels on each side. With `flip`, half of the views are mirrored. Views that are only cropped and
    flipped are made on the training device. Other views are made when the images are read, and a policy needs the CPU.

    With `device_memory`, the images lie in the memory of the training device, so that no batch has to be copied there.
    "auto" means on a GPU on which they take at most a third of the free memory. The views are the same in any case.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[Path], Path | str] | None,
        root: str,
        path: str | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        padding: int,
        flip: bool,
        device_memory: bool | Literal["auto"] = "auto",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.device_memory = device_memory
        self.device_arrays: dict[torch.device, Mapping[str, Tensor]] = {}
        self.prepare_file, self.root, self.path = prepare, root, path
        self.given_mean, self.given_std = mean, std
        self.padding, self.flip = padding, flip

    def read(self) -> ImageArrays:
        """Read the arrays, and set `mean` and `std`. Raises `UserError` if there is no valid array file."""
        file = Path(self.path or self._prepared_file()).expanduser()
        if self.unlabelled_folder is not None:
            raise UserError(
                f"data.unlabelled={self.unlabelled} is not possible for an array file: put the images into its array "
                "unlabelled_images, or choose data.unlabelled=rest."
            )
        self.arrays = load_arrays(file)
        self.mean, self.std = self._normalisation()
        return self.arrays

    def _prepared_file(self) -> Path | str:
        """Return the file that `prepare` makes. Raises `UserError` if it fails, or if it returns something else."""
        if self.prepare_file is None:
            raise UserError(f"data={self.name} needs data.path=FILE.npz (see docs/data.md for the format).")
        try:
            file: object = self.prepare_file(Path(self.root).expanduser())
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"data.prepare of data={self.name} fails ({describe_error(error)}): correct it, or set data.path to an "
                "array file."
            ) from error
        if not isinstance(file, (Path, str)):
            returned = "None" if file is None else f"a {type(file).__name__}"
            raise UserError(f"data.prepare of data={self.name} returned {returned}: return the path of the array file.")
        return file

    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.given_mean is not None and self.given_std is not None:
            return self.given_mean, self.given_std
        mean, std = channel_statistics(self.arrays.train_images)
        return self.given_mean or mean, self.given_std or std

    def load(self) -> None:
        """Read the labels and draw the splits.

        Raises `UserError` if a policy excludes `device_memory`, or if `ImageData.load` raises it.
        """
        if self.augmentation.policy is not None and self.device_memory is True:
            raise UserError(
                "data.device_memory=true does not fit this augmentation, because its random operations run on the CPU: "
                "leave data.device_memory at auto."
            )
        super().load()

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """Return a reader of a split. It augments training images if this cannot wait for `augment`."""
        labels = self.train_labels if split == "train" else self.arrays.labels(split)
        return self._reader(split, self.arrays.images(split), labels, index)

    def _reader(self, split: Split, images: Tensor, labels: Tensor, index: Tensor | None) -> Reader:
        if split != "train" or self.augmentation.is_geometric:
            return ArrayReader(images, labels, index)
        return ArrayViewReader(
            **self.view_options(images.device),
            labels=labels,
            images=images,
            padding=self.padding,
            flip=self.flip,
        )

    def lies_on(self, device: torch.device) -> bool:
        """Return whether training on this device reads the images from its memory."""
        if self.augmentation.policy is not None:
            return False
        if self.device_memory != "auto":
            return self.device_memory
        size = sum(array.nbytes for array in self._host_arrays().values())
        return device in self.device_arrays or fits_in_memory(size, device)

    def device_reader(self, split: Split, index: Tensor | None, device: torch.device) -> Reader:
        """Return a reader of the images in the memory of a device. They are copied there once."""
        if device not in self.device_arrays:
            self.device_arrays[device] = {name: array.to(device) for name, array in self._host_arrays().items()}
        arrays = self.device_arrays[device]
        images = arrays["train_images" if split == "held_out" else f"{split}_images"]
        return self._reader(split, images, arrays[f"{split}_labels"], index if index is None else index.to(device))

    def _host_arrays(self) -> dict[str, Tensor]:
        images = {f"{split}_images": self.arrays.images(split) for split in self.arrays.splits}
        labels = {f"{split}_labels": self.arrays.labels(split) for split in self.arrays.splits}
        return images | labels | {"train_labels": self.train_labels, "held_out_labels": self.arrays.labels("train")}

    def view_records(self, epochs: int) -> Tensor:
        """List the records of the view store that a training of this many epochs reads, [R] int64, each once."""
        images = len(self.arrays.train_labels)
        is_read = torch.zeros(images * self.view_count(epochs), dtype=torch.bool)
        for epoch, view in itertools.product(range(epochs), range(self.views_per_image)):
            is_read[self.draw(self.trained_index, epoch, view) * images + self.trained_index] = True
        return is_read.nonzero()[:, 0]

    def draw(self, index: Tensor, epoch: int, view: int) -> Tensor:
        """Draw the view numbers [B] int64 of the training images at the positions `index` [B]."""
        keys: dict[str, Any] = {
            "seed": self.seed,
            "epoch": epoch,
            "view": view,
            "views_per_image": self.views_per_image,
            "fixed_views": self.fixed_views,
        }
        if not self.augmentation.is_geometric:
            return draw_view(index, **keys).number
        if self.augmentation.is_constant:
            return torch.zeros_like(index)
        return draw_views(index, padding=self.padding, flip=self.flip, **keys)

    def augment(self, batch: Samples, epoch: int) -> Samples:
        """Replace the images by their views in `epoch`, unless the reader has done so."""
        if batch.view_numbers:
            return batch
        (images,) = batch.images
        numbers = tuple(self.draw(batch.index, epoch, view) for view in range(self.views_per_image))
        is_cropped = self.augmentation.crop_and_flip
        views = tuple(crop_and_flip(images, each, self.padding) if is_cropped else images for each in numbers)
        return batch._replace(images=views, view_numbers=numbers)

    @cached_property
    def train_duplicates(self) -> dict[str, int]:
        """The number of images in `val` and `test` that are also training images, pixel for pixel."""
        train = _hashes(self.arrays.train_images)
        seen = {train[row] for row in self.trained_index.tolist()}
        own = self.arrays.val_images
        val = [train[row] for row in self.val_index.tolist()] if own is None else _hashes(own)
        splits = {"val": val, "test": _hashes(self.arrays.test_images)}
        return {split: sum(image in seen for image in images) for split, images in splits.items() if images}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of an image."""
        _, height, width = self.arrays.train_images.shape[1:]
        return 3, height, width

    def view_count(self, epochs: int) -> int:
        """Return how many view numbers an image has. For crops and flips, the number of epochs does not matter."""
        if self.augmentation.is_geometric and not self.augmentation.is_constant:
            return view_count(self.padding, self.flip)
        return super().view_count(epochs)

    @property
    def views_name(self) -> str:
        """Padding, flip and augmentation, as part of a file name."""
        crops = f"{self.padding}-{self.flip}{self.augmentation_key}"
        return crops if self.augmentation.is_geometric else self.drawn_name(crops)


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
