"""Time several sides in turn on one machine, and write their ratios as the rows of a Markdown table."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

HEAD = "| what | against | setting | ratio | target | |\n|---|---|---|---|---|---|"


class Row(NamedTuple):
    """One row of the table."""

    what: str
    against: str
    """The baseline."""
    setting: str
    ratios: list[float]
    """One ratio for each round."""
    target: str
    absolute: str = ""
    """The median of each side, in its unit."""

    def markdown(self) -> str:
        """Write the median ratio, and its range if there were several rounds.

        >>> Row("a step", "a bare step", "64", [1.0, 2.0, 4.0], "time <= 2").markdown()
        '| a step | a bare step | 64 | 2 (1 to 4, n=3) | time <= 2 |  |'
        """
        ratio = f"{statistics.median(self.ratios):.3g}"
        if len(self.ratios) > 1:
            ratio += f" ({min(self.ratios):.3g} to {max(self.ratios):.3g}, n={len(self.ratios)})"
        return f"| {self.what} | {self.against} | {self.setting} | {ratio} | {self.target} | {self.absolute} |"


class Hardware(NamedTuple):
    """Measured rates of this machine: 10^9 operations per second, and 10^9 bytes per second."""

    float32: float
    bfloat16: float
    memory: float

    @classmethod
    def measure(cls) -> "Hardware":
        """Time products of 1,024 x 1,024 matrices, and copies of 256 MB. The fastest of five rounds counts."""
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        source, target = torch.zeros(2**26), torch.empty(2**26)
        found = measure_in_turn(
            {
                "float32": lambda: seconds_per_call(lambda: a @ b),
                "bfloat16": lambda: seconds_per_call(lambda: a.bfloat16() @ b.bfloat16()),
                "copy": lambda: seconds_per_call(lambda: target.copy_(source)),
            },
            rounds=5,
        )
        single, half, copy = (min(found[name]) for name in ("float32", "bfloat16", "copy"))
        operations = 2 * 1024**3 / 1e9
        return cls(operations / single, operations / half, 2 * source.nbytes / 1e9 / copy)

    def __str__(self) -> str:
        return (
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; matrix products {self.float32:.0f} GFLOP/s "
            f"in float32, {self.bfloat16:.0f} in bfloat16; memory {self.memory:.1f} GB/s."
        )


class Place(NamedTuple):
    """The folder, the images, the machine and the options with which a row is measured."""

    folder: Path
    """The row's own folder, for the files that it writes."""
    images: Path
    """The array file of its images."""
    hardware: Hardware
    options: Namespace
    """The command line, as parsed by `benchmarks.speed`."""


def measure_in_turn(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every side once to warm up, and then once in each of `rounds` rounds, in alternating order.

    Returns the values of each side by round, without the warm-up.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(rounds + 1):
        for name in list(sides)[:: 1 if repetition % 2 else -1]:
            value = sides[name]()
            if repetition:
                found[name].append(value)
    return found


def divide(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Divide the values of two sides, round by round.

    >>> divide([1.0, 6.0], [2.0, 3.0])
    [0.5, 2.0]
    """
    return [a / b for a, b in zip(one, other, strict=True)]


def seconds_per_call(action: Callable[[], Any], calls: int = 1) -> float:
    """Call an action several times. Returns the mean seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - begin) / calls


def milliseconds(found: Mapping[str, Sequence[float]], *sides: str) -> str:
    """Write the median of the given sides (none: of all), which are in seconds.

    >>> milliseconds({"ours": [0.0011, 0.0019, 0.0012], "theirs": [0.25]})
    'ours 1.2 ms, theirs 250.0 ms'
    """
    return ", ".join(f"{side} {1000 * statistics.median(found[side]):.1f} ms" for side in sides or found)


def megabytes(found: Mapping[str, Sequence[float]], digits: int) -> str:
    """Write the median of each side, which is in bytes, in MB (10^6 bytes).

    >>> megabytes({"ours": [2e6, 3e6, 9e6]}, digits=1)
    'ours 3.0 MB'
    """
    return ", ".join(f"{side} {statistics.median(values) / 1e6:.{digits}f} MB" for side, values in found.items())
