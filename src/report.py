"""`python -m src.report`: write tables, comparisons and pictures of the runs below a folder. `--help` is the guide."""

import logging
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from src.analysis.answered import answer
from src.analysis.document import Section, Table, html, latex, markdown
from src.analysis.report_pictures import check_classes, draw
from src.analysis.report_tables import (
    NOTE,
    SCORES,
    comparison_table,
    hierarchy_table,
    notes,
    pair_tables,
    results_table,
    unfinished_table,
)
from src.analysis.results import Finished, by_protocol, find_runs, group
from src.command import job, run_command
from src.common.errors import UserError
from src.common.files import output_folder, write_text

log = logging.getLogger(__name__)


def make_section(title: str, runs: Sequence[Finished], cfg: DictConfig, prefix: str) -> Section:
    """Make the section for the runs of one protocol, and print its table of results.

    The file names of its pictures start with `prefix`.
    """
    groups = group(runs)
    results = results_table(groups)
    show(title, results)
    answered, failures = answer(groups, cfg.data_root) if cfg.answers else ({}, [])
    compared = comparison_table(groups, cfg.against, cfg.scores)
    tables = [*pair_tables(groups), results, *filter(None, [compared, hierarchy_table(groups, answered)])]
    pictures = draw(groups, answered, Path(cfg.out).expanduser(), cfg.relations.classes, prefix)
    return Section(title, [*notes(groups), *failures], tables, pictures)


def show(title: str, table: Table) -> None:
    """Print the columns of a table that fit into a terminal. The report has all of them."""
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
    """Print the results, and write the report as HTML, Markdown and LaTeX, with its pictures."""
    root, out = Path(cfg.runs).expanduser(), output_folder(cfg.out)
    if root.is_file():
        raise UserError(f"runs={cfg.runs} is a file: give a folder, in which the runs are searched.")
    for score in cfg.scores:
        if score not in SCORES:
            raise UserError(f"scores={score} is not a score: choose from {', '.join(SCORES)}.")
    runs, others = find_runs(root)
    for other in others:
        log.warning("Left out: %s is %s: %s", other.folder, other.state, other.detail)
    if not runs:
        raise UserError(
            f"There is no finished run below {cfg.runs}: train one with python -m src.train runs={cfg.runs}."
        )
    methods = sorted({run.result.method for run in runs})
    if cfg.against is not None and cfg.against not in methods:
        raise UserError(f"against={cfg.against} is not a method of these runs: choose from {', '.join(methods)}.")
    check_classes(runs, cfg.relations.classes or ())
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        make_section(title, together, cfg, f"{number}-" if number > 1 else "")
        for number, (title, together) in enumerate(by_protocol(runs).items(), start=1)
    ]
    Console().print(NOTE, style="dim")
    if others:
        sections.append(Section("Not among the results", tables=[unfinished_table(others, str(root))]))
    write_text(out / "table.md", markdown(sections))
    write_text(out / "table.tex", latex(sections))
    write_text(out / "report.html", html(cfg.title, sections))
    log.info("Written: %s, and beside it table.md, table.tex and the pictures.", out / "report.html")


if __name__ == "__main__":
    run_command(main)
