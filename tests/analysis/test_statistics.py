"""Paired comparisons, their correction for multiplicity, and their verdicts, against cases computed by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.analysis.statistics import Comparison, compare_paired, correct_for_multiplicity, interval_of_mean


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def comparison(p: float, difference: float = 1.0) -> Comparison:
    """Make a comparison of three seeds whose interval excludes 0."""
    return Comparison("one", "other", (0, 1, 2), difference, difference - 0.5, difference + 0.5, p)


def test_the_interval_of_a_known_case() -> None:
    # Differences 1, 0.5, 2: mean 7/6, s = sqrt(7/12), t(0.975; 2) = 4.302653
    found = compare_paired("one", "other", by_seed(1, 2, 4), by_seed(0, 1.5, 2))
    half = 4.302653 * math.sqrt(7 / 12) / math.sqrt(3)
    assert found.difference == pytest.approx(7 / 6)
    assert (found.low, found.high) == pytest.approx((7 / 6 - half, 7 / 6 + half), rel=1e-6)
    assert found.p == pytest.approx(0.118083, rel=1e-5)
    assert math.isnan(found.corrected_p)
    assert not found.distinguishable
    assert found.verdict == (
        "with n=3 the 95 % interval is -0.73 to +3.06: not distinguishable; n=3 is not enough to tell them apart"
    )


@pytest.mark.parametrize(("sign", "higher"), [(1, "one"), (-1, "other")])
def test_a_clear_difference_names_the_higher(sign: int, higher: str) -> None:
    values = by_seed(*(sign * value for value in (3.0, 3.1, 2.9)))
    found = compare_paired("one", "other", values, by_seed(0, 0, 0))
    assert found.distinguishable
    assert found.verdict.endswith(f": distinguishable, {higher} is higher")


def test_only_common_seeds_are_compared() -> None:
    found = compare_paired("one", "other", {0: 1.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 0.5, 3: 100.0})
    assert found.seeds == (0, 1)
    assert found.difference == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("ones", "others", "difference", "words"),
    [
        ({0: 1.0}, {1: 1.0}, math.nan, "no common seed: not compared"),
        ({0: 1.0}, {0: 0.5}, 0.5, "n=1: one seed does not tell a difference from chance"),
        (by_seed(1, 2, 3), by_seed(0, 1, 2), 1.0, "with n=3 the difference is the same for every seed"),
        (by_seed(0.1, 0.2), by_seed(0.1, 0.2), 0.0, "with n=2 the difference is the same for every seed"),
        (by_seed(70.1, 70.3), by_seed(70.0, 70.2), 0.1, "with n=2 the difference is the same for every seed"),
    ],
)
def test_too_few_seeds_allow_no_verdict(
    ones: dict[int, float], others: dict[int, float], difference: float, words: str
) -> None:
    found = compare_paired("one", "other", ones, others)
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert found.verdict.startswith(words)
    assert not found.distinguishable
    assert math.isnan(found.p)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_swapping_the_settings_negates_the_comparison(values: list[tuple[float, float]]) -> None:
    ones, others = (by_seed(*column) for column in zip(*values, strict=True))
    found, back = compare_paired("one", "other", ones, others), compare_paired("other", "one", others, ones)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert found.low <= found.difference + 1e-9
    assert found.difference <= found.high + 1e-9
    assert found.distinguishable == back.distinguishable


# The correction for the number of comparisons


def test_the_correction_of_a_case_computed_by_hand() -> None:
    # Three comparisons: c = 1 + 1/2 + 1/3 = 11/6. In ascending order, p * 3 c / rank is 0.055, 0.0825 and 0.0733...;
    # from the largest down, no value may exceed the one after it.
    corrected = correct_for_multiplicity([comparison(0.01), comparison(0.04), comparison(0.03)])
    assert [each.p for each in corrected] == [0.01, 0.04, 0.03]
    assert [each.corrected_p for each in corrected] == pytest.approx([0.055, 0.22 / 3, 0.22 / 3])


def test_a_single_comparison_needs_no_correction() -> None:
    (corrected,) = correct_for_multiplicity([comparison(0.04)])
    assert corrected.corrected_p == pytest.approx(0.04)


def test_a_corrected_p_value_is_at_most_1() -> None:
    assert [each.corrected_p for each in correct_for_multiplicity([comparison(0.9)] * 3)] == [1.0] * 3


def test_comparisons_without_a_p_value_stay_without_and_do_not_count() -> None:
    single_seed = compare_paired("one", "other", {0: 1.0}, {0: 0.5})
    first, without, last = correct_for_multiplicity([comparison(0.02), single_seed, comparison(0.03)])
    assert math.isnan(without.p)
    assert math.isnan(without.corrected_p)
    assert without.verdict == single_seed.verdict
    # Two comparisons: c = 3/2, p * 2 c / rank is 0.06 and 0.045.
    assert [first.corrected_p, last.corrected_p] == pytest.approx([0.045, 0.045])


def test_nothing_is_corrected_without_p_values() -> None:
    single_seed = compare_paired("one", "other", {0: 1.0}, {0: 0.5})
    assert correct_for_multiplicity([]) == []
    (found,) = correct_for_multiplicity([single_seed])
    assert math.isnan(found.corrected_p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_corrected_p_value_is_never_smaller_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = [each.corrected_p for each in correct_for_multiplicity([comparison(p) for p in p_values])]
    assert all(after >= before - 1e-12 for before, after in zip(p_values, corrected, strict=True))
    ascending = [value for _, value in sorted(zip(p_values, corrected, strict=True))]
    assert ascending == sorted(ascending)


@pytest.mark.parametrize(("difference", "higher"), [(1.0, "one"), (-1.0, "other")])
def test_the_verdict_says_if_a_difference_is_not_significant_after_correction(difference: float, higher: str) -> None:
    alone = correct_for_multiplicity([comparison(0.04, difference)])[0]
    among_three = correct_for_multiplicity([comparison(0.04, difference), comparison(0.5), comparison(0.6)])[0]
    assert alone.verdict.endswith(f": distinguishable, {higher} is higher")
    assert among_three.corrected_p > 0.05
    assert among_three.distinguishable  # by itself
    assert among_three.verdict.endswith(f": {higher} is higher, but the difference is not significant after correction")


# The interval of a mean


def test_the_interval_of_a_mean() -> None:
    low, high = interval_of_mean([1, 2, 3]) or (0, 0)  # s = 1, t(0.975; 2) = 4.302653
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert interval_of_mean([1]) is None
    assert interval_of_mean([1, 1]) is None
