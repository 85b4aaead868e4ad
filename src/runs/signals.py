"""The signals that ask a command to end, and the handler for them."""

import contextlib
import math
import multiprocessing
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType

from lightning.fabric.utilities.rank_zero import rank_zero_only

ENDING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
"""Signals of `kill`, of Ctrl-C, of a cluster that needs the machine or ends a job at its time limit, and of a terminal
that is closed."""
SIGNALS = tuple(getattr(signal, name) for name in (*ENDING, "SIGUSR2") if hasattr(signal, name))
"""The signals of `ENDING`, and SIGUSR2, which submitit sends. Windows lacks some of them."""
ONE_REQUEST = 1.0
"""Signals within so many seconds are one request. If a terminal closes, for example, shell and system send one each."""
GRACE = 10
"""Seconds that child processes have for their last batch and its checkpoint. joblib then kills its processes."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[None]:
    """End the command on a signal, with one sentence and the customary exit code 128 + number.

    Child processes get some time to save. A second signal, at least a second later, ends the command at once.

    If SIGHUP is ignored, as under nohup, it stays ignored.
    """

    command, first = os.getpid(), math.inf  # the time of the first signal

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        is_first, first = now < first, min(now, first)
        if not is_first and now - first < ONE_REQUEST:
            return
        leave_closed_terminal()
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        if os.getpid() == command and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # stderr is closed
                print(f"Stopped by {name}: the same command resumes from the last checkpoint.", file=sys.stderr)
        if is_first:
            _wait_for_checkpoints(children)
        sys.exit(128 + number)

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


def _wait_for_checkpoints(children: Sequence[BaseProcess]) -> None:
    """Let child processes that train save their checkpoints: those of ddp_fork, and joblib's, which never end alone."""
    end = time.monotonic() + GRACE
    for child in children:
        if not child.daemon:  # a loader worker is a daemon
            child.join(max(0.0, end - time.monotonic()))


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


def leave_closed_terminal() -> None:
    """Discard further output to a closed terminal or pipe. Otherwise the next line of the log would raise an error."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if _is_closed(stream):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)


def _is_closed(stream: int) -> bool:
    """Return whether a stream has no reader: a closed terminal or pipe, or the null device."""
    if stat.S_ISCHR(os.fstat(stream).st_mode):
        return not os.isatty(stream)
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
