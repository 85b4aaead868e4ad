"""What lets the same command go on where a run was interrupted: checkpoints within epochs, signals, and locks."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from src.errors import UserError
from src.files import written_whole
from src.models.checkpoints import read_file, serialized

log = logging.getLogger(__name__)

ENDING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What asks a command to end: `kill`, Ctrl-C, a cluster that needs the machine or whose time is up."""
SIGNALS = tuple(getattr(signal, name) for name in (*ENDING, "SIGUSR2") if hasattr(signal, name))
"""These, and what submitit asks by."""


AGAIN = "start_over=true does the run again"


class BusyError(UserError):
    """Another command does this."""


def checkpoint_file(folder: Path) -> Path:
    """Where a run keeps its last checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def previous_file(folder: Path) -> Path:
    """Where a run keeps the checkpoint before the last, while it trains."""
    return folder / "checkpoints" / "previous.ckpt"


def last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is not damaged, file and content; None where there is none yet.

    Raises `UserError` where all are damaged.
    """
    last, previous = (file if file.is_file() else None for file in (checkpoint_file(folder), previous_file(folder)))
    if last is None:  # never, or a kill between two renames
        return (previous, _read(previous)) if previous else None
    try:
        return last, _read(last)
    except UserError as error:
        if previous is None:
            raise
        found = previous, _read(previous)
        log.warning("%s: going on from the checkpoint before it.", str(error).partition(":")[0])
        return found


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The content of the newest checkpoint that is not damaged, None where there is none.

    Raises `UserError` where all are damaged.
    """
    found = last_good(folder)
    return found[1] if found else None


def _read(file: Path) -> dict[str, Any]:
    content = read_file(file, AGAIN)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} is not what a run writes: {AGAIN}.")
    return content


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, on its own disk, and keeps the one before it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `path`; a last checkpoint that is there becomes the previous one."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = serialized(checkpoint)
        with written_whole(file) as partial:
            partial.write_bytes(content)
            if file.name == "last.ckpt" and file.is_file():
                file.replace(file.with_name("previous.ckpt"))


class Checkpoints(Checkpoint):
    """Saves after every epoch, within an epoch whenever `minutes` have passed, and when a signal asks the run to end.

    A signal waits for the end of its batch; then what it would have done without this happens (`ended_by_signal`, or
    what a cluster's launcher has set up). The last batch of an epoch is followed by evaluation and the epoch's own
    checkpoint: none is made between. Lightning's means over the epoch so far are kept too.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file = checkpoint_file(folder)
        self.interval = timedelta(minutes=minutes).total_seconds()
        self.saved = time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}
        self.received: int | None = None
        self.started = False
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back after fit; what there was to restore is."""
        self.started = True
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                signal.signal(number, self._receive if callable(handler) else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == number:  # who asks twice does not want to wait
            self._end(number, frame)
        self.received = number

    def _end(self, number: int, frame: FrameType | None) -> None:
        handler = self.handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to; all devices decide together."""
        self._resume_means(trainer)
        due = self.received is not None or time.monotonic() - self.saved >= self.interval
        due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)
            self._end_together(trainer)

    def _end_together(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            number, self.received = self.received or signal.SIGTERM, None
            self._end(number, None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch."""
        self._save(trainer)
        self._end_together(trainer)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # what is not written when the run is killed is not logged again
        trainer.save_checkpoint(self.file, weights_only=False)
        self.saved = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add each device's sums of what is averaged over the epoch: Lightning forgets them."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        means = _means(trainer) if progress.ready > progress.processed else {}  # the epoch is not over
        sums = torch.tensor(
            [(float(mean.value), float(mean.cumulated_batch_size)) for mean in means.values()], dtype=torch.float64
        )
        shares = [sums] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(shares, sums)
        checkpoint["epoch_sums"] = dict(zip(means, torch.stack(shares, dim=1), strict=True))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The sums [devices, 2] of each mean, for an epoch that goes on."""
        self.sums = checkpoint["epoch_sums"]

    def _resume_means(self, trainer: Trainer) -> None:
        """After the first batch, by which Lightning has named its means again."""
        means = _means(trainer)
        for name, sums in self.sums.items():
            mean = means[name]
            if len(sums) == trainer.world_size:
                value, size = sums[trainer.global_rank].tolist()
            else:  # other devices than before
                value, size = sums.sum(dim=0).tolist() if trainer.is_global_zero else (0.0, 0.0)
            mean.value = mean.value + value
            mean.cumulated_batch_size = mean.cumulated_batch_size + int(size)
        self.sums = {}


def _means(trainer: Trainer) -> dict[str, Any]:
    """Lightning's means over the training epoch."""
    results = trainer.fit_loop.epoch_loop._results
    return {name: metric for name, metric in results.items() if metric.meta.on_epoch and metric.meta.is_mean_reduction}


@contextlib.contextmanager
def ended_by_signal() -> Iterator[None]:
    """What asks the command to end does so in one sentence, with the customary exit code 128 + number."""

    def end(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():  # of ddp_fork: they save, and would be waited for
            child.terminate()
        if os.getpid() == command and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            name = signal.Signals(number).name
            print(f"Stopped by {name}: the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + number)

    command = os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in SIGNALS if number.name in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Keep a folder for this process. The lock beside it ends with its process, however that ends.

    Raises `BusyError` where another process has it, unless it shall `wait` for that one's end.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise BusyError(
                f"{folder} is being trained by another command: wait for it, or choose another runs=."
            ) from None
        log.info("Waiting for another command that trains %s.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
