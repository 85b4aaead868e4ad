"""Run folders with given results, without training."""

import json
from pathlib import Path
from typing import Any

TEACHER = {"name": "resnet20", "sha256": "5e" * 32, "accuracy": 0.7}


def write_run(
    root: Path, method: str = "kd", seed: int = 0, accuracy: float = 0.5, layer: str = "none", **changes: Any
) -> Path:
    """A finished run of resnet8 with only what a report reads; `changes` of its result, `settings` added to its own."""
    alone = method == "vanilla"
    settings = {
        "data": {"name": "colours"},
        "model": {"student": changes.get("student", "resnet8")},
        "schedule": {"epochs": 3, "learning_rate": 0.1},
        "trainer": {"max_epochs": 3},
        "method": {"name": method},
        **changes.pop("settings", {}),
    }
    result = {
        "test": {"accuracy": accuracy, "top5": 0.9, "nll": 1.5, "ece": 0.1, **({} if alone else {"agreement": 0.6})},
        "best_epoch": {"split": "test", "epoch": 1, "accuracy": accuracy + 0.01},
        "seconds": 10.0,
        "parameters": {"student": 80_000, "teacher": None if alone else 270_000, "training_only": 0},
        "data": "colours",
        "method": method,
        "serialization": layer,
        "teacher": None if alone else TEACHER,
        "student": "resnet8",
        "seed": seed,
        "epochs": 3,
        "train_images": 200,
        "class_names": ["red", "green"],
        "settings": settings,
        **changes,
    }
    folder = root / "colours" / "pair" / method / f"{layer}-seed{seed}-{len(list(root.rglob('run.json'))):08x}"
    folder.mkdir(parents=True)
    about = {"fingerprints": {"code": "c0de"}, "versions": {"torch": "2.14", "commit": "abc"}, "seed": seed}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text("trainer: {max_epochs: 3}\n")
    rows = [f"{epoch},{accuracy - 0.1 * (2 - epoch)}" for epoch in range(3)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,test/accuracy", *rows]) + "\n")
    (folder / "result.json").write_text(json.dumps(result))
    return folder
