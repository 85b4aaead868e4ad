"""The memory of this process (Linux)."""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOK_EVERY = 0.005
"""Seconds between two readings."""


def read_status(key: str) -> float:
    """Read a size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def peak_growth(action: Callable[[], Any]) -> float:
    """Measure the peak resident memory during an action minus the memory before it, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_status("VmRSS")
    action()
    return read_status("VmHWM") - before


def anonymous_peak(action: Callable[[], Any]) -> float:
    """Measure the peak anonymous memory during an action, in bytes.

    The kernel keeps no such peak, so a thread looks at the memory every few milliseconds.
    """
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(LOOK_EVERY):
            peak = max(peak, read_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return peak
