"""The table of all methods: their inputs, the parameters they train beside the student, and their cost beside KD's.

Steps of a method and of KD are timed in turn, on random images of CIFAR's size. There is no view store, so the teacher
runs in every step of a method that reads it. If a method has several stages, the main stage is timed. `--no-timing`
leaves the cost out and makes the table in seconds. `python -m benchmarks.methods --help` lists the options.
"""

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track

from benchmarks.images import CLASSES, write_random_images
from benchmarks.trial import CONF, SMALLEST, compose_training, make_step, make_untrained_distiller, repeat_views
from src.common.errors import UserError
from src.common.files import write_text
from src.data.image_data import ImageData
from src.setup.assemble import make_data, make_method
from src.training.distiller import Distiller
from src.training.summary import parameter_count

TRAIN_SIZE = 50_000
"""As in CIFAR-100. A memory bank has a row for each image."""
METHODS = tuple(sorted(file.stem for file in (CONF / "method").glob("*.yaml")))
COLUMNS = ("method", "year", "uses", "extra parameters", "settings")


class Bench:
    """Makes the modules of all methods for one pair, on random images.

    `rounds` is the number of timed steps, in turn with steps of KD (0: no step is timed).
    """

    def __init__(self, folder: Path, model: str, batch_size: int, rounds: int) -> None:
        self.images, self.model, self.batch_size, self.rounds = folder / "random.npz", model, batch_size, rounds
        write_random_images(self.images, TRAIN_SIZE, CLASSES, CLASSES)
        self.load = functools.cache(self._load)

    def columns(self) -> list[str]:
        """Return the heads of the columns of `row`."""
        return self._with_cost(list(COLUMNS), "step / KD's")

    def row(self, method: str) -> list[str]:
        """Return a method's cells: "-" for keys that its yaml lacks, and the reason if it refuses the pair."""
        cfg = self.compose(method)
        about = [str(cfg.method.get(key) or "-") for key in ("year", "uses", "settings")]
        try:
            distiller, data = self.make(cfg)
        except UserError as error:
            extra, cost = "refused", str(error)
        else:
            count = parameter_count(distiller.method) + parameter_count(distiller.serialization)
            extra = f"{count:,}" if count else "-"
            cost = self._cost(make_timer(distiller, data)) if self.rounds else ""
        year, uses, settings = about
        return self._with_cost([method, year, uses, extra, settings], cost)

    def compose(self, method: str) -> DictConfig:
        """Compose the configuration of a method."""
        return compose_training(method, self.model, self.images, self.batch_size)

    def make(self, cfg: DictConfig) -> tuple[Distiller, ImageData]:
        """Make the module of a method, and its data."""
        method = make_method(cfg)
        data = self.load(method.views_per_image)
        return make_untrained_distiller(cfg, data, method), data

    def _load(self, views: int) -> ImageData:
        return make_data(self.compose("kd"), views)

    @functools.cached_property
    def _time_kd(self) -> Callable[[], float]:
        return make_timer(*self.make(self.compose("kd")))

    def _cost(self, time_step: Callable[[], float]) -> str:
        """Time steps in turn with steps of KD. Returns the median ratio and its range."""
        time_kd = self._time_kd
        ratios = sorted(time_step() / time_kd() for _ in range(self.rounds))
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"

    def _with_cost(self, cells: list[str], cost: str) -> list[str]:
        """Put the cost before the settings, if steps are timed."""
        return [*cells[:-1], cost, cells[-1]] if self.rounds else cells


def make_timer(distiller: Distiller, data: ImageData) -> Callable[[], float]:
    """Make the function that trains one step, always on the same batch, and returns its seconds."""
    step, batch = make_step(distiller), next(repeat_views(data, 1))

    def time_step() -> float:
        begin = time.perf_counter()
        step(batch)
        return time.perf_counter() - begin

    time_step()  # warms up
    return time_step


def table(
    methods: Sequence[str] = METHODS, model: str = SMALLEST, batch_size: int = 64, rounds: int = 0
) -> Iterator[str]:
    """Yield the lines of the table in Markdown: method by method, with the cost of a step if `rounds` is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), model, batch_size, rounds)
        columns = bench.columns()
        yield f"| {' | '.join(columns)} |"
        yield f"|{'---|' * len(columns)}"
        for method in track(methods, transient=True):
            yield f"| {' | '.join(bench.row(method))} |"


def main() -> None:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS, help="names of methods; none: all")
    parser.add_argument("--model", default=SMALLEST, help="a pair of conf/model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each method, in turn with steps of KD")
    parser.add_argument("--no-timing", action="store_true", help="leave out the cost of a step; no step is trained")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--out", type=Path, help="a file to write instead of printing the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*self.log.*")
    rounds = 0 if options.no_timing else options.rounds
    lines = table(options.methods, options.model, options.batch_size, rounds)
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")
    else:
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
