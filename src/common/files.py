"""Atomic writes, CSV files, digests, checks of archives, and locks around files that several processes make."""

import csv
import hashlib
import io
import os
import secrets
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from src.common.errors import UserError

LARGEST_ARCHIVE = 64 * 2**30
"""Uncompressed bytes. An archive that claims to hold more is refused before any member is read."""
LARGE_ARCHIVE = 2**28
"""Uncompressed bytes. Smaller archives may have any compression ratio."""
LARGEST_RATIO = 200
"""Maximum compression ratio of a large archive, or of a large member. Images and weights never reach it. Only zip
bombs exceed it."""
PACKED = (".bin", ".ckpt", ".gz", ".npz", ".pt", ".pth", ".safetensors", ".tar", ".th", ".zip")
"""Suffixes of files that people pack into archives. The members of a checkpoint or of an array file have others."""


OUTPUTS = (".csv", ".gz", ".html", ".json", ".md", ".npz", ".onnx", ".pdf", ".png", ".pt", ".pt2", ".pte",
           ".pth", ".safetensors", ".tar", ".tex", ".txt", ".yaml", ".zip")  # fmt: skip
"""Suffixes of files. A new folder with such a name is a mistake."""


def output_folder(out: str) -> Path:
    """Return the folder at the option `out`. Raises `UserError` if it is a file, or if its name is that of a file."""
    folder = Path(out).expanduser()
    if folder.is_file():
        raise UserError(f"out={out} is a file: give a folder, in which the files are written.")
    if folder.suffix.lower() in OUTPUTS and not folder.is_dir():
        raise UserError(f"out={out} has the name of a file: give a folder, in which the files are written.")
    return folder


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, with the same suffix, and rename it to `file` at the end.

    If the block raises an exception, `file` stays as it was.
    """
    partial = file.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.{file.name}")  # nodes can share process ids
    try:
        yield partial
        with partial.open("rb+") as content:  # else the new name could outlive a power cut, and the content not
            os.fsync(content.fileno())
        partial.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        if error.filename is None:  # a full disk raises an error without a file name
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that a rename survives a power cut. Windows cannot do this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems sync files only
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    with file.open(newline="", encoding="utf-8") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def file_digest(file: Path) -> str:
    """Compute the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_members(path: Path, archive: IO[bytes] | None = None) -> list[zipfile.ZipInfo]:
    """List the members of the zip archive at `path`, or of `archive`, if that file is open already.

    Raises `UserError` if the archive claims to be implausibly large.
    """
    with zipfile.ZipFile(archive or path) as opened:
        members = opened.infolist()
    claimed = sum(member.file_size for member in members)
    sizes = [(claimed, sum(member.compress_size for member in members))]
    sizes += [(member.file_size, member.compress_size) for member in members]
    bomb = any(size >= LARGE_ARCHIVE and size > LARGEST_RATIO * packed for size, packed in sizes)
    if claimed > LARGEST_ARCHIVE or bomb:
        raise UserError(f"{path} claims to hold {claimed:,} bytes, which is implausible: get the file again.")
    return members


def describe_foreign(path: Path) -> str | None:
    """Say what a file is that was given in the place of another one, and what to do: the end of a sentence.

    Returns None if the file is of none of the kinds that people give by mistake.
    """
    with path.open("rb") as file:
        start = file.read(1024)
    text = start.lstrip().lower()
    if not start:
        return "an empty file: get it again"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of git LFS to a file that was not fetched: run git lfs pull"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, as of a failed download: get the file again"
    if start[8:10] == b'{"':
        return "a safetensors file: load it with safetensors.torch, and save the dict with torch.save"
    if start.startswith(b"\x93NUMPY"):
        return "a single NumPy array (.npy): save all arrays in one file with numpy.savez"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file: export the weights from its own framework"
    if name := _packed_file(path):
        return f"an archive of files such as {name}: unpack it, and give one of them"
    if start.startswith((b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!")):
        return "a compressed file: unpack it, and give a file in it"
    return None


def _packed_file(path: Path) -> str | None:
    """Return the name of a file in a tar or zip archive of files. Returns None for any other file."""
    with suppress(Exception):  # a damaged file can raise any exception of the readers
        if tarfile.is_tarfile(path):  # first, because a tar archive that ends with a zip archive looks like one
            with tarfile.open(path) as members:
                first = members.next()  # reading on could decompress gigabytes
                return first.name if first else None
        with zipfile.ZipFile(path) as archive:
            return next((name for name in archive.namelist() if Path(name).suffix.lower() in PACKED), None)
    return None


def lock_file(path: Path) -> Path:
    """Return the path of the lock of a file or folder, which lies beside it.

    >>> lock_file(Path("runs/none-seed0")).name
    '.none-seed0.lock'
    """
    return path.with_name(f".{path.name}.lock")


@contextmanager
def one_process_at_a_time(file: Path, on_busy: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file or folder that several processes or nodes may want to make.

    Another process calls `on_busy`, which may raise an exception, and then waits for the lock. Check inside the block
    whether a process has made the file meanwhile.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(file))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_busy is not None:
            on_busy()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
