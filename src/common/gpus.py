"""The visible GPUs of this machine, and the choice of one of them for a process of a sweep."""

import itertools
import os
import re
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable from which CUDA learns the GPUs of a process. CUDA reads it once, when it is initialised."""
GPU = re.compile(r"\d+|(GPU|MIG)-.+")
"""Names of a GPU: its number or its UUID. CUDA ignores a name of another form, and all names after it."""
_slot: FileLock | None = None
"""The lock that this process holds while it is pinned to a GPU."""


def visible_gpus() -> list[str]:
    """List the visible GPUs by the names that CUDA_VISIBLE_DEVICES gives them. Does not initialise CUDA."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return list(dict.fromkeys(itertools.takewhile(GPU.fullmatch, map(str.strip, named.split(",")))))


def name_visible_gpus() -> None:
    """Set CUDA_VISIBLE_DEVICES if it is not set, so that worker processes need not count the GPUs."""
    if gpus := visible_gpus():
        os.environ.setdefault(VISIBLE, ",".join(gpus))


def pin_gpu() -> None:
    """Let this process see a single GPU from now on: the one that the fewest pinned processes of this user share.

    Does nothing in a process that is pinned already, or has initialised CUDA, which cannot change its devices any more.
    The process holds a lock on its GPU. The system releases the lock when the process ends, even if it is killed.
    """
    global _slot
    gpus = visible_gpus()
    if _slot is not None or torch.cuda.is_initialized() or not gpus:
        return
    folder = Path(tempfile.gettempdir()) / f"aekt-gpus-{os.getuid() if hasattr(os, 'getuid') else 'all'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "choice.lock"):
        slots = {gpu: _slots(folder, gpu) for gpu in gpus}
        gpu = min(gpus, key=lambda gpu: len(slots[gpu][0]))
        _slot = FileLock(slots[gpu][1][0])
        _slot.acquire()
    os.environ[VISIBLE] = gpu


def _slots(folder: Path, gpu: str) -> tuple[list[Path], list[Path]]:
    """List the lock files of a GPU: those that other processes hold, and the free ones. At least one is free."""
    name = gpu.replace("/", "_")
    count = len(list(folder.glob(f"{name}.*.lock")))
    files = [folder / f"{name}.{number}.lock" for number in range(count + 1)]
    taken = [file for file in files if _is_locked(file)]
    return taken, [file for file in files if file not in taken]


def _is_locked(file: Path) -> bool:
    """Return whether another process holds a lock."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
