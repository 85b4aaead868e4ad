"""The one exception that a command reports as a sentence instead of a traceback."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
"""Folders of Python's library and of installed packages."""


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


def describe_error(error: Exception) -> str:
    """Describe an error by its type, its message, and the last line outside of libraries that led to it.

    The line that caught the error is left out: it is the same for all errors.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if _is_own_code(Path(frame.filename))]
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
    if not frames:
        return what
    file = Path(frames[-1].filename)
    shown = file.relative_to(ROOT) if ROOT in file.parents else file
    return f"{what} in {shown}, line {frames[-1].lineno}"


def _is_own_code(file: Path) -> bool:
    return file.is_file() and not any(folder in file.parents for folder in LIBRARIES)
