"""The DataModule: batches that are a function of (seed, epoch, batch), whatever images are read from."""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.source import Source
from src.data.views import epoch_order, random_bits
from src.errors import UserError

SPLIT_STREAM = 1 << 20
Split = Literal["train", "val", "test"]


class Samples(NamedTuple):
    """A batch on its way to the networks; the networks normalise, each in its own way."""

    images: tuple[Tensor, ...]
    """A uint8 [B, 3, H, W] for each view."""
    target: Tensor
    """[B] int64"""
    index: Tensor  # type: ignore[assignment]
    """[B] int64: the position in the training arrays, or in the split that is evaluated."""
    views: tuple[Tensor, ...] = ()
    """The number [B] int64 of each image's view, for each view; empty in evaluation."""


class Share(NamedTuple):
    """What one device reads for one batch."""

    epoch: int
    positions: list[int]


class Reader(Dataset[Samples]):
    """Reads the `Samples` of a `Share` of one split."""

    def __getitem__(self, share: Share) -> Samples:
        raise NotImplementedError

    def __getitems__(self, share: Share) -> Samples:
        """What a DataLoader calls with each item of its batch sampler."""
        return self[share]


class EpochBatches(Sampler[Share]):
    """Batches of positions 0 .. size - 1 as a function of (seed, epoch): every device takes its share of each global
    batch.

    Shuffled (training): the last batch keeps a multiple of the number of devices. In order (evaluation): every
    position once over all devices, in batches of nearly one size, so that every device has equally many.
    `blocks` [size]: where each position is stored, for an order that keeps what is stored together. The epoch `epoch`,
    which is resumed, goes on with its batch number `done`; all others have all their batches.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int | None,
        index: Tensor | None = None,
        blocks: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        done: int = 0,
    ) -> None:
        self.size, self.batch_size, self.seed, self.index, self.blocks = size, batch_size, seed, index, blocks
        self.rank, self.world_size = rank, world_size
        self.epoch = self.resumed = epoch
        self.done = done
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        kept = self.size - self.size % self.world_size if self.seed is not None else self.size
        return -(-kept // self.batch_size)

    def __iter__(self) -> Iterator[Share]:
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            order = epoch_order(self.seed, self.epoch, self.size, self.blocks)
        rows = order if self.index is None else self.index[order]
        batches = rows.split(self.batch_size) if self.seed is not None else rows.tensor_split(len(self))
        for batch in batches[self.done if self.epoch == self.resumed else 0 :]:
            if self.seed is not None:
                batch = batch[: len(batch) - len(batch) % self.world_size]
            if share := batch[self.rank :: self.world_size].tolist():
                yield Share(self.epoch, share)


class ImageData(L.LightningDataModule):
    """Any image data: how it is split, dealt to devices and seen; a subclass says what is read and augmented, and how.

    `train_size` keeps a stratified part of the training images, `val_size` holds some out, both drawn by `split_seed`.
    `batch_size` is global. `mean` and `std` are the student's normalisation.
    """

    mean: Sequence[float]
    std: Sequence[float]
    evaluation_batch_size = 500
    blocks: Tensor | None = None
    """Where each training image is stored, [N] int64, if images that are stored together should be read together."""

    def __init__(
        self,
        *,
        name: str,
        train_size: int | None,
        val_size: int,
        split_seed: int,
        workers: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.train_size, self.val_size, self.split_seed = train_size, val_size, split_seed
        self.workers, self.batch_size, self.seed = workers, batch_size, seed
        self.next_batch = (0, 0)
        """Epoch and batch that training starts with."""
        self.views = 1
        """How many views of each image the method asks for."""

    def read(self) -> Source:
        """Labels and classes, and whatever `reader` needs. Raises `UserError` where there is no such data."""
        raise NotImplementedError

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """For the split `train` or `test`, or `val`: the part of the training split at `index`.

        For training it may make the views already, or leave that to `augment`.
        """
        raise NotImplementedError

    def augment(self, batch: Samples, epoch: int) -> Samples:
        """On the device: the views of an epoch."""
        return batch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of a view."""
        raise NotImplementedError

    def view_count(self, epochs: int) -> int:
        """How many numbers the views of an image can have in so many epochs."""
        return epochs * self.views

    @property
    def views_name(self) -> str:
        """Tells views of the same number from others in a file name."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the labels and draw the splits. Raises `UserError` where the data or a size does not serve."""
        self.source = self.read()
        labels = self.source.train_labels
        self.val_index = stratified(labels, torch.arange(len(labels)), self.val_size, self.split_seed, "data.val_size")
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[self.val_index] = False
        rest = kept.nonzero()[:, 0]
        size = len(rest) if self.train_size is None else self.train_size
        self.train_index = stratified(labels, rest, size, self.split_seed, "data.train_size")
        if not len(self.train_index):
            raise UserError("No training images are left: lower data.val_size or raise data.train_size.")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class."""
        return self.source.class_names

    @property
    def trained_labels(self) -> Tensor:
        """The class of each image of the training data [N] int64, -1 of those that take no part in training."""
        labels = torch.full_like(self.source.train_labels, -1)
        labels[self.train_index] = self.source.train_labels[self.train_index]
        return labels

    @property
    def superclasses(self) -> list[str] | None:
        """The name of each class's superclass, where the data has such."""
        names, of = self.source.superclass_names, self.source.superclass_of
        return [names[superclass] for superclass in of] if names and of else None

    @property
    def validates_on(self) -> Literal["val", "test"]:
        """The split that is scored every epoch: the test set only where no training images are held out."""
        return "val" if self.val_size else "test"

    @property
    def val_digest(self) -> str:
        """Which training images are held out."""
        return hashlib.sha256(self.val_index.numpy().tobytes()).hexdigest()[:8]

    @property
    def train_duplicates(self) -> dict[str, int] | None:
        """How many images of `val` and `test` are training images too, pixel for pixel; None where it is not known."""
        return None

    def split_size(self, split: str) -> int:
        """Number of images in `val` or `test`."""
        return len(self.val_index if split == "val" else self.source.test_labels)

    def setup(self, stage: str) -> None:
        """Training starts at its first batch, unless a checkpoint is restored after this."""
        self.next_batch = (0, 0)

    def state_dict(self) -> dict[str, int]:
        """Which batch of which epoch is the next."""
        assert self.trainer is not None
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"epoch": epochs.processed, "batch": batches.processed if epochs.ready > epochs.processed else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there: the first batches are fetched before Lightning tells the epoch."""
        self.next_batch = (state_dict["epoch"], state_dict["batch"])

    def train_dataloader(self) -> DataLoader[Samples]:
        """Shuffled batches of this device's share."""
        rank, world_size = self._place()
        if self.batch_size % world_size:
            raise UserError(
                f"schedule.batch_size={self.batch_size} is global and does not divide by {world_size} devices."
            )
        batches = EpochBatches(
            len(self.train_index),
            self.batch_size,
            seed=self.seed,
            index=self.train_index,
            blocks=None if self.blocks is None else self.blocks[self.train_index],
            rank=rank,
            world_size=world_size,
            epoch=self.next_batch[0],
            done=self.next_batch[1],
        )
        return self._loader(self.reader("train"), batches)

    def val_dataloader(self) -> DataLoader[Samples]:
        """The split that `validates_on` names."""
        return self.evaluation_loader(self.validates_on, *self._place())

    def test_dataloader(self) -> DataLoader[Samples]:
        """The test set."""
        return self.evaluation_loader("test", *self._place())

    def evaluation_loader(self, split: str, rank: int = 0, world_size: int = 1) -> DataLoader[Samples]:
        """`val` or `test` in order, every image once over all devices."""
        reader = self.reader("val", self.val_index) if split == "val" else self.reader("test")
        batches = EpochBatches(
            self.split_size(split), self.evaluation_batch_size, seed=None, rank=rank, world_size=world_size
        )
        return self._loader(reader, batches)

    def test_images(self, positions: list[int]) -> Tensor:
        """Some test images, uint8 [N, 3, H, W]."""
        return self.reader("test")[Share(0, positions)].images[0]

    def on_after_batch_transfer(self, batch: Samples, dataloader_idx: int) -> Samples:
        """On the device: training images become views, evaluation images stay."""
        assert self.trainer is not None
        return self.augment(batch, self.trainer.current_epoch) if self.trainer.training else batch

    def _loader(self, reader: Reader, batches: EpochBatches) -> DataLoader[Samples]:
        return DataLoader(
            reader,
            batch_sampler=batches,  # type: ignore[arg-type]  # a batch is a Share
            collate_fn=_as_it_is,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_run,
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(worker: int) -> None:
    """A cluster and Ctrl-C ask all processes of a job to end; the run still wants its next batch."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def stratified(labels: Tensor, candidates: Tensor, size: int, seed: int, option: str) -> Tensor:
    """`size` of the candidate positions, sorted, with the classes in the proportions of the candidates (to the
    nearest).

    Raises `UserError` in the name of `option` where there are not so many, or fewer than one a class.
    """
    classes = labels[candidates].unique()
    if not 0 <= size <= len(candidates) or 0 < size < len(classes):
        raise UserError(f"{option}={size} does not fit: there are {len(candidates)} images of {len(classes)} classes.")
    shuffled = candidates[torch.argsort(random_bits(seed, 0, candidates, SPLIT_STREAM))]
    rank_in_class = torch.empty(len(shuffled), dtype=torch.float64)
    for label in classes:
        places = (labels[shuffled] == label).nonzero()[:, 0]
        rank_in_class[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return shuffled[torch.argsort(rank_in_class, stable=True)[:size]].sort().values
