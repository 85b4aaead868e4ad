"""The speed of training: each row times two or more sides in turn in one process, and compares them.

Choose rows by name (`python -m benchmarks.speed step_stored data loss`). Without a name, all rows are measured. The
output is a Markdown table. Images are CIFAR-100's if the folder AEKT_DATA holds cifar100.npz, else random images. A
ratio is the median of all rounds, with its range.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.images import CLASSES, cifar100_file, write_images
from benchmarks.part_rows import augmentation, data, loss, teacher
from benchmarks.run_rows import PAIRS, allocator, memory, startup, sweep
from benchmarks.step_rows import compiled, loop, scale, step_plain, step_stored, winograd
from benchmarks.timing import HEAD, Hardware, Place, Row
from benchmarks.trial import BATCH_SIZE, silence

ROWS: dict[str, Callable[[Place], Iterator[Row]]] = {
    row.__name__: row
    for row in (
        *(
            step_stored,
            step_plain,
            compiled,
            winograd,
            loop,
            data,
            augmentation,
            loss,
            startup,
            sweep,
            memory,
            allocator,
        ),
        *(teacher, scale),
    )
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[], help="names of rows; none: all")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS, help="pairs of conf/model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=8, help="steps in each round")
    parser.add_argument("--batches", type=int, default=8, help="batches of the epoch that is repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch")
    parser.add_argument("--bfloat16", action="store_true", help="add bfloat16; without support, a step takes minutes")
    parser.add_argument("--winograd", action="store_true", help="use Winograd's algorithm in teacher and student")
    parser.add_argument("--precision", default="32-true", help="trainer.precision of the rows sweep and memory")
    parser.add_argument(
        "--sweep-images", type=int, default=500, help="training images of a run; 2000 for the full sweep"
    )
    parser.add_argument("--sweep-epochs", type=int, default=2, help="epochs of a run; 20 for the full sweep")
    parser.add_argument("--sweep-seeds", type=int, default=3, help="seeds of the sweep")
    parser.add_argument("--out", type=Path, help="a file to which the table is appended, below its command")
    options = parser.parse_args(arguments)
    if options.winograd and options.bfloat16:
        parser.error("--winograd computes in float32, so it excludes --bfloat16: leave one of them out")
    return options


def main() -> None:
    """Print the table, row by row."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    silence()
    command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
    shown = "CIFAR-100's images" if cifar100_file() else "random images"
    machine = Hardware.measure()
    write(f"`{command}`: {shown}, {machine}\n\n{HEAD}", options.out)
    largest = max(options.sweep_images, options.batches * max(BATCH_SIZE, *options.batch_sizes), CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        write_images(images, largest)
        for name in options.rows or ROWS:
            place = Place(Path(folder) / name, images, machine, options)
            place.folder.mkdir()
            for row in ROWS[name](place):
                write(row.markdown(), options.out)


def write(text: str, out: Path | None) -> None:
    """Print a text, and append it to the file `out` if there is one."""
    print(text, flush=True)
    if out:
        with out.open("a") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()
