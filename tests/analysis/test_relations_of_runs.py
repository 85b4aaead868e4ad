"""Relations between classes, read from run folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.analysis.answered import Answered
from src.analysis.predictions import Predictions
from src.analysis.relations_of_runs import class_matrices, serial_layers
from src.analysis.results import Finished
from tests.helpers.run_folders import finished

WEIGHT = np.array([[1.0, 0.5], [-0.25, 1.0]])


def save_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> None:
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def run(tmp_path: Path) -> Finished:
    """A run with a serial layer. Only its checkpoint is on the disk."""
    save_checkpoint(tmp_path, {"serialization.layer.weight": torch.from_numpy(WEIGHT)})
    return finished(tmp_path, method="aekt", layer="serial")


def answered(teacher: list[int] | None) -> Answered:
    """Make the answers to four images, two of class 0 and two of class 1. The student takes one 0 for a 1."""
    predictions = Predictions(np.array([[0], [1], [1], [1]]), np.ones((4, 1)), np.array([0, 0, 1, 1]))
    data: Any = None
    return Answered(predictions, None if teacher is None else np.array(teacher), 0, None, data)


def test_the_weights_of_the_first_run_are_read(run: Finished, tmp_path: Path) -> None:
    second = finished(tmp_path / "missing", method="aekt", layer="serial", seed=1)
    ((name, found, weight),) = serial_layers({"by aekt": [run, second]})
    assert (name, found) == ("by aekt", run)
    np.testing.assert_array_equal(weight, WEIGHT)


def test_other_layers_and_other_sizes_are_skipped(run: Finished, tmp_path: Path) -> None:
    without_layer = finished(tmp_path, method="aekt")
    three_classes = finished(tmp_path, method="aekt", layer="serial", class_names=["a", "b", "c"])
    without_checkpoint = finished(tmp_path / "missing", method="aekt", layer="serial")
    groups = {"none": [without_layer], "three": [three_classes], "missing": [without_checkpoint]}
    assert list(serial_layers(groups)) == []


def test_a_layer_that_is_not_square_is_skipped(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"serialization.layer.weight": torch.zeros(2, 3)})
    assert list(serial_layers({"by aekt": [finished(tmp_path, layer="serial")]})) == []


@pytest.mark.parametrize(
    "weight",
    [
        torch.full((2, 2), float("nan")),
        torch.eye(2, dtype=torch.bfloat16),
        torch.eye(2, dtype=torch.bool),
        torch.eye(2).to_sparse(),
    ],
    ids=["not finite", "bfloat16", "bool", "sparse"],
)
def test_weights_that_cannot_be_drawn_are_skipped(weight: torch.Tensor, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"serialization.layer.weight": weight})
    assert list(serial_layers({"by aekt": [finished(tmp_path, layer="serial")]})) == []


def test_a_damaged_checkpoint_is_reported_and_skipped(run: Finished, caplog: pytest.LogCaptureFixture) -> None:
    (run.folder / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert list(serial_layers({"by aekt": [run]})) == []
    assert "The class relations of by aekt are left out:" in caplog.text


def test_only_the_layer_is_known_without_answers() -> None:
    ((title, matrix),) = class_matrices(WEIGHT, None).items()
    assert title == "Serialization layer: w_ij"
    np.testing.assert_array_equal(matrix, [[0, 0.5], [-0.25, 0]])


def test_confusions_stand_beside_the_layer() -> None:
    matrices = class_matrices(WEIGHT, answered(teacher=[1, 1, 1, 0]))
    assert list(matrices) == ["Serialization layer: w_ij", "Teacher: i taken for j", "Student: i taken for j"]
    np.testing.assert_array_equal(matrices["Teacher: i taken for j"], [[0, 1.0], [0.5, 0]])
    np.testing.assert_array_equal(matrices["Student: i taken for j"], [[0, 0.5], [0, 0]])


@pytest.mark.parametrize("teacher", [None, [1, 1, 1, -1]], ids=["without answers", "with an image missing"])
def test_a_teacher_needs_an_answer_to_every_image(teacher: list[int] | None) -> None:
    assert "Teacher: i taken for j" not in class_matrices(WEIGHT, answered(teacher))
