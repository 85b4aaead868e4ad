"""Durations as options: `05:00:00`, `1:05:00:00`, or `{hours: 5}`."""

import re
from datetime import timedelta
from typing import Any

FORMS = "give a time as HH:MM:SS, as DD:HH:MM:SS, or as {hours: 5}"
IN_YAML = f'{FORMS}; in a YAML file, put quotes around it, as in "12:00:00"'
"""YAML reads 12:00:00 as the number 43200, and 1:00:00:00, a day, as 216000, which are 60 hours."""


def duration(value: Any) -> timedelta | None:
    """Read the duration that an option gives. None means no limit.

    Raises `ValueError`, with a message that says what is allowed, if `value` is not a positive duration.

    >>> print(duration("00:30:00"), duration("1:00:00:05"), duration({"minutes": 5}), duration(None))
    0:30:00 1 day, 0:00:05 0:05:00 None
    """
    if value is None:
        return None
    if isinstance(value, (int, float)):
        raise ValueError(IN_YAML)
    try:
        found = _from_text(value) if isinstance(value, str) else timedelta(**value)
    except (TypeError, OverflowError):  # an unknown unit, or neither a text nor a dict
        found = timedelta()
    if found <= timedelta():
        raise ValueError(FORMS)
    return found


def _from_text(text: str) -> timedelta:
    found = re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d):(\d\d)", text.strip())
    if found is None:
        return timedelta()
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
