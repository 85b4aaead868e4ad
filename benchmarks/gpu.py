"""The speed of training on one GPU: ratios of programs that run in turn on the same card.

`python -m benchmarks.gpu --out speed.json` takes less than two minutes. It writes the JSON file after each row, and
prints a table at the end. A row that fails is recorded with its traceback, and the next rows are measured. `--tiny`
tries all rows on small data in seconds, also on a CPU. Then the numbers mean nothing.

The images are random, in the number and size of CIFAR-100's, because speed does not depend on the pixels. `--data`
names an array file instead. Networks have random weights.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.card import describe, peak_memory, reset_peak_memory, restored_numerics
from benchmarks.gpu_bench import SETTINGS, TINY, Bench, Failure, Finding, Sizes
from benchmarks.gpu_rows import compiled, epochs, loop, stored, waits
from benchmarks.images import CLASSES, write_random_images
from benchmarks.side_by_side import side_by_side
from benchmarks.timing import HEAD, Row
from benchmarks.trial import silence
from src.common.files import write_text

ROWS: Mapping[str, tuple[Callable[[Bench], Iterator[Finding | Failure]], float, float]] = {
    "waits": (waits, 3, 0),
    "loop": (loop, 46, 10),
    "stored": (stored, 14, 5),
    "epochs": (epochs, 6, 5),
    "side_by_side": (side_by_side, 30, 20),
    "compiled": (compiled, 1, 40),
}
"""By name: the function, its share of the time, and the fewest seconds with which it is begun. The order is that of
importance."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[], help="names of rows; none: all")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tries all rows on small data, within seconds")
    parser.add_argument("--data", type=Path, help="an array file with CIFAR-100; default: random images")
    parser.add_argument("--seconds", type=float, default=110, help="time for all rows; later rows are left out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU: use --device cpu --tiny to try the rows on a CPU")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure the rows, and print the table."""
    begin = time.perf_counter()
    options = parse(arguments)
    silence()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts, for deterministic runs
    sizes = TINY if options.tiny else Sizes()
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", 0)
    if device.type == "cpu":
        torch.set_num_threads(1)  # OpenMP's threads would not survive the fork of the row `side_by_side`
    with tempfile.TemporaryDirectory() as place, restored_numerics():
        folder = Path(place)
        images = options.data or folder / "random.npz"
        if options.data is None:
            write_random_images(images, sizes.images, CLASSES, sizes.test_images)
        bench = Bench(folder, images, device, sizes)
        report = Report(options.out, device, bench.peaks, " ".join(["python -m benchmarks.gpu", *arguments]))
        measure(bench, report, options.rows or list(ROWS), begin + options.seconds)
    report.write(seconds=time.perf_counter() - begin)
    print(report.text())


class Report:
    """The JSON file, which is written again after each row."""

    def __init__(self, file: Path, device: torch.device, peaks: Mapping[str, float], command: str) -> None:
        self.file = file
        settings = {setting.name: setting.overrides for setting in SETTINGS}
        self.content: dict[str, Any] = {"command": command, "card": describe(device), "peaks": peaks}
        self.content |= {"settings": settings, "rows": []}

    def add(self, name: str, **facts: Any) -> None:
        """Add a row's finding, failure or omission."""
        self.content["rows"].append({"name": name, **facts})
        self.write()
        print(facts.get("error", ""), end="", file=sys.stderr)

    def write(self, **facts: Any) -> None:
        """Write the file atomically."""
        self.content.update(facts)
        write_text(self.file, json.dumps(self.content, indent=1) + "\n")

    def text(self) -> str:
        """Write the card, the peaks and a Markdown table."""
        card = ", ".join(f"{name} {value}" for name, value in self.content["card"].items())
        peaks = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.content["peaks"].items())
        lines = [f"`{self.content['command']}`", card, f"Measured peaks: {peaks}", "", HEAD]
        return "\n".join([*lines, *map(line, self.content["rows"]), "", f"{self.content['seconds']:.0f} seconds"])


def line(row: Mapping[str, Any]) -> str:
    """Write one line of the table.

    >>> line({"name": "waits", "skipped": "no GPU"})
    '| waits |  |  | skipped: no GPU |  |  |'
    """
    if "skipped" in row:
        return f"| {row['name']} |  |  | skipped: {row['skipped']} |  |  |"
    if "error" in row:
        return f"| {row['name']} |  | {row['what']} | failed: {row['error'].splitlines()[-1]} |  |  |"
    target = f"{row['target']}: {'met' if row['met'] else 'missed'}" if row["target"] else ""
    share = f"; {100 * row['share_of_peak']:.2g} % of the peak" if "share_of_peak" in row else ""
    overhead = statistics.median(row["overhead_milliseconds"]) if "overhead_milliseconds" in row else None
    more = share if overhead is None else f"; {overhead:.3g} ms more a step"
    cells = (row["what"], row["against"], row["setting"], row["ratios"], target, row["absolute"] + more)
    return Row(*cells).markdown()


def measure(bench: Bench, report: Report, names: Sequence[str], end: float) -> None:
    """Measure rows until `end`. A row gets its share of the time that is left."""
    for position, name in enumerate(names):
        row, share, least = ROWS[name]
        left = end - time.perf_counter()
        if left < least and bench.sizes is not TINY:
            report.add(name, skipped=f"{left:.0f} seconds are left, it needs {least}")
            continue
        bench.deadline = time.perf_counter() + left * share / sum(ROWS[later][1] for later in names[position:])
        _measure_row(bench, report, name, row)


def _measure_row(bench: Bench, report: Report, name: str, row: Callable[[Bench], Iterator[Finding | Failure]]) -> None:
    reset_peak_memory(bench.device)
    begin = time.perf_counter()
    try:
        for found in row(bench):
            if isinstance(found, Failure):
                report.add(name, **found._asdict())
                continue
            seconds, memory = time.perf_counter() - begin, peak_memory(bench.device)
            summary = {"median": statistics.median(found.row.ratios), "met": is_met(found.row)}
            report.add(name, **found.row._asdict(), **summary, **found.details, seconds=seconds, peak_memory=memory)
    except NotImplementedError as reason:
        report.add(name, skipped=str(reason))
    except Exception:
        report.add(name, what="", error=traceback.format_exc())


def is_met(row: Row) -> bool | None:
    """Return whether the median meets the target. None if there is no target.

    >>> is_met(Row("a run", "another", "64", [3.0, 5.0], "speed >= 4"))
    True
    """
    if not row.target:
        return None
    _, sign, bound = row.target.split()
    value = statistics.median(row.ratios)
    return value >= float(bound) if sign == ">=" else value <= float(bound)


if __name__ == "__main__":
    main(sys.argv[1:])
