"""Checkpoints are written atomically, in time, and one that is damaged gives way to the one before it."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from src.common.errors import UserError
from src.methods.vanilla import Vanilla
from src.runs import checkpointing
from src.runs.checkpointing import (
    AtomicCheckpointIO,
    Checkpoints,
    checkpoint_file,
    newest_intact_checkpoint,
    previous_file,
    read_checkpoint,
)
from src.runs.history import History
from src.training.term_log import TermLog
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_trainer, weights


def save(folder: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"step": torch.tensor(step)}}, checkpoint_file(folder))


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":  # a bit of the tensor
        place = content.index((77).to_bytes(8, "little"))
        content[place] ^= 1
    file.write_bytes(b"" if how == "empty" else content)


# Finding a checkpoint


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 77)
    damage(checkpoint_file(tmp_path), how)
    found = newest_intact_checkpoint(tmp_path)
    assert found is not None
    assert (found[0], found[1]["state_dict"]["step"]) == (previous_file(tmp_path), 1)
    assert len(caplog.messages) == 1
    assert "last.ckpt is damaged" in caplog.messages[0]
    previous_file(tmp_path).write_bytes(b"too")
    with pytest.raises(UserError, match=r"previous.ckpt is damaged .*start_over=true"):
        newest_intact_checkpoint(tmp_path)


def test_a_damaged_checkpoint_without_another_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 77)
    damage(checkpoint_file(tmp_path), "cut")
    with pytest.raises(UserError, match=r"last.ckpt is damaged .*start_over=true"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"weights": {}}, {"state_dict": {"step": 3}}, {"state_dict": None}], ids=str
)
def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path, content: Any) -> None:
    checkpoint_file(tmp_path).parent.mkdir()
    torch.save(content, checkpoint_file(tmp_path))
    with pytest.raises(UserError, match=r"last.ckpt was not written by a run: .*start_over=true"):
        read_checkpoint(tmp_path)


def test_two_checkpoints_are_kept_and_a_kill_between_their_renames_loses_none(tmp_path: Path) -> None:
    assert newest_intact_checkpoint(tmp_path) is None
    assert read_checkpoint(tmp_path) is None
    for step in range(4):
        save(tmp_path, step)
    assert {file.name for file in checkpoint_file(tmp_path).parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    checkpoint_file(tmp_path).replace(previous_file(tmp_path))
    found = newest_intact_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["state_dict"]["step"] == 3


# Saving in time


class Saves(Callback):
    """Note the steps at which checkpoints are saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("minutes", "steps"),
    [
        (1000, [6, 12]),  # after each epoch of six batches
        (0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),  # after the last batch of an epoch, only after the evaluation
    ],
)
def test_a_checkpoint_is_saved_after_each_epoch_and_at_each_interval(
    tmp_path: Path, minutes: float, steps: list[int]
) -> None:
    data, saves = tiny_data(tmp_path), Saves()
    callbacks = [Checkpoints(tmp_path, minutes), saves]
    tiny_trainer(2, enable_checkpointing=True, callbacks=callbacks).fit(
        tiny_distiller(data, Vanilla()), datamodule=data
    )
    assert saves.steps == steps


class Stop(Callback):
    """End the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_no_checkpoint_is_saved_while_gradients_accumulate(tmp_path: Path) -> None:
    data, saves = tiny_data(tmp_path), Saves()
    callbacks = [Checkpoints(tmp_path, 0), saves]
    trainer = tiny_trainer(1, enable_checkpointing=True, callbacks=callbacks, accumulate_grad_batches=4)
    trainer.fit(tiny_distiller(data, Vanilla()), datamodule=data)
    assert saves.steps == [1, 2], "after four of six batches, and after the epoch"


def test_a_run_that_a_callback_has_ended_trains_no_further_when_it_resumes(tmp_path: Path) -> None:
    data, distiller = tiny_data(tmp_path), tiny_distiller(tiny_data(tmp_path), Vanilla())
    callbacks = [Stop(8), Checkpoints(tmp_path, 1000)]
    trainer = tiny_trainer(3, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(distiller, datamodule=data)
    before = weights(distiller)
    resumed = tiny_trainer(3, enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 1000)])
    resumed.fit(distiller, datamodule=data, ckpt_path=checkpoint_file(tmp_path), weights_only=True)
    assert resumed.global_step == trainer.global_step == 8
    assert same(weights(distiller), before)


@pytest.mark.parametrize("how", ["max_steps", "callback"])
def test_a_run_that_ends_within_an_epoch_saves_its_last_step_once_with_the_row_of_the_epoch(
    tmp_path: Path, how: str
) -> None:
    data, saves, history = tiny_data(tmp_path), Saves(), History(tmp_path)
    stop, options = ([], {"max_steps": 8}) if how == "max_steps" else ([Stop(8)], {})
    callbacks = [TermLog(), history, *stop, Checkpoints(tmp_path, 0), saves]
    trainer = tiny_trainer(3, enable_checkpointing=True, callbacks=callbacks, **options)
    trainer.fit(tiny_distiller(data, Vanilla()), datamodule=data)
    assert saves.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(history.rows) == 2


def test_the_interval_counts_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 60 seconds for each reading of the clock and 150 seconds between checkpoints."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 60
        return now[0]

    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=monotonic))
    data, saves = tiny_data(tmp_path), Saves()
    callbacks = [Checkpoints(tmp_path, 2.5), saves]
    tiny_trainer(1, enable_checkpointing=True, callbacks=callbacks).fit(
        tiny_distiller(data, Vanilla()), datamodule=data
    )
    assert saves.steps == [3, 6]


def test_loggers_are_saved_before_the_checkpoint(tmp_path: Path) -> None:
    order: list[str] = []
    trainer: Any = SimpleNamespace(
        loggers=[SimpleNamespace(save=lambda: order.append("logger"))],
        save_checkpoint=lambda *_, **__: order.append("checkpoint"),
    )
    Checkpoints(tmp_path, 0)._save(trainer)
    assert order == ["logger", "checkpoint"]


# Signals


def test_the_second_signal_does_not_wait_for_the_batch_unless_both_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    checkpoints, ended = Checkpoints(tmp_path, 1000), list[int]()
    checkpoints.handlers[signal.SIGTERM] = lambda number, _: ended.append(number)
    for later in (0, 0.5, 0.5, 0.5):
        assert ended == []
        now[0] += later
        checkpoints._receive(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]
