import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.analysis.statistics import interval_of_mean, paired


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_interval_of_a_known_case() -> None:
    # Differences 1, 0.5, 2: mean 7/6, s = sqrt(7/12), t(0.975; 2) = 4.302653
    found = paired("one", "other", by_seed(1, 2, 4), by_seed(0, 1.5, 2))
    half = 4.302653 * math.sqrt(7 / 12) / math.sqrt(3)
    assert found.difference == pytest.approx(7 / 6)
    assert (found.low, found.high) == pytest.approx((7 / 6 - half, 7 / 6 + half), rel=1e-6)
    assert found.p == pytest.approx(0.118083, rel=1e-5)
    assert not found.distinguishable
    assert found.verdict == (
        "with n=3 the 95 % interval is -0.73 to +3.06: not distinguishable; n=3 does not suffice to tell them apart"
    )


@pytest.mark.parametrize(("sign", "higher"), [(1, "one"), (-1, "other")])
def test_a_clear_difference_names_the_higher(sign: int, higher: str) -> None:
    values = by_seed(*(sign * value for value in (3.0, 3.1, 2.9)))
    found = paired("one", "other", values, by_seed(0, 0, 0))
    assert found.distinguishable
    assert found.verdict.endswith(f": distinguishable, {higher} is higher")


def test_only_seeds_that_both_have_are_compared() -> None:
    found = paired("one", "other", {0: 1.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 0.5, 3: 100.0})
    assert found.seeds == (0, 1)
    assert found.difference == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("ones", "others", "difference", "words"),
    [
        ({0: 1.0}, {1: 1.0}, math.nan, "no seed in common"),
        ({0: 1.0}, {0: 0.5}, 0.5, "n=1: one seed does not tell a difference from chance"),
        (by_seed(1, 2, 3), by_seed(0, 1, 2), 1.0, "with n=3 every seed differs by the same amount"),
        (by_seed(0.1, 0.2), by_seed(0.1, 0.2), 0.0, "with n=2 every seed differs by the same amount"),
        (by_seed(70.1, 70.3), by_seed(70.0, 70.2), 0.1, "with n=2 every seed differs by the same amount"),
    ],
)
def test_too_little_to_tell(ones: dict[int, float], others: dict[int, float], difference: float, words: str) -> None:
    found = paired("one", "other", ones, others)
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert found.verdict.startswith(words)
    assert not found.distinguishable
    assert math.isnan(found.p)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_the_other_way_round_is_the_negative(values: list[tuple[float, float]]) -> None:
    ones, others = (by_seed(*column) for column in zip(*values, strict=True))
    found, back = paired("one", "other", ones, others), paired("other", "one", others, ones)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert found.low <= found.difference + 1e-9
    assert found.difference <= found.high + 1e-9
    assert found.distinguishable == back.distinguishable


def test_the_interval_of_a_mean() -> None:
    low, high = interval_of_mean([1, 2, 3]) or (0, 0)  # s = 1, t(0.975; 2) = 4.302653
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert interval_of_mean([1]) is None
    assert interval_of_mean([1, 1]) is None
