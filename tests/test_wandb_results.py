"""What reaches W&B, read back from what an offline run wrote."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb

from src.analysis.predictions import Predictions
from src.models.checkpoints import read_state_dict, weights_digest
from src.models.resnet import resnet8
from src.wandb_results import _log_networks, class_rows, publish
from tests.commands import run


def test_rows_of_classes() -> None:
    predicted, target = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 0, 0, 1, 1, 1])
    said = Predictions(predicted[:, None], np.ones((6, 1)), target)
    assert class_rows(said, ["a", "b", "c", "d"]) == [
        ["a", 3, pytest.approx(2 / 3), "b"], ["b", 3, pytest.approx(1 / 3), "c"], ["c", 0, None, None],
        ["d", 0, None, None],
    ]  # fmt: skip


def inspect(folder: Path, *options: str) -> str:
    """W&B's own reading of an offline run, as JSON."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_run_offline(tmp_path: Path, array_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ran = run(
        "train", "data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug",
        "logger=wandb", "method=aekt", "network@model.teacher=resnet8", f"runs={tmp_path}", f"teacher.store={tmp_path}",
    )  # fmt: skip
    wandb.finish()
    wandb.teardown()  # until then its service may still be writing
    assert ran.code == 0, ran.err
    assert "did not take" not in ran.out + ran.err
    (folder,) = tmp_path.glob("*/*/aekt/serial-*")
    (offline,) = folder.glob("wandb/offline-run-*")
    result = json.loads((folder / "result.json").read_text())

    media = {
        file.name.rpartition("_")[0].rpartition("_")[0] for file in offline.rglob("*") if file.parts[-2] == "results"
    }
    assert media == {"classes", "strongest_relations", "calibration", "class_relations"}
    (table,) = offline.rglob("classes_*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["class", "images", "accuracy", "most often taken for"]
    assert [row[0] for row in rows["data"]] == [f"colour {i}" for i in range(10)]

    records = [json.loads(line) for line in inspect(offline).splitlines()]
    (begun,) = [record["run"] for record in records if record["type"] == "run"]
    assert begun["run_group"] == "cifar10/resnet8_to_resnet8/aekt/serial"
    assert set(begun["tags"]) == {"cifar10", "resnet8_to_resnet8", "aekt", "serial"}
    student = resnet8(10)
    student.load_state_dict(read_state_dict(folder / "student.pth"))
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert f"resnet8-{weights_digest(student)[:12]}" in {artifact["name"] for artifact in artifacts}

    read = json.loads(inspect(offline, "--summary"))
    assert read["config"]["method"]["name"] == "aekt"
    assert read["config"]["teacher_sha256"] == result["teacher"]["sha256"]
    summary = read["summary"]
    assert summary["last/accuracy"] == pytest.approx(result["test"]["accuracy"])
    assert summary["parameters"] == result["parameters"]["student"]
    assert {"results/classes", "results/class_relations", "train/tckd_epoch", "best_epoch/accuracy"} <= summary.keys()


class Run(SimpleNamespace):
    """Remembers the artifacts that it is given."""

    disabled, offline = False, False

    def __init__(self) -> None:
        super().__init__(made=[], used=[])

    def log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> None:
        self.made.append(artifact)

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.used.append(artifact)


def test_a_teacher_that_a_run_made_is_that_runs_student(tmp_path: Path) -> None:
    """Lineage by name and content; that a server draws it so was not tried here."""
    network, file = resnet8(4), tmp_path / "student.pth"
    file.write_bytes(b"weights")
    result: dict[str, Any] = {"student": "resnet8", "seed": 0, "test": {"accuracy": 0.5}, "teacher": None}
    first, second = Run(), Run()
    distiller: Any = SimpleNamespace(student=network)
    _log_networks(first, distiller, result, file)  # type: ignore[arg-type]
    teacher = {"name": "resnet8", "sha256": weights_digest(network), "source": str(file), "accuracy": 0.5}
    distiller.student = resnet8(4)
    _log_networks(second, distiller, {**result, "teacher": teacher}, file)  # type: ignore[arg-type]
    (made,), (used,) = first.made, second.used
    assert first.used == []
    assert (made.name, made.type, made.digest) == (used.name, used.type, used.digest)
    assert second.made[0].name != used.name


def test_a_server_that_refuses_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    publish(SimpleNamespace(disabled=False), None, None, {}, Path(), None)  # type: ignore[arg-type]
    assert "W&B did not take the run's result" in caplog.text


def test_the_workspace_is_one_that_wandb_accepts() -> None:
    pytest.importorskip("wandb_workspaces")
    from src.wandb_workspace import workspace

    made = workspace("somebody", "aekt")
    text = made._to_model().model_dump_json(by_alias=True)
    for name in ("test/accuracy", "last/ece", "results/class_relations", "Methods and seeds"):
        assert name in text
    assert type(made)._from_model(made._to_model()).sections[0].name == made.sections[0].name
