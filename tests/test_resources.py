"""A full disk, or too little shared memory: the command ends in one sentence, and nothing that was saved is lost."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import dataloader

from src.common.files import atomic_write
from src.models.checkpoints import save_weights
from src.models.resnet import resnet8
from src.runs.checkpointing import AtomicCheckpointIO, read_checkpoint
from tests.helpers.commands import Ran
from tests.helpers.place import ROOT, SMALL, Place, result_of
from tests.helpers.tiny import same

IGNORED_BY_PYTHON = re.compile(r"^Exception ignored in: .*__del__.*\n(?:Traceback .*\n(?: .*\n)*\w+: .*\n)?", re.M)
"""What Python prints of a loader of torch whose workers could not start: its destructor fails too."""
EPOCHS = ("method=vanilla", "schedule.epochs=2", "trainer.max_epochs=2")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit the size of files in bytes. Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_sentence(ran: Ran, *phrases: str) -> None:
    """Check that the command failed with one line that holds the phrases. Warnings may precede it."""
    assert ran.code == 1
    complaints = IGNORED_BY_PYTHON.sub("", ran.err).splitlines()
    (line,) = [line for line in complaints if "Warning" not in line]
    assert line.startswith("error: ")
    for phrase in phrases:
        assert phrase in line


def test_the_same_command_trains_after_a_full_disk(place: Place) -> None:
    assert place.train(*EPOCHS, "trainer.max_epochs=1").code == 0  # to learn the size of a checkpoint
    (whole,) = place.runs.rglob("last.ckpt")
    size = whole.stat().st_size
    shutil.rmtree(place.runs)
    with files_up_to(size // 2):
        ran = place.train(*EPOCHS)
    assert_one_sentence(ran, "File too large", "last.ckpt", "the same command resumes")
    (folder,) = place.folders("vanilla")
    assert not list(folder.rglob("*.ckpt")) + list(folder.rglob("*.pth")) + list(folder.rglob("result.json"))
    assert not list(folder.rglob(".*.*.ckpt")), "a partial file is left"
    assert place.train(*EPOCHS).code == 0
    assert result_of(folder)["epochs"] == 2


def test_a_disk_that_fills_up_in_a_later_epoch_loses_only_that_epoch(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes, checkpoints = Path.write_bytes, []

    def fail_at_the_second_checkpoint(file: Path, content: Any) -> int:
        if "last.ckpt" in file.name:
            checkpoints.append(file)
            if len(checkpoints) == 2:
                write_bytes(file, bytes(content)[:1000])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(file, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail_at_the_second_checkpoint)
        ran = place.train(*EPOCHS)
    assert_one_sentence(ran, "No space left on device", "last.ckpt", "are kept, and the same command resumes")
    (folder,) = place.folders("vanilla")
    checkpoint = read_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint["epoch"] == 0
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"last.ckpt"}
    ran = place.train(*EPOCHS)
    assert ran.code == 0
    assert "epoch 1/2" not in ran.out
    assert "epoch 2/2" in ran.out


def test_a_full_disk_damages_no_weights_and_no_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet8(10)
    save_weights(network, tmp_path / "a.pth")
    AtomicCheckpointIO().save_checkpoint({"state_dict": network.state_dict()}, tmp_path / "last.ckpt")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with files_up_to(10_000):
        with pytest.raises(OSError, match=r"File too large.*a\.pth"):
            save_weights(resnet8(10), tmp_path / "a.pth")
        with pytest.raises(OSError, match=r"File too large.*last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"state_dict": resnet8(10).state_dict()}, tmp_path / "last.ckpt")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same(torch.load(tmp_path / "a.pth", weights_only=True)["model"], network.state_dict())


def test_a_failed_write_names_its_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with files_up_to(10), pytest.raises(OSError, match=r"a\.txt"), atomic_write(file) as partial:
        partial.write_text("new" * 100)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to write to file </torch_12_34_5>: No space left on device (28)"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It may be out of shared memory."),
        RuntimeError("received 0 items of ancdata"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=str,
)
def test_the_error_of_workers_that_cannot_start_says_what_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", fail)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "__del__", lambda _: None)
    ran = place.train("method=vanilla", "data.workers=2")
    assert_one_sentence(ran, "The data's workers ran out of shared memory or open files (", "set data.workers=0")
    assert place.train("method=vanilla").code == 0, "data.workers is no part of a run's identity"


def in_own_mounts(mount: str, place: Place, *arguments: str) -> Ran:
    """Run the command in a process of root that has mounts of its own."""
    here = (f"data.path={place.data}", f"runs={place.runs}", "method=vanilla", *arguments)
    shell = f"{mount} || exit 77; exec {sys.executable} -m src.train {' '.join([*SMALL, *here])}"
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    if ran.returncode == 77:
        pytest.skip("this machine does not allow mounts")
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize(
    ("mount", "arguments", "phrases"),
    [
        ("mount -t tmpfs -o size=4k tmpfs /dev/shm", ["data.workers=2"], ["data.workers=0"]),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", ["data.workers=2"], ["Read-only file system", "data.workers=0"]),
        ("mount -t tmpfs -o size=300k tmpfs {runs}", [], ["No space left on device", "last.ckpt"]),
        ("mount -t tmpfs -o ro tmpfs {runs}", [], ["cannot be written (Read-only", "runs=..."]),
    ],
)
def test_real_mounts_that_are_full_or_read_only(
    place: Place, mount: str, arguments: list[str], phrases: list[str]
) -> None:
    place.runs.mkdir()
    assert_one_sentence(in_own_mounts(mount.format(runs=place.runs), place, *arguments), *phrases)
