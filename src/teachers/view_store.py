"""The view store: a teacher's answers to training views, in one file for all runs and processes with one cache key."""

import os
import shutil
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.common.errors import UserError

ADVICE = "free disk space, or set teacher.view_store=false. The same command resumes the run"
PAGE = 4096
"""Bytes. The smallest unit of disk space."""


class ViewStore:
    """A teacher's logits by view, in one memory-mapped file that fills up while a run trains.

    Record `view * images + index` holds logits [C] of `dtype`, and a checksum of 8 bytes: the CRC-32 of the logits plus
    2^32. A record that was never written is all zeros, and a crash can leave a partly written one. Neither passes the
    check, so both count as unknown. Processes can therefore read and write at the same time without locks. The only
    memory used is the system's file cache.

    Writes bypass the memory map. A full disk then raises an error instead of killing the process.
    """

    def __init__(
        self,
        file: Path,
        images: int,
        view_count: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        expected_answers: int | None = None,
        gigabytes: float = float("inf"),
    ) -> None:
        """Open the file, and make it if it is missing.

        At most `expected_answers` records will be added (None: all of them). Raises `UserError` if the file could
        outgrow the disk or `gigabytes`, or if it is a link or not a regular file.
        """
        self.images, self.dtype = images, dtype
        self.size_in_records = images * view_count
        kind = np.float16 if dtype == torch.float16 else np.float32
        record = np.dtype([("logits", kind, (num_classes,)), ("check", "<u8")])
        self.size = size = images * view_count * record.itemsize
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise UserError(
                f"{file} is a link or not a regular file, and writing to it could damage something: remove it."
            )
        growth = size if expected_answers is None else expected_answers * (record.itemsize + 2 * PAGE)
        _check_room(file, size, growth, gigabytes)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        self.file = file.open("r+b", buffering=0)
        weakref.finalize(self, self.file.close)
        if os.fstat(self.file.fileno()).st_size < size:
            # Do not truncate: another process may have enlarged the file by now. The last byte is zero in any case.
            self._write(b"\0", size - 1)
        self.records = np.memmap(self.file, record, "r", shape=(images * view_count,))

    def read(self, index: Tensor, view_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32 [B, C] on the CPU, and a mask [B] that marks unknown logits.

        Raises `UserError` if another program has shortened the file: reading beyond its end would kill the process.
        """
        return self.read_rows(self._rows(index, view_numbers))

    def read_rows(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the logits and the mask of `read` for these record numbers."""
        if os.fstat(self.file.fileno()).st_size < self.size:
            raise UserError(f"{self.file.name} was shortened while in use: run the same command again to repair it.")
        found = self.records[rows]
        unknown = found["check"] == 0
        for row in np.flatnonzero(~unknown):
            unknown[row] = found["check"][row] != _checksum(found["logits"][row])
        return torch.from_numpy(found["logits"].astype(np.float32)), torch.from_numpy(unknown)

    def write(self, index: Tensor, view_numbers: Tensor, logits: Tensor) -> None:
        """Store logits [B, C] of any device. Raises `UserError` if the disk is full."""
        rows = self._rows(index, view_numbers)
        records = np.empty(len(rows), self.records.dtype)
        records["logits"] = logits.cpu().numpy()
        records["check"] = [_checksum(row) for row in records["logits"]]
        for row, record in zip(rows.tolist(), records, strict=True):
            self._write(record.tobytes(), row * records.itemsize)

    def _rows(self, index: Tensor, view_numbers: Tensor) -> np.ndarray:
        return (view_numbers.cpu() * self.images + index.cpu()).numpy()

    def _write(self, content: bytes, offset: int) -> None:
        try:
            os.pwrite(self.file.fileno(), content, offset)
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written ({error.strerror}): {ADVICE}.") from None


def _checksum(logits: np.ndarray) -> int:
    return 1 << 32 | zlib.crc32(logits.tobytes())


def _check_room(file: Path, size: int, growth: int, gigabytes: float) -> None:
    """Raise `UserError` if a sparse file of `size` bytes, which may still grow by `growth` bytes, has no room."""
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    used = file.stat().st_blocks * 512 if file.exists() else 0
    most, free = min(size, used + growth), shutil.disk_usage(folder).free
    if most > gigabytes * 1e9:
        raise UserError(
            f"teacher.view_store could grow to {most / 1e9:.3g} GB, more than "
            f"teacher.view_store_gigabytes={gigabytes:g}: raise that limit, or set teacher.view_store=false."
        )
    if most - used > free:
        raise UserError(
            f"teacher.view_store needs {most - used:,} bytes in {folder}, but only {free:,} are free: free disk space, "
            "or set teacher.view_store=false."
        )
