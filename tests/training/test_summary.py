"""A result holds the last epoch's metrics, whichever split was evaluated in it, and the best epoch beside them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from torch import nn

from src.common.metrics import metrics_of_split
from src.data.array_data import ArrayData
from src.methods.method import Method
from src.methods.simkd import SimKD
from src.methods.vanilla import Vanilla
from src.runs.folder import RunFolder
from src.runs.history import read_history
from src.runs.identity import identity
from src.runs.result import Metrics, Result, TeacherFacts
from src.training.fitting import fit
from src.training.serialization import Serial
from src.training.summary import best_epoch, parameter_count, summarise
from tests.helpers.configure import changed, configure
from tests.helpers.tiny import CLASSES, kd, tiny_data, tiny_distiller, tiny_teacher


def run(tmp_path: Path, data: ArrayData, **options: Any) -> tuple[Result, list[dict[str, float]], DictConfig]:
    """Train a student alone. Returns the result, the history and the configuration."""
    composed = configure(
        "method=vanilla", "trainer=cpu", "logger=none", "gradients.every=0", "schedule.batch_size=8",
        "+trainer.val_check_interval=1.0",
    )  # fmt: skip
    cfg = changed(composed, **{"runs": str(tmp_path / "runs"), "trainer__max_epochs": 3, **options})
    distiller = tiny_distiller(data, Vanilla())
    distiller.settings = replace(distiller.settings, validates_on=data.validates_on)
    folder = RunFolder(cfg)
    trainer = fit(cfg, distiller, data, folder.path)
    return summarise(cfg, distiller, data, folder, trainer, None), read_history(folder.path), cfg


def with_held_out(folder: Path) -> ArrayData:
    """Load the tiny data with 8 of its training images held out."""
    data = tiny_data(folder)
    data.val_size = 8
    data.load()
    return data


def metrics_of(row: dict[str, float], split: str) -> Metrics:
    return Metrics(**metrics_of_split(row, split))


def test_the_metrics_come_from_the_last_epoch(tmp_path: Path) -> None:
    result, rows, cfg = run(tmp_path, tiny_data(tmp_path))
    assert result.test == metrics_of(rows[-1], "test")
    assert result.val is None
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert (result.epochs, result.train_images, result.teacher) == (3, 44, None)
    assert (result.method, result.serialization, result.student) == ("vanilla", "none", cfg.model.student.name)
    assert result.class_names == ["red", "green", "blue", "yellow"]
    assert result.settings == {name: value for name, value in identity(cfg).items() if name != "seed"}


def test_the_test_set_is_evaluated_if_the_last_epoch_skipped_it(tmp_path: Path) -> None:
    expected, *_ = run(tmp_path, tiny_data(tmp_path))
    result, rows, _ = run(tmp_path, tiny_data(tmp_path), trainer__check_val_every_n_epoch=2)
    assert "test/accuracy" not in rows[-1]
    assert result.test == expected.test
    assert result.best_epoch is not None
    assert (result.best_epoch.epoch, result.best_epoch.accuracy) == (1, rows[1]["test/accuracy"])


@pytest.mark.parametrize("every", [1, 2])
def test_held_out_images_are_validated_and_the_test_set_is_evaluated_once(tmp_path: Path, every: int) -> None:
    result, rows, _ = run(tmp_path, with_held_out(tmp_path), trainer__check_val_every_n_epoch=every)
    assert not any("test/accuracy" in row for row in rows)
    assert result.test.accuracy >= 0
    assert ("val/accuracy" in rows[-1]) == (every == 1)
    assert result.best_epoch is not None
    assert result.best_epoch.split == "val"


@pytest.mark.parametrize(
    "averaging", [None, {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.5}]
)
@pytest.mark.parametrize(
    "seldom", [{"trainer__val_check_interval": 4}, {"trainer__check_val_every_n_epoch": 2}], ids=str
)
@pytest.mark.parametrize("load", [with_held_out, tiny_data])
def test_the_metrics_are_those_of_the_last_weights(
    tmp_path: Path, load: Callable[[Path], ArrayData], seldom: dict[str, Any], averaging: Any
) -> None:
    """The last validation was within the last epoch of 5 or 6 steps, or before that epoch."""
    expected, *_ = run(tmp_path / "whole", load(tmp_path), averaging=averaging)
    result, rows, _ = run(tmp_path / "seldom", load(tmp_path), averaging=averaging, **seldom)
    assert not any(name.endswith("accuracy") for name in rows[-1])
    assert (result.val, result.test) == (expected.val, expected.test)


def test_without_validation_a_result_has_no_validation_metrics(tmp_path: Path) -> None:
    result, *_ = run(tmp_path, with_held_out(tmp_path), trainer__limit_val_batches=0)
    assert result.val is None


@pytest.mark.parametrize("limit", [0, 0.5, 1, 2])
def test_all_test_images_are_scored_at_the_end_of_a_run_with_limited_validation(tmp_path: Path, limit: float) -> None:
    expected, *_ = run(tmp_path, tiny_data(tmp_path))
    data = tiny_data(tmp_path)
    data.evaluation_batch_size = 5  # 4 batches
    result, rows, _ = run(tmp_path, data, trainer__limit_val_batches=limit)
    assert result.test.accuracy == pytest.approx(expected.test.accuracy)
    assert all(("test/accuracy" in row) == bool(limit) for row in rows)
    assert (result.best_epoch is None) == (limit == 0)


def test_without_validation_the_result_has_no_validation_metrics(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    data.val_size = 8
    data.load()
    result, _, _ = run(tmp_path, data, data__val_size=8, trainer__limit_val_batches=0)
    assert result.val is None
    assert result.test.accuracy > 0


def test_without_an_evaluated_epoch_there_is_no_best_epoch(tmp_path: Path) -> None:
    result, rows, _ = run(tmp_path, tiny_data(tmp_path), trainer__check_val_every_n_epoch=5)
    assert not any("test/accuracy" in row for row in rows)
    assert result.best_epoch is None
    assert result.test.accuracy >= 0


def test_of_equal_epochs_the_first_is_the_best() -> None:
    rows = [{"epoch": epoch, "test/accuracy": accuracy} for epoch, accuracy in enumerate([0.3, 0.5, 0.5, 0.4])]
    best = best_epoch(rows, "test")
    assert best is not None
    assert (best.split, best.epoch, best.accuracy) == ("test", 1, 0.5)
    assert best_epoch(rows, "val") is None


@pytest.mark.parametrize("method", [kd(), SimKD(feature_weight=1.0, factor=2)], ids=["kd", "simkd"])
def test_parameters_are_counted_by_their_role(tmp_path: Path, method: Method) -> None:
    """SimKD predicts through its own layers, so they count as the student's."""
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    layer = Serial(0.1) if method.distils_logits else None
    distiller = tiny_distiller(data, method, teacher=teacher, serialization=layer)
    cfg = changed(configure("method=kd", "trainer=cpu"), runs=str(tmp_path / "runs"))
    folder = RunFolder(cfg)
    folder.path.mkdir(parents=True)
    (folder.path / "metrics.csv").write_text("seconds,test/accuracy,test/top5,test/nll,test/ece,epoch\n1,0.5,1,1,0,0\n")
    facts = TeacherFacts(name="resnet14", sha256=teacher.digest, accuracy=0.5)
    result = summarise(cfg, distiller, data, folder, None, facts)  # type: ignore[arg-type]
    student = parameter_count(distiller.student)
    assert result.teacher == facts
    assert result.parameters.teacher == parameter_count(teacher.network)
    if method.distils_logits:
        assert result.parameters.student == student
        assert result.parameters.training_only == CLASSES * CLASSES + CLASSES
    else:
        assert result.parameters.student > student
        assert result.parameters.training_only == parameter_count(method)


def test_parameters_are_counted_and_buffers_are_not() -> None:
    frozen = nn.Linear(3, 4).requires_grad_(False)
    assert parameter_count(nn.Sequential(frozen, nn.BatchNorm1d(4))) == 3 * 4 + 4 + 2 * 4
    assert parameter_count(nn.Identity()) == 0
    shared = nn.Linear(2, 2)
    assert parameter_count(nn.Sequential(shared, shared)) == 6, "a shared layer counts once"
