"""Processes of a sweep spread over the visible GPUs, which are fakes here. CUDA is never asked for them."""

import multiprocessing
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from src.common import gpus
from src.common.gpus import VISIBLE, name_visible_gpus, pin_gpu, visible_gpus


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("3,5", ["3", "5"]),
        (" 0, 1 ", ["0", "1"]),
        ("GPU-8f2a,MIG-1c/1/0", ["GPU-8f2a", "MIG-1c/1/0"]),
        ("2,-1,3", ["2"]),
        ("1,1", ["1"]),
        ("NoDevFiles", []),
        ("", []),
    ],
)
def test_the_variable_names_the_visible_gpus(monkeypatch: pytest.MonkeyPatch, variable: str, names: list[str]) -> None:
    monkeypatch.setenv(VISIBLE, variable)
    assert visible_gpus() == names
    name_visible_gpus()
    assert os.environ[VISIBLE] == variable


@pytest.mark.parametrize(("count", "names"), [(0, None), (1, "0"), (3, "0,1,2")])
def test_without_the_variable_all_gpus_are_visible(
    monkeypatch: pytest.MonkeyPatch, count: int, names: str | None
) -> None:
    monkeypatch.setenv(VISIBLE, "")  # so that the variable is restored
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == [str(number) for number in range(count)]
    name_visible_gpus()
    assert os.environ.get(VISIBLE) == names


def pin_and_wait(connection: Connection) -> None:
    pin_gpu()
    connection.send(os.environ.get(VISIBLE))
    pin_gpu()  # changes nothing
    connection.send(os.environ.get(VISIBLE))
    connection.recv()


Start = Callable[[], tuple[str | None, BaseProcess]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a process, waits until it is pinned, and returns its visible GPUs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "_slot", None)
    context = multiprocessing.get_context("fork")
    processes = []

    def new_process() -> tuple[str | None, BaseProcess]:
        here, there = context.Pipe()
        process = context.Process(target=pin_and_wait, args=(there,))
        process.start()
        processes.append((process, here))
        first, second = here.recv(), here.recv()
        assert first == second
        return first, process

    yield new_process
    for process, _ in processes:
        process.kill()
        process.join()


def test_two_processes_get_different_gpus(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setenv(VISIBLE, "3,5")
    assert [start()[0] for _ in range(2)] == ["3", "5"]


def test_processes_share_gpus_evenly(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setenv(VISIBLE, "GPU-aa,MIG-bb/1/0")
    assert Counter(start()[0] for _ in range(4)) == {"GPU-aa": 2, "MIG-bb/1/0": 2}


def test_a_gpu_is_free_again_when_its_process_is_killed(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setenv(VISIBLE, "3,5")
    processes = dict(start() for _ in range(2))
    for gpu in ("5", "3", "5"):
        process = processes[gpu]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found, processes[gpu] = start()
        assert found == gpu


def test_the_gpu_with_the_fewest_processes_is_chosen(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setenv(VISIBLE, "3,5")
    started = [start() for _ in range(4)]
    for gpu, process in started[:3]:  # leaves the second process of GPU 5, whose first slot is free now
        assert gpu in ("3", "5")
        process.kill()
        process.join()
    assert [start()[0] for _ in range(3)] == ["3", "3", "5"]


def test_without_gpus_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch, start: Start, tmp_path: Path) -> None:
    monkeypatch.setenv(VISIBLE, "")
    assert start()[0] == ""
    assert list(tmp_path.iterdir()) == []
