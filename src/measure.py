"""`python -m src.measure`: measure what student, teacher and exported files cost on this processor. See `--help`."""

import json
import logging
from collections.abc import Callable, Sequence

import hydra
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from src.analysis import figures
from src.command import job, run_command
from src.common.files import output_folder, write_text
from src.common.markup import plain
from src.config.validation import validate
from src.exporting.forms import BATCH
from src.exporting.measuring import Row, measure

log = logging.getLogger(__name__)

Line = dict[str, str]
"""The cells of a row by the names of their columns."""


def network_line(row: Row, baseline: Row) -> Line:
    """Write what a network costs on any machine, with ratios to the baseline."""
    ratio = ratio_to(row is baseline)
    return {
        "network": row.network,
        "parameters": f"{row.parameters / 1e3:,.0f}k{ratio(row.parameters, baseline.parameters)}",
        "MACs": f"{row.macs / 1e6:,.1f}M{ratio(row.macs, baseline.macs)}",
        "activations": f"{row.activation_bytes / 1e3:,.0f} kB{ratio(row.activation_bytes, baseline.activation_bytes)}",
    }


def form_line(row: Row, baseline: Row, with_quartiles: bool) -> Line:
    """Write what a form costs on this machine, with ratios to the baseline."""
    ratio = ratio_to(row is baseline)

    def timing(threads: int, batch: int) -> str:
        low, middle, high = row.ratios[threads][batch]
        time = 1e3 * row.seconds[threads][batch]
        text = (f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms") + ratio(middle, 1)
        return f"{text} ({low:.2g} to {high:.2g})" if with_quartiles and row is not baseline else text

    times = {
        f"{batch} image{'s' * (batch > 1)}, {threads} thread{'s' * (threads > 1)}": timing(threads, batch)
        for batch in (1, BATCH)
        for threads in row.seconds
    }
    return {
        "form": row.name,
        "top-1": f"{100 * row.accuracy:.1f}",
        "file": f"{row.file_bytes / 1e3:,.0f} kB{ratio(row.file_bytes, baseline.file_bytes)}",
        **times,
        "memory": f"{row.memory:,.0f} MB{ratio(row.memory, baseline.memory)}",
    }


def ratio_to(is_baseline: bool) -> Callable[[float, float], str]:
    """Return a function that writes the ratio of two numbers. The baseline itself has no ratio."""
    return lambda value, whole: "" if is_baseline else f", {value / whole:.2g}x"


def make_tables(rows: Sequence[Row], with_quartiles: bool) -> tuple[list[Line], list[Line]]:
    """Make the table of networks and the table of forms."""
    networks = [row for number, row in enumerate(rows) if row.network not in {row.network for row in rows[:number]}]
    return [network_line(row, rows[0]) for row in networks], [form_line(row, rows[0], with_quartiles) for row in rows]


def markdown(rows: Sequence[Row], note: str) -> str:
    """Write the tables and their note."""
    parts = []
    for lines in make_tables(rows, with_quartiles=True):
        texts = [[plain(cell) for cell in line.values()] for line in lines]
        parts += [f"| {' | '.join(cells)} |" for cells in (list(lines[0]), ["---"] * len(lines[0]), *texts)] + [""]
    return "\n".join([*parts, note]) + "\n"


def show(rows: Sequence[Row], note: str) -> None:
    """Print the tables without quartiles, and the times of batches on all threads only: this fits into a terminal."""
    for lines in make_tables(rows, with_quartiles=False):
        left_out = [column for column in lines[0] if column.startswith(f"{BATCH} images")][:-1]
        columns = [column for column in lines[0] if column not in left_out]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column.replace(", ", "\n"), justify="right" if number else "left", no_wrap=True)
        for line in lines:
            table.add_row(*(line[column] for column in columns))
        Console().print(table)
    Console().print(note, style="dim")


@hydra.main(version_base="1.3", config_path="../conf", config_name="measure")
@job
def main(cfg: DictConfig) -> None:
    """Print the table, and write the table and the figure."""
    validate(cfg)
    out = output_folder(cfg.out)
    rows, note = measure(cfg)
    show(rows, note)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", markdown(rows, note))
    write_text(out / "measured.json", json.dumps({"rows": [row._asdict() for row in rows], "note": note}, indent=2))
    points = {row.name: (1e3 * row.seconds[1][1], row.ratios[1][1], 100 * row.accuracy) for row in rows}
    picture = figures.save(figures.accuracy_against_latency(points), out / "accuracy_latency.png")
    log.info("Written: %s, %s, %s", out / "table.md", out / "measured.json", picture)


if __name__ == "__main__":
    run_command(main)
