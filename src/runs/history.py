"""`metrics.csv`: one row per epoch."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from src.common.files import read_rows, write_rows

log = logging.getLogger(__name__)

FILE = "metrics.csv"


class History(Callback):
    """Write `metrics.csv`, and one line per epoch to the log. The rows are part of the checkpoint.

    `data_wait` is the share of an epoch's training time between the end of a step and the start of the next one. The
    host reads the next batch then. A GPU may still compute. The term log, which provides the means of the loss, must
    come before this callback.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.rows: list[dict[str, float]] = []
        self.epoch_start = self.batch_end = 0.0
        self.waited = 0.0
        """Seconds of this epoch in which a step waited for its batch."""
        self.learning_rate = 0.0
        self.validated = False

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far, and the learning rate and the seconds so far of the current epoch."""
        seconds = time.monotonic() - self.epoch_start
        return {"rows": self.rows, "learning_rate": self.learning_rate, "seconds": seconds, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows up to the checkpoint. Later epochs are trained again."""
        self.rows = list(state_dict["rows"])
        self.learning_rate = state_dict["learning_rate"]
        self.waited = state_dict["waited"]
        self.batch_end = time.monotonic()
        self.epoch_start = self.batch_end - state_dict["seconds"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and note the learning rate. The scheduler changes it before `on_train_epoch_end`."""
        self.validated = False
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.waited = 0.0
        self.epoch_start = self.batch_end = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time since the end of the last batch."""
        self.waited += time.monotonic() - self.batch_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time. A validation within the epoch was of weights that this batch has changed."""
        self.batch_end = time.monotonic()
        self.validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are metrics of the current weights."""
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row. Validation has run by now."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.endswith("_step")}
        values = {name.removesuffix("_epoch"): value for name, value in values.items() if "/" in name}
        if not self.validated:  # Lightning still holds the metrics of earlier weights
            values = {name: value for name, value in values.items() if name.startswith("train/")}
        row = {
            "epoch": trainer.current_epoch,
            "learning_rate": self.learning_rate,
            "seconds": time.monotonic() - self.epoch_start,
            "data_wait": self.waited / max(self.batch_end - self.epoch_start, 1e-9),
            **values,
        }
        pl_module.log("data_wait", row["data_wait"], rank_zero_only=True)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.file, self.rows)
            if trainer.progress_bar_callback is None:  # a progress bar shows the same, and a log line would break it
                log.info("%s", _line(trainer, row))


def _line(trainer: Trainer, row: Mapping[str, float]) -> str:
    """Describe an epoch in one line."""
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"loss {row['train/loss']:.3f}"]
    for split in ("val", "test"):
        if f"{split}/accuracy" in row:
            parts.append(f"{split} accuracy {100 * row[f'{split}/accuracy']:.2f} %")
    return "  ".join([*parts, f"({row['seconds']:.0f} s)"])


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a run folder's metrics.csv. Returns no rows if the file does not exist yet."""
    return read_rows(folder / FILE)
