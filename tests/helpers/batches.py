"""Read all batches of an epoch, by several ranks or by a trainer, and compare them."""

import traceback
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.data.array_data import ArrayData
from src.data.batches import EpochBatches
from src.data.image_data import Samples


def batches(loader: Any, epoch: int = 0) -> list[Samples]:
    """Read all batches of an epoch."""
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def message_of_unreadable(loader: Any) -> str:
    """Read batches until a `UserError`, and return its message."""
    try:
        list(loader)
    except UserError as error:
        # A loader in a reference cycle ends when garbage is collected, and then waits 10 s for each of its workers.
        traceback.clear_frames(error.__traceback__)
        return str(error)
    pytest.fail("All batches were read.")


def as_rank(data: ArrayData, rank: int, world_size: int) -> ArrayData:
    """Attach a mock of the trainer of one rank to a data module."""
    trainer = Mock(global_rank=rank, world_size=world_size)
    trainer.fit_loop.epoch_progress.current.processed = 0
    data.trainer = trainer
    return data


def positions(batches: EpochBatches) -> list[list[int]]:
    """List the positions in each batch."""
    return [list(share.positions) for share in batches]


def indices_of(parts: list[Samples]) -> Tensor:
    """Concatenate the indices of several batches."""
    return torch.cat([part.index for part in parts])


def images_by_index(parts: list[Samples], view: int = 0) -> dict[int, Tensor]:
    """Collect one view of each image in several batches, by the index of the image."""
    return {int(i): image for part in parts for i, image in zip(part.index, part.images[view], strict=True)}


def assert_same_images(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    """Check that two results of `images_by_index` are equal."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i], b[i]) for i in a)


class Recorder(L.LightningModule):
    """Records the batches that a trainer passes to it."""

    def __init__(self, data: ArrayData) -> None:
        super().__init__()
        self.data, self.layer = data, nn.Linear(1, 1)
        self.trained: list[tuple[int, Tensor, Tensor]] = []
        """Epoch, indices and images of each training batch."""
        self.validated: list[Tensor] = []
        """Images of each validation batch."""

    def training_step(self, batch: Samples) -> Tensor:
        self.trained.append((self.current_epoch, batch.index, batch.images[0]))
        return self.layer(torch.ones(1, 1, device=self.device)).sum()

    def validation_step(self, batch: Samples) -> None:
        self.validated.append(batch.images[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ArrayData, folder: Path, epochs: int) -> Recorder:
    """Train a `Recorder` up to `epochs`, from the checkpoint in `folder` if there is one. Save a checkpoint there."""
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    recorder = Recorder(data)
    last = folder / "last.ckpt"
    trainer.fit(recorder, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    return recorder
