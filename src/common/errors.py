"""The one exception that a command reports as a sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one sentence. It says what is wrong, where, and what to do.
    """

    def __str__(self) -> str:
        # A DataLoader worker sends its whole traceback as the message. The sentence is the end of that text.
        return super().__str__().rpartition(f"{__name__}.UserError: ")[2].rstrip()


@contextmanager
def report_damage(file: Path, advice: str) -> Iterator[None]:
    """Turn any exception raised while reading `file` into a `UserError` that names the file and gives `advice`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{file} is damaged, or was written by another version ({type(error).__name__}: {reason}): {advice}."
        ) from error
