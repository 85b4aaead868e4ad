"""Durations are read in the forms that people and Lightning write. Anything else is refused."""

from datetime import timedelta
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.common.duration import duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:05", 5), ("01:30:00", 5400), ("36:00:00", 129600), ("00:00:00:05", 5), ("1:00:00:00", 86400),
        ({"minutes": 5}, 300), ({"hours": 1, "seconds": 1}, 3601), ({"hours": 0.5}, 1800),
    ],
)  # fmt: skip
def test_a_duration_is_read(value: Any, seconds: int) -> None:
    assert duration(value) == timedelta(seconds=seconds)


def test_none_is_no_limit() -> None:
    assert duration(None) is None


def test_a_number_is_refused_with_the_advice_to_quote_a_time_in_yaml() -> None:
    read = OmegaConf.create("day: 1:00:00:00\nhalf: 12:00:00\nquoted: '12:00:00'")
    assert duration(read.quoted) == timedelta(hours=12)
    for value in (read.half, read.day, 1.5):
        with pytest.raises(ValueError, match=r'HH:MM:SS.*; in a YAML file, put quotes around it, as in "12:00:00"$'):
            duration(value)


@pytest.mark.parametrize(
    "value", [5, "5", "5h", "00:05", "00:00:00", "-1:00:00:00", {"parsecs": 1}, {"hours": -1}, {"hours": "x"}, {}, True]
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"give a time as HH:MM:SS"):
        duration(value)
