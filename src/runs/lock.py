"""The lock that keeps two commands from training in the same folder."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from src.common.errors import UserError
from src.common.files import lock_file, one_process_at_a_time

log = logging.getLogger(__name__)


class BusyError(UserError):
    """Another command trains in the same folder."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Lock a run folder. The system releases the lock when the process ends, even if it is killed.

    Raises `BusyError` if another process holds the lock. With `wait`, waits until it is released instead.
    """

    def report() -> None:
        if not wait:
            raise BusyError(
                f"{folder} is being trained by another command: wait for it, or choose another folder with runs=..."
            ) from None
        log.info("Waiting for another command that trains %s.", folder)

    with one_process_at_a_time(folder, report):
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a process on this machine holds the lock of a run folder."""
    if not lock_file(folder).is_file():
        return False
    lock = FileLock(lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False
