"""Checkpoints after and within epochs. A resumed run ends with the same bits as an uninterrupted run."""

import logging
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from src.common.devices import steps_between_waits
from src.common.errors import UserError
from src.common.files import atomic_write
from src.models.checkpoints import read_file, serialize
from src.runs.result import START_OVER
from src.runs.signals import ONE_REQUEST, SIGNALS, leave_closed_terminal
from src.runs.time_budget import OutOfTime, TimeBudget

log = logging.getLogger(__name__)


def checkpoint_file(folder: Path) -> Path:
    """Return the path of a run's last checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def previous_file(folder: Path) -> Path:
    """Return the path of the checkpoint before the last, which is kept while the run trains."""
    return folder / "checkpoints" / "previous.ckpt"


def newest_intact_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find a run's newest checkpoint that is not damaged. Returns its file and its content.

    Returns None if the run has no checkpoint. Raises `UserError` if all of them are damaged.
    """
    last, previous = (file if file.is_file() else None for file in (checkpoint_file(folder), previous_file(folder)))
    if last is None:  # none was saved yet, or the process was killed between two renames
        return (previous, _read(previous)) if previous else None
    try:
        return last, _read(last)
    except UserError as error:
        if previous is None:
            raise
        found = previous, _read(previous)
        log.warning("%s: resuming from the previous checkpoint.", str(error).partition(":")[0])
        return found


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read a run's newest checkpoint that is not damaged. Returns None if the run has no checkpoint.

    Raises `UserError` if all of them are damaged.
    """
    found = newest_intact_checkpoint(folder)
    return found[1] if found else None


def _do_nothing() -> None:
    pass


def _ends_epoch(trainer: Trainer) -> bool:
    """Return whether Lightning trains no further batch of this epoch, perhaps because the run ends within it."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early))


def _accumulates(trainer: Trainer) -> bool:
    """Return whether gradients wait for those of the next batch. A checkpoint does not contain them."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop._should_accumulate())


def _read(file: Path) -> dict[str, Any]:
    content = read_file(file, START_OVER)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} was not written by a run: {START_OVER}.")
    checkpoint: dict[str, Any] = content
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, and keep the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to `path`. An existing last checkpoint becomes the previous one."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = serialize(checkpoint)
        with atomic_write(file) as partial:
            partial.write_bytes(content)
            if file.name == "last.ckpt" and file.is_file():
                file.replace(file.with_name("previous.ckpt"))


class Checkpoints(Checkpoint):
    """Save after every epoch, within an epoch after every `minutes`, and when a signal asks the run to end.

    A signal takes effect at the end of its batch, or of the batches whose gradients are accumulated. The run is saved,
    and then the earlier signal handler is called: the handler of `stop_on_signal` or of a cluster launcher. The end of
    the time budget takes effect in the same way: the run is saved, and `OutOfTime` is raised. No checkpoint is saved
    after the last batch of an epoch, or of the run, because the evaluation and the epoch's own checkpoint follow.

    Several devices decide together. For this they wait for each other, every `check_every` steps (see
    `steps_between_waits`).
    """

    def __init__(
        self, folder: Path, minutes: float, check_every: int | None = None, budget: TimeBudget | None = None
    ) -> None:
        self.file = checkpoint_file(folder)
        self.interval = timedelta(minutes=minutes).total_seconds()
        self.saved = time.monotonic()
        self.check_every = check_every
        self.budget = budget or TimeBudget()
        self.received: int | None = None
        self.received_at = 0.0
        self.started = False
        self.handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers until fit ends. Any checkpoint has been restored by now."""
        self.started = True
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():
                signal.signal(number, self._receive if callable(handler) else handler)
        # Without Lightning's handlers, no signal can be left for its own question to all devices in every step.
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add whether a callback such as `EarlyStopping` has ended the training."""
        checkpoint["should_stop"] = trainer.should_stop

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Train no further if a callback had ended the training."""
        trainer.should_stop = checkpoint.get("should_stop", False)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A second signal does not wait for the end of the batch. But one request can be two signals: if a terminal
        # closes, shell and system send one each, and `stop_on_signal` passes on what a cluster sends to all processes.
        is_repeated = self.received == number and time.monotonic() - self.received_at > ONE_REQUEST
        if is_repeated and signal.Signals(number).name != "SIGHUP":
            self._end(number, frame)
        leave_closed_terminal()
        if self.received != number:
            self.received, self.received_at = number, time.monotonic()

    def _end(self, number: int, frame: FrameType | None) -> None:
        handler = self.handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal has arrived or the interval is over."""
        if trainer.world_size > 1 and (batch_idx + 1) % self._batches_between_decisions(trainer):
            return
        due = self.received is not None or self.budget.is_over or time.monotonic() - self.saved >= self.interval
        due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due and not _ends_epoch(trainer) and not _accumulates(trainer):
            self._save(trainer)
            self._end_together(trainer)

    def _batches_between_decisions(self, trainer: Trainer) -> int:
        """Round the configured number up to whole steps of the optimiser."""
        accumulated = trainer.accumulate_grad_batches
        return -(-steps_between_waits(trainer, self.check_every) // accumulated) * accumulated

    def _end_together(self, trainer: Trainer, is_last_epoch: bool = False) -> None:
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            number, self.received = self.received or signal.SIGTERM, None
            self._end(number, None)
        if is_last_epoch or not self.budget.is_limited:
            return
        if trainer.strategy.reduce_boolean_decision(self.budget.is_over, all=False):
            raise OutOfTime

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch. A run that has trained its last epoch does not end here."""
        self._save(trainer)
        has_all_steps = 0 < trainer.max_steps <= trainer.global_step
        is_last = trainer.should_stop or has_all_steps or trainer.current_epoch + 1 == trainer.max_epochs
        self._end_together(trainer, is_last_epoch=is_last)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # a resumed run does not log the rows before its checkpoint again
        trainer.save_checkpoint(self.file, weights_only=False)
        self.saved = time.monotonic()
