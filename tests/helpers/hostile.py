"""Commands on damaged run folders, and an index of shards to damage."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.commands import Ran, run
from tests.helpers.place import Place


def run_on(place: Place, command: str, folder: Path) -> Ran:
    """Run a command on a run folder of AEKT in `place`.

    `command` is evaluate, checkpoint (evaluate the student's weights alone), export, report, train, or resume (train as
    if the run were not finished).
    """
    if command == "evaluate":
        return place.evaluate(f"run={folder}")
    if command == "checkpoint":
        model = "network@model.student=resnet8"
        return place.evaluate("data=cifar10", model, f"checkpoint={folder / 'student.pth'}")
    if command == "export":
        out = f"out={place.path / 'export'}"
        return run("export", f"run={folder}", f"data.path={place.data}", out, "format=safetensors", "images=20")
    if command == "report":
        return run("report", f"runs={place.runs}", f"out={place.path / 'reports'}", f"data_root={place.path}")
    if command == "resume":
        (folder / "result.json").unlink(missing_ok=True)
    return place.train("method=aekt", "network@model.teacher=resnet8")


def write_shard_index(file: Path, digest: str = "0" * 64) -> None:
    """Write an index of shards as `src.convert` does, for four photos of each split."""
    columns: dict[str, Any] = {
        f"{split}_{name}": np.arange(4)
        for split in ("train", "test")
        for name in ("labels", "shards", "offsets", "sizes")
    }
    np.savez_compressed(file, class_names=np.array(list("abcd")), digest=np.array(digest), **columns)
