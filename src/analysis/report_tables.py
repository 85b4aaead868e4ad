"""The tables of a report."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from statistics import mean
from typing import NamedTuple

import numpy as np

from src.analysis.answered import Answered
from src.analysis.class_relations import hierarchy, likeness
from src.analysis.document import Table
from src.analysis.published import NOTE as PUBLISHED_NOTE
from src.analysis.published import published
from src.analysis.relations_of_runs import class_matrices, serial_layers
from src.analysis.results import Finished, Unfinished, spread, teacher_names
from src.analysis.statistics import CONFIDENCE, Comparison, compare_paired, correct_for_multiplicity
from src.common.errors import UserError
from src.runs.result import RunRecord, read_record

Groups = Mapping[str, Sequence[Finished]]
"""Repetitions by the name of their setting."""
NOTE = (
    "top-1, top-5 and ECE (in %) and NLL (in nats): test images, last epoch, mean +- standard deviation over n seeds. "
    "best: top-1 of the best epoch, chosen with hindsight, on held-out images if there are some. agree: % of the test "
    "images that get the teacher's class. size: parameters. time: training of this network on the machine that ran it."
)


class Score(NamedTuple):
    """How a report shows a score of the test images: as a percentage, unless it says otherwise."""

    column: str
    factor: int = 100
    digits: int = 1
    """The decimal places of a mean. A difference has one more."""


SCORES = {
    "accuracy": Score("top-1"),
    "top5": Score("top-5"),
    "nll": Score("NLL", factor=1, digits=2),
    "ece": Score("ECE"),
    "agreement": Score("agree"),
}
HIERARCHY_NOTES = {
    "hierarchy": (
        "hierarchy: AUC, the probability that two classes of one superclass are related more strongly than two classes "
        "of different superclasses. Chance level is 0.5."
    ),
    "teacher": "teacher: Spearman's correlation with the teacher's confusion.",
}
PERMUTATION_NOTE = "p: share of permutations of the classes that reach the value."


def results_table(groups: Groups) -> Table:
    """Make one row per setting. Empty columns are dropped."""
    columns: dict[str, Callable[[Sequence[Finished]], str]] = {
        "n": lambda runs: str(len(runs)),
        "top-1": lambda runs: _mean(runs, "accuracy"),
        "best": _best,
        "published": lambda runs: str(published(runs[0]) or "-"),
        **{SCORES[name].column: partial(_mean, score=name) for name in ("top5", "nll", "ece", "agreement")},
        "size": lambda runs: f"{runs[0].result.parameters.student / 1000:,.0f}k",
        "time": _time,
    }
    cells = {name: [cell(runs) for runs in groups.values()] for name, cell in columns.items()}
    kept = {"network": list(groups), **_without_empty(cells)}
    caption = f"{NOTE} {PUBLISHED_NOTE}" if "published" in kept else NOTE
    return Table(caption, list(kept), list(zip(*kept.values(), strict=True)))


def _mean(runs: Sequence[Finished], score: str) -> str:
    values = by_seed(runs, score).values()
    return spread(list(values), SCORES[score].digits) if values else "-"


def by_seed(runs: Sequence[Finished], score: str) -> dict[int, float]:
    """Return a score of the test images by seed, in the unit of the report. Runs without this score are left out."""
    measured = {run.result.seed: getattr(run.result.test, score) for run in runs}
    return {seed: SCORES[score].factor * value for seed, value in measured.items() if value is not None}


def _time(runs: Sequence[Finished]) -> str:
    seconds = mean(run.result.seconds for run in runs)
    return f"{seconds:.0f} s" if isfinite(seconds) else "-"


def _best(runs: Sequence[Finished]) -> str:
    values = [100 * run.result.best_epoch.accuracy for run in runs if run.result.best_epoch]
    return spread(values, 1) if values else "-"


def pair_tables(groups: Groups) -> list[Table]:
    """Make tables of methods by pairs: accuracy after the last epoch, of the best epoch, and as published.

    A pair with several settings of a method has a row for each. Returns an empty list for a single pair.
    """
    taught = list(dict.fromkeys(runs[0].pair for runs in groups.values() if runs[0].result.teacher))
    if len(taught) < 2:
        return []
    trained = Counter((runs[0].label, runs[0].pair) for runs in groups.values())
    cells: dict[str, dict[str, Sequence[Finished]]] = {}
    for name, runs in groups.items():
        run = runs[0]
        settings = name.partition(" (")[2]  # that tell the group from others of its label
        several = f"{run.label} ({settings}" if settings else name
        row = run.label if trained[run.label, run.pair] == 1 else several
        for pair in [run.pair] if run.result.teacher else [p for p in taught if p.endswith(f" to {run.pair}")]:
            cells.setdefault(row, {})[pair] = runs

    def table(caption: str, cell: Callable[[Sequence[Finished]], str]) -> Table:
        rows = [[label, *(cell(of[pair]) if pair in of else "" for pair in taught)] for label, of in cells.items()]
        return Table(caption, ["method", *taught], rows)

    return [
        table("Top-1 after the last epoch, in % (n seeds).", lambda runs: f"{_mean(runs, 'accuracy')} ({len(runs)})"),
        table("Top-1 of the best epoch, chosen with hindsight, in %.", _best),
        table(PUBLISHED_NOTE, lambda runs: str(published(runs[0]) or "")),
    ]


def comparison_table(groups: Groups, against: str | None, scores: Sequence[str] = ("accuracy",)) -> Table | None:
    """Compare every two settings of the same student by seed, in each of `scores` (keys of `SCORES`).

    With `against`, only the comparisons with that method are made. Returns None without comparisons.
    """
    comparisons, columns = [], []
    for score, ((other, others), (one, ones)) in itertools.product(scores, itertools.combinations(groups.items(), 2)):
        methods = {ones[0].result.method, others[0].result.method}
        if ones[0].result.student != others[0].result.student or (against and against not in methods):
            continue
        values = [by_seed(runs, score) for runs in (ones, others)]
        if all(values):
            comparisons.append(replace(compare_paired(one, other, *values), digits=SCORES[score].digits + 1))
            columns.append(SCORES[score].column)
    if not comparisons:
        return None
    rows = [
        [f"{c.one} minus {c.other}", column, _signed(c), _p_value(c.p), _p_value(c.corrected_p), c.verdict]
        for c, column in zip(correct_for_multiplicity(comparisons), columns, strict=True)
    ]
    caption = (
        "Differences after the last epoch, paired by seed: the mean, in percentage points (NLL: in nats). p: "
        "p-value of the paired t-test. corrected p: the same after correction for the number of comparisons "
        f"({sum(not np.isnan(c.p) for c in comparisons)}; Benjamini and Yekutieli). verdict: with the "
        f"{100 * CONFIDENCE:.0f} % interval of the mean. This covers the chance of the seed, not that of the data."
    )
    return Table(caption, ["compared", "score", "difference", "p", "corrected p", "verdict"], rows, sentences=True)


def _signed(comparison: Comparison) -> str:
    """Write a difference with its sign, or a dash for nan."""
    return "-" if np.isnan(comparison.difference) else f"{comparison.difference:+.{comparison.digits}f}"


def _p_value(value: float) -> str:
    """Write a p-value with three digits.

    >>> _p_value(0.0421), _p_value(0.00002), _p_value(float("nan"))
    ('0.042', '<0.001', '-')
    """
    if np.isnan(value):
        return "-"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def hierarchy_table(groups: Groups, answered: Mapping[str, Answered]) -> Table | None:
    """Compare each serial layer, and each confusion matrix, with the superclasses and with the teacher's confusion.

    Rows and columns without a value are dropped. Returns None if nothing is left.
    """
    rows = []
    for name, run, weight in serial_layers(groups):
        superclasses = run.result.superclasses
        matrices = class_matrices(weight, answered.get(name))
        teacher = next((matrix for title, matrix in matrices.items() if title.startswith("Teacher")), None)
        for title, matrix in matrices.items():
            measures = (
                hierarchy(matrix, superclasses) if superclasses else None,
                None if teacher is None or teacher is matrix else likeness(matrix, teacher),
            )
            cells = ["-" if each is None else f"{each.value:.2f} (p {each.p:.4f})" for each in measures]
            if any(measures):
                rows.append([name, title, *cells])
    if not rows:
        return None
    columns = dict(zip(("network", "relations", "hierarchy", "teacher"), zip(*rows, strict=True), strict=True))
    kept = _without_empty(columns)
    explained = " ".join(text for column, text in HIERARCHY_NOTES.items() if column in kept)
    caption = f"Relations between classes, in any sign and direction. {explained} {PERMUTATION_NOTE}"
    return Table(caption, list(kept), list(zip(*kept.values(), strict=True)))


def _without_empty(columns: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Drop the columns without a value.

    >>> _without_empty({"top-1": ["70.1", "-"], "agree": ["-", "-"]})
    {'top-1': ['70.1', '-']}
    """
    return {name: column for name, column in columns.items() if set(column) != {"-"}}


def unfinished_table(others: Sequence[Unfinished], root: str) -> Table:
    """List the folders that do not count, relative to `root`, with the reason."""
    rows = [[str(other.folder.relative_to(root)), other.state, other.detail] for other in others]
    return Table("Folders that do not count, and the reason.", ["folder", "state", "why"], rows, sentences=True)


def notes(groups: Groups) -> list[str]:
    """Name the teachers, the missing seeds of each setting, and the code that made the runs."""
    runs = [run for repeated in groups.values() for run in repeated]
    taught = {run.result.student for run in runs if run.result.teacher}
    seeds = sorted({run.result.seed for run in runs if run.result.student in taught})
    names = teacher_names(runs)
    teachers = {f"{names[t.name, t.sha256]} ({100 * t.accuracy:.2f} %)" for run in runs if (t := run.result.teacher)}
    lines = [f"Teacher: {', '.join(sorted(teachers))}."] if teachers else []
    for name, repeated in groups.items():
        missing = [seed for seed in seeds if seed not in {run.result.seed for run in repeated}]
        if missing and repeated[0].result.student in taught:
            lines.append(
                f"{name}: no finished run with seed {', '.join(map(str, missing))}, which other settings have."
            )
    made_by = {version for run in runs if (version := _version(run))}
    return [*lines, f"Made by {'; '.join(sorted(made_by))}."] if made_by else lines


def _version(run: Finished) -> str:
    """Name the code version and the torch version of a run, from its run.json. Returns "" if it cannot be read."""
    try:
        versions = read_record(RunRecord, run.folder / "run.json").versions
    except (OSError, UserError):
        return ""
    return f"code {versions.get('commit', 'without a commit')}, torch {versions.get('torch', '?')}"
