"""`python -m src.report`: tables, comparisons and pictures of runs, from their folders. `--help` is the guide."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import hydra
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from src.analysis import figures
from src.analysis.class_relations import confusion, hierarchy, likeness, relations
from src.analysis.document import Picture, Section, Table, html, latex, markdown
from src.analysis.gradient_figures import gradient_anatomy
from src.analysis.gradients import read_gradients
from src.analysis.predictions import Predictions, multiply_accumulates, predict
from src.analysis.published import NOTE as PUBLISHED_NOTE
from src.analysis.published import published
from src.analysis.relation_figures import relation_matrices, strongest_relations
from src.analysis.results import Finished, Unfinished, by_protocol, find_runs, group, spread
from src.analysis.statistics import CONFIDENCE, paired
from src.command import job, run_command
from src.data.image_data import ImageData
from src.data.imagenet import readable
from src.errors import UserError
from src.evaluate import load_run, read_config
from src.resume import read_checkpoint

log = logging.getLogger(__name__)

Groups = Mapping[str, Sequence[Finished]]
NOTE = (
    "top-1, top-5, NLL, ECE (%, nats, %): test images, last epoch, mean +- standard deviation over n seeds. best: the "
    "best epoch's top-1, on held-out images where there are some, chosen with hindsight. agree: % same class as the "
    "teacher. size: parameters. time: this network's training, on the machine that ran it."
)


class Answered(NamedTuple):
    """One run of a setting, asked again."""

    predictions: Predictions
    teacher: np.ndarray | None
    """[N], the class that the teacher gave each test image; None without a teacher or its stored answers."""
    macs: int
    teacher_macs: int | None
    data: ImageData


def results(groups: Groups) -> Table:
    """A row a setting; columns that nothing can be said in are left out."""
    columns: dict[str, Callable[[Sequence[Finished]], str]] = {
        "network": lambda runs: "",
        "n": lambda runs: str(len(runs)),
        "top-1": lambda runs: _test(runs, "accuracy"),
        "best": _best,
        "published": lambda runs: str(published(runs[0]) or "-"),
        "top-5": lambda runs: _test(runs, "top5"),
        "NLL": lambda runs: _test(runs, "nll", 1),
        "ECE": lambda runs: _test(runs, "ece"),
        "agree": lambda runs: _test(runs, "agreement"),
        "size": lambda runs: f"{(runs[0].result['parameters'].get('student') or 0) / 1000:,.0f}k",
        "time": lambda runs: f"{mean(run.result['seconds'] for run in runs):.0f} s",
    }
    cells = {name: [cell(runs) for runs in groups.values()] for name, cell in columns.items()}
    cells["network"] = list(groups)
    kept = {name: column for name, column in cells.items() if name == "n" or set(column) != {"-"}}
    caption = f"{NOTE} {PUBLISHED_NOTE}" if "published" in kept else NOTE
    return Table(caption, list(kept), list(zip(*kept.values(), strict=True)))


def _test(runs: Sequence[Finished], name: str, factor: float = 100) -> str:
    values = [factor * run.result["test"][name] for run in runs if run.result["test"].get(name) is not None]
    return spread(values, 2 if factor == 1 else 1) if values else "-"


def _best(runs: Sequence[Finished]) -> str:
    values = [100 * run.result["best_epoch"]["accuracy"] for run in runs if run.result["best_epoch"]]
    return spread(values, 1) if values else "-"


def by_pair(groups: Groups) -> list[Table]:
    """Methods x pairs, of the last epoch, of the best and as published, where there are several pairs."""
    taught = list(dict.fromkeys(runs[0].pair for runs in groups.values() if runs[0].result["teacher"]))
    if len(taught) < 2:
        return []
    cells: dict[str, dict[str, Sequence[Finished]]] = {}
    for runs in groups.values():
        run = runs[0]
        for pair in [run.pair] if run.result["teacher"] else [p for p in taught if p.endswith(f" to {run.pair}")]:
            row = run.label if pair not in cells.get(run.label, {}) else f"{run.label} {run.folder.name[-8:]}"
            cells.setdefault(row, {})[pair] = runs

    def table(caption: str, cell: Callable[[Sequence[Finished]], str]) -> Table:
        rows = [[label, *(cell(of[pair]) if pair in of else "" for pair in taught)] for label, of in cells.items()]
        return Table(caption, ["method", *taught], rows)

    return [
        table("Top-1 after the last epoch, in % (n seeds).", lambda runs: f"{_test(runs, 'accuracy')} ({len(runs)})"),
        table("Top-1 of the best epoch, chosen with hindsight, in %.", _best),
        table(PUBLISHED_NOTE, lambda runs: str(published(runs[0]) or "")),
    ]


def comparisons(groups: Groups, against: str | None) -> Table | None:
    """Each two settings of the same student by seed; only those with the method `against` where that is given."""
    rows = []
    for (other, others), (one, ones) in itertools.combinations(groups.items(), 2):
        methods = {ones[0].result["method"], others[0].result["method"]}
        if ones[0].result["student"] != others[0].result["student"] or (against and against not in methods):
            continue
        values = [{run.result["seed"]: 100 * run.result["test"]["accuracy"] for run in runs} for runs in (ones, others)]
        found = paired(one, other, *values)
        p = "-" if np.isnan(found.p) else f"{found.p:.3f}"
        rows.append([f"{one} less {other}", f"{found.difference:+.2f}", p, found.verdict])
    if not rows:
        return None
    caption = (
        "Difference in top-1 after the last epoch, in points, paired by seed: mean, p of the paired t-test and "
        f"{100 * CONFIDENCE:.0f} % interval of the mean. It tells the chance of the seed alone, not of the data, and "
        f"is not corrected for the number of comparisons ({len(rows)})."
    )
    return Table(caption, ["compared", "points", "p", "what n says"], rows, sentences=True)


def notes(groups: Groups) -> list[str]:
    """Teachers, seeds that a setting lacks, and what code made the runs."""
    runs = [run for repeated in groups.values() for run in repeated]
    taught = {run.result["student"] for run in runs if run.result["teacher"]}
    seeds = sorted({run.result["seed"] for run in runs if run.result["student"] in taught})
    teachers = {f"{t['name']} ({100 * t['accuracy']:.2f} %)" for run in runs if (t := run.result["teacher"])}
    lines = [f"Teacher: {', '.join(sorted(teachers))}."] if teachers else []
    for name, repeated in groups.items():
        missing = [seed for seed in seeds if seed not in {run.result["seed"] for run in repeated}]
        if missing and repeated[0].result["student"] in taught:
            lines.append(f"{name}: no finished run with seed {', '.join(map(str, missing))}, which others have.")
    made_by = {version for run in runs if (version := _version(run))}
    return [*lines, f"Made by {'; '.join(sorted(made_by))}."] if made_by else lines


def _version(run: Finished) -> str:
    """Code and library of a run, as its run.json says; empty where there is none."""
    try:
        versions = json.loads((run.folder / "run.json").read_text())["versions"]
        return f"code {versions.get('commit', 'of no commit')}, torch {versions.get('torch', '?')}"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return ""


def ask(groups: Groups, cfg: DictConfig) -> tuple[dict[str, Answered], list[str]]:
    """The first run of each setting about the test images, by name; a sentence for each that cannot be asked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said, silent = {}, []
    for name, runs in groups.items():
        try:
            distiller, data = load_run(runs[0].folder, read_config(runs[0].folder, cfg.data_root))
            distiller.to(device)
            teacher = distiller.teacher_predictions.get("test")
            macs = multiply_accumulates(distiller, data)
            known = None if teacher is None else teacher.numpy()
            said[name] = Answered(predict(distiller, data), known, *macs, data)
            said = {other: each._replace(data=data) for other, each in said.items()}  # the same images, held once
        except Exception as error:  # whatever the folder of another version holds, the others are reported
            log.warning("%s cannot be asked: %s", name, error)
            silent.append(f"{name} is in no picture that needs its answers: {type(error).__name__}.")
    return said, silent


def draw(groups: Groups, said: Mapping[str, Answered], out: Path, cfg: DictConfig, prefix: str = "") -> list[Picture]:
    """All pictures that these runs can give."""
    drawn: list[Picture] = []

    def add(name: str, figure: Figure | None, caption: str, wide: bool = False) -> None:
        if figure is not None:
            drawn.append(Picture(figures.save(figure, out / f"{prefix}{name}.png"), caption, wide))

    add("accuracy", figures.accuracies(groups), "A dot a run; line: mean; band: 95 % interval of the mean.")
    add("learning_curves", figures.learning_curves(groups), "Top-1 by epoch; at the right the mean of the last epoch.")
    macs = {name: answered.macs for name, answered in said.items()}
    teachers = {
        teacher["name"]: (answered.teacher_macs, 100 * teacher["accuracy"])
        for name, answered in said.items()
        if (teacher := groups[name][0].result["teacher"]) and answered.teacher_macs
    }
    caption = "Accuracy against the time of training (of the machines that ran it) and the cost of one image."
    add("accuracy_by_cost", figures.accuracy_by_cost(groups, macs, teachers), caption)
    if said:
        predictions = {name: answered.predictions for name, answered in said.items()}
        seeds = "The first seed's run of each setting."
        add("reliability", figures.reliability(predictions), f"Accuracy of the images by confidence. {seeds}")
        classes = {
            f"{groups[name][0].result['teacher']['name']} (teacher)": answered.teacher
            for name, answered in said.items()
            if answered.teacher is not None and (answered.teacher >= 0).all()
        }
        classes |= {name: answered.predictions.predicted for name, answered in said.items()}
        if len(classes) > 1:
            add("agreement", figures.agreement(classes), f"How often two networks give the same class. {seeds}")
    add("what_they_say", draw_answers(groups, said), "Test images that the best taught student gained.", wide=True)
    for number, (name, runs) in enumerate(groups.items(), start=1):
        rows = read_gradients(runs[0].folder)
        if runs[0].result["teacher"] and rows:
            caption = f"What the weighted terms of {name} sent to the logits, seed {runs[0].result['seed']}."
            add(f"gradients-{number}", gradient_anatomy(rows, name), caption, wide=True)
    related = next(layers(groups), None)
    if related:
        name, run, weight = related
        names, superclasses = readable(run.result["class_names"]), run.result.get("superclasses")
        matrices = class_matrices(weight, said.get(name))
        caption = f"Learned by {name}, seed {run.result['seed']}; beside it who was taken for whom."
        add("class_relations", relation_matrices(matrices, names, superclasses), caption, wide=True)
        chosen = class_numbers(names, cfg.relations.classes) if cfg.relations.classes else None
        caption = "The largest weights of single classes; in bold those of the same superclass."
        add("strongest_relations", strongest_relations(weight, names, superclasses, chosen), caption, wide=True)
    return drawn


def layers(groups: Groups) -> Iterator[tuple[str, Finished, np.ndarray]]:
    """The weights [C, C] of the serial layers that can be read: the first run of each setting, with its name."""
    for name, runs in groups.items():
        if runs[0].result["serialization"] != "serial":
            continue
        try:
            checkpoint = read_checkpoint(runs[0].folder)
        except UserError as error:
            log.warning("No picture of class relations: %s", error)
            continue
        weight = (checkpoint or {}).get("state_dict", {}).get("serialization.layer.weight")
        if weight is not None and len(weight) == len(runs[0].result["class_names"]):
            yield name, runs[0], weight.numpy()


def class_matrices(weight: np.ndarray, answered: Answered | None) -> dict[str, np.ndarray]:
    """Relations of classes by title: the layer's, and the confusions that are known."""
    matrices = {"Serialization layer: w_ij": relations(weight)}
    if answered is None:
        return matrices
    target, student = answered.predictions.target, answered.predictions.predicted
    if answered.teacher is not None and (answered.teacher >= 0).all():
        matrices["Teacher: i taken for j"] = confusion(target, answered.teacher, len(weight))
    return {**matrices, "Student: i taken for j": confusion(target, student, len(weight))}


def class_numbers(names: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Classes by name. Raises `UserError` where there is none of that name."""
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"relations.classes: {unknown[0]} is no class here; there are {', '.join(names[:8])} ...")
    return [names.index(name) for name in chosen]


def hierarchies(groups: Groups, said: Mapping[str, Answered]) -> Table | None:
    """How much of the superclasses, and of the teacher's confusion, is in each serial layer and in each confusion."""
    rows = []
    for name, run, weight in layers(groups):
        superclasses = run.result.get("superclasses")
        matrices = class_matrices(weight, said.get(name))
        teacher = next((matrix for title, matrix in matrices.items() if title.startswith("Teacher")), None)
        for title, matrix in matrices.items():
            measures = (
                superclasses and hierarchy(matrix, superclasses),
                None if teacher is None or teacher is matrix else likeness(matrix, teacher),
            )
            cells = ["-" if each is None else f"{each.value:.2f} (p {each.p:.4f})" for each in measures]
            rows.append([name, title, *cells])
    if not rows:
        return None
    caption = (
        "Relations between classes, whatever their sign and direction. hierarchy: AUC, the chance that two classes of "
        "one superclass are related more strongly than two of different ones, 0.5 for none. teacher: Spearman's "
        "correlation with the teacher's confusion. p: share of permutations of the classes that reach it."
    )
    return Table(caption, ["network", "relations", "hierarchy", "teacher"], rows)


def draw_answers(groups: Groups, said: Mapping[str, Answered]) -> Figure | None:
    """Test images that the student alone gets wrong and the best taught one right, with what both say.

    None where there are no two such runs.
    """
    taught = [name for name in said if groups[name][0].result["teacher"]]
    if not taught:
        return None
    best = max(taught, key=lambda name: groups[name][0].result["test"]["accuracy"])
    student = groups[best][0].result["student"]
    alone = [name for name in said if name not in taught and groups[name][0].result["student"] == student]
    if not alone:
        return None
    pair = {name: said[name].predictions for name in (alone[0], best)}
    before, after = pair.values()
    learned = np.flatnonzero(~before.correct & after.correct)
    picked = learned[:: max(1, len(learned) // 8)][:8].tolist()
    if not picked:
        return None
    data = said[best].data
    images = data.test_images(picked).permute(0, 2, 3, 1).numpy()
    title = f"What the teaching changed: {len(learned)} of {len(after.target)} test images like these"
    return figures.what_they_say(images, picked, pair, readable(data.class_names), title)


def unfinished_section(others: Sequence[Unfinished], root: Path) -> Section:
    """What is not among the results."""
    rows = [[str(other.folder.relative_to(root)), other.state, other.detail] for other in others]
    return Section(
        "Not among the results",
        tables=[Table("Folders without a result.", ["folder", "state", "why"], rows, sentences=True)],
    )


def show(title: str, table: Table) -> None:
    """The columns of a table that fit into a terminal."""
    shown = ConsoleTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=Text(title))
    chosen = [index for index, column in enumerate(table.columns) if column not in ("top-5", "agree", "size")]
    for index in chosen:
        shown.add_column(table.columns[index], justify="right" if index else "left", no_wrap=index > 0)
    for row in table.rows:
        shown.add_row(*(Text(row[index]) for index in chosen))
    Console().print(shown)


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
@job
def main(cfg: DictConfig) -> None:
    """Print the table, write it in its three forms, and the pictures."""
    root, out = Path(cfg.runs).expanduser(), Path(cfg.out).expanduser()
    runs, others = find_runs(root)
    for other in others:
        log.warning("Not finished: %s is %s: %s", other.folder, other.state, other.detail)
    if not runs:
        raise UserError(f"No finished run below {cfg.runs}: train one by python -m src.train runs={cfg.runs} ...")
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, (title, together) in enumerate(by_protocol(runs).items(), start=1):
        groups = group(together)
        table = results(groups)
        show(title, table)
        said, silent = ask(groups, cfg) if cfg.answers else ({}, [])
        compared = comparisons(groups, cfg.against)
        tables = [*by_pair(groups), table, *filter(None, [compared, hierarchies(groups, said)])]
        pictures = draw(groups, said, out, cfg, prefix=f"{number}-" if number > 1 else "")
        sections.append(Section(title, [*notes(groups), *silent], tables, pictures))
    Console().print(NOTE, style="dim")
    if others:
        sections.append(unfinished_section(others, root))
    (out / "table.md").write_text(markdown(sections))
    (out / "table.tex").write_text(latex(sections))
    (out / "report.html").write_text(html(cfg.title, sections), encoding="utf-8")
    log.info("Written: %s, table.tex, table.md and the pictures beside it.", out / "report.html")


if __name__ == "__main__":
    run_command(main)
