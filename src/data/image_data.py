"""The data module: splits, batches and devices."""

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.common.errors import UserError
from src.data.augmentation import Augmentation
from src.data.batches import EpochBatches, MixedBatches, Share
from src.data.source import Source, Split, distinct_names
from src.data.views import SPLIT_STREAM, WRONG_LABELS, random_bits, uniform

STANDARD = Augmentation()
PURPOSES = {"train": "training", "unlabelled": "unlabelled training", "val": "validation", "test": "test"}
"""Descriptions of the use of each split."""


class Samples(NamedTuple):
    """A batch of images and labels. Teacher and student normalise the images themselves."""

    images: tuple[Tensor, ...]
    """One tensor uint8 [B, 3, H, W] per view."""
    target: Tensor
    """[B] int64, the class numbers, or -1 for images without a label."""
    index: Tensor  # type: ignore[assignment]
    """[B] int64, the positions in the whole training data, or in the split under evaluation."""
    view_numbers: tuple[Tensor, ...] = ()
    """The view numbers of the images: one tensor int64 [B] per view. Empty in evaluation."""
    other_target: Tensor | None = None
    """[B] int64, the classes of the images that the first view is mixed with. None: it is not mixed."""
    share: Tensor | None = None
    """[B] float32, the share of `target` in the label of the first view. The rest belongs to `other_target`."""


class Reader(Dataset[Samples]):
    """Reads one split: the item of a `Share` is its `Samples`."""

    def __getitem__(self, share: Share) -> Samples:
        raise NotImplementedError

    def __getitems__(self, share: Share) -> Samples:
        """Read a share. A DataLoader calls this method with each item of its batch sampler."""
        return self[share]


class ImageData(L.LightningDataModule):
    """A data module for images: splits, and batches for each device. Subclasses read and augment the images.

    `val_size` training images are held out, unless the data has a validation split of its own. Training then uses
    `train_size` of the rest, or all of them if it is None. Both draws are stratified by class and depend on
    `split_seed` only. `batch_size` is the global batch size, over all devices. `mean` and `std` are the student's
    normalisation. The method requests `views` views of each image.
    """

    mean: Sequence[float]
    std: Sequence[float]
    evaluation_batch_size = 500
    blocks: Tensor | None = None
    """The storage block of each training image, [N] int64, if images of one block should be read together."""

    def __init__(
        self,
        *,
        name: str,
        train_size: float | None,
        val_size: float,
        split_seed: int,
        workers: int,
        batch_size: int,
        seed: int,
        views_per_image: int = 1,
        fixed_views: int | None = None,
        wrong_labels: float = 0.0,
        unlabelled: str | None = None,
        unlabelled_share: float | None = None,
        reads_unlabelled: bool = True,
        augmentation: Augmentation = STANDARD,
    ) -> None:
        super().__init__()
        self.name = name
        self.train_size, self.val_size, self.split_seed = train_size, val_size, split_seed
        self.workers, self.batch_size, self.seed = workers, batch_size, seed
        self.first_batch = (0, 0)
        """Epoch and batch number at which training starts."""
        self.views_per_image = views_per_image
        self.fixed_views, self.wrong_labels = fixed_views, wrong_labels
        self.unlabelled, self.unlabelled_share, self.reads_unlabelled = unlabelled, unlabelled_share, reads_unlabelled
        self.augmentation = augmentation

    def read(self) -> Source:
        """Read labels and classes, and prepare for `reader`.

        Raises `UserError` if the data is missing or invalid.
        """
        raise NotImplementedError

    def reader(self, split: Split, index: Tensor | None = None) -> Reader:
        """Return a reader of a split. `index` selects and orders its images.

        A reader of `train` may augment images itself, or leave this to `augment`.
        """
        raise NotImplementedError

    def augment(self, batch: Samples, epoch: int) -> Samples:
        """Replace the images of a training batch by their views in `epoch`. This runs on the device."""
        return batch

    def lies_on(self, device: torch.device) -> bool:
        """Return whether training on this device reads the images from its memory. If so, define the next two."""
        return False

    def device_reader(self, split: Split, index: Tensor | None, device: torch.device) -> Reader:
        """Return a reader of images in the memory of a device."""
        raise NotImplementedError

    def view_records(self, epochs: int) -> Tensor:
        """List the records of the view store that a training of this many epochs reads, [R] int64, each once."""
        raise NotImplementedError

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of a view."""
        raise NotImplementedError

    def view_count(self, epochs: int) -> int:
        """Return how many view numbers an image can have in a training of this many epochs."""
        return 1 if self.augmentation.is_constant else self.fixed_views or epochs * self.views_per_image

    @property
    def views_name(self) -> str:
        """The settings that determine a view from its number, as part of a file name."""
        raise NotImplementedError

    @property
    def unlabelled_folder(self) -> Path | None:
        """The folder of the photos without labels, if there is one."""
        return None if self.unlabelled in (None, "rest") else Path(str(self.unlabelled)).expanduser()

    def view_options(self, device: torch.device | None = None) -> dict[str, Any]:
        """Collect the options of a `ViewReader` that do not depend on the kind of images."""
        return {
            "augmentation": self.augmentation,
            "partners": self.train_index.to(device),
            "unlabelled_partners": self.unlabelled_index.to(device),
            "views_per_image": self.views_per_image,
            "seed": self.seed,
            "fixed_views": self.fixed_views,
        }

    def drawn_name(self, crops: str) -> str:
        """Complete `views_name` for views that `draw_view` draws. Fixed views are the same for all seeds."""
        return f"{crops}-fixed" if self.fixed_views is not None else f"{crops}-{self.views_per_image}-seed{self.seed}"

    @property
    def augmentation_key(self) -> str:
        """The part of `views_name` that stands for the augmentation. Empty for crops and flips only."""
        if self.augmentation.mixing is None:
            return self.augmentation.key
        pools = [self.train_index, self.unlabelled_index, *([] if self.blocks is None else [self.blocks])]
        partners = hashlib.sha256(b"|".join(pool.numpy().tobytes() for pool in pools)).hexdigest()[:8]
        return f"{self.augmentation.key}-{partners}"

    def load(self) -> None:
        """Read the labels and draw the splits. Raises `UserError` if the data is invalid or a size does not fit it."""
        self.source = self.read()
        labels = self.source.train_labels
        if self.num_classes < 2:
            (name,) = self.class_names
            raise UserError(f"The data has one class only ({name}): add images of another class.")
        if self.has_val_split and self.val_size:
            where = self.source.places.get("val", "the data")
            raise UserError(
                f"data.val_size={self.val_size} holds training images out, but {where} has validation images already: "
                f"set data.val_size=0 to use them{self.how_to_ignore_val}."
            )
        candidates = (labels >= 0).nonzero()[:, 0]
        val_size = count_of(self.val_size, len(candidates))
        self.val_index = stratified(labels, candidates, val_size, self.split_seed, "data.val_size")
        kept = labels >= 0
        kept[self.val_index] = False
        rest = kept.nonzero()[:, 0]
        size = len(rest) if self.train_size is None else count_of(self.train_size, len(rest))
        self.train_index = stratified(labels, rest, size, self.split_seed, "data.train_size")
        self.train_labels = with_wrong_labels(labels, self.num_classes, self.wrong_labels, self.split_seed).clone()
        self.available_unlabelled = self._find_unlabelled(rest)
        is_read = self.reads_unlabelled and self.unlabelled_share != 0
        self.unlabelled_index = self.available_unlabelled if is_read else self.available_unlabelled[:0]
        self.train_labels[self.unlabelled_index] = -1
        if not len(self.train_index) + len(self.unlabelled_index):
            raise UserError("No training images are left: lower data.val_size or raise data.train_size.")

    def _find_unlabelled(self, rest: Tensor) -> Tensor:
        """Return the positions of the training images without labels. `rest` are the images that are not held out."""
        labels = self.source.train_labels
        is_unlabelled = labels < 0
        if self.unlabelled == "rest":
            is_unlabelled[rest] = True
            is_unlabelled[self.train_index] = False
            if len(rest) == len(self.train_index):
                raise UserError(
                    "data.unlabelled=rest uses the training images that data.train_size leaves out, but there are "
                    "none: set data.train_size."
                )
        elif self.unlabelled_share and not is_unlabelled.any():
            raise UserError(
                f"data.unlabelled_share={self.unlabelled_share} has no images without labels: set data.unlabelled to a "
                "folder of photos, or to rest."
            )
        return is_unlabelled.nonzero()[:, 0]

    @property
    def unlabelled_per_batch(self) -> int:
        """The number of images without a label in each global batch."""
        labelled, unlabelled = len(self.train_index), len(self.unlabelled_index)
        if not labelled or not unlabelled:
            return self.batch_size if unlabelled else 0
        share = unlabelled / (labelled + unlabelled) if self.unlabelled_share is None else self.unlabelled_share
        return min(max(round(share * self.batch_size), 1), self.batch_size - 1)

    @property
    def labelled_share(self) -> float:
        """The share of each batch that has labels."""
        return 1 - self.unlabelled_per_batch / self.batch_size

    @property
    def trained_index(self) -> Tensor:
        """The positions of all images that are trained on, with and without labels, [N] int64."""
        return torch.cat([self.train_index, self.unlabelled_index])

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, in the order of the class numbers."""
        return self.source.class_names

    @property
    def trained_labels(self) -> Tensor:
        """The class of each image in the whole training data, [N] int64. It is -1 for images not used in training."""
        labels = torch.full_like(self.train_labels, -1)
        labels[self.train_index] = self.train_labels[self.train_index]
        return labels

    @property
    def superclasses(self) -> list[str] | None:
        """The name of each class's superclass, or None if the data has no superclasses.

        Superclasses of the same name are told apart by their numbers.
        """
        names, of = self.source.superclass_names, self.source.superclass_of
        if not names or not of:
            return None
        distinct = distinct_names(names)
        return [distinct[superclass] for superclass in of]

    how_to_ignore_val = ""
    """The end of a sentence: how the data's own validation split can be left unread."""

    @property
    def has_val_split(self) -> bool:
        """Whether the data has a validation split of its own."""
        return self.source.val_labels is not None

    @property
    def labelled_digest(self) -> str:
        """Hash of the content without the images that have no label, which the training of a teacher leaves out."""
        return self.source.labelled_digest or self.source.digest

    @property
    def validates_on(self) -> Literal["val", "test"]:
        """The split that is evaluated after each epoch: the test set if there are no validation images."""
        return "val" if self.split_size("val") else "test"

    @property
    def val_digest(self) -> str:
        """Hash of the held-out positions, or of the labels of the data's own validation split, 8 hexadecimal digits."""
        decides = self.val_index if self.source.val_labels is None else self.source.val_labels
        return hashlib.sha256(decides.numpy().tobytes()).hexdigest()[:8]

    @property
    def train_duplicates(self) -> dict[str, int] | None:
        """The number of `val` and `test` images that are also training images, pixel for pixel. None if unknown."""
        return None

    def split_size(self, split: str) -> int:
        """Return the number of images in `val` or `test`."""
        if split == "val":
            return len(self.val_index if self.source.val_labels is None else self.source.val_labels)
        return len(self.source.test_labels)

    def notes(self, world_size: int = 1) -> list[str]:
        """Return sentences for the log: what is used for what, and what has been converted, left out or left unread.

        Raises `UserError` if the images are too few to train on with this number of devices.
        """
        rest = {"unlabelled": "with the labels of the rest unread"} if self.unlabelled == "rest" else {}
        validation, places = self.split_size("val"), {"val": "held out of them", **self.source.places, **rest}
        sizes = {
            "train": len(self.train_index),
            "unlabelled": len(self.unlabelled_index),
            "val": validation,
            "test": self.split_size("test"),
        }
        named = {split: f" ({places[split]})" if split in places else "" for split in sizes}
        used = [f"{size:,} {PURPOSES[split]} images{named[split]}" for split, size in sizes.items() if size]
        role = "scored once, at the end" if validation else "the validation images, too"
        notes = [f"Data: {', '.join(used)}. The test images are {role}.", *self.source.notes]
        if self.wrong_labels:
            wrong = int((self.train_labels != self.source.train_labels)[self.train_index].sum())
            notes.append(f"{wrong:,} training images have a wrong label, because of data.wrong_labels.")
        notes += self._unlabelled_notes()
        if self._training_batches(0, world_size).merges:
            last = self.batch_size + world_size
            notes.append(f"The last batch has {last} images, because batch norm cannot train on a rest of one image.")
        return notes

    def _unlabelled_notes(self) -> list[str]:
        """Say how images without labels are used."""
        unread = len(self.available_unlabelled) - len(self.unlabelled_index)
        if unread:
            why = "the method distils nothing" if not self.reads_unlabelled else "data.unlabelled_share is 0"
            return [f"{unread:,} training images without labels are left unread, because {why}."]
        without = self.unlabelled_per_batch
        if not without:
            return []
        if not len(self.train_index):
            return ["No training image has a label, so cross-entropy trains nothing."]
        kinds = f"{self.batch_size - without} images with and {without} without labels"
        return [f"Each of the {self.count_training_batches():,} batches of an epoch has {kinds}."]

    def setup(self, stage: str) -> None:
        """Start training at the first batch. A checkpoint that is restored later overrides this."""
        self.first_batch = (0, 0)

    def state_dict(self) -> dict[str, int]:
        """Return epoch and number of the next training batch, for a checkpoint."""
        assert self.trainer is not None
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"epoch": epochs.processed, "batch": batches.processed if epochs.ready > epochs.processed else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start training at the batch of a checkpoint.

        The sampler needs the place now: the loader fetches the first batches before Lightning calls `set_epoch`.
        """
        self.first_batch = (state_dict["epoch"], state_dict["batch"])

    def train_dataloader(self) -> DataLoader[Samples]:
        """Return a loader of this device's share of the shuffled training batches.

        Raises `UserError` if the batch size is not divisible by the number of devices, or if there are too few images.
        """
        return self._loader("train", None, self._training_batches(*self._rank_and_world_size()))

    def count_training_batches(self, world_size: int = 1) -> int:
        """Count the batches of an epoch. Raises `UserError` as `train_dataloader` does."""
        return len(self._training_batches(0, world_size))

    def _training_batches(self, rank: int, world_size: int) -> EpochBatches:
        if self.batch_size % world_size:
            raise UserError(
                f"schedule.batch_size={self.batch_size} is the global batch size, which is not divisible by "
                f"{world_size} devices: choose a multiple of {world_size}."
            )
        if len(self.unlabelled_index):
            return self._mixed_batches(rank, world_size)
        needed = min(self.batch_size, 2 * world_size)
        if len(self.train_index) < needed:
            raise UserError(
                f"There are too few training images ({len(self.train_index)}), because batch norm needs two on each "
                f"device: use at least {needed}, with more images or a higher data.train_size."
            )
        return EpochBatches(len(self.train_index), self.batch_size, **self._order(rank, world_size))

    def _mixed_batches(self, rank: int, world_size: int) -> MixedBatches:
        """Make the sampler of batches with images of both kinds. Raises `UserError` if one kind fills no batch."""
        without = self.unlabelled_per_batch
        if self.batch_size == 1 and len(self.train_index):
            raise UserError(
                "schedule.batch_size=1 does not fit images with and without labels, because each batch holds both: "
                "choose 2 or more."
            )
        batches = MixedBatches(
            len(self.train_index),
            self.batch_size,
            unlabelled=self.unlabelled_index,
            unlabelled_per_batch=without,
            unlabelled_blocks=None if self.blocks is None else self.blocks[self.unlabelled_index],
            **self._order(rank, world_size),
        )
        if not len(batches):
            raise UserError(
                f"A batch needs {self.batch_size - without} training images with and {without} without labels, but "
                f"there are {len(self.train_index)} and {len(self.unlabelled_index)}: lower schedule.batch_size or "
                "change data.unlabelled_share."
            )
        return batches

    def _order(self, rank: int, world_size: int) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "index": self.train_index,
            "blocks": None if self.blocks is None else self.blocks[self.train_index],
            "rank": rank,
            "world_size": world_size,
            "epoch": self.first_batch[0],
            "done": self.first_batch[1],
            "device": self._storage(),
        }

    def val_dataloader(self) -> DataLoader[Samples]:
        """Return a loader of the split `validates_on`."""
        return self.evaluation_loader(self.validates_on, *self._rank_and_world_size(), self._storage())

    def test_dataloader(self) -> DataLoader[Samples]:
        """Return a loader of the test set."""
        return self.evaluation_loader("test", *self._rank_and_world_size(), self._storage())

    def evaluation_loader(
        self, split: str, rank: int = 0, world_size: int = 1, device: torch.device | None = None
    ) -> DataLoader[Samples]:
        """Return a loader of `val` or `test`, in order. The devices together read each image exactly once.

        With a `device`, the batches come from its memory.
        """
        batches = EpochBatches(
            self.split_size(split),
            self.evaluation_batch_size,
            seed=None,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        if split == "val" and not self.has_val_split:
            return self._loader("held_out", self.val_index, batches)
        return self._loader("val" if split == "val" else "test", None, batches)

    def test_images(self, positions: list[int]) -> Tensor:
        """Read the test images at `positions`: uint8 [N, 3, H, W]."""
        return self.reader("test")[Share(0, positions)].images[0]

    def on_after_batch_transfer(self, batch: Samples, dataloader_idx: int) -> Samples:
        """Augment a training batch on the device. Lightning calls this method."""
        assert self.trainer is not None
        return self.augment(batch, self.trainer.current_epoch) if self.trainer.training else batch

    def _loader(self, split: Split, index: Tensor | None, batches: EpochBatches) -> DataLoader[Samples]:
        device = batches.device
        workers = self.workers if device is None else 0  # other processes do not see this process's device memory
        return DataLoader(
            self.reader(split, index) if device is None else self.device_reader(split, index, device),
            batch_sampler=batches,  # type: ignore[arg-type]  # a batch is a Share
            collate_fn=_identity,
            num_workers=workers,
            # joblib changes the default of its processes, and workers that are started by its method fail.
            multiprocessing_context=multiprocessing.get_all_start_methods()[0] if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and device is None,
            worker_init_fn=_ignore_signals,
        )

    def _storage(self) -> torch.device | None:
        """Return the device whose memory holds the images of the trainer's loaders. None: the host's memory."""
        device = self.trainer.strategy.root_device if self.trainer else None
        return device if device is not None and self.lies_on(device) else None

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ignore all signals in a loader worker that ask a command to end (`src/runs/signals.py`).

    A cluster, Ctrl-C and a closed terminal send these signals to all processes of a job. The training process still
    needs its next batch. Then it stops and ends its workers.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows lacks some of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kill the loader workers that are still alive when this process exits.

    A worker stays alive if something still refers to its loader, such as a notebook or the traceback of an exception.
    It ignores SIGTERM, so multiprocessing would wait for it forever.
    """
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed workers as failed
    for worker in workers:
        worker.kill()


def with_wrong_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Replace the labels [N] of a random `share` of all images by another class, with equal probabilities.

    Images without a label (-1) stay without. The images of a smaller share are among those of a larger share with the
    same seed, and have the same labels.

    >>> with_wrong_labels(torch.zeros(1000, dtype=torch.int64), 3, 0.3, seed=0).bincount().tolist()
    [703, 130, 167]
    """
    if share == 0:
        return labels
    bits = random_bits(seed, 0, torch.arange(len(labels)), WRONG_LABELS)
    other = (labels + 1 + (uniform(bits, 1) * (num_classes - 1)).long()) % num_classes
    return torch.where((uniform(bits, 0) < share) & (labels >= 0), other, labels)


def count_of(size: float, images: int) -> int:
    """Return a size in images: an integer is one already, and a fraction is a share of `images`.

    >>> count_of(0.1, 45), count_of(45, 45)
    (4, 45)
    """
    return round(size * images) if isinstance(size, float) else size


def stratified(labels: Tensor, candidates: Tensor, size: int, seed: int, option: str) -> Tensor:
    """Draw `size` of the candidate positions, sorted. Classes keep the candidates' proportions, up to rounding.

    A smaller draw is part of a larger draw with the same seed. `labels` [N] are the labels of all positions.

    Raises `UserError`, naming `option`, if `size` exceeds the candidates or is less than one image per class.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> drawn = stratified(labels, torch.arange(6), 3, seed=0, option="data.val_size")
    >>> labels[drawn].tolist()
    [0, 0, 1]
    """
    classes = labels[candidates].unique()
    if not 0 <= size <= len(candidates) or 0 < size < len(classes):
        raise UserError(
            f"{option}={size} does not fit: choose a number from {len(classes)} (one image per class) to "
            f"{len(candidates)} (all images)."
        )
    shuffled = candidates[torch.argsort(random_bits(seed, 0, candidates, SPLIT_STREAM))]
    rank_in_class = torch.empty(len(shuffled), dtype=torch.float64)
    for label in classes:
        places = (labels[shuffled] == label).nonzero()[:, 0]
        rank_in_class[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return shuffled[torch.argsort(rank_in_class, stable=True)[:size]].sort().values
