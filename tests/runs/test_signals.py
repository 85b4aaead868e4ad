"""A signal ends a command with one sentence and the customary exit code, and takes its child processes along."""

import fcntl
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from src.runs import signals
from src.runs.checkpointing import Checkpoints
from src.runs.signals import ENDING, SIGNALS, leave_closed_terminal, stop_on_signal
from tests.helpers.interruption import SMALL
from tests.helpers.tiny import write_arrays


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_ends_the_command_with_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, stop_on_signal():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"Stopped by {name}: the same command resumes from the last checkpoint.\n"
    assert signal.getsignal(number) == before


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit) as ended, stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert capsys.readouterr().err == ""


def sleep(started: Any) -> None:
    started.set()
    time.sleep(600)


def test_child_processes_are_ended_too(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    with stop_on_signal():
        child = context.Process(target=sleep, args=(started,))
        child.start()
        started.wait()
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    child.join()
    assert child.exitcode == 143
    assert capfd.readouterr().err.count("Stopped by") == 1


def save_slowly(started: Any, file: Path | None) -> None:
    """Write the file after a signal. Without a file, saving takes for ever."""

    def save(*_: Any) -> None:
        time.sleep(0.5 if file else 600)
        if file:
            file.touch()
        sys.exit()

    signal.signal(signal.SIGTERM, save)
    sleep(started)


def test_child_processes_have_time_to_save(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started, file = context.Event(), tmp_path / "saved"
    with stop_on_signal():
        context.Process(target=save_slowly, args=(started, file)).start()
        started.wait()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()  # part of the same request
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        assert file.exists()


def test_a_second_signal_does_not_wait_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_REQUEST", 0.1)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=save_slowly, args=(started, None))
    with stop_on_signal():
        child.start()
        started.wait()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 130
        assert child.is_alive()
    child.kill()
    child.join()


def test_handlers_are_restored_without_a_signal() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with stop_on_signal():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with stop_on_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


# A terminal that is closed


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_closed_terminal_is_discarded_and_a_file_is_kept(tmp_path: Path) -> None:
    main, terminal = os.openpty()
    kept = os.dup(1), os.dup(2)
    try:
        with (tmp_path / "out").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(terminal, 2)
            os.close(terminal)
            leave_closed_terminal()
            assert os.isatty(2), "an open terminal is left alone"
            os.close(main)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(2, b"lost")
            leave_closed_terminal()
            assert os.write(2, b"discarded") == 9
            assert os.write(1, b"kept") == 4
    finally:
        for number, saved in enumerate(kept, start=1):
            os.dup2(saved, number)
            os.close(saved)
    assert (tmp_path / "out").read_text() == "kept"


@pytest.mark.parametrize("is_read", [True, False])
def test_output_to_a_pipe_is_discarded_if_nobody_reads_it(is_read: bool) -> None:
    reader, writer = os.pipe()
    kept = os.dup(2)
    try:
        os.dup2(writer, 2)
        if not is_read:
            os.close(reader)
        leave_closed_terminal()
        assert os.write(2, b"text") == 4
    finally:
        os.dup2(kept, 2)
        for number in (kept, writer):
            os.close(number)
    if is_read:
        assert os.read(reader, 10) == b"text"
        os.close(reader)


def test_a_message_that_nobody_can_read_raises_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Mock(write=Mock(side_effect=BrokenPipeError))
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as ended, stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert stderr.write.called


def arguments_of(path: Path) -> list[str]:
    """List the arguments of a command that trains for a long time without a checkpoint within an epoch."""
    places = f"data.path={write_arrays(path / 'tiny.npz')}", f"runs={path / 'runs'}"
    return [*SMALL, *places, "method=vanilla", "schedule.epochs=500", "logger=none", "checkpoint_minutes=10"]


def train_in_terminal(path: Path, *before: str) -> tuple[int, int]:
    """Start a training command in a terminal of its own. Returns its process and the terminal's main end."""
    main, terminal = os.openpty()
    arguments = [*arguments_of(path), "trainer.enable_progress_bar=true"]
    process = os.fork()
    if process == 0:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in range(3):
            os.dup2(terminal, number)
        os.close(main)
        os.execvp([*before, sys.executable][0], [*before, sys.executable, "-m", "src.train", *arguments])
    os.close(terminal)
    return process, main


def wait_for_epochs(path: Path, main: int, count: int) -> None:
    """Read what the command prints until it has trained some epochs."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([main], [], [], 0.1)[0]:
            os.read(main, 65536)
        file = next(path.rglob("metrics.csv"), None)
        if file and len(file.read_text().splitlines()) > count:
            return
    pytest.fail("the command trains no epoch")


def assert_saved(path: Path) -> None:
    """Assert that the only run has a checkpoint of its last step, and no failure."""
    (checkpoint,) = path.rglob("last.ckpt")
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    (metrics,) = path.rglob("metrics.csv")
    assert steps >= 6 * (len(metrics.read_text().splitlines()) - 1)
    assert not list(path.rglob("failure.txt"))


def test_a_closed_terminal_saves_a_checkpoint(tmp_path: Path) -> None:
    process, main = train_in_terminal(tmp_path)
    wait_for_epochs(tmp_path, main, 2)
    os.close(main)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert_saved(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_job_saves_a_checkpoint_though_workers_and_the_reader_of_a_pipe_get_it_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "src.train", *arguments_of(tmp_path), "data.workers=1"]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    try:
        wait_for_epochs(tmp_path, reader, 2)
        os.close(reader)  # as `| tee log` ends
        os.killpg(process.pid, number)
        assert process.wait() == 128 + number
    finally:
        process.kill()
    assert_saved(tmp_path)


def test_two_hangups_in_a_row_do_not_end_a_run_before_it_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, minutes=10)
    for _ in range(2):
        checkpoints._receive(signal.SIGHUP, None)
    assert checkpoints.received == signal.SIGHUP
