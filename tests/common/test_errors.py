"""Errors of the user are one sentence, wherever they are raised."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from src.common.errors import UserError, describe_error, report_damage
from tests.helpers.batches import message_of_unreadable


def test_a_user_error_is_its_sentence() -> None:
    assert str(UserError("a.npz is no file: give another.")) == "a.npz is no file: give another."


class Unreadable(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise UserError(f"photo {index} is damaged: remove it.")


def test_a_user_error_of_a_data_worker_is_its_sentence_too() -> None:
    message = message_of_unreadable(DataLoader(Unreadable(), num_workers=1))
    assert message == "photo 0 is damaged: remove it."


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad magic\nand more"), "ValueError: bad magic"),
        (KeyError("weight"), "KeyError: 'weight'"),
        (EOFError(), "EOFError: "),
    ],
    ids=["two lines", "one line", "no message"],
)
def test_an_error_while_a_file_is_read_names_the_file_the_reason_and_the_advice(error: Exception, reason: str) -> None:
    with pytest.raises(UserError) as caught, report_damage(Path("a.pth"), "get it again"):
        raise error
    assert str(caught.value) == f"a.pth is damaged, or was written by another version ({reason}): get it again."
    assert caught.value.__cause__ is error


def test_a_user_error_while_a_file_is_read_stays_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^choose another\.$"), report_damage(Path("a.pth"), "get it again"):
        raise UserError("choose another.")


def test_nothing_is_reported_without_damage() -> None:
    with report_damage(Path("a.pth"), "get it again"):
        torch.zeros(1)


def test_an_interruption_is_no_damage() -> None:
    with pytest.raises(KeyboardInterrupt), report_damage(Path("a.pth"), "get it again"):
        raise KeyboardInterrupt


def caught(act: Callable[[], object]) -> str:
    """Describe the error that a function raises."""
    try:
        act()
    except Exception as error:
        return describe_error(error)
    pytest.fail("there is no error")


def fail() -> None:
    raise ValueError("no such\nsize.")


def test_an_error_is_described_by_the_last_line_outside_of_libraries() -> None:
    line = fail.__code__.co_firstlineno + 1
    assert caught(fail) == f"ValueError: no such size in tests/common/test_errors.py, line {line}"
    deeper = caught(lambda: torch.zeros(2).apply_(lambda value: fail()))
    assert deeper == f"ValueError: no such size in tests/common/test_errors.py, line {line}"


def test_an_error_that_no_own_line_has_caused_is_described_without_a_line() -> None:
    assert caught(functools.partial(int, "x")) == "ValueError: invalid literal for int() with base 10: 'x'"
    assert caught(functools.partial(next, iter(()))) == "StopIteration"
