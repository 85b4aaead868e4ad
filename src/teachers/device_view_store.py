"""The records of a view store that one run needs, copied to the memory of a GPU."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from src.teachers.view_store import ViewStore

LOADED_AT_ONCE = 1 << 16
"""Records per read from the file."""
PENDING = 64
"""Batches of answers that may wait to be written. Beyond that, training waits for the disk."""


def device_bytes(store: ViewStore, rows: int) -> int:
    """Return the bytes of device memory that a copy of this many records takes."""
    classes: int = store.records.dtype["logits"].shape[0]
    return rows * (classes * store.dtype.itemsize + 1) + 8 * store.size_in_records


class DeviceViewStore:
    """A `ViewStore` that answers from device memory, without waiting for the host.

    The checksums are verified once, when the records are loaded. New answers go to the device memory at once, and are
    written to the file by a thread. A crash loses only the answers that this thread has not written yet.

    `rows` [R] are the numbers of the records that the run needs, each once. A view outside of them gets NaN.
    """

    def __init__(self, store: ViewStore, rows: Tensor, device: torch.device) -> None:
        self.store = store
        classes: int = store.records.dtype["logits"].shape[0]
        self.logits = torch.full((len(rows) + 1, classes), torch.nan, dtype=store.dtype, device=device)
        self.unknown = torch.zeros(len(rows) + 1, dtype=torch.bool, device=device)
        for start in range(0, len(rows), LOADED_AT_ONCE):
            part = rows[start : start + LOADED_AT_ONCE]
            logits, unknown = store.read_rows(part.numpy())
            self.logits[start : start + len(part)] = logits.to(device, store.dtype)
            self.unknown[start : start + len(part)] = unknown.to(device)
        self.is_complete = not self.unknown.any()
        """False if at least one record was unknown when the run started."""
        self.slots = torch.full((store.size_in_records,), len(rows), device=device)
        self.slots[rows.to(device)] = torch.arange(len(rows), device=device)
        self.writer = ThreadPoolExecutor(1)
        self.pending: deque[Future[None]] = deque()

    def read(self, index: Tensor, view_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits float32 [B, C] on the device, and a mask [B] that marks unknown logits."""
        slots = self._slots(index, view_numbers)
        return self.logits.index_select(0, slots).float(), self.unknown.index_select(0, slots)

    def write(self, index: Tensor, view_numbers: Tensor, logits: Tensor, is_new: Tensor) -> None:
        """Keep logits [B, C], and let the thread store those that `is_new` [B] marks.

        Raises the `UserError` of an earlier write that failed.
        """
        slots = self._slots(index, view_numbers)
        self.logits[slots] = logits.to(self.logits.dtype)
        self.unknown.index_fill_(0, slots, False)
        while self.pending and (self.pending[0].done() or len(self.pending) >= PENDING):
            self.pending.popleft().result()
        event = None
        if logits.is_cuda:  # the thread copies on another stream, so it must wait for the answers
            event = torch.cuda.Event()
            event.record()
        self.pending.append(self.writer.submit(self._write_to_file, event, index, view_numbers, logits, is_new))

    def flush(self) -> None:
        """Wait until all answers are written. Raises the `UserError` of a write that failed."""
        while self.pending:
            self.pending.popleft().result()

    def _write_to_file(
        self, event: torch.cuda.Event | None, index: Tensor, view_numbers: Tensor, logits: Tensor, is_new: Tensor
    ) -> None:
        if event is not None:
            event.synchronize()
        new = is_new.cpu().nonzero()[:, 0]
        if len(new):
            self.store.write(index.cpu()[new], view_numbers.cpu()[new], logits.cpu()[new])

    def _slots(self, index: Tensor, view_numbers: Tensor) -> Tensor:
        return self.slots[view_numbers * self.store.images + index]
