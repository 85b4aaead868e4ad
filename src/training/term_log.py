"""Log the loss terms, and stop on a loss that is not finite, without waiting for the device in every step."""

from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from src.common.devices import steps_between_logs, steps_between_waits
from src.common.errors import UserError
from src.training.acceleration import mean_over_devices

ADVICE = (
    "try a lower schedule.learning_rate, a lower weight of the term that grew, or trainer.precision=32-true. The last "
    "checkpoint is kept"
)


class Row(NamedTuple):
    """The weighted terms of one batch."""

    batch_idx: int
    size: int
    """Number of images."""
    values: Tensor
    """[K], one value for each term, on the device."""


class TermLog(Callback):
    """Collect the module's `weighted_terms` on the device, and read them from time to time.

    - Every `check_every` steps, the host checks the terms for NaN and infinity (None: in every step on a CPU, every
      `log_every_n_steps` steps on a GPU). A validation, a checkpoint and the end of an epoch check them too, so that
      no checkpoint has seen a loss that is not finite.
    - Every `log_every_n_steps` steps and at the end of an epoch, the mean over the devices is computed with one
      collective for all terms and steps. The terms of the last step are logged as `train/<term>_step`. Several devices
      check these means, so that a NaN on one of them stops all.
    - At the end of an epoch, the means over its images are logged as `train/<term>_epoch`. The sums are part of the
      checkpoint, so that the means of a resumed epoch are those of the whole epoch.

    `loss` is the sum of the terms.
    """

    def __init__(self, check_every: int | None = None) -> None:
        self.check_every = check_every
        self.names: list[str] = []
        self.rows: list[Row] = []
        self.checked = 0
        """The number of rows that have been checked."""
        self.sums: dict[str, list[float]] = {}
        """Of each term, the sum over the images of the epoch, and the number of images."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the terms of this batch. Raise `UserError` if a check is due and a term is not finite."""
        terms: Any = pl_module.weighted_terms
        batch, _ = pl_module.last_batch  # type: ignore[misc]
        self.names = list(terms)
        values = torch.stack(list(terms.values())).detach()
        self.rows.append(Row(trainer.fit_loop.batch_idx, len(batch.target), values))
        if trainer.world_size == 1 and steps_between_waits(trainer, self.check_every) == 1:
            pl_module.log("loss", self._check(trainer, values[None].cpu()).sum(), prog_bar=True, logger=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the terms if that is due. Log the terms of this step if it is the turn of the loggers."""
        interval = steps_between_logs(trainer)
        turn = interval and trainer.global_step % interval == 0
        # Several devices meet only where the loggers log, unless the configuration asks for more checks.
        check_every = self.check_every if trainer.world_size > 1 else steps_between_waits(trainer, self.check_every)
        is_due = check_every is not None and len(self.rows) - self.checked >= check_every
        if not self.rows or not (turn or is_due):
            return
        values = self._read(trainer)
        if is_due:
            pl_module.log("loss", values.sum(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if turn:
            named = zip([*self.names, "loss"], [*values, values.sum()], strict=True)
            pl_module.log_dict({f"train/{name}_step": value for name, value in named}, on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all terms so far, because a student that is not finite has no metrics."""
        self._read(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Raise the error of a NaN, if it is behind the failure of a decomposition."""
        if isinstance(exception, LinAlgError) and self.rows[self.checked :]:
            self._check(trainer, torch.stack([row.values for row in self.rows[self.checked :]]).cpu())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the epoch."""
        self._read(trainer)
        means = {name: torch.tensor(total / images, dtype=torch.float64) for name, (total, images) in self.sums.items()}
        pl_module.log_dict({f"train/{name}_epoch": mean for name, mean in means.items()})
        self.sums = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check all terms so far, and add the sums behind the means."""
        self._read(trainer)
        checkpoint["epoch_sums"] = self.sums

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the sums of an epoch that was interrupted."""
        self.sums = {name: list(sums) for name, sums in checkpoint["epoch_sums"].items()}

    def _read(self, trainer: Trainer) -> Tensor:
        """Add the rows to the sums, as means over the devices. Returns the terms of the last row, [K] on the CPU."""
        if not self.rows:
            return torch.empty(0)
        rows, values = self.rows, torch.stack([row.values for row in self.rows])
        values = mean_over_devices([values])[0].cpu()
        last = self._check(trainer, values[self.checked :]) if self.checked < len(rows) else values[-1]
        sizes = torch.tensor([float(row.size) for row in rows], dtype=torch.float64)
        with_loss = torch.cat([values, values.sum(dim=1, keepdim=True)], dim=1).double()
        for name, total in zip([*self.names, "loss"], (sizes @ with_loss).tolist(), strict=True):
            sums = self.sums.setdefault(name, [0.0, 0.0])
            sums[0] += total
            sums[1] += float(sizes.sum())
        self.rows, self.checked = [], 0
        return last

    def _check(self, trainer: Trainer, values: Tensor) -> Tensor:
        """Return the last of the unchecked rows [N, K] on the CPU. Raise `UserError` at the first one with a NaN."""
        unchecked, self.checked = self.rows[self.checked :], len(self.rows)
        for row, terms in zip(unchecked, values, strict=True):
            if not terms.isfinite().all():
                shown = ", ".join(f"{name} {float(term):.4g}" for name, term in zip(self.names, terms, strict=True))
                raise UserError(
                    f"The loss is not finite in epoch {trainer.current_epoch}, batch {row.batch_idx} ({shown}): "
                    f"{ADVICE}."
                )
        return values[-1]
