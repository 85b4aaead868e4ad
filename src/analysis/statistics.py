"""Whether a difference between two methods is more than the chance of their seeds: scipy's tests, in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two settings that were run with the same seeds: `one` less `other`, in the unit of what was compared."""

    one: str
    other: str
    seeds: tuple[int, ...]
    """Those that both have."""
    difference: float
    """The mean over the seeds; nan without any."""
    low: float
    high: float
    """The bounds of the mean difference's 95 % interval; nan with fewer than two seeds."""
    p: float
    """Of the paired t-test, two-sided; nan where there is none."""

    @property
    def distinguishable(self) -> bool:
        """Whether the interval has a width and leaves 0 out."""
        return self.low < self.high and not self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """What n seeds say, in words."""
        n = len(self.seeds)
        if n == 0:
            return "no seed in common: not compared"
        if n == 1:
            return "n=1: one seed does not tell a difference from chance"
        if not self.low < self.high:
            return f"with n={n} every seed differs by the same amount: this tells nothing about chance"
        interval = f"with n={n} the {100 * CONFIDENCE:.0f} % interval is {self.low:+.2f} to {self.high:+.2f}"
        if not self.distinguishable:
            return f"{interval}: not distinguishable; n={n} does not suffice to tell them apart"
        ahead = self.one if self.difference > 0 else self.other
        return f"{interval}: distinguishable, {ahead} is higher"


def paired(one: str, other: str, ones: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """Compare two settings by their values by seed (paired t-test, `scipy.stats.ttest_rel`)."""
    seeds = tuple(sorted(ones.keys() & others.keys()))
    first, second = (np.array([values[seed] for seed in seeds], dtype=float) for values in (ones, others))
    gaps = first - second
    if len(seeds) < 2:
        return Comparison(one, other, seeds, float(gaps.mean()) if len(seeds) else np.nan, np.nan, np.nan, np.nan)
    if np.ptp(gaps) <= 1e-9 * np.abs(first).max():  # scipy would divide by the rounding of a variance of 0
        return Comparison(one, other, seeds, float(gaps.mean()), float(gaps.mean()), float(gaps.mean()), np.nan)
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(CONFIDENCE)
    return Comparison(
        one, other, seeds, float(gaps.mean()), float(interval.low), float(interval.high), float(test.pvalue)
    )


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean's 95 % interval (`scipy.stats.t`); None for fewer than two values, or where all are the same."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)
