"""A temporary folder for runs and teachers, and the commands that train and evaluate in it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.commands import Ran, run

ROOT = Path(__file__).parents[2]


SMALL = (
    "data=cifar10", "model=resnet20_to_resnet8", "trainer=debug", "start_over=false", "logger=none",
    "schedule.batch_size=8",
)  # fmt: skip
"""Options for two steps of every loop. `start_over=false` finds a finished run again, as other trainers do."""

RUNS = (("vanilla", "none"), ("kd", "none"), ("kd", "parallel"), ("dkd", "serial"), ("aekt", "serial"))
"""Method and serialization layer of the runs of the fixture `finished`."""


class Place:
    """A folder for runs and teachers, and the commands in it."""

    def __init__(self, path: Path, data: Path) -> None:
        self.path, self.data, self.runs = path, data, path / "runs"

    def train(self, *arguments: object) -> Ran:
        """Train two steps on the small array file. Arguments override the defaults."""
        here = (f"data.path={self.data}", f"runs={self.runs}", f"teacher.store={self.path / 'teachers'}")
        flags = [argument for argument in arguments if str(argument).startswith("-")]
        return run("train", *flags, *SMALL, *here, *(argument for argument in arguments if argument not in flags))

    def evaluate(self, *arguments: object) -> Ran:
        """Evaluate on the small array file."""
        return run("evaluate", f"data.path={self.data}", *arguments)

    def folders(self, method: str = "*", layer: str = "*") -> list[Path]:
        """List the run folders of a method, of all networks."""
        return sorted(file.parent for file in self.runs.glob(f"*/*/{method}/{layer}-*/run.json"))

    def folder(self, method: str, layer: str = "*") -> Path:
        """Return the only run folder of a method."""
        (folder,) = self.folders(method, layer)
        return folder

    def contents(self) -> dict[Path, tuple[bytes, int]]:
        """Return the bytes and the modification time of every file."""
        files = (file for file in self.path.rglob("*") if file.is_file())
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def result_of(folder: Path) -> dict[str, Any]:
    """Read a run's result.json."""
    return json.loads((folder / "result.json").read_text())


class Hostile:
    """An object that creates the file `executed` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.folder / 'executed'}",)
