"""The result of a run in W&B, read back from the files of an offline run."""

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
from src.analysis.wandb_results import _log_networks, _summary, class_rows, publish
from src.models.checkpoints import read_state_dict, weights_digest
from src.models.resnet import resnet8
from tests.helpers.commands import run
from tests.helpers.run_folders import TEACHER, make_result


def test_a_class_has_its_accuracy_and_its_most_frequent_mistake() -> None:
    predicted, target = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 0, 0, 1, 1, 1])
    said = Predictions(predicted[:, None], np.ones((6, 1)), target)
    assert class_rows(said, ["a", "b", "c", "d"]) == [
        ["a", 3, pytest.approx(2 / 3), "b"], ["b", 3, pytest.approx(1 / 3), "c"], ["c", 0, None, None],
        ["d", 0, None, None],
    ]  # fmt: skip


def inspect(folder: Path, *options: str) -> str:
    """Let W&B read an offline run, as JSON."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_an_offline_run_has_tables_figures_networks_and_a_summary(
    tmp_path: Path, array_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ran = run(
        "train", "data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug",
        "logger=wandb", "method=aekt", "network@model.teacher=resnet8", f"runs={tmp_path}", f"teacher.store={tmp_path}",
    )  # fmt: skip
    wandb.finish()
    wandb.teardown()  # until then its service may still be writing
    assert ran.code == 0, ran.err
    assert "did not accept" not in ran.out + ran.err
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
    assert begun["run_group"].rpartition("-")[0] == "cifar10/resnet8_to_resnet8/aekt/serial"
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
    """Stand in for a W&B run: remember the artifacts."""

    disabled, offline = False, False

    def __init__(self) -> None:
        super().__init__(made=[], used=[])

    def log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> None:
        self.made.append(artifact)

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.used.append(artifact)


def test_a_teacher_from_an_earlier_run_is_that_runs_artifact(tmp_path: Path) -> None:
    """The two artifacts have the same name and content. How a server draws the lineage was not tried here."""
    network, file = resnet8(4), tmp_path / "student.pth"
    file.write_bytes(b"weights")
    first, second = Run(), Run()
    distiller: Any = SimpleNamespace(student=network)
    _log_networks(first, distiller, make_result("vanilla"), file)  # type: ignore[arg-type]
    teacher = {"name": "resnet8", "sha256": weights_digest(network), "source": str(file), "accuracy": 0.5}
    distiller.student = resnet8(4)
    _log_networks(second, distiller, make_result("kd", teacher=teacher), file)  # type: ignore[arg-type]
    (made,), (used,) = first.made, second.used
    assert first.used == []
    assert (made.name, made.type, made.digest) == (used.name, used.type, used.digest)
    assert second.made[0].name != used.name


def test_an_offline_run_names_its_teacher_in_the_configuration(tmp_path: Path) -> None:
    offline = Run()
    offline.offline, offline.config = True, {}
    distiller: Any = SimpleNamespace(student=resnet8(4))
    _log_networks(offline, distiller, make_result("kd"), tmp_path / "missing.pth")  # type: ignore[arg-type]
    assert offline.used == []
    assert offline.config == {"teacher_sha256": TEACHER["sha256"]}


def test_the_summary_holds_only_values_that_the_run_has() -> None:
    taught, alone = _summary(make_result("kd")), _summary(make_result("vanilla", best_epoch=None))
    assert taught["last/agreement"] == 0.6
    assert (taught["teacher/name"], taught["teacher/accuracy"]) == ("resnet20", 0.7)
    assert (taught["best_epoch/split"], taught["best_epoch/epoch"]) == ("test", 1)
    assert alone == {
        "last/accuracy": 0.5, "last/top5": 0.9, "last/nll": 1.5, "last/ece": 0.1, "seconds": 10.0, "parameters": 80_000,
    }  # fmt: skip


def test_a_server_that_refuses_does_not_fail_a_run(caplog: pytest.LogCaptureFixture) -> None:
    publish(SimpleNamespace(disabled=False), None, None, make_result(), Path(), None)  # type: ignore[arg-type]
    assert "W&B did not accept the run's result" in caplog.text


def test_a_disabled_run_gets_nothing() -> None:
    publish(SimpleNamespace(disabled=True), None, None, make_result(), Path(), None)  # type: ignore[arg-type]
