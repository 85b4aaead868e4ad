"""Runs that were killed and typed again end as the run that was never killed, to the last bit."""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning import Callback, Trainer

from src import assemble
from src.data.image_data import EpochBatches
from src.errors import UserError
from src.methods.vanilla import Vanilla
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from src.resume import BusyError, Checkpoints, WholeFiles, checkpoint_file, last_good, locked, previous_file
from src.run import History, read_history
from tests.commands import run
from tests.tiny import CLASSES, tiny_data, tiny_distiller, tiny_trainer, weights, write_arrays

SMALL = (
    "data=arrays", "data.padding=1", "model=resnet20_to_resnet8", "schedule=quick", "schedule.epochs=3",
    "schedule.batch_size=8", "trainer=cpu", "trainer.log_every_n_steps=2", "gradients.every=4",
    "trainer.check_val_every_n_epoch=2", "logger=csv", "checkpoint_minutes=0",
)  # fmt: skip
CASES = {
    "own parameters and banks": ("method=crd", "method@also=ctkd", "averaging=ema", "averaging.decay=0.9"),
    "a stage, workers": ("method=ab", "data.workers=1", "schedule=cifar240"),
    "view store": ("method=kd", "teacher.view_store=true", "optimizer=dot"),
    "teacher first": ("method=aekt", "schedule.epochs=2", "teacher.path=null"),
}
context = multiprocessing.get_context("forkserver")  # processes that have imported all this already
context.set_forkserver_preload(["wandb", "src.train", "tests.test_interruption"])


class Place:
    """A folder of its own for runs, and the command in processes of its own."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.runs, self.note, self.arguments = path / "runs", path / "note.json", arguments
        path.mkdir()

    def train(self, kill_at: int | None = None, by: int = signal.SIGKILL, *arguments: str) -> dict[str, Any]:
        """Train, unless killed at a number of calls: exit code, calls, what was said."""
        self.note.unlink(missing_ok=True)
        arguments = (*self.arguments, f"runs={self.runs}", *arguments)
        process = context.Process(target=train, args=(arguments, kill_at, by, self.note))
        process.start()
        process.join()
        return json.loads(self.note.read_text()) if self.note.is_file() else {"code": process.exitcode}

    def left(self) -> dict[str, Any]:
        """All that runs leave behind and that no clock and no path decides."""
        found: dict[str, Any] = {}
        for folder in sorted(file.parent for file in self.runs.rglob("result.json")):
            name = str(folder.relative_to(self.runs))
            for file in sorted(folder.rglob("*.ckpt")):
                found[f"{name}/{file.relative_to(folder)}"] = torch.load(file, weights_only=True)
            found[f"{name}/metrics"] = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
            found[f"{name}/student"] = torch.load(folder / "student.pth", weights_only=True)
            found[f"{name}/gradients"] = (folder / "gradients.csv").read_text().splitlines()
            found[f"{name}/result"] = json.loads((folder / "result.json").read_text())
        found["views"] = [f.read_bytes() for f in self.runs.rglob("*.views")]
        return found

    def logged(self) -> set[tuple[str, str, str]]:
        """Step, name and value of all that loggers were told: what was done again they were told again."""
        rows = [row for file in self.runs.rglob("steps/*/metrics.csv") for row in csv.DictReader(file.open())]
        return {(row["step"], name, value) for row in rows for name, value in row.items() if value}


def train(arguments: Sequence[str], kill_at: int | None, by: int, note: Path) -> None:
    """`python -m src.train`, in a process that sends itself a signal after so many calls and returns in Python."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), by)

    def make_data(*arguments: Any) -> Any:  # composing the configuration writes nothing
        sys.setprofile(count)
        return original(*arguments)

    original = assemble.make_data
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a command
    torch.set_num_threads(1)
    with patch.object(assemble, "make_data", make_data):
        ran = run("train", *arguments)
    sys.setprofile(None)
    note.write_text(json.dumps({"code": ran.code, "calls": calls, "out": ran.out, "err": ran.err}))


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two structures differ, but for clocks and places."""
    if where.endswith(("/seconds", "/source", "/dirpath", "/path", "/runs", "/root")):
        return []
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [] if one.keys() == other.keys() else [f"{where}: {list(one)} {list(other)}"]
        return keys + [d for k in one.keys() & other.keys() for d in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        length = [] if len(one) == len(other) else [f"{where}: {len(one)} and {len(other)}"]
        return length + [
            d for i, pair in enumerate(zip(one, other, strict=False)) for d in differences(*pair, f"{where}/{i}")
        ]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{where}: {one.flatten()[:4]} {other.flatten()[:4]}"]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one} {other}"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Data and a teacher."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(5)
    save_weights(resnet20(CLASSES), folder / "teacher.pth")
    return f"data.path={write_arrays(folder / 'tiny.npz')}", f"teacher.path={folder / 'teacher.pth'}"


@pytest.mark.parametrize(
    ("case", "kills"),
    [("own parameters and banks", 2), *(pytest.param(case, 14, marks=pytest.mark.slow) for case in CASES)],
)
def test_killed_at_any_moment_it_ends_as_if_it_never_was(
    tmp_path: Path, sources: tuple[str, ...], case: str, kills: int
) -> None:
    arguments = (*SMALL, *sources, *CASES[case])
    whole, killed = Place(tmp_path / "whole", *arguments), Place(tmp_path / "killed", *arguments)
    uninterrupted = whole.train()
    assert (uninterrupted["code"], uninterrupted["err"]) == (0, "")
    draw = random.Random(case)
    moments: list[int] = []
    while kills:
        moments.append(draw.randrange(1, uninterrupted["calls"]))
        if killed.train(moments[-1])["code"] == -signal.SIGKILL:
            kills -= 1
        else:  # it was finished before
            assert differences(whole.left(), killed.left()) == [], moments
            killed = Place(tmp_path / f"killed{len(moments)}", *arguments)
    last = killed.train()
    assert (last["code"], last["err"]) == (0, ""), moments
    assert differences(whole.left(), killed.left()) == [], moments
    assert killed.logged() <= whole.logged()
    again = killed.train()
    assert "is finished already" in again["out"], again
    assert not list(killed.runs.rglob("previous.ckpt"))
    assert not list(killed.runs.rglob(".[0-9]*"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_asked_to_end_it_saves_its_batch_and_says_how_to_go_on(
    tmp_path: Path, sources: tuple[str, ...], number: int, code: int
) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla", "checkpoint_minutes=1000", "data.workers=1")
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train()["calls"]
    ended = place.train(calls * 3 // 4, number)
    assert ended["code"] == code
    assert ended["err"].splitlines() == [
        f"Stopped by {signal.Signals(number).name}: the same command goes on from the last checkpoint."
    ]
    (file,) = place.runs.rglob("last.ckpt")
    loops = torch.load(file, weights_only=True)["loops"]["fit_loop"]
    assert 0 < loops["epoch_loop.batch_progress"]["current"]["processed"] < 6  # in the middle of an epoch
    assert place.train()["code"] == 0
    assert differences(whole.left(), place.left()) == []


class StoppedError(Exception):
    pass


class StopBefore(Callback):
    """An interruption before a step, in this process."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise StoppedError


def fit(
    folder: Path, step: int | None = None, workers: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Three epochs of six steps, with a schedule of steps, from the last checkpoint on."""
    folder.mkdir(exist_ok=True)
    data = tiny_data(folder.parent, workers=workers)
    distiller = tiny_distiller(data, Vanilla())
    distiller.interval = "step"
    distiller.scheduler_partial = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    callbacks = [History(folder), Checkpoints(folder, 0), StopBefore(step)]
    trainer = tiny_trainer(3, enable_checkpointing=True, callbacks=callbacks, check_val_every_n_epoch=2)
    trainer.strategy.checkpoint_io = WholeFiles()
    found = last_good(folder)
    with nullcontext() if step is None else pytest.raises(StoppedError):
        trainer.fit(distiller, datamodule=data, ckpt_path=found[0] if found else None)
    return weights(distiller), [{**row, "seconds": 0.0} for row in read_history(folder)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_batch_of_an_epoch_can_be_the_last_before_an_interruption(tmp_path: Path, workers: int) -> None:
    expected, rows = fit(tmp_path / "whole")
    for steps in ((1, 5, 9), (6, 14), (13, 15, 17)):
        folder = tmp_path / str(steps[0])
        for step in steps:
            fit(folder, step, workers)
        found, found_rows = fit(folder, None, workers)
        assert differences(expected, found) == []
        assert found_rows == rows


def test_a_resumed_epoch_has_its_last_batches_and_the_next_one_all() -> None:
    whole = EpochBatches(20, 8, seed=3, rank=1, world_size=2)
    resumed = EpochBatches(20, 8, seed=3, rank=1, world_size=2, epoch=1, done=2)
    assert len(resumed) == len(whole) == 3
    for epoch, first in ((1, 2), (2, 0)):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[first:]


def save(folder: Path, step: int) -> None:
    WholeFiles().save_checkpoint({"state_dict": {"step": torch.tensor(step)}}, checkpoint_file(folder))


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":  # a bit of the tensor
        place = content.index((77).to_bytes(8, "little"))
        content[place] ^= 1
    file.write_bytes(b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 77)
    damage(checkpoint_file(tmp_path), how)
    found = last_good(tmp_path)
    assert found is not None
    assert (found[0], found[1]["state_dict"]["step"]) == (previous_file(tmp_path), 1)
    assert len(caplog.messages) == 1
    assert "last.ckpt is damaged" in caplog.messages[0]
    previous_file(tmp_path).write_bytes(b"too")
    with pytest.raises(UserError, match=r"previous.ckpt is damaged .*start_over=true"):
        last_good(tmp_path)


def test_the_last_checkpoints_are_two_and_a_kill_between_their_renames_loses_none(tmp_path: Path) -> None:
    assert last_good(tmp_path) is None
    for step in range(4):
        save(tmp_path, step)
    assert {file.name for file in checkpoint_file(tmp_path).parent.iterdir()} == {"last.ckpt", "previous.ckpt"}
    checkpoint_file(tmp_path).replace(previous_file(tmp_path))
    found = last_good(tmp_path)
    assert found is not None
    assert found[1]["state_dict"]["step"] == 3


@pytest.mark.slow
def test_a_run_goes_on_from_the_good_checkpoint_and_keeps_it_until_there_is_another(
    tmp_path: Path, sources: tuple[str, ...]
) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla")
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train()["calls"]
    place.train(calls * 2 // 3)
    (last,) = place.runs.rglob("last.ckpt")
    damage(last, "cut")
    resumed = place.train()
    assert resumed["code"] == 0
    assert resumed["out"].count("is damaged") == 1
    assert differences(whole.left(), place.left()) == []


def hold(folder: Path, held: Any, go_on: Any) -> None:
    with locked(folder, wait=False):
        held.set()
        go_on.wait()


def test_a_lock_keeps_others_off_and_dies_with_its_process(tmp_path: Path) -> None:
    held, go_on = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, go_on))
    process.start()
    held.wait()
    with (
        pytest.raises(BusyError, match="run is being trained by another command"),
        locked(tmp_path / "run", wait=False),
    ):
        pass
    process.kill()
    with locked(tmp_path / "run", wait=True):
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_second_command_leaves_a_run_to_the_first(tmp_path: Path, sources: tuple[str, ...]) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla", "trainer=debug")
    assert place.train()["code"] == 0
    (folder,) = (file.parent for file in place.runs.rglob("run.json"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with locked(folder, wait=False):
        busy = place.train(None, 0, "start_over=true")
        assert busy["code"] == 1
        assert busy["err"].splitlines() == [
            f"error: {folder} is being trained by another command: wait for it, or choose another runs=."
        ]
        sweep = place.train(None, 0, "start_over=true", "seed=0,1", "-m")
        assert (sweep["code"], sweep["err"]) == (0, "")
        assert sweep["out"].count("Left to it.") == 1
    assert before == {file: file.read_bytes() for file in before}
    assert len(list(place.runs.rglob("result.json"))) == 2


@pytest.mark.slow
def test_to_start_over_forgets_all_of_the_run(tmp_path: Path, sources: tuple[str, ...]) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla", "trainer=debug")
    place.train()
    (folder,) = (file.parent for file in place.runs.rglob("run.json"))
    (folder / "stages").mkdir()
    (folder / "old").touch()
    assert place.train(None, 0, "start_over=true")["code"] == 0
    assert not (folder / "stages").exists()
    assert not (folder / "old").exists()


@pytest.mark.slow
def test_a_sweep_that_was_killed_does_only_what_is_missing_and_names_what_failed(
    tmp_path: Path, sources: tuple[str, ...]
) -> None:
    sweep = ("seed=0,1", "data.val_size=0,1000", "-m")
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla", "trainer=debug")
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train(None, 0, *sweep)["calls"]
    assert place.train(calls * 2 // 3, signal.SIGKILL, *sweep)["code"] == -signal.SIGKILL
    again = place.train(None, 0, *sweep)
    assert again["code"] == 1
    assert "is finished already" in again["out"]
    last = again["err"].splitlines()[-1]
    assert last == "error: 2 of 4 jobs failed: seed=0 data.val_size=1000; seed=1 data.val_size=1000."
    assert differences(whole.left(), place.left()) == []
