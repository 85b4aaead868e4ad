"""`python -m src.report`: a table and pictures of finished runs, from their folders. `--help` is the guide."""

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from src.analysis import figures
from src.analysis.results import Finished, find_runs, group, spread
from src.config import job, run_command
from src.data.imagenet import readable
from src.errors import UserError
from src.evaluate import load_run, read_config
from src.run import read_checkpoint

log = logging.getLogger(__name__)

COLUMNS = ("network", "n", "top-1", "best", "top-5", "NLL", "ECE", "agree", "size", "time")
NOTE = (
    "top-1, top-5, NLL, ECE (%, nats, %): test images, last epoch, mean +- standard deviation over n seeds. best: the "
    "best epoch's top-1, on held-out images where there are some, chosen with hindsight. agree: % same class as the "
    "teacher. size: parameters. time: this network's training."
)


def rows(groups: Sequence[Sequence[Finished]]) -> list[list[str]]:
    """The table's cells."""
    return [_row(runs) for runs in groups]


def _row(runs: Sequence[Finished]) -> list[str]:
    results = [run.result for run in runs]
    first = results[0]

    def test(name: str, factor: float = 100) -> str:
        if name not in first["test"]:
            return "-"
        return spread([factor * result["test"][name] for result in results], 2 if factor == 1 else 1)

    best = [100 * result["best_epoch"]["accuracy"] for result in results if result["best_epoch"]]
    return [
        runs[0].name,
        str(len(runs)),
        test("accuracy"),
        spread(best, 1) if best else "-",
        test("top5"),
        test("nll", 1),
        test("ece"),
        test("agreement"),
        f"{first['parameters']['student'] / 1000:,.0f}k",
        f"{mean(result['seconds'] for result in results):.0f} s",
    ]


def markdown(cells: Sequence[Sequence[str]], runs: Sequence[Finished], unfinished: Sequence[Path]) -> str:
    """The table with what it was made of."""
    setting = sorted({(r.result["data"], r.result["train_images"], r.result["epochs"]) for r in runs})
    made_of = "; ".join(f"{data}, {images:,} training images, {epochs} epochs" for data, images, epochs in setting)
    teachers = {f"{t['name']} ({100 * t['accuracy']:.2f} %)" for r in runs if (t := r.result["teacher"])}
    made_of += f"; teacher: {', '.join(sorted(teachers))}" if teachers else ""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *(f"| {' | '.join(row)} |" for row in cells)]
    missing = [f"Not finished: {folder}" for folder in unfinished]
    return "\n".join([*lines, "", f"{made_of}. {NOTE}", *missing]) + "\n"


def draw(groups: Sequence[Sequence[Finished]], out: Path) -> list[Path]:
    """All pictures that these runs can give."""
    drawn = [figures.save(figures.learning_curves(groups), out / "learning_curves.png")]
    serial = [runs[0] for runs in groups if runs[0].result["serialization"] == "serial"]
    if serial:
        checkpoint = read_checkpoint(serial[0].folder)
        assert checkpoint is not None
        weight = checkpoint["state_dict"]["serialization.layer.weight"]
        figure = figures.class_relations(weight.numpy(), readable(serial[0].result["class_names"]))
        drawn.append(figures.save(figure, out / "class_relations.png"))
    return drawn


@torch.no_grad()
def draw_answers(groups: Sequence[Sequence[Finished]], out: Path, cfg: DictConfig) -> Path | None:
    """Test images that the student alone gets wrong and the best taught one right, with what both say.

    None where there are no two such runs, or the data is not at hand.
    """
    taught = [runs[0] for runs in groups if runs[0].result["teacher"]]
    if not taught:
        return None
    best = max(taught, key=lambda run: run.result["test"]["accuracy"])
    alone = next((runs[0] for runs in groups if _is_alone(runs[0], best)), None)
    if alone is None:
        return None
    said = {}
    for name, run in ((f"{alone.result['student']} alone", alone), (f"by {best.label}", best)):
        try:
            distiller, data = load_run(run.folder, read_config(run.folder, cfg.data_root))
        except UserError as error:
            log.warning("No picture of answers: %s", error)
            return None
        batches = [distiller.eval().predict_logits(batch.images[0]) for batch in data.evaluation_loader("test")]
        said[name] = torch.cat(batches).softmax(dim=1).numpy()
    target = data.source.test_labels.numpy()
    before, after = (probabilities.argmax(axis=1) for probabilities in said.values())
    learned = np.flatnonzero((before != target) & (after == target))
    picked = learned[:: max(1, len(learned) // 8)][:8]
    if not len(picked):
        return None
    images = data.test_images(picked.tolist()).permute(0, 2, 3, 1).numpy()
    title = f"What the teaching changed: {len(learned)} of {len(target)} test images like these"
    chosen = {name: probabilities[picked] for name, probabilities in said.items()}
    return figures.save(
        figures.what_they_say(images, target[picked], chosen, readable(data.class_names), title),
        out / "what_they_say.png",
    )


def _is_alone(run: Finished, taught: Finished) -> bool:
    """Whether a run trained the same student on the same data and budget without a teacher."""
    same = all(run.result[key] == taught.result[key] for key in ("student", "data", "train_images", "epochs"))
    return same and run.result["teacher"] is None


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
@job
def main(cfg: DictConfig) -> None:
    """Print the table, write it and the pictures."""
    runs, unfinished = find_runs(Path(cfg.runs).expanduser())
    if not runs:
        raise UserError(f"No finished run below {cfg.runs}: train one by python -m src.train runs={cfg.runs} ...")
    groups, out = group(runs), Path(cfg.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    cells = rows(groups)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    Console().print(NOTE, style="dim")
    for folder in unfinished:
        log.warning("Not finished: %s", folder)
    (out / "table.md").write_text(markdown(cells, runs, unfinished))
    pictures = [*draw(groups, out), draw_answers(groups, out, cfg)]
    log.info("Written: %s", ", ".join(str(file) for file in [out / "table.md", *pictures] if file))


if __name__ == "__main__":
    run_command(main)
