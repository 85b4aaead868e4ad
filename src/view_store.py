"""A teacher's answers to views, kept in one file for all methods, seeds and processes that ask alike."""

import os
import shutil
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError

ADVICE = "free space or set teacher.view_store=false; the same command resumes"
PAGE = 4096
"""Bytes that a disk sets aside at once."""


class ViewStore:
    """A teacher's logits by view, in one memory-mapped file that grows as training asks.

    Record `view * images + index` holds logits [C] of `dtype` and a check of 8 bytes: 1 above their CRC-32. Zeros, as
    of a place where nothing was written yet, and what a kill or a crash of the machine has torn do not pass it and are
    unknown. So processes read and write at the same time without locks. Memory is the system's file cache alone.
    Writing goes past the map: a full disk is then an error that can be told, not the end of the process.
    """

    def __init__(
        self,
        file: Path,
        images: int,
        views: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        asked: int | None = None,
        gigabytes: float = float("inf"),
    ) -> None:
        """At most `asked` answers are still to come, None: all.

        Raises `UserError` where the file could outgrow the disk or `gigabytes`, or is a link or no file.
        """
        self.images = images
        kind = np.float16 if dtype == torch.float16 else np.float32
        record = np.dtype([("logits", kind, (num_classes,)), ("check", "<u8")])
        self.size = size = images * views * record.itemsize
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise UserError(f"{file} is no file of its own, which would be written to: remove it.")
        _check_room(file, size, size if asked is None else asked * (record.itemsize + 2 * PAGE), gigabytes)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        self.file = file.open("r+b", buffering=0)
        weakref.finalize(self, self.file.close)
        if os.fstat(self.file.fileno()).st_size < size:
            # Not truncate: another process may have made the file larger meanwhile. A check's last byte is zero anyway.
            self._write(b"\0", size - 1)
        self.records = np.memmap(self.file, record, "r", shape=(images * views,))

    def read(self, index: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 [B, C] on the CPU, and a mask [B] of those that are unknown.

        Raises `UserError` where somebody has cut the file: reading beyond its end would end the process (SIGBUS).
        """
        if os.fstat(self.file.fileno()).st_size < self.size:
            raise UserError(f"{self.file.name} was cut while it was in use: the same command makes it whole.")
        found = self.records[self._rows(index, views)]
        unknown = [check != _check(logits) for logits, check in zip(found["logits"], found["check"], strict=True)]
        return torch.from_numpy(found["logits"].astype(np.float32)), torch.tensor(unknown)

    def write(self, index: Tensor, views: Tensor, logits: Tensor) -> None:
        """Keep logits [B, C]. Raises `UserError` where the disk is full."""
        rows = self._rows(index, views)
        records = np.empty(len(rows), self.records.dtype)
        records["logits"] = logits.numpy()
        records["check"] = [_check(row) for row in records["logits"]]
        for row, record in zip(rows.tolist(), records, strict=True):
            self._write(record.tobytes(), row * records.itemsize)

    def _rows(self, index: Tensor, views: Tensor) -> np.ndarray:
        return (views.cpu() * self.images + index.cpu()).numpy()

    def _write(self, content: bytes, place: int) -> None:
        try:
            os.pwrite(self.file.fileno(), content, place)
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written ({error.strerror}): {ADVICE}.") from None


def _check(logits: np.ndarray) -> int:
    return 1 << 32 | zlib.crc32(logits.tobytes())


def _check_room(file: Path, size: int, growth: int, gigabytes: float) -> None:
    """Raise `UserError` where a sparse file of `size` bytes, of which `growth` may come to be used, has no room."""
    folder = next(parent for parent in file.absolute().parents if parent.is_dir())
    used = file.stat().st_blocks * 512 if file.exists() else 0
    most, free = min(size, used + growth), shutil.disk_usage(folder).free
    if most > gigabytes * 1e9:
        raise UserError(
            f"teacher.view_store could come to {most / 1e9:.3g} GB, more than teacher.store_gigabytes={gigabytes:g}: "
            "raise that, or set teacher.view_store=false."
        )
    if most - used > free:
        raise UserError(
            f"teacher.view_store needs {most - used:,} bytes at {folder} and {free:,} are free: set it to false."
        )
