"""Predictions of finished runs, computed again from their folders."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.analysis.answered import Answered, answer
from src.analysis.predictions import Predictions
from src.analysis.results import Finished, find_runs
from tests.helpers.run_folders import finished, taught_by_a_program


@pytest.fixture
def run(finished_run: Path) -> Finished:
    """A trained run of AEKT."""
    (found,) = (run for run in find_runs(finished_run.parents[3])[0] if run.result.method == "aekt")
    return found


def test_the_first_run_of_a_setting_answers_again(run: Finished, tmp_path: Path) -> None:
    missing = finished(tmp_path / "missing", seed=1)
    answered, failures = answer({"by aekt": [run, missing]}, str(tmp_path))
    assert failures == []
    ((name, found),) = answered.items()
    assert name == "by aekt"
    assert found.teacher is not None
    assert len(found.predictions.target) == found.data.split_size("test")
    scored = int((found.teacher >= 0).sum())  # the run itself scored two batches only
    assert found.predictions.correct[:scored].mean() == pytest.approx(run.result.test.accuracy)
    assert found.teacher_macs is not None
    assert found.teacher_macs > found.macs > 0


def test_the_cost_of_a_program_as_teacher_is_unknown(run: Finished, tmp_path: Path) -> None:
    folder = taught_by_a_program(run.folder, tmp_path)
    answered, _ = answer({"by aekt": [Finished(folder, run.result)]}, str(tmp_path))
    assert answered["by aekt"].teacher_macs is None


def test_the_teachers_stored_answers_are_read(run: Finished, tmp_path: Path) -> None:
    answered, _ = answer({"by aekt": [run]}, str(tmp_path))
    teacher = answered["by aekt"].teacher
    assert teacher is not None
    known = teacher[teacher >= 0]
    assert len(known) > 0
    target = answered["by aekt"].predictions.target[: len(known)]
    facts = run.result.teacher
    assert facts
    assert np.mean(known == target) == pytest.approx(facts.accuracy)


def test_a_run_that_cannot_be_opened_is_reported_and_the_others_answer(
    run: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(run.folder, damaged)
    (damaged / "config.yaml").write_text("method: {_target_: os.system}\n")
    groups = {"hostile": [Finished(damaged, run.result)], "by aekt": [run]}
    answered, failures = answer(groups, str(tmp_path))
    assert list(answered) == ["by aekt"]
    assert failures == ["hostile is left out of the pictures of predictions (UserError)."]
    assert "hostile cannot predict the test images:" in caplog.text


def test_a_run_whose_data_has_changed_since_is_left_out(
    run: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answered, failures = answer({"by aekt": [replace(run, data="0ther")]}, str(tmp_path))
    assert answered == {}
    assert failures == ["by aekt is left out of the pictures of predictions (UserError)."]
    assert "by aekt cannot predict the test images: the data has changed since the run" in caplog.text


def test_the_test_images_are_held_once(run: Finished, tmp_path: Path) -> None:
    answered, _ = answer({"one": [run], "two": [run]}, str(tmp_path))
    assert answered["one"].data is answered["two"].data


@pytest.mark.parametrize(
    ("teacher", "complete"), [(None, False), (np.array([0, 1]), True), (np.array([0, -1]), False)],
    ids=["none", "complete", "with an image missing"],
)  # fmt: skip
def test_a_teacher_is_complete_if_it_answered_every_image(teacher: np.ndarray | None, complete: bool) -> None:
    predictions = Predictions(np.zeros((2, 1), dtype=int), np.ones((2, 1)), np.zeros(2, dtype=int))
    data: Any = None
    found = Answered(predictions, teacher, 0, None, data).complete_teacher
    assert found is (teacher if complete else None)
