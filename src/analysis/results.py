"""Run folders read back: what finished, what did not and why, and which of them can be compared."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import pydantic
import yaml
from filelock import FileLock, Timeout

from src.run import read_history

Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


class _Scores(pydantic.BaseModel):
    accuracy: Fraction
    top5: Fraction
    nll: float
    ece: float
    agreement: float | None = None


class _Best(pydantic.BaseModel):
    split: str
    epoch: int
    accuracy: Fraction


class _Teacher(pydantic.BaseModel):
    name: str
    sha256: str
    accuracy: Fraction


class _Result(pydantic.BaseModel):
    """What a report reads of result.json: anything else is no result of this project."""

    test: _Scores
    best_epoch: _Best | None
    seconds: float
    parameters: dict[str, int | None]
    data: str
    method: str
    serialization: str
    student: str
    teacher: _Teacher | None
    seed: int
    epochs: int
    train_images: int
    class_names: list[str]
    superclasses: list[str] | None = None
    settings: dict[str, Any]


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
    def pair(self) -> str:
        """Teacher and student, or the student alone."""
        teacher = self.result["teacher"]
        return f"{teacher['name']} to {self.result['student']}" if teacher else self.result["student"]

    @property
    def setting(self) -> str:
        """All that decides the result but the seed: runs with the same setting are repetitions."""
        teacher = self.result["teacher"]
        weights = teacher and teacher["sha256"][:12]
        return json.dumps({**self.result["settings"], "teacher_weights": weights}, sort_keys=True)

    @property
    def protocol(self) -> str:
        """Data and budget: runs under the same protocol can be compared, whatever their networks and methods."""
        settings = self.result["settings"]
        schedule = settings.get("schedule")
        if isinstance(schedule, dict):  # the rate is the network's own, the warm-up a method's
            schedule = {k: v for k, v in schedule.items() if k not in ("learning_rate", "distillation_warmup")}
        decides = {key: settings.get(key) for key in ("data", "trainer", "channels_last")}
        decides |= {"schedule": schedule, **{key: self.result[key] for key in ("train_images", "epochs")}}
        return json.dumps(decides, sort_keys=True)

    @property
    def budget(self) -> str:
        """Data and budget in words."""
        result = self.result
        return f"{result['data']}, {result['train_images']:,} training images, {result['epochs']} epochs"

    def history(self) -> list[dict[str, float]]:
        """A row an epoch."""
        return read_history(self.folder)


@dataclass(frozen=True)
class Unfinished:
    """A folder that holds no result to count, and why."""

    folder: Path
    state: str
    """running, stopped, failed, damaged, foreign or a copy."""
    detail: str


def find_runs(root: Path) -> tuple[list[Finished], list[Unfinished]]:
    """All runs below a folder. A run that is there twice counts once."""
    finished: dict[tuple[str, int], Finished] = {}
    others = []
    for folder in sorted({file.parent for name in ("run.json", "result.json") for file in root.rglob(name)}):
        found = _read(folder)
        if isinstance(found, Unfinished):
            others.append(found)
            continue
        first = finished.setdefault((found.setting, found.result["seed"]), found)
        if first is not found:
            others.append(Unfinished(folder, "a copy", f"of {first.folder.relative_to(root)}, which counts"))
    return list(finished.values()), others


def _read(folder: Path) -> Finished | Unfinished:
    try:
        history = read_history(folder)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return Unfinished(folder, "damaged", f"metrics.csv cannot be read ({type(error).__name__})")
    if not (folder / "result.json").is_file():
        return _without_result(folder, history)
    try:
        result = json.loads((folder / "result.json").read_text())
        _Result.model_validate(result)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return Unfinished(folder, "foreign", f"result.json is not what a run writes: {where}: {first['msg']}")
    except (OSError, ValueError, RecursionError) as error:
        return Unfinished(folder, "damaged", f"result.json cannot be read ({type(error).__name__})")
    return Finished(folder, result)


def _without_result(folder: Path, history: Sequence[Mapping[str, float]]) -> Unfinished:
    try:
        about = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        return Unfinished(folder, "damaged", f"run.json cannot be read ({type(error).__name__})")
    if not isinstance(about, dict) or "fingerprints" not in about:
        return Unfinished(folder, "foreign", "run.json is not what a run writes")
    done = f"{len(history)} of {_epochs(folder)} epochs done"
    failure = folder / "failure.txt"
    if failure.is_file():
        return Unfinished(folder, "failed", f"{done}: {' '.join(failure.read_text(errors='replace').split())}")
    return Unfinished(folder, "running" if _is_locked(folder) else "stopped", done)


def _epochs(folder: Path) -> str:
    """How many epochs the run wants, as its configuration says."""
    try:
        return str(int(yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return "?"


def _is_locked(folder: Path) -> bool:
    """Whether a process on this machine holds the run's lock (`src/resume.py`)."""
    file = folder.with_name(f".{folder.name}.lock")
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def by_protocol(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """The runs that can be compared with one another, by data and budget in words."""
    together: dict[str, list[Finished]] = {}
    for run in runs:
        together.setdefault(run.protocol, []).append(run)
    return _told_apart(list(together.values()), lambda run: run.budget, lambda run: run.protocol)


def group(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """Repetitions together, by seed, under names that differ: networks alone first, then by method as named.

    Groups of one name but different settings get those settings into the name.
    """
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    order = {"vanilla": 0, "kd": 1, "dkd": 2}
    ordered = sorted(
        groups.values(),
        key=lambda runs: (
            order.get(runs[0].result["method"], 3),
            -(runs[0].result["parameters"].get("student") or 0),
            runs[0].label,
            runs[0].setting,
        ),
    )
    pairs = {runs[0].pair for runs in ordered if runs[0].result["teacher"]}
    students = {runs[0].result["student"] for runs in ordered if runs[0].result["teacher"]}

    def name(run: Finished) -> str:
        several = run.result["teacher"] and len(pairs) > len(students)
        return f"{run.name} from {run.result['teacher']['name']}" if several else run.name

    return _told_apart(
        [sorted(runs, key=lambda run: run.result["seed"]) for runs in ordered], name, lambda run: run.setting
    )


def _told_apart(
    groups: Sequence[list[Finished]], name: Callable[[Finished], str], decides: Callable[[Finished], str]
) -> dict[str, list[Finished]]:
    """Groups by name; those that share one get what differs in what `decides` (JSON) into it."""
    named: dict[str, list[Finished]] = {}
    for runs in groups:
        mine = _flat(json.loads(decides(runs[0])))
        alike = [_flat(json.loads(decides(other[0]))) for other in groups if name(other[0]) == name(runs[0])]
        keys = sorted({key for settings in alike for key in settings if len({s.get(key) for s in alike}) > 1})
        differing = ", ".join(f"{key.rpartition('.')[2]}={mine.get(key, '-')}" for key in keys)
        text = f"{name(runs[0])} ({differing})" if differing else name(runs[0])
        named[text if text not in named else f"{text} #{len(named)}"] = runs
    return named


def _flat(node: Any, name: str = "") -> dict[str, str]:
    """Leaves of nested settings as text, by dotted name."""
    if not isinstance(node, (dict, list)):
        return {name: str(node)}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {k: v for key, value in items for k, v in _flat(value, f"{name}.{key}" if name else str(key)).items()}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"
