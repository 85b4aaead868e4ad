"""A signal ends a command with one sentence and the customary exit code, and takes its child processes along."""

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from src.runs.signals import ENDING, SIGNALS, stop_on_signal


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
