"""Atomic writes, CSV files, checks of archives, and locks around files that several processes make."""

import csv
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from src.common.errors import UserError

LARGEST_ARCHIVE = 64 * 2**30
"""Uncompressed bytes. An archive that claims to hold more is refused before any member is read."""
LARGE_MEMBER = 2**28
"""Uncompressed bytes. Smaller members of an archive may have any compression ratio."""
LARGEST_RATIO = 200
"""Maximum compression ratio of a large member. Images and weights never reach it. Only zip bombs exceed it."""


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, with the same suffix, and rename it to `file` at the end.

    If the block raises an exception, `file` stays as it was.
    """
    partial = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        if error.filename is None:  # a full disk raises an error without a file name
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_rows(file: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a CSV file of numbers atomically. A column that a row lacks is an empty cell."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def read_rows(file: Path) -> list[dict[str, float]]:
    """Read a CSV file of numbers, without its empty cells. Returns no rows if the file does not exist."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def list_members(path: Path, archive: IO[bytes] | None = None) -> list[zipfile.ZipInfo]:
    """List the members of the zip archive at `path`, or of `archive`, if that file is open already.

    Raises `UserError` if the archive claims to be implausibly large.
    """
    with zipfile.ZipFile(archive or path) as opened:
        members = opened.infolist()
    claimed = sum(member.file_size for member in members)
    bomb = any(m.file_size >= LARGE_MEMBER and m.file_size > LARGEST_RATIO * m.compress_size for m in members)
    if claimed > LARGEST_ARCHIVE or bomb:
        raise UserError(f"{path} claims to hold {claimed:,} bytes, which is implausible: get the file again.")
    return members


@contextmanager
def one_process_at_a_time(file: Path) -> Iterator[None]:
    """Hold the lock of a file that several processes or nodes may want to make.

    Other processes wait for the lock. Check inside the block whether one of them has made the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield
