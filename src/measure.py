"""`python -m src.measure`: measure what student, teacher and exported files cost on this processor. See `--help`."""

import json
import logging
from collections.abc import Sequence

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

COLUMNS = ("form", "top-1", "parameters", "MACs", "file", "1 image", "quartiles", f"{BATCH} images", "quartiles",
           "images/s", "memory")  # fmt: skip
PRINTED = (0, 1, 5, 7, 10)
"""The columns that fit into a terminal. The file has all of them."""


def cells(row: Row, baseline: Row) -> list[str]:
    """Write a row as text, with ratios to the baseline."""

    def ratio(value: float, whole: float) -> str:
        return "" if row is baseline else f", {value / whole:.2g}x"

    def timing(batch: int) -> list[str]:
        low, middle, high = row.ratios[batch]
        time = 1e3 * row.seconds[batch]
        milliseconds = f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms"
        return [milliseconds, ""] if row is baseline else [f"{milliseconds}, {middle:.2g}x", f"{low:.2g} to {high:.2g}"]

    return [
        row.name,
        f"{100 * row.accuracy:.1f}",
        f"{row.parameters / 1e3:,.0f}k{ratio(row.parameters, baseline.parameters)}",
        f"{row.macs / 1e6:,.1f}M{ratio(row.macs, baseline.macs)}",
        f"{row.file_bytes / 1e3:,.0f} kB{ratio(row.file_bytes, baseline.file_bytes)}",
        *timing(1),
        *timing(BATCH),
        f"{BATCH / row.seconds[BATCH]:,.0f}",
        f"{row.memory:,.0f} MB{ratio(row.memory, baseline.memory)}",
    ]


def markdown(rows: Sequence[Row], note: str) -> str:
    """Write the whole table and its note."""
    lines = [[plain(cell) for cell in cells(row, rows[0])] for row in rows]
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), "", note]) + "\n"


def show(rows: Sequence[Row], note: str) -> None:
    """Print the columns that fit into a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in PRINTED:
        table.add_column(COLUMNS[column], justify="right" if column else "left", no_wrap=True)
    for row in rows:
        texts = cells(row, rows[0])
        table.add_row(*(texts[column] for column in PRINTED))
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
    points = {row.name: (1e3 * row.seconds[1], row.ratios[1], 100 * row.accuracy) for row in rows}
    picture = figures.save(figures.accuracy_against_latency(points), out / "accuracy_latency.png")
    log.info("Written: %s, %s, %s", out / "table.md", out / "measured.json", picture)


if __name__ == "__main__":
    run_command(main)
