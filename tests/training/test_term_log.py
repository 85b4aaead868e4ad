"""The loss terms are logged with one collective, checked for NaN in time, and averaged exactly over an epoch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import distributed

from src.common.devices import steps_between_waits
from src.common.errors import UserError
from src.methods.method import LogitMethod
from src.runs.checkpointing import AtomicCheckpointIO, Checkpoints, newest_intact_checkpoint
from src.runs.history import History, read_history
from src.training.term_log import TermLog
from tests.helpers.tiny import by_threads, kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, without_clock

STEPS = 6
"""44 images in batches of 8."""


class Growing(LogitMethod):
    """Its second term is the number of the step, or NaN from the step `nan_at` on."""

    def __init__(self, nan_at: int | None = None) -> None:
        super().__init__()
        self.nan_at = nan_at

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "step": 2.0}

    def distillation(self, logits: Any, batch: Any) -> dict[str, torch.Tensor]:
        value = float("nan") if self.nan_at is not None and batch.step >= self.nan_at else float(batch.step)
        return {"step": torch.tensor(value) + 0 * logits.student.sum()}


class Seen(L.Callback):
    """Note the steps, the progress bar's loss and what was logged after each step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.bar: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def fit(folder: Path, method: LogitMethod, every: int | None, **options: Any) -> tuple[L.Trainer, Seen]:
    """Train two epochs by a method, from the newest checkpoint in the folder."""
    seen = Seen()
    data = tiny_data(folder)
    callbacks = [TermLog(every), History(folder), seen, Checkpoints(folder, options.pop("minutes", 10), every)]
    trainer = tiny_trainer(2, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0, **options)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    found = newest_intact_checkpoint(folder)
    trainer.fit(
        tiny_distiller(data, method, teacher=tiny_teacher()), datamodule=data, ckpt_path=found[0] if found else None
    )
    return trainer, seen


@pytest.mark.parametrize("every", [1, 3, 4, 50])
def test_the_mean_over_an_epoch_weighs_every_image_once(tmp_path: Path, every: int) -> None:
    fit(tmp_path, Growing(), every)
    rows = read_history(tmp_path)
    assert [row["train/step"] for row in rows] == [  # five batches of 8 images and one of 4
        2 * (8 * (0 + 1 + 2 + 3 + 4) + 4 * 5) / 44,
        2 * (8 * (6 + 7 + 8 + 9 + 10) + 4 * 11) / 44,
    ]
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/step"] + row["train/cross_entropy"], rel=1e-6)


def test_the_interval_of_the_checks_changes_no_bit(tmp_path: Path) -> None:
    rows = []
    for every in (1, 4):
        (tmp_path / str(every)).mkdir()
        fit(tmp_path / str(every), kd(), every)
        rows.append(without_clock(read_history(tmp_path / str(every))))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("every", [1, 4])
def test_the_loggers_get_the_terms_of_every_nth_step(tmp_path: Path, every: int) -> None:
    logger = CSVLogger(tmp_path, name="log", version="")
    fit(tmp_path, Growing(), every, logger=logger, log_every_n_steps=4)
    lines = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [(int(row["step"]), float(row["train/step_step"])) for row in rows if row["train/step_step"]] == [
        (step, 2.0 * step) for step in (3, 7, 11)
    ]
    assert [float(row["train/step_epoch"]) for row in rows if row["train/step_epoch"]] == pytest.approx(
        [200 / 44, 728 / 44]
    )


@pytest.mark.parametrize(
    ("every", "nan_at", "found_after"),
    [(1, 2, 2), (4, 2, 3), (4, 3, 3), (4, 4, 5), (50, 2, 5), (4, 8, 9)],
    ids=["in its step", "a step later", "in a checked step", "at the end of the epoch", "never before it", "epoch 2"],
)
def test_a_nan_is_found_at_the_next_check_and_its_batch_is_named(
    tmp_path: Path, every: int, nan_at: int, found_after: int
) -> None:
    """`found_after` is the number of optimiser steps that were made before the error."""
    seen = Seen()
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(2, callbacks=[TermLog(every), seen], log_every_n_steps=0, limit_val_batches=0)
    epoch, batch = divmod(nan_at, STEPS)
    with pytest.raises(
        UserError, match=rf"not finite in epoch {epoch}, batch {batch} \(cross_entropy [\d.]+, step nan\): try a lower"
    ):
        trainer.fit(tiny_distiller(data, Growing(nan_at), teacher=tiny_teacher()), datamodule=data)
    at_the_end = every > STEPS or nan_at == 4
    assert len(seen.steps) == found_after + at_the_end


@pytest.mark.parametrize("every", [1, 4, 50])
def test_no_checkpoint_is_written_between_a_nan_and_its_discovery(tmp_path: Path, every: int) -> None:
    """A checkpoint is due after every batch."""
    with pytest.raises(UserError, match="not finite in epoch 1, batch 2"):
        fit(tmp_path, Growing(8), every, minutes=0)
    found = newest_intact_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["global_step"] == 8
    assert all(value.isfinite().all() for value in found[1]["state_dict"].values())


def test_a_check_adds_the_steps_since_the_last_one() -> None:
    log, shown = TermLog(2), list[float]()
    module: Any = SimpleNamespace(
        weighted_terms={"a": torch.tensor(1.0), "b": torch.tensor(2.0)},
        last_batch=(SimpleNamespace(target=torch.zeros(3)), None),
        log=lambda name, value, **_: shown.append(float(value)),
    )
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(batch_idx=0),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        world_size=1,
        current_epoch=0,
        global_step=1,
        log_every_n_steps=0,
    )
    for _ in range(5):
        log.on_before_backward(trainer, module, torch.tensor(3.0))
        log.on_train_batch_end(trainer, module, None, None, 0)
    assert (len(log.rows), shown) == (1, [3.0, 3.0])
    checkpoint: dict[str, Any] = {}
    log.on_save_checkpoint(trainer, module, checkpoint)
    assert (log.rows, log.checked) == ([], 0)
    assert checkpoint["epoch_sums"] == {"a": [15.0, 15.0], "b": [30.0, 15.0], "loss": [45.0, 15.0]}


@pytest.mark.parametrize(
    ("device", "wanted", "steps"),
    [("cpu", None, 1), ("cpu", 7, 7), ("cuda", None, 50), ("cuda", 7, 7), ("cuda", 1, 1)],
)
def test_a_gpu_is_waited_for_as_often_as_the_loggers_need(device: str, wanted: int | None, steps: int) -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), log_every_n_steps=50)
    assert steps_between_waits(trainer, wanted) == steps
    trainer.log_every_n_steps = 0
    assert steps_between_waits(trainer, wanted) == steps


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier")


class CountCollectives(L.Callback):
    """Write down the collectives of the steps of the second epoch, and of its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.counted: list[str] = []

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        for name in COLLECTIVES:
            setattr(distributed, name, self.counting(name, getattr(distributed, name)))

    def counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.counted.append(",".join(self.calls))
        self.calls = []

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1 and trainer.is_global_zero:
            self.counted.append(",".join(self.calls))
            (self.folder / "collectives").write_text("\n".join(self.counted[1:]))


@pytest.mark.parametrize("method", [kd(), Growing()], ids=["kd", "growing"])
def test_devices_meet_once_for_all_terms_where_the_loggers_log(tmp_path: Path, method: LogitMethod) -> None:
    """Two devices, six steps, loggers every four steps. DDP's own collectives are not called from Python."""
    with by_threads(1):  # OpenMP's threads do not survive a fork
        data = tiny_data(tmp_path)
        callbacks = [TermLog(50), History(tmp_path), CountCollectives(tmp_path), Checkpoints(tmp_path, 1000, 50)]
        trainer = tiny_trainer(
            2,
            devices=2,
            strategy="ddp_fork",
            callbacks=callbacks,
            limit_val_batches=0,
            log_every_n_steps=4,
            enable_checkpointing=True,
        )
        trainer.fit(tiny_distiller(data, method, teacher=tiny_teacher()), datamodule=data)
    steps = (tmp_path / "collectives").read_text().split("\n")
    assert len(steps) == STEPS
    # Steps 8 and 12 of the run log. The last entry is the end of step 12 and of the epoch.
    assert steps == ["", "all_reduce", "", "", "", "all_reduce"]


@pytest.mark.slow
def test_a_nan_on_one_of_two_devices_stops_both(tmp_path: Path) -> None:
    class OnOneDevice(Growing):
        def distillation(self, logits: Any, batch: Any) -> dict[str, torch.Tensor]:
            self.nan_at = 2 if distributed.get_rank() == 1 else None
            return super().distillation(logits, batch)

    with by_threads(1):
        data = tiny_data(tmp_path)
        trainer = tiny_trainer(2, devices=2, strategy="ddp_fork", callbacks=[TermLog(50)], log_every_n_steps=4)
        with pytest.raises(Exception, match="not finite in epoch 0, batch 2"):
            trainer.fit(tiny_distiller(data, OnOneDevice(), teacher=tiny_teacher()), datamodule=data)


def test_a_decomposition_that_fails_on_a_nan_names_the_nan(tmp_path: Path) -> None:
    class Decomposing(Growing):
        def distillation(self, logits: Any, batch: Any) -> dict[str, torch.Tensor]:
            if batch.step == 3:
                raise torch.linalg.LinAlgError("the input has a NaN")  # type: ignore[attr-defined]
            return super().distillation(logits, batch)

    trainer = tiny_trainer(2, callbacks=[TermLog(50)], limit_val_batches=0)
    with pytest.raises(UserError, match="not finite in epoch 0, batch 2"):
        trainer.fit(
            tiny_distiller(tiny_data(tmp_path), Decomposing(2), teacher=tiny_teacher()), datamodule=tiny_data(tmp_path)
        )


def test_a_nan_at_the_end_of_an_epoch_is_found_before_the_validation(tmp_path: Path) -> None:
    trainer = tiny_trainer(1, callbacks=[TermLog(50)])
    with pytest.raises(UserError, match="not finite in epoch 0, batch 4"):
        trainer.fit(
            tiny_distiller(tiny_data(tmp_path), Growing(4), teacher=tiny_teacher()), datamodule=tiny_data(tmp_path)
        )
    assert "test/accuracy" not in trainer.callback_metrics
