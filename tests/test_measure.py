"""The command `python -m src.measure`: its table, its files and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src import measure
from src.exporting.measuring import Row
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from tests.helpers.commands import assert_refused, run
from tests.helpers.run_folders import taught_by_a_lost_file, taught_by_a_program

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")


def row(name: str, factor: float) -> Row:
    seconds, ratios = {1: 0.01 * factor, 64: 0.4 * factor}, {1: (0.2, 0.25, 0.3), 64: (0.4, 0.5, 0.6)}
    return Row(
        name=name, network=name.partition(",")[0], accuracy=0.5, parameters=int(80_000 * factor),
        macs=int(4e6 * factor), activation_bytes=int(200_000 * factor), file_bytes=int(1000 * factor),
        seconds={1: seconds, 2: {1: 0.008, 64: 0.3}}, ratios={1: ratios, 2: ratios}, memory=20 * factor,
    )  # fmt: skip


def test_the_tables_have_ratios_to_the_first_line() -> None:
    rows = [row("teacher, torch", 1), row("student, torch", 0.5), row("student, onnx", 0.25)]
    text = measure.markdown(rows, "The note.")
    assert text.splitlines() == [
        "| network | parameters | MACs | activations |",
        "| --- | --- | --- | --- |",
        "| teacher | 80k | 4.0M | 200 kB |",
        "| student | 40k, 0.5x | 2.0M, 0.5x | 100 kB, 0.5x |",
        "",
        "| form | top-1 | file | 1 image, 1 thread | 1 image, 2 threads | 64 images, 1 thread | 64 images, 2 threads "
        "| memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| teacher, torch | 50.0 | 1 kB | 10 ms | 8 ms | 400 ms | 300 ms | 20 MB |",
        "| student, torch | 50.0 | 0 kB, 0.5x | 5 ms, 0.25x (0.2 to 0.3) | 8 ms, 0.25x (0.2 to 0.3) "
        "| 200 ms, 0.5x (0.4 to 0.6) | 300 ms, 0.5x (0.4 to 0.6) | 10 MB, 0.5x |",
        "| student, onnx | 50.0 | 0 kB, 0.25x | 2.5 ms, 0.25x (0.2 to 0.3) | 8 ms, 0.25x (0.2 to 0.3) "
        "| 100 ms, 0.5x (0.4 to 0.6) | 300 ms, 0.5x (0.4 to 0.6) | 5 MB, 0.25x |",
        "",
        "The note.",
    ]


def test_the_printed_tables_are_narrow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    measure.show([row("teacher, exported_program", 1000), row("student, exported_program", 123)], "The note.")
    printed = capsys.readouterr().out
    assert "1 thread" in printed
    assert "8 ms, 0.25x" in printed
    assert "123 MB" not in printed  # 2,460 MB
    assert "2,460 MB, 0.12x" in printed
    assert "…" not in printed


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
    rows = measured(tmp_path, f"run={finished_run}", f"data.path={array_file}", "forms=[torchscript]", "threads=2")
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
    assert list(teacher["seconds"]) == ["1", "2"]
    assert all(ratio == [1, 1, 1] for ratios in teacher["ratios"].values() for ratio in ratios.values())
    assert student["activation_bytes"] == script["activation_bytes"] == 3 * 4 * 16 * 32**2


def test_a_program_as_teacher_is_left_out(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    folder = taught_by_a_program(finished_run, tmp_path / "runs")
    rows = measured(tmp_path / "out", f"run={folder}", f"data.path={array_file}", "forms=[torchscript]", "threads=1")
    assert list(rows) == ["student, torch", "student, torchscript"]


@pytest.mark.slow
def test_all_forms_of_a_checkpoint(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    given = ["data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8"]
    file = finished_run / "student.pth"
    forms = "[onnx,exported_program,torchscript-bfloat16]"
    rows = measured(tmp_path, f"checkpoint={file}", *given, f"forms={forms}")
    assert list(rows) == [
        "student, torch", "student, onnx", "student, exported_program", "student, torchscript bfloat16"
    ]  # fmt: skip


@pytest.mark.slow
def test_executorch_files_beside_the_teachers(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    forms = "forms=[executorch,executorch-int8]"
    rows = measured(tmp_path, f"run={finished_run}", f"data.path={array_file}", forms)
    assert list(rows) == [
        "teacher, torch", "teacher, executorch", "student, torch", "student, executorch", "student, executorch int8"
    ]  # fmt: skip
    assert rows["student, executorch"]["accuracy"] == rows["student, torch"]["accuracy"]
    assert rows["student, executorch int8"]["file_bytes"] < 0.5 * rows["student, executorch"]["file_bytes"]
    assert all(0 < row["memory"] < 500 for row in rows.values())


def test_another_teacher_is_refused(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_weights(resnet20(10), tmp_path / "other.pth")
    folder = taught_by_a_lost_file(finished_run, tmp_path / "runs", tmp_path / "gone.pth")
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
