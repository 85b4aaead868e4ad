"""Training commands in processes that can be killed, and comparisons of the files that they leave behind."""

import csv
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from src.setup import assemble
from tests.helpers.commands import run
from tests.helpers.tiny import CLASSES, write_arrays

SMALL = (
    "data=arrays", "data.padding=1", "model=resnet20_to_resnet8", "schedule=quick", "schedule.epochs=3",
    "schedule.batch_size=8", "trainer=cpu", "trainer.log_every_n_steps=2", "gradients.every=4",
    "trainer.check_val_every_n_epoch=2", "logger=csv", "checkpoint_minutes=0",
)  # fmt: skip
"""A short run on the tiny arrays. A checkpoint is saved after every batch."""

context = multiprocessing.get_context("forkserver")
"""Its processes are forked from a server that has imported the project already, which saves their imports."""
context.set_forkserver_preload(["wandb", "src.train", "tests.helpers.interruption"])


class Place:
    """A folder with runs, and the training command in separate processes."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.runs, self.note, self.arguments = path / "runs", path / "note.json", arguments
        path.mkdir()

    def train(self, kill_at: int | None = None, by: int = signal.SIGKILL, *arguments: str) -> dict[str, Any]:
        """Train. The process sends itself the signal `by` at Python call number `kill_at` (None: never).

        Returns its exit code and, unless it was killed, the number of calls and its output: `calls`, `out`, `err`.
        """
        self.note.unlink(missing_ok=True)
        arguments = (*self.arguments, f"runs={self.runs}", *arguments)
        process = context.Process(target=train, args=(arguments, kill_at, by, self.note))
        process.start()
        process.join()
        return json.loads(self.note.read_text()) if self.note.is_file() else {"code": process.exitcode}

    def left(self) -> dict[str, Any]:
        """Collect the contents of all finished runs and of the view stores."""
        found: dict[str, Any] = {}
        for folder in sorted(file.parent for file in self.runs.rglob("result.json")):
            name = str(folder.relative_to(self.runs))
            for file in sorted(folder.rglob("*.ckpt")):
                found[f"{name}/{file.relative_to(folder)}"] = torch.load(file, weights_only=True)
            found[f"{name}/metrics"] = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
            found[f"{name}/student"] = torch.load(folder / "student.pth", weights_only=True)
            found[f"{name}/gradients"] = (folder / "gradients.csv").read_text().splitlines()
            found[f"{name}/result"] = json.loads((folder / "result.json").read_text())
        found["views"] = [f.read_bytes() for f in self.runs.rglob("*.views")]
        return found

    def logged(self) -> set[tuple[str, str, str]]:
        """Return step, name and value of everything that was logged. Steps trained twice are logged twice."""
        rows = [row for file in self.runs.rglob("steps/*/metrics.csv") for row in csv.DictReader(file.open())]
        return {
            (row["step"], name, value) for row in rows for name, value in row.items() if value and name != "data_wait"
        }


def train(arguments: Sequence[str], kill_at: int | None, by: int, note: Path) -> None:
    """Run `python -m src.train` in this process, and send it the signal `by` at Python call number `kill_at`."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), by)

    def make_data(*arguments: Any, **options: Any) -> Any:  # count calls from here, because the run's work begins here
        sys.setprofile(count)
        return original(*arguments, **options)

    original = assemble.make_data
    multiprocessing.set_start_method("fork", force=True)  # data workers are forked, as in a command
    torch.set_num_threads(1)
    with patch.object(assemble, "make_data", make_data):  # `run` executes src/train.py, which imports the patch
        ran = run("train", *arguments)
    sys.setprofile(None)
    note.write_text(json.dumps({"code": ran.code, "calls": calls, "out": ran.out, "err": ran.err}))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """List the places at which two structures differ, apart from times and paths."""
    if where.endswith(("/seconds", "/data_wait", "/waited", "/source", "/dirpath", "/path", "/runs", "/root")):
        return []
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [] if one.keys() == other.keys() else [f"{where}: {list(one)} {list(other)}"]
        return keys + [d for k in one.keys() & other.keys() for d in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        length = [] if len(one) == len(other) else [f"{where}: {len(one)} and {len(other)}"]
        return length + [
            d for i, pair in enumerate(zip(one, other, strict=False)) for d in differences(*pair, f"{where}/{i}")
        ]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{where}: {one.flatten()[:4]} {other.flatten()[:4]}"]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one} {other}"]


def write_sources(folder: Path) -> tuple[str, ...]:
    """Write tiny data and a teacher with random weights. Returns the options that name them."""
    torch.manual_seed(5)
    save_weights(resnet20(CLASSES), folder / "teacher.pth")
    return f"data.path={write_arrays(folder / 'tiny.npz')}", f"teacher.path={folder / 'teacher.pth'}"
