"""What is measured, in which order, and what the table says of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src import measure
from src.analysis.predictions import macs
from src.errors import UserError
from src.export import Form
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from tests.commands import run

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")


def test_every_round_times_every_form_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each form moves on by a time of its own, twice as long in the second round."""
    now = 0.0
    seen: list[tuple[str, int]] = []

    def form(name: str, seconds: float) -> Any:
        def answer(images: Tensor) -> Tensor:
            nonlocal now
            now += seconds * (1 + (len(seen) > 9))
            seen.append((name, len(images)))
            return images

        return answer

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(measure, "CALLS", 4)
    images = torch.zeros(64, 3, 2, 2, dtype=torch.uint8)
    seconds = measure.interleaved([form("a", 1), form("b", 3)], images, 16, rounds=2)
    assert [name for name, _ in seen] == ["a", "b", *"aaaabbbb" * 2]
    assert {count for _, count in seen} == {16}
    np.testing.assert_allclose(seconds, [[1, 3], [2, 6]])
    np.testing.assert_allclose(seconds[:, 1] / seconds[:, 0], 3)


def test_multiply_accumulates_of_a_known_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 7))
    assert macs(network, torch.zeros(1, 3, 8, 8)) == 8 * 8 * 5 * 3 * 3 * 3 + 5 * 7


def test_quartiles() -> None:
    assert measure.quartiles(np.array([5.0, 1, 2, 3, 4])) == (2, 3, 4)


def row(name: str, factor: float) -> measure.Row:
    return measure.Row(
        name=name, network="student", accuracy=0.5, parameters=int(80_000 * factor), macs=int(4e6 * factor),
        file_bytes=int(1000 * factor), seconds={1: 0.01 * factor, 64: 0.4 * factor},
        ratios={1: (0.2, 0.25, 0.3), 64: (0.4, 0.5, 0.6)}, memory=20 * factor,
    )  # fmt: skip


def test_the_table_is_of_ratios_to_the_first_line() -> None:
    text = measure.markdown([row("teacher, torch", 1), row("student, onnx", 0.5)], "The note.")
    lines = text.splitlines()
    assert lines[2] == "| teacher, torch | 50.0 | 80k | 4.0M | 1 kB | 10 ms |  | 400 ms |  | 160 | 20 MB |"
    assert lines[3] == (
        "| student, onnx | 50.0 | 40k, 0.5x | 2.0M, 0.5x | 0 kB, 0.5x | 5 ms, 0.25x | 0.2 to 0.3 | 200 ms, 0.5x "
        "| 0.4 to 0.6 | 320 | 10 MB, 0.5x |"
    )
    assert text.endswith("\n\nThe note.\n")


@pytest.mark.parametrize(
    ("form", "expected"), [("onnx", ("onnx", "float32")), ("torchscript-bfloat16", ("torchscript", "bfloat16"))]
)
def test_forms(form: str, expected: tuple[str, str]) -> None:
    assert measure.parse(form) == Form(*expected)


@pytest.mark.parametrize("form", ["safetensors", "nonsense", "onnx-int4", "onnx-bfloat16"])
def test_forms_that_are_none(form: str) -> None:
    with pytest.raises(UserError, match=form.rpartition("-")[2]):
        measure.parse(form)


def measured(out: Path, *arguments: object) -> dict[str, Any]:
    ran = run("measure", f"out={out}", "images=60", "calibration_images=40", "rounds=2", *arguments)
    assert (ran.code, ran.err) == (0, "")
    assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "measured.json").read_text())
    table = (out / "table.md").read_text()
    assert all(f"| {row['name']} |" in table for row in found["rows"])
    return {row["name"]: row for row in found["rows"]}


def test_a_run_beside_its_teacher(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    rows = measured(tmp_path, f"run={finished_run}", f"data.path={array_file}", "forms=[torchscript]")
    assert list(rows) == ["teacher, torch", "student, torch", "student, torchscript"]
    result = json.loads((finished_run / "result.json").read_text())
    teacher, student, script = rows.values()
    assert teacher["accuracy"] == pytest.approx(result["teacher"]["accuracy"])
    assert student["accuracy"] == script["accuracy"] == pytest.approx(result["test"]["accuracy"])
    assert student["parameters"] == result["parameters"]["student"]
    assert teacher["parameters"] == result["parameters"]["teacher"]
    assert student["macs"] < teacher["macs"]
    assert student["file_bytes"] < teacher["file_bytes"]
    assert all(0 < value < 2000 for value in (teacher["memory"], student["memory"], script["memory"]))
    assert all(ratio == [1, 1, 1] for ratio in teacher["ratios"].values())


@pytest.mark.slow
def test_all_forms_of_a_checkpoint(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    given = ["data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8"]
    file = finished_run / "student.pth"
    forms = "[onnx,exported_program,torchscript-bfloat16]"
    rows = measured(tmp_path, f"checkpoint={file}", *given, f"forms={forms}")
    assert list(rows) == [
        "student, torch", "student, onnx", "student, exported_program", "student, torchscript bfloat16"
    ]  # fmt: skip


def test_another_teacher_is_refused(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_weights(resnet20(10), tmp_path / "other.pth")
    folder = tmp_path / "runs" / finished_run.relative_to(finished_run.parents[3])
    shutil.copytree(finished_run, folder)
    about = json.loads((folder / "run.json").read_text())
    about["teacher"]["source"] = str(tmp_path / "gone.pth")
    (folder / "run.json").write_text(json.dumps(about))
    for arguments, phrase in (
        ([f"teacher.path={tmp_path / 'other.pth'}"], "is not the teacher of"),
        ([], "gone.pth is no file: give a checkpoint of resnet20"),
    ):
        ran = run("measure", f"run={folder}", f"data.path={array_file}", f"out={tmp_path / 'out'}", *arguments)
        assert ran.code == 1
        (line,) = ran.err.splitlines()
        assert line.startswith("error: ")
        assert phrase in line
    assert not (tmp_path / "out").exists()


def test_help_is_a_guide() -> None:
    ran = run("measure", "--help")
    assert ran.code == 0
    assert "python -m src.measure run=" in ran.out
