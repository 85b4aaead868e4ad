"""Files that are there as a whole or not at all, whenever a run is killed, and archives that are what they claim."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from src.errors import UserError

LARGEST = 64 * 2**30
"""Bytes; an archive that claims more is refused before anything is read."""
LARGEST_RATIO = 200
"""How far a member of 256 MiB or more may be compressed: images and weights never are by as much, a bomb is."""


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A path beside `file`, with its ending, to write to; it takes the place of `file` unless the block raises."""
    partial = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        if error.filename is None:  # a full disk does not say where it is
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


def believable_members(path: Path, archive: Path | IO[bytes] | None = None) -> list[zipfile.ZipInfo]:
    """The members of a zip archive, `path` itself unless it has been opened.

    Raises `UserError` where it claims to hold more than anybody would put into it.
    """
    with zipfile.ZipFile(archive or path) as opened:
        members = opened.infolist()
    claimed = sum(member.file_size for member in members)
    bomb = any(m.file_size >= 2**28 and m.file_size > LARGEST_RATIO * m.compress_size for m in members)
    if claimed > LARGEST or bomb:
        raise UserError(f"{path} claims to hold {claimed:,} bytes, more than is believable: refused.")
    return members


@contextmanager
def by_one_process(file: Path) -> Iterator[None]:
    """Of the processes and nodes that want to make a file one does at a time: the others wait, and then find it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield
