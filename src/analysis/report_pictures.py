"""The pictures of a report."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from src.analysis import figures
from src.analysis.answered import Answered
from src.analysis.document import Picture
from src.analysis.gradient_figures import gradient_anatomy
from src.analysis.relation_figures import relation_matrices, strongest_relations
from src.analysis.relations_of_runs import class_matrices, serial_layers
from src.analysis.results import Finished, teacher_names
from src.common.errors import UserError
from src.data.imagenet import english_names
from src.data.source import distinct_names
from src.training.gradient_anatomy import read_gradients

Groups = Mapping[str, Sequence[Finished]]
FIRST_SEED = "First seed of each setting."
EXAMPLES = 8
"""Maximum number of example images."""


class Drawn(NamedTuple):
    """An unsaved figure, its file name and its caption."""

    name: str
    figure: Figure | None
    """None if the runs lack the data for the figure."""
    caption: str
    wide: bool = False
    """True if the picture takes the whole width of a page."""


def draw(
    groups: Groups, answered: Mapping[str, Answered], out: Path, relation_classes: Sequence[str] | None, prefix: str
) -> list[Picture]:
    """Draw and save every picture that the runs have data for. File names start with `prefix`.

    `relation_classes` are the names of the classes whose strongest relations are drawn. None chooses three classes.
    """
    drawn = itertools.chain(
        _accuracy_figures(groups, answered),
        _answer_figures(groups, answered),
        _gradient_figures(groups),
        _relation_figures(groups, answered, relation_classes),
    )  # one figure at a time: an open figure takes memory, and matplotlib warns of more than 20
    return [
        Picture(figures.save(figure, out / f"{prefix}{name}.png"), caption, wide)
        for name, figure, caption, wide in drawn
        if figure is not None
    ]


def _accuracy_figures(groups: Groups, answered: Mapping[str, Answered]) -> Iterator[Drawn]:
    macs = {name: each.macs for name, each in answered.items()}
    names = teacher_names(runs[0] for runs in groups.values())
    teachers = {
        names[teacher.name, teacher.sha256]: (each.teacher_macs, 100 * teacher.accuracy)
        for name, each in answered.items()
        if (teacher := groups[name][0].result.teacher) and each.teacher_macs
    }
    caption = "One dot per run. Line: mean. Band: 95 % interval of the mean."
    yield Drawn("accuracy", figures.accuracies(groups), caption)
    caption = "Top-1 by epoch, one line per run. The number on the right is the mean after the last epoch."
    yield Drawn("learning_curves", figures.learning_curves(groups), caption)
    caption = "Accuracy against the training time on the machine that ran it, and against the cost of one image."
    yield Drawn("accuracy_by_cost", figures.accuracy_by_cost(groups, macs, teachers), caption)


def _answer_figures(groups: Groups, answered: Mapping[str, Answered]) -> Iterator[Drawn]:
    if not answered:
        return
    predictions = {name: each.predictions for name, each in answered.items()}
    caption = f"Accuracy by confidence (bars), and the share of images at each confidence (line). {FIRST_SEED}"
    yield Drawn("reliability", figures.reliability(predictions), caption)
    names = teacher_names(runs[0] for runs in groups.values())
    classes = {
        f"{names[teacher.name, teacher.sha256]} (teacher)": each.complete_teacher
        for name, each in answered.items()
        if (teacher := groups[name][0].result.teacher) and each.complete_teacher is not None
    }
    classes |= {name: each.predicted for name, each in predictions.items()}
    if len(classes) > 1:
        caption = f"How often two networks predict the same class. {FIRST_SEED}"
        yield Drawn("agreement", figures.agreement(classes), caption)
    caption = "Test images that the student alone gets wrong, and the best taught student gets right. Green: the label."
    yield Drawn("what_they_say", draw_gained_images(groups, answered), caption, wide=True)


def _gradient_figures(groups: Groups) -> Iterator[Drawn]:
    for number, (name, runs) in enumerate(groups.items(), start=1):
        rows = read_gradients(runs[0].folder)
        if runs[0].result.teacher and rows:
            caption = f"Gradients of the weighted loss terms of {name} at the logits, seed {runs[0].result.seed}."
            yield Drawn(f"gradients-{number}", gradient_anatomy(rows, name), caption, wide=True)


def _relation_figures(
    groups: Groups, answered: Mapping[str, Answered], classes: Sequence[str] | None
) -> Iterator[Drawn]:
    found = next(serial_layers(groups), None)
    if found is None:
        return
    name, run, weight = found
    names, superclasses = english_names(run.result.class_names), run.result.superclasses
    chosen = class_numbers(names, classes or ()) or None
    names = distinct_names(names)
    matrices = class_matrices(weight, answered.get(name))
    caption = f"Relations learned by {name}, seed {run.result.seed}, beside the confusion matrices."
    yield Drawn("class_relations", relation_matrices(matrices, names, superclasses), caption, wide=True)
    caption = "The largest weights of single classes."
    caption += " Bold: classes of the same superclass." if superclasses else ""
    yield Drawn("strongest_relations", strongest_relations(weight, names, superclasses, chosen), caption, wide=True)


def check_classes(runs: Sequence[Finished], chosen: Sequence[str]) -> None:
    """Raise `UserError` if no run has a class of a chosen name."""
    known = list(dict.fromkeys(name for run in runs for name in english_names(run.result.class_names)))
    unknown = next((name for name in chosen if name not in known), None)
    if unknown is not None:
        raise UserError(f"relations.classes: there is no class {unknown}. Choose from {', '.join(known[:8])} ...")


def class_numbers(names: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Find the numbers of classes by name. A name of several classes chooses all of them, and an unknown one none.

    >>> class_numbers(["crane", "dog", "crane"], ["dog", "crane", "apple"])
    [1, 0, 2]
    """
    return [number for chosen_name in chosen for number, name in enumerate(names) if name == chosen_name]


def draw_gained_images(groups: Groups, answered: Mapping[str, Answered]) -> Figure | None:
    """Draw test images that the student trained alone gets wrong, and the best taught student gets right.

    Returns None if one of the two runs is missing, or if there is no such image.
    """
    taught = [name for name in answered if groups[name][0].result.teacher]
    if not taught:
        return None
    best = max(taught, key=lambda name: groups[name][0].accuracy)
    student = groups[best][0].result.student
    same_student = [name for name in answered if groups[name][0].result.student == student]
    alone = [name for name in same_student if groups[name][0].result.method == "vanilla"]
    if not alone:
        return None
    pair = {name: answered[name].predictions for name in (alone[0], best)}
    before, after = pair.values()
    gained = np.flatnonzero(~before.correct & after.correct)
    picked = gained[:: max(1, len(gained) // EXAMPLES)][:EXAMPLES].tolist()
    if not picked:
        return None
    data = answered[best].data
    images = data.test_images(picked).permute(0, 2, 3, 1).numpy()
    title = f"Gained by distillation: {len(gained)} of {len(after.target)} test images, for example these"
    return figures.example_predictions(images, picked, pair, distinct_names(english_names(data.class_names)), title)
