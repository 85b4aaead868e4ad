"""Run folders with given results, made without training."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from src.analysis.results import Finished
from src.runs.result import Result, RunRecord

TEACHER: dict[str, Any] = {"name": "resnet20", "sha256": "5e" * 32, "accuracy": 0.7}
WITHOUT_TEACHER = ("vanilla", "tfkd", "dml")


def make_result(
    method: str = "kd", seed: int = 0, accuracy: float = 0.5, layer: str = "none", **changes: Any
) -> Result:
    """Make the result of a run of resnet8. `changes` replace values. `settings` are added to the defaults."""
    teacher = changes.get("teacher", None if method in WITHOUT_TEACHER else TEACHER)
    settings = {
        "data": {"name": "colours"},
        "model": {"student": changes.get("student", "resnet8")},
        "schedule": {"epochs": 3, "learning_rate": 0.1},
        "trainer": {"max_epochs": 3},
        "method": {"name": method},
        **changes.pop("settings", {}),
    }
    test = {"accuracy": accuracy, "top5": 0.9, "nll": 1.5, "ece": 0.1, **({"agreement": 0.6} if teacher else {})}
    values = {
        "test": test,
        "best_epoch": {"split": "test", "epoch": 1, "accuracy": accuracy + 0.01},
        "seconds": 10.0,
        "parameters": {"student": 80_000, "teacher": 270_000 if teacher else None, "training_only": 0},
        "data": "colours",
        "method": method,
        "serialization": layer,
        "teacher": teacher,
        "student": "resnet8",
        "seed": seed,
        "epochs": 3,
        "train_images": 200,
        "class_names": ["red", "green"],
        "settings": settings,
        **changes,
    }
    return Result.model_validate(values)


def finished(folder: Path = Path(), **options: Any) -> Finished:
    """Make a finished run in memory. `options` are the arguments of `make_result`."""
    return Finished(folder, make_result(**options))


def write_run(
    root: Path, method: str = "kd", seed: int = 0, accuracy: float = 0.5, layer: str = "none", **changes: Any
) -> Path:
    """Write the folder of a finished run, with only the files that a report reads. Returns the folder."""
    result = make_result(method, seed, accuracy, layer, **changes)
    folder = root / "colours" / "pair" / method / f"{layer}-seed{seed}-{len(list(root.rglob('run.json'))):08x}"
    folder.mkdir(parents=True)
    started = {
        "fingerprints": {"code": "c0de", "data": "da7a", "teacher": None},
        "versions": {"torch": "2.14", "commit": "abc"},
        "seed": seed,
    }
    RunRecord.model_validate(started).write(folder / "run.json")
    (folder / "config.yaml").write_text("trainer: {max_epochs: 3}\n")
    rows = [f"{epoch},{accuracy - 0.1 * (2 - epoch)}" for epoch in range(3)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,test/accuracy", *rows]) + "\n")
    result.write(folder / "result.json")
    return folder


def copied(run: Path, place: Path) -> Path:
    """Copy a run into the folder `place`, below the names of its data, networks and method."""
    folder = place / run.relative_to(run.parents[3])
    shutil.copytree(run, folder)
    return folder


def taught_by_a_lost_file(run: Path, place: Path, file: Path) -> Path:
    """Copy a run into the folder `place`, and let its record say that its teacher was `file`."""
    folder = copied(run, place)
    record = json.loads((folder / "run.json").read_text())
    record["teacher"]["source"] = str(file)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def taught_by_a_program(run: Path, place: Path) -> Path:
    """Copy a run into the folder `place`, and let its configuration say that its teacher was a program."""
    folder = copied(run, place)
    config = (folder / "config.yaml").read_text()
    found = re.sub(r"(teacher:\n  path:) .*", rf"\1 {place / 'gone.pt2'}", config)
    (folder / "config.yaml").write_text(found.replace("allow_program: false", "allow_program: true"))
    return folder
