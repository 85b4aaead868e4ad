"""The one exception that a command answers with a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Bad input or a broken surrounding: the message is one sentence that says what is wrong, where, and what to do."""

    def __str__(self) -> str:
        # A worker's error arrives with its traceback as the message; the sentence is the end of it.
        return super().__str__().rpartition(f"{__name__}.UserError: ")[2].rstrip()


@contextmanager
def readable(file: Path, hint: str) -> Iterator[None]:
    """Raise `UserError` for whatever comes of a `file` that somebody damaged or made up."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{file} is damaged, or not what this version writes ({type(error).__name__}: {reason}): {hint}."
        ) from error
