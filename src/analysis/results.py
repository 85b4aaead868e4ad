"""Run folders read back: what finished, by method and seed."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from src.run import read_history


@dataclass(frozen=True)
class Finished:
    """One finished run."""

    folder: Path
    result: dict[str, Any]

    @property
    def label(self) -> str:
        """The method, with its serialization where it has one."""
        layer = self.result["serialization"]
        return self.result["method"] + ("" if layer == "none" else f", {layer}")

    @property
    def name(self) -> str:
        """The student and what it was trained by."""
        return (
            f"{self.result['student']} by {self.label}" if self.result["teacher"] else f"{self.result['student']} alone"
        )

    @property
    def setting(self) -> str:
        """All that decides the result but the seed: runs with the same setting are repetitions."""
        return json.dumps(self.result["settings"], sort_keys=True)

    def history(self) -> list[dict[str, float]]:
        """A row an epoch."""
        return read_history(self.folder)


def find_runs(root: Path) -> tuple[list[Finished], list[Path]]:
    """All finished runs below a folder, and the folders of those that are not finished or not readable."""
    finished, others = [], []
    for file in sorted(root.rglob("run.json")):
        try:
            finished.append(Finished(file.parent, json.loads((file.parent / "result.json").read_text())))
        except (OSError, ValueError):
            others.append(file.parent)
    return finished, others


def group(runs: Iterable[Finished]) -> list[list[Finished]]:
    """Repetitions together: networks alone first, then by method as named."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    order = {"vanilla": 0, "kd": 1, "dkd": 2}
    return sorted(
        groups.values(),
        key=lambda runs: (
            order.get(runs[0].result["method"], 3),
            -runs[0].result["parameters"]["student"],
            runs[0].label,
        ),
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"
