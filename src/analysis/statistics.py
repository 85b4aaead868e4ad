"""Statistical tests of the differences between methods over several seeds, by scipy, and their verdicts in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The difference `one` minus `other` of two settings over their common seeds, in the unit of the values."""

    one: str
    other: str
    seeds: tuple[int, ...]
    """The seeds that both settings have."""
    difference: float
    """The mean over the seeds, or nan without common seeds."""
    low: float
    """The lower bound of the 95 % confidence interval of the mean difference. nan with fewer than two seeds."""
    high: float
    """The upper bound of the interval."""
    p: float
    """The p-value of the paired two-sided t-test, or nan if the test is not possible."""
    corrected_p: float = np.nan
    """The p-value after `correct_for_multiplicity`. nan before it, or if `p` is nan."""
    digits: int = 2
    """The decimal places of the verdict."""

    @property
    def distinguishable(self) -> bool:
        """True if the interval has a positive width and excludes 0. This ignores the number of comparisons."""
        return self.low < self.high and not self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """The conclusion that n seeds allow, in words."""
        n = len(self.seeds)
        if n == 0:
            return "no common seed: not compared"
        if n == 1:
            return "n=1: one seed does not tell a difference from chance"
        if not self.low < self.high:
            return f"with n={n} the difference is the same for every seed: this says nothing about chance"
        low, high = (f"{bound:+.{self.digits}f}" for bound in (self.low, self.high))
        interval = f"with n={n} the {100 * CONFIDENCE:.0f} % interval is {low} to {high}"
        if not self.distinguishable:
            return f"{interval}: not distinguishable; n={n} is not enough to tell them apart"
        ahead = self.one if self.difference > 0 else self.other
        if self.corrected_p > 1 - CONFIDENCE:
            return f"{interval}: {ahead} is higher, but the difference is not significant after correction"
        return f"{interval}: distinguishable, {ahead} is higher"


def compare_paired(one: str, other: str, ones: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """Compare two settings by a paired t-test over their common seeds (`scipy.stats.ttest_rel`).

    `ones` and `others` hold each setting's values by seed.
    """
    seeds = tuple(sorted(ones.keys() & others.keys()))
    first, second = (np.array([values[seed] for seed in seeds], dtype=float) for values in (ones, others))
    gaps = first - second
    if len(seeds) < 2:
        return Comparison(one, other, seeds, float(gaps.mean()) if len(seeds) else np.nan, np.nan, np.nan, np.nan)
    if np.ptp(gaps) <= 1e-9 * np.abs(first).max():  # the variance is 0 but for rounding, and scipy would divide by it
        return Comparison(one, other, seeds, float(gaps.mean()), float(gaps.mean()), float(gaps.mean()), np.nan)
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(CONFIDENCE)
    return Comparison(
        one, other, seeds, float(gaps.mean()), float(interval.low), float(interval.high), float(test.pvalue)
    )


def correct_for_multiplicity(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Set `corrected_p`: the p-values corrected for the number of comparisons.

    The procedure is that of Benjamini and Yekutieli (`scipy.stats.false_discovery_control`). It bounds the expected
    share of false discoveries among the comparisons that are called significant, and it allows comparisons that depend
    on one another, such as comparisons of the same runs. Comparisons without a p-value are not counted.
    """
    tested = [index for index, comparison in enumerate(comparisons) if not np.isnan(comparison.p)]
    if not tested:
        return list(comparisons)
    corrected = stats.false_discovery_control([comparisons[index].p for index in tested], method="by")
    by_index = dict(zip(tested, corrected.tolist(), strict=True))
    return [replace(c, corrected_p=by_index.get(index, np.nan)) for index, c in enumerate(comparisons)]


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Compute the mean's 95 % interval (`scipy.stats.t`). Returns None for fewer than two values, or equal ones."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)
