"""The lock of a run folder keeps other commands out, and ends with its process."""

import signal
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import UserError
from src.common.files import lock_file
from src.runs.lock import BusyError, is_locked, locked
from tests.helpers.interruption import context


def hold(folder: Path, held: Any, release: Any) -> None:
    """Lock a folder until `release` is set."""
    with locked(folder, wait=False):
        held.set()
        release.wait()


def test_a_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path: Path) -> None:
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, release))
    process.start()
    held.wait()
    with (
        pytest.raises(BusyError, match=r"run is being trained by another command: .* runs=\.\.\."),
        locked(tmp_path / "run", wait=False),
    ):
        pass
    assert is_locked(tmp_path / "run")
    process.kill()
    with locked(tmp_path / "run", wait=True):
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not is_locked(tmp_path / "run")


def test_a_waiting_command_says_so_and_gets_the_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, release))
    process.start()
    held.wait()
    caplog.set_level("INFO", "src.runs.lock")

    def let_go(record: Any) -> bool:  # the message makes the other process release the lock
        release.set()
        return True

    caplog.handler.addFilter(let_go)
    with locked(tmp_path / "run", wait=True):
        assert caplog.messages == [f"Waiting for another command that trains {tmp_path / 'run'}."]
    process.join()
    assert process.exitcode == 0


def test_a_lock_lies_beside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder, wait=False):
        assert lock_file(folder) == tmp_path / "runs" / ".a.lock"
        assert lock_file(folder).is_file()
        assert not folder.exists()


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run", wait=False):
        raise ZeroDivisionError
    with locked(tmp_path / "run", wait=False):
        pass


def test_asking_whether_a_folder_is_locked_makes_no_lock(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_busy_folder_is_an_error_of_the_user() -> None:
    assert issubclass(BusyError, UserError)
