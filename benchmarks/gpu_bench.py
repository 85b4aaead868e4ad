"""Sizes, settings, data, deadlines and findings shared by the rows of `benchmarks.gpu`."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import DictConfig

from benchmarks.card import measure_peaks, wait_for
from benchmarks.timing import Row, divide
from benchmarks.trial import SMALLEST, Trial, assemble, compose_training
from src.data.array_data import ArrayData
from src.setup.assemble import make_data, prepare

_Item = TypeVar("_Item")
Side = Callable[[int], float]
"""Trains this number of steps. Returns the seconds per step."""


class Sizes(NamedTuple):
    """How much each row trains."""

    pairs: tuple[str, ...] = ("wrn40_2_to_wrn16_2", "resnet32x4_to_resnet8x4", SMALLEST)
    long_pair: str = "slimnet600k_to_resnet20"
    """The pair whose 240 epochs are extrapolated."""
    batch_size: int = 64
    images: int = 50_000
    test_images: int = 10_000
    workers: int = 8
    """Loader workers of the customary loop."""
    warm_up: int = 12
    """Steps of each measurement before its clock starts."""
    window: float = 0.4
    """Seconds of a measurement."""
    unit: int = 100
    """The number of steps of a measurement is a multiple of this, because some steps write to the loggers."""
    most_steps: int = 600
    """Steps of a measurement at most."""
    few_steps: int = 20
    """Steps of the first measurement, which chooses the number of steps of the others."""
    rounds: int = 5
    """Rounds of a row at most."""
    stored_steps: int = 200
    """Steps of an epoch whose answers are stored."""
    epoch_steps: int = 100
    """Steps of each epoch in the row of 240 epochs."""
    methods: tuple[str, ...] = ("kd", "dkd", "aekt", "vanilla")
    """The methods that train side by side."""
    seeds: int = 2
    matrix: int = 8192
    """Rows of the matrices that measure the peak."""


TINY = Sizes(
    pairs=(SMALLEST,),
    long_pair=SMALLEST,
    batch_size=8,
    images=200,
    test_images=100,
    workers=1,
    warm_up=1,
    window=0.02,
    unit=1,
    most_steps=3,
    few_steps=2,
    rounds=1,
    stored_steps=4,
    epoch_steps=3,
    methods=("kd", "vanilla"),
    seeds=1,
    matrix=64,
)


class Setting(NamedTuple):
    """How a run computes: a name for tables, and overrides of the configuration."""

    name: str
    overrides: tuple[str, ...] = ()
    mixed: bool = False
    """True if it computes in bfloat16."""


_FAST = ("trainer.deterministic=false", "trainer.benchmark=true", "teacher.fold=true")
_MIXED = (*_FAST, "trainer.precision=bf16-mixed")
DEFAULT = Setting("float32, deterministic")
FLOAT32 = Setting("float32", _FAST)
BFLOAT16 = Setting("bfloat16", _MIXED, mixed=True)
COMPILED = Setting("bfloat16, compiled", (*_MIXED, "compile=true"), mixed=True)
SETTINGS = (DEFAULT, FLOAT32, BFLOAT16, COMPILED)


class Finding(NamedTuple):
    """A row of the table, and the measurements behind it."""

    row: Row
    details: Mapping[str, Any]


class Failure(NamedTuple):
    """A part of a row that failed: its name, and the traceback."""

    what: str
    error: str


class Bench:
    """The place and the sizes of all rows, their data, and the clock of the row that is measured."""

    def __init__(self, folder: Path, images: Path, device: torch.device, sizes: Sizes) -> None:
        self.folder, self.images, self.device, self.sizes = folder, images, device, sizes
        self.peaks = measure_peaks(device, sizes.matrix)
        self.deadline = float("inf")
        """The time at which the row should end."""

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        wait_for(self.device)

    def compose(self, method: str, model: str, setting: Setting, *overrides: str) -> DictConfig:
        """Compose the configuration of a run."""
        common = (
            "data.mean=[0.5071,0.4867,0.4408]",
            "data.std=[0.2675,0.2565,0.2761]",
            "logger=none",
            "schedule.learning_rate=0.001",  # some students of a teacher of random weights diverge at the usual rate
            f"trainer.accelerator={'gpu' if self.is_cuda else 'cpu'}",
        )
        chosen = (*common, *setting.overrides, *overrides)
        return prepare(compose_training(method, model, self.images, self.sizes.batch_size, *chosen))

    def each(
        self, items: Iterable[_Item], rows: Callable[[_Item, float], Iterator["Finding | Failure"]]
    ) -> Iterator["Finding | Failure"]:
        """Measure `rows` of each item and its deadline. An item that fails does not stop the others."""
        listed = list(items)
        for number, item in enumerate(listed):
            now = time.perf_counter()
            try:
                yield from rows(item, now + (self.deadline - now) / (len(listed) - number))
            except Exception:
                yield Failure(str(getattr(item, "name", item)), traceback.format_exc())

    def trial(self, method: str, model: str, setting: Setting) -> Trial:
        """Make a run on the shared data, with networks of fresh weights."""
        return assemble(self.compose(method, model, setting), self.data)

    @cached_property
    def data(self) -> ArrayData:
        """The images of all rows that have no data of their own."""
        made = make_data(self.compose("vanilla", SMALLEST, DEFAULT))
        assert isinstance(made, ArrayData)
        return made

    def steps_of_window(self, seconds_per_step: float) -> int:
        """Return the number of steps that fit a measurement's time."""
        units = round(self.sizes.window / seconds_per_step / self.sizes.unit)
        return min(max(1, units) * self.sizes.unit, self.sizes.most_steps)

    def measure(self, sides: Mapping[str, Side], deadline: float, steps: int | None = None) -> dict[str, list[float]]:
        """Measure all sides in turn, in alternating order, until the deadline. There is at least one round.

        Without `steps`, a first measurement of each side chooses the number of steps, and warms up.
        """
        chosen = {name: steps or self.steps_of_window(side(self.sizes.few_steps)) for name, side in sides.items()}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.sizes.rounds):
            begin = time.perf_counter()
            for name in list(sides)[:: 1 if number % 2 else -1]:
                found[name].append(sides[name](chosen[name]))
            if 2 * time.perf_counter() - begin > deadline:
                break
        return found

    def compare(
        self,
        found: Mapping[str, Sequence[float]],
        sides: tuple[str, str],
        what: tuple[str, str, str],
        target: str = "",
        **details: Any,
    ) -> Finding:
        """Compare two sides of `measure`: the first side's speed with a target "speed ...", else its time.

        `what` is the measured program, its baseline and the setting.
        """
        one, other = (found[side] for side in sides)
        ratios = divide(other, one) if target.startswith("speed") else divide(one, other)
        ours, theirs = statistics.median(one), statistics.median(other)
        rate = self.sizes.batch_size / ours
        absolute = f"{1000 * ours:.3g} ms, {1000 * theirs:.3g} ms; {rate:,.0f} images/s"
        milliseconds = {side: [1000 * seconds for seconds in found[side]] for side in sides}
        return Finding(Row(*what, ratios, target, absolute), {"milliseconds_per_step": milliseconds, **details})
