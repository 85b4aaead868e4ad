"""Read run folders: the finished runs, the reasons why others do not count, and the groups that can be compared."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import pydantic
import yaml

from src.runs.history import read_history
from src.runs.lock import is_locked
from src.runs.result import Record, Result, RunRecord, TeacherFacts, describe_damage

CHOOSE_TEACHER = ("path", "source", "seed", "method", "serialization", "class_map")
"""The options of `teacher` that choose its weights and classes. A result holds what they chose."""
METHOD_ORDER = {"vanilla": 0, "kd": 1, "dkd": 2}
"""Methods that come first in tables and figures, in this order."""


@dataclass(frozen=True)
class Finished:
    """One finished run."""

    folder: Path
    result: Result
    data: str | None = None
    """Digest of the data. None if run.json does not tell it."""
    code: str | None = None
    """Digest of the code that trained the run, likewise."""

    @property
    def label(self) -> str:
        """The method, with its serialization layer if it has one."""
        layer = self.result.serialization
        return self.result.method + ("" if layer == "none" else f", {layer}")

    @property
    def name(self) -> str:
        """The student, and the method that trained it."""
        student = self.result.student
        return f"{student} alone" if self.label == "vanilla" else f"{student} by {self.label}"

    @property
    def pair(self) -> str:
        """Teacher and student, or the student alone."""
        teacher = self.result.teacher
        return f"{teacher.name} to {self.result.student}" if teacher else self.result.student

    @property
    def accuracy(self) -> float:
        """The test accuracy after the last epoch, in %."""
        return 100 * self.result.test.accuracy

    @property
    def setting(self) -> str:
        """Everything that decides the result except the seed: runs of one setting are repetitions.

        The data, the teacher and the code are told by their digests. The name and place of their files do not count.
        """
        settings, teacher = dict(self.result.settings), self.result.teacher
        if teacher:
            settings["teacher"] = self._teacher_settings(teacher)
            model, network = _node(settings, "model"), _node(_node(settings, "model"), "teacher")
            named = {"teacher": _without(network, ("name",))} if network else {}  # a program is named after its file
            settings["model"] = _without(model, ("name",)) | named
        weights = teacher.sha256[:12] if teacher else None
        digests = {"teacher_weights": weights, "data_digest": self._short_digest, "code": (self.code or "")[:7]}
        return json.dumps({**settings, **digests}, sort_keys=True)

    def _teacher_settings(self, teacher: TeacherFacts) -> dict[str, Any]:
        """Return how the teacher computes: options, and in place of some of them the facts that came of them."""
        facts = teacher.model_dump(include={"mean", "std", "image_size", "class_index"}, exclude_none=True)
        return _without(_node(self.result.settings, "teacher"), CHOOSE_TEACHER) | facts

    @property
    def _short_digest(self) -> str | None:
        return self.data[:12] if self.data else None

    @property
    def protocol(self) -> str:
        """Data and budget: runs of one protocol can be compared, whatever their networks and methods."""
        settings = self.result.settings
        schedule = settings.get("schedule")
        if isinstance(schedule, dict):  # the learning rate belongs to the network, the warm-up to the method
            schedule = {k: v for k, v in schedule.items() if k not in ("learning_rate", "distillation_warmup")}
        decides = {key: settings.get(key) for key in ("data", "trainer", "channels_last")}
        budget = {"train_images": self.result.train_images, "epochs": self.result.epochs_wanted or self.result.epochs}
        return json.dumps(
            {**decides, "schedule": schedule, "data_digest": self._short_digest, **budget}, sort_keys=True
        )

    @property
    def budget(self) -> str:
        """Data and budget in words."""
        result = self.result
        epochs = f"{result.epochs_wanted or result.epochs} epochs"
        early = "" if result.end == "the last epoch" else ", ended early"
        images = f"{result.train_images:,} training images"
        if result.settings.get("data", {}).get("unlabelled") or result.unlabelled_images:
            images += f" with labels, {result.unlabelled_images:,} without"
        return f"{result.data}, {images}, {epochs}{early}"

    def history(self) -> list[dict[str, float]]:
        """Read the run's metrics, one row per epoch."""
        return read_history(self.folder)


@dataclass(frozen=True)
class Unfinished:
    """A folder without a usable result, and the reason."""

    folder: Path
    state: str
    """running, stopped, failed, damaged, foreign or a copy."""
    detail: str


def find_runs(root: Path) -> tuple[list[Finished], list[Unfinished]]:
    """Find all runs below a folder. Returns the finished runs, and the other folders with the reason.

    Of two copies of a run, one counts. The other is listed among the other folders.
    """
    finished: dict[tuple[str, int], Finished] = {}
    others = []
    for folder in sorted({file.parent for name in ("run.json", "result.json") for file in root.rglob(name)}):
        found = _read_run(folder)
        if isinstance(found, Unfinished):
            others.append(found)
            continue
        first = finished.setdefault((found.setting, found.result.seed), found)
        if first is not found:
            others.append(Unfinished(folder, "a copy", f"the run counts once, as {first.folder.relative_to(root)}"))
    return list(finished.values()), others


def _read_run(folder: Path) -> Finished | Unfinished:
    try:
        history = read_history(folder)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return Unfinished(folder, "damaged", f"metrics.csv cannot be read ({type(error).__name__})")
    if (folder / "result.json").is_file():
        result, record = _read_record(Result, folder, "result.json"), _read_record(RunRecord, folder, "run.json")
        if isinstance(result, Unfinished):
            return result
        if not isinstance(record, RunRecord):
            return Finished(folder, result)
        return Finished(folder, result, record.fingerprints.data, record.fingerprints.code)
    return _unfinished(folder, history)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def _read_record(kind: type[AnyRecord], folder: Path, name: str) -> AnyRecord | Unfinished:
    try:
        return kind.model_validate_json((folder / name).read_bytes())
    except pydantic.ValidationError as error:
        state = "damaged" if error.errors()[0]["type"] == "json_invalid" else "foreign"
        return Unfinished(folder, state, f"{name} {describe_damage(error)}")
    except OSError as error:
        return Unfinished(folder, "damaged", f"{name} cannot be read ({type(error).__name__})")


def _unfinished(folder: Path, history: Sequence[Mapping[str, float]]) -> Unfinished:
    record = _read_record(RunRecord, folder, "run.json")
    if isinstance(record, Unfinished):
        return record
    done = f"{len(history)} of {_wanted_epochs(folder)} epochs done"
    failure = folder / "failure.txt"
    if failure.is_file():
        reason = failure.read_text(encoding="utf-8", errors="replace")
        return Unfinished(folder, "failed", f"{done}: {' '.join(reason.split())}")
    return Unfinished(folder, "running" if is_locked(folder) else "stopped", done)


def _wanted_epochs(folder: Path) -> str:
    """Read the number of epochs from the run's configuration. Returns "?" if it cannot be read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return str(int(config["trainer"]["max_epochs"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return "?"


def by_protocol(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """Group the runs that can be compared with one another. The names describe data and budget."""
    together: dict[str, list[Finished]] = {}
    for run in runs:
        together.setdefault(run.protocol, []).append(run)
    # The first run gives its name to the group. Networks that were trained alone left images without labels unread.
    groups = [sorted(each, key=lambda run: -run.result.unlabelled_images) for each in together.values()]
    return _name_groups(groups, lambda run: run.budget, lambda run: run.protocol)


def group(runs: Iterable[Finished]) -> dict[str, list[Finished]]:
    """Group the repetitions of each setting, ordered by seed, under distinct names.

    Networks that were trained alone come first, then the methods.
    """
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    ordered = sorted(groups.values(), key=lambda runs: _place(runs[0]))
    pairs = {runs[0].pair for runs in ordered if runs[0].result.teacher}
    students = {runs[0].result.student for runs in ordered if runs[0].result.teacher}

    def name(run: Finished) -> str:
        teacher = run.result.teacher
        return f"{run.name} from {teacher.name}" if teacher and len(pairs) > len(students) else run.name

    by_seed = [sorted(runs, key=lambda run: run.result.seed) for runs in ordered]
    return _name_groups(by_seed, name, lambda run: run.setting)


def _place(run: Finished) -> tuple[int, int, str, str]:
    return METHOD_ORDER.get(run.result.method, 3), -run.result.parameters.student, run.label, run.setting


def _name_groups(
    groups: Sequence[list[Finished]], name: Callable[[Finished], str], decides: Callable[[Finished], str]
) -> dict[str, list[Finished]]:
    """Name the groups. Where names collide, append the settings that differ. `decides` returns them as JSON."""
    named: dict[str, list[Finished]] = {}
    for runs in groups:
        mine = _flat(json.loads(decides(runs[0])))
        alike = [_flat(json.loads(decides(other[0]))) for other in groups if name(other[0]) == name(runs[0])]
        keys = sorted({key for settings in alike for key in settings if len({s.get(key) for s in alike}) > 1})
        short = {key: key.rpartition(".")[2] for key in keys}
        differing = ", ".join(f"{short[key]}={mine[key]}" if key in mine else f"no {short[key]}" for key in keys)
        text = f"{name(runs[0])} ({differing})" if differing else name(runs[0])
        named[text if text not in named else f"{text} #{len(named)}"] = runs
    return named


def _flat(node: Any, name: str = "") -> dict[str, str]:
    """Flatten nested settings to text by dotted name.

    >>> _flat({"schedule": {"epochs": 3}, "seed": [0, 1]})
    {'schedule.epochs': '3', 'seed.0': '0', 'seed.1': '1'}
    """
    if not isinstance(node, (dict, list)):
        return {name: str(node)}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {k: v for key, value in items for k, v in _flat(value, f"{name}.{key}" if name else str(key)).items()}


def _node(settings: Any, name: str) -> dict[str, Any]:
    """Return a node of a run's settings, or an empty one. The settings of a foreign run may hold anything."""
    node = settings.get(name) if isinstance(settings, dict) else None
    return node if isinstance(node, dict) else {}


def _without(node: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name not in names}


def teacher_names(runs: Iterable[Finished]) -> dict[tuple[str, str], str]:
    """Name the teachers, each found by its name and digest. The digest tells teachers of the same name apart."""
    found = {(run.result.teacher.name, run.result.teacher.sha256) for run in runs if run.result.teacher}
    counts = Counter(name for name, _ in found)
    return {(name, sha): name if counts[name] == 1 else f"{name} {sha[:6]}" for name, sha in found}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean, and the standard deviation if there are several values, or "-" if a value is not finite.

    >>> spread([1.0, 2.0, 3.0], digits=1), spread([1.0]), spread([1.0, float("nan")])
    ('2.0 +- 1.0', '1.00', '-')
    """
    if not all(map(isfinite, values)):
        return "-"
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} +- {stdev(values):.{digits}f}"
