"""The signals that ask a command to end, and the handler for them."""

import contextlib
import multiprocessing
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from lightning.fabric.utilities.rank_zero import rank_zero_only

ENDING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
"""Signals of `kill`, of Ctrl-C, of a cluster that needs the machine or ends a job at its time limit, and of a terminal
that is closed."""
SIGNALS = tuple(getattr(signal, name) for name in (*ENDING, "SIGUSR2") if hasattr(signal, name))
"""The signals of `ENDING`, and SIGUSR2, which submitit sends. Windows lacks some of them."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[None]:
    """End the command on a signal, with one sentence and the customary exit code 128 + number.

    If SIGHUP is ignored, as under nohup, it stays ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        for child in multiprocessing.active_children():  # processes of ddp_fork; each saves its own checkpoint
            child.terminate()
        if os.getpid() == command and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            name = signal.Signals(number).name
            print(f"Stopped by {name}: the same command resumes from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + number)

    command = os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in SIGNALS if number.name in ENDING and not _is_ignored_hangup(number)]
    before = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


def leave_closed_terminal() -> None:
    """Discard further output to a terminal that is closed. Otherwise the next line of the log would raise an error."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):  # closed, or the null device already
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)
