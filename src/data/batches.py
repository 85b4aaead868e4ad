"""Which images are in which batch: a pure function of (seed, epoch, batch number)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from src.data.views import LABELLED_PASS, UNLABELLED_PASS, epoch_order


class Share(NamedTuple):
    """The part of one batch that one device reads."""

    epoch: int
    positions: list[int] | Tensor
    """As in `Samples.index`. A tensor [B] int64 on the device if the images are in device memory."""


class EpochBatches(Sampler[Share]):
    """Sampler of batches of the positions 0 .. size - 1. Each device reads its share of each global batch.

    - With a `seed`, for training: the order is shuffled, as a function of (seed, epoch). The last batch is cut to a
      multiple of the number of devices. If it holds one image per device, it is part of the batch before, because batch
      norm cannot train on a single image.
    - Without a `seed`, for evaluation: the order is kept. The devices together read each position exactly once. Batches
      have nearly equal sizes, so that all devices get the same number of batches.

    `index` [size] replaces each position by another number. `blocks` [size] is the storage block of each position:
    positions of one block then stay close together (see `epoch_order`). To resume within an epoch, epoch number
    `epoch` skips its first `done` batches. With a `device`, positions are drawn and kept on it.
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
        device: torch.device | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.blocks = size, batch_size, seed, blocks
        self.index, self.device = index if index is None else index.to(device), device
        self.rank, self.world_size = rank, world_size
        self.epoch = self.resumed = epoch
        self.done = done
        self.sampler = self  # Lightning calls set_epoch of the batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Lightning calls this method before each epoch."""
        self.epoch = epoch

    @property
    def merges(self) -> bool:
        """Whether the last batch of training holds one image more for each device."""
        remainder = self.size % self.batch_size // self.world_size
        return self.seed is not None and remainder == 1 and self.size > self.batch_size > self.world_size

    def __len__(self) -> int:
        if self.seed is None:
            return -(-self.size // self.batch_size)
        return -(-(self.size - self.size % self.world_size) // self.batch_size) - self.merges

    def __iter__(self) -> Iterator[Share]:
        for batch in self._batches()[self.done if self.epoch == self.resumed else 0 :]:
            share = batch[self.rank :: self.world_size]
            if len(share):
                yield Share(self.epoch, share.tolist() if self.device is None else share.contiguous())

    def _batches(self) -> Sequence[Tensor]:
        """Return the global batches of the epoch."""
        if self.seed is None:
            order = torch.arange(self.size, device=self.device)
            return (order if self.index is None else self.index[order]).tensor_split(len(self))
        order = epoch_order(self.seed, self.epoch, self.size, self.blocks, self.device)
        order = order[: self.size - self.size % self.world_size]
        rows = order if self.index is None else self.index[order]
        return rows.tensor_split([self.batch_size * number for number in range(1, len(self))])


class MixedBatches(EpochBatches):
    """Sampler of training batches that hold images with and without labels, in the same proportion.

    A global batch has `unlabelled_per_batch` images of the positions `unlabelled`. The others are as described in
    `EpochBatches`. An epoch reads the images of one kind once, up to a rest that fills no batch. Those of the other
    kind, which are fewer in proportion, are read again in a new order whenever all have been read.
    `unlabelled_blocks` are the storage blocks of `unlabelled`.
    """

    def __init__(
        self,
        *arguments: Any,
        unlabelled: Tensor,
        unlabelled_per_batch: int,
        unlabelled_blocks: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.unlabelled, self.unlabelled_blocks = unlabelled.to(self.device), unlabelled_blocks
        self.sizes = (self.batch_size - unlabelled_per_batch, unlabelled_per_batch)

    @property
    def merges(self) -> bool:
        """Never: all batches are full."""
        return False

    def __len__(self) -> int:
        available = (self.size, len(self.unlabelled))
        fills = [count // size for count, size in zip(available, self.sizes, strict=True) if size]
        return max(fills) if min(fills) else 0

    def _batches(self) -> Sequence[Tensor]:
        assert self.index is not None
        labelled = self._read(self.index, self.blocks, self.sizes[0], LABELLED_PASS)
        unlabelled = self._read(self.unlabelled, self.unlabelled_blocks, self.sizes[1], UNLABELLED_PASS)
        return torch.cat([labelled, unlabelled], dim=1).unbind()

    def _read(self, index: Tensor, blocks: Tensor | None, size: int, stream: int) -> Tensor:
        """Draw the positions of one kind in all batches of the epoch, [batches, size], in as many passes as needed."""
        assert self.seed is not None
        wanted = len(self) * size
        passes = [
            index[epoch_order(self.seed, self.epoch, len(index), blocks, self.device, stream + number)]
            for number in range(-(-wanted // max(len(index), 1)))
        ]
        return torch.cat([index[:0], *passes])[:wanted].view(len(self), size)
