"""metrics.csv has one row per epoch, and its rows survive an interruption."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from src.methods.vanilla import Vanilla
from src.runs.history import FILE, History, read_history
from src.training.term_log import TermLog
from tests.helpers.tiny import tiny_data, tiny_distiller, tiny_trainer


def train(folder: Path, epochs: int, **options: Any) -> list[dict[str, float]]:
    """Train a tiny student and return the rows of its metrics.csv."""
    data = tiny_data(folder)
    trainer = tiny_trainer(epochs, callbacks=[TermLog(), History(folder)], **options)
    trainer.fit(tiny_distiller(data, Vanilla()), datamodule=data)
    return read_history(folder)


def test_a_row_holds_the_epoch_its_loss_terms_and_its_metrics(tmp_path: Path) -> None:
    rows = train(tmp_path, 2)
    assert [row["epoch"] for row in rows] == [0, 1]
    for row in rows:
        assert row.keys() == {
            "epoch", "learning_rate", "seconds", "data_wait", "train/cross_entropy", "train/loss", "test/accuracy",
            "test/top5", "test/nll", "test/ece",
        }  # fmt: skip
        assert row["seconds"] > 0
        assert 0 < row["data_wait"] < 1
        assert row["train/loss"] == row["train/cross_entropy"]


def test_each_row_has_the_learning_rate_with_which_its_epoch_was_trained(tmp_path: Path) -> None:
    rows = train(tmp_path, 3)  # the milestone is after the second epoch
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05, 0.05, 0.005])


def test_an_epoch_without_validation_has_no_metrics_of_an_earlier_epoch(tmp_path: Path) -> None:
    rows = train(tmp_path, 3, check_val_every_n_epoch=2)
    assert ["test/accuracy" in row for row in rows] == [False, True, False]
    assert all("train/loss" in row for row in rows)


@pytest.mark.parametrize(("interval", "has_metrics"), [(4, False), (3, True)])
def test_a_validation_within_the_epoch_gives_no_metrics(tmp_path: Path, interval: int, has_metrics: bool) -> None:
    """An epoch has six batches. After the batches that follow a validation, its metrics are those of other weights."""
    rows = train(tmp_path, 2, val_check_interval=interval)
    assert ["test/accuracy" in row for row in rows] == [has_metrics, has_metrics]


def test_only_rank_zero_writes_the_file(tmp_path: Path) -> None:
    history = History(tmp_path)
    trainer: Any = SimpleNamespace(
        callback_metrics={"train/loss_epoch": torch.tensor(1.0)}, current_epoch=0, is_global_zero=False
    )
    history.on_train_epoch_end(trainer, Mock())
    assert [row["train/loss"] for row in history.rows] == [1.0]
    assert not (tmp_path / FILE).exists()


def test_an_epoch_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "src.runs.history")
    rows = train(tmp_path, 2, check_val_every_n_epoch=2)
    first, second = (record.getMessage() for record in caplog.records if record.name == "src.runs.history")
    assert first.startswith(f"epoch 1/2  loss {rows[0]['train/loss']:.3f}  (")
    accuracy = f"test accuracy {100 * rows[1]['test/accuracy']:.2f} %"
    assert second.startswith(f"epoch 2/2  loss {rows[1]['train/loss']:.3f}  {accuracy}  (")


def test_a_progress_bar_replaces_the_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "src.runs.history")
    train(tmp_path, 1, enable_progress_bar=True)
    assert not [record for record in caplog.records if record.name == "src.runs.history"]


def test_the_state_holds_the_rows_the_learning_rate_and_the_time_of_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 106.0, 120.0, 130.0, 1000.0, 1005.0, 1007.0])
    monkeypatch.setattr("src.runs.history.time.monotonic", lambda: next(clock))
    first, resumed = History(tmp_path), History(tmp_path)
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.3}])])
    module = Mock()
    first.on_train_epoch_start(trainer, module)  # at 100
    first.on_train_batch_start(trainer, module, None, 0)  # at 106
    first.on_train_batch_end(trainer, module, None, None, 0)  # at 120
    first.rows.append({"epoch": 0})
    state = first.state_dict()  # at 130
    assert state == {"rows": [{"epoch": 0}], "learning_rate": 0.3, "seconds": 30.0, "waited": 6.0}
    resumed.load_state_dict(state)  # at 1000, on another clock
    assert resumed.state_dict() == {**state, "seconds": 35.0}  # at 1005
    resumed.on_train_batch_start(trainer, module, None, 1)  # at 1007
    assert resumed.waited == 6.0 + 7.0
    resumed.rows.append({"epoch": 1})
    assert first.rows == [{"epoch": 0}], "the rows are a copy"


def test_a_run_that_has_not_finished_an_epoch_has_no_rows(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
