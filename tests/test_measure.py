"""The command `python -m src.measure`: its table, its files and its refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from src import measure
from src.exporting.measuring import Row
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from tests.helpers.commands import assert_refused, run

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")


def row(name: str, factor: float) -> Row:
    return Row(
        name=name, network="student", accuracy=0.5, parameters=int(80_000 * factor), macs=int(4e6 * factor),
        file_bytes=int(1000 * factor), seconds={1: 0.01 * factor, 64: 0.4 * factor},
        ratios={1: (0.2, 0.25, 0.3), 64: (0.4, 0.5, 0.6)}, memory=20 * factor,
    )  # fmt: skip


def test_the_table_has_ratios_to_the_first_line() -> None:
    text = measure.markdown([row("teacher, torch", 1), row("student, onnx", 0.5)], "The note.")
    lines = text.splitlines()
    assert lines[2] == "| teacher, torch | 50.0 | 80k | 4.0M | 1 kB | 10 ms |  | 400 ms |  | 160 | 20 MB |"
    assert lines[3] == (
        "| student, onnx | 50.0 | 40k, 0.5x | 2.0M, 0.5x | 0 kB, 0.5x | 5 ms, 0.25x | 0.2 to 0.3 | 200 ms, 0.5x "
        "| 0.4 to 0.6 | 320 | 10 MB, 0.5x |"
    )
    assert text.endswith("\n\nThe note.\n")


def measured(out: Path, *arguments: object) -> dict[str, Any]:
    """Run the command, check its files, and return the measurements by name."""
    ran = run("measure", f"out={out}", "images=60", "calibration_images=40", "rounds=2", *arguments)
    assert (ran.code, ran.err) == (0, "")
    assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "measured.json").read_text())
    table = (out / "table.md").read_text()
    assert all(f"| {row['name']} |" in table for row in found["rows"])
    assert found["note"] in table
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
    record = json.loads((folder / "run.json").read_text())
    record["teacher"]["source"] = str(tmp_path / "gone.pth")
    (folder / "run.json").write_text(json.dumps(record))
    for arguments, phrase in (
        ([f"teacher.path={tmp_path / 'other.pth'}"], "is not the teacher of"),
        ([], "gone.pth does not exist: give a checkpoint of resnet20"),
    ):
        ran = run("measure", f"run={folder}", f"data.path={array_file}", f"out={tmp_path / 'out'}", *arguments)
        assert_refused(ran, phrase)
    assert not (tmp_path / "out").exists()


def test_help_is_a_guide() -> None:
    ran = run("measure", "--help")
    assert ran.code == 0
    assert "python -m src.measure run=" in ran.out
