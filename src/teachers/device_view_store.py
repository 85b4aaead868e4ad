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
        parts = [store.read_rows(part.numpy()) for part in rows.split(LOADED_AT_ONCE)]
        nan = torch.full((1, parts[0][0].shape[1]), torch.nan)
        self.logits = torch.cat([*(logits.to(store.dtype) for logits, _ in parts), nan.to(store.dtype)]).to(device)
        unknown = torch.cat([unknown for _, unknown in parts])
        self.is_complete = not unknown.any()
        self.unknown = torch.cat([unknown, torch.tensor([False])]).to(device)
        self.slots = torch.full((store.size_in_records,), len(rows), device=device)
        self.slots[rows.to(device)] = torch.arange(len(rows), device=device)
        self.writer = ThreadPoolExecutor(1)
        self.pending: deque[Future[None]] = deque()

    def read(self, index: Tensor, view_numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits float32 [B, C] on the device, and a mask [B] of unknown logits: None if all are known."""
        slots = self._slots(index, view_numbers)
        logits = self.logits.index_select(0, slots).float()
        return logits, None if self.is_complete else self.unknown.index_select(0, slots)

    def write(self, index: Tensor, view_numbers: Tensor, logits: Tensor) -> None:
        """Keep logits [B, C], and let the thread store them. Raises the `UserError` of an earlier write that failed."""
        slots = self._slots(index, view_numbers)
        self.logits[slots] = logits.to(self.logits.dtype)
        self.unknown.index_fill_(0, slots, False)
        while self.pending and (self.pending[0].done() or len(self.pending) >= PENDING):
            self.pending.popleft().result()
        event = None
        if logits.is_cuda:  # the thread copies on another stream, so it must wait for the answers
            event = torch.cuda.Event()
            event.record()
        self.pending.append(self.writer.submit(self._write_to_file, event, index, view_numbers, logits))

    def flush(self) -> None:
        """Wait until all answers are written. Raises the `UserError` of a write that failed."""
        while self.pending:
            self.pending.popleft().result()

    def _write_to_file(
        self, event: torch.cuda.Event | None, index: Tensor, view_numbers: Tensor, logits: Tensor
    ) -> None:
        if event is not None:
            event.synchronize()
        self.store.write(index, view_numbers, logits)

    def _slots(self, index: Tensor, view_numbers: Tensor) -> Tensor:
        return self.slots[view_numbers * self.store.images + index]
