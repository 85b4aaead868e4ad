"""A run that is killed and started again ends with the same bits as a run that is never interrupted."""

import random
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from src.data.batches import EpochBatches
from src.methods.vanilla import Vanilla
from src.runs.checkpointing import AtomicCheckpointIO, Checkpoints, newest_intact_checkpoint
from src.runs.history import History, read_history
from src.runs.lock import locked
from src.training.term_log import TermLog
from tests.helpers.interruption import SMALL, Place, differences, write_sources
from tests.helpers.tiny import tiny_data, tiny_distiller, tiny_trainer, weights, without_clock

CASES = {
    "own parameters and banks": ("method=crd", "method@also=ctkd", "averaging=ema", "averaging.decay=0.9"),
    "a stage, workers": ("method=ab", "data.workers=1", "schedule=cifar240", "data.val_size=12", "keep_best=true"),
    "view store": ("method=kd", "teacher.view_store=true", "optimizer=dot"),
    "teacher first": ("method=aekt", "schedule.epochs=2", "teacher.path=null"),
}
DEBUG = ("method=vanilla", "trainer=debug", "start_over=false")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(
    ("case", "kills"),
    [("own parameters and banks", 2), *(pytest.param(case, 14, marks=pytest.mark.slow) for case in CASES)],
)
def test_a_run_killed_at_any_moment_ends_like_an_uninterrupted_one(
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
        else:  # the rest of the run took fewer calls, so the run is finished
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
def test_a_signal_saves_the_batch_and_the_message_says_how_to_resume(
    tmp_path: Path, sources: tuple[str, ...], number: int, code: int
) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla", "checkpoint_minutes=1000", "data.workers=1")
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train()["calls"]
    ended = place.train(calls * 8 // 9, number)
    assert ended["code"] == code
    assert ended["err"].splitlines() == [
        f"Stopped by {signal.Signals(number).name}: the same command resumes from the last checkpoint."
    ]
    (file,) = place.runs.rglob("last.ckpt")
    loops = torch.load(file, weights_only=True)["loops"]["fit_loop"]
    assert 0 < loops["epoch_loop.batch_progress"]["current"]["processed"] < 6  # within an epoch
    assert place.train()["code"] == 0
    assert differences(whole.left(), place.left()) == []


class StoppedError(Exception):
    pass


class StopBefore(Callback):
    """Interrupt the training in this process before a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise StoppedError


def fit(
    folder: Path, step: int | None = None, workers: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Train three epochs of six steps, by a scheduler that steps every batch, from the newest checkpoint."""
    folder.mkdir(exist_ok=True)
    data = tiny_data(folder.parent, workers=workers)
    distiller = tiny_distiller(data, Vanilla())
    scheduler = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    distiller.recipe = distiller.recipe._replace(make_scheduler=scheduler, interval="step")
    callbacks = [TermLog(), History(folder), Checkpoints(folder, 0), StopBefore(step)]
    trainer = tiny_trainer(3, enable_checkpointing=True, callbacks=callbacks, check_val_every_n_epoch=2)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    found = newest_intact_checkpoint(folder)
    with nullcontext() if step is None else pytest.raises(StoppedError):
        trainer.fit(distiller, datamodule=data, ckpt_path=found[0] if found else None)
    return weights(distiller), without_clock(read_history(folder))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_can_be_interrupted_after_any_batch_of_an_epoch(tmp_path: Path, workers: int) -> None:
    expected, rows = fit(tmp_path / "whole")
    for steps in ((1, 5, 9), (6, 14), (13, 15, 17)):
        folder = tmp_path / str(steps[0])
        for step in steps:
            fit(folder, step, workers)
        found, found_rows = fit(folder, None, workers)
        assert differences(expected, found) == []
        assert found_rows == rows


def test_a_resumed_epoch_has_its_last_batches_and_the_next_epoch_has_all() -> None:
    whole = EpochBatches(20, 8, seed=3, rank=1, world_size=2)
    resumed = EpochBatches(20, 8, seed=3, rank=1, world_size=2, epoch=1, done=2)
    assert len(resumed) == len(whole) == 3
    for epoch, first in ((1, 2), (2, 0)):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[first:]


@pytest.mark.slow
def test_a_run_resumes_from_the_intact_checkpoint_and_keeps_it_until_the_next_one(
    tmp_path: Path, sources: tuple[str, ...]
) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, "method=vanilla")
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train()["calls"]
    place.train(calls * 2 // 3)
    (last,) = place.runs.rglob("last.ckpt")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    resumed = place.train()
    assert resumed["code"] == 0
    assert resumed["out"].count("is damaged") == 1
    assert differences(whole.left(), place.left()) == []


def test_a_second_command_does_not_touch_a_locked_run(tmp_path: Path, sources: tuple[str, ...]) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, *DEBUG)
    assert place.train()["code"] == 0
    (folder,) = (file.parent for file in place.runs.rglob("run.json"))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with locked(folder, wait=False):
        busy = place.train(None, 0, "start_over=true")
        assert busy["code"] == 1
        message = f"{folder} is being trained by another command: wait for it, or choose another folder with runs=..."
        assert busy["err"].splitlines() == [f"error: {message}"]
        sweep = place.train(None, 0, "start_over=true", "seed=0,1", "-m")
        assert (sweep["code"], sweep["err"]) == (0, "")
        assert sweep["out"].count("This sweep skips the run.") == 1
    assert before == {file: file.read_bytes() for file in before}
    assert len(list(place.runs.rglob("result.json"))) == 2


@pytest.mark.slow
def test_starting_over_deletes_all_files_of_the_run(tmp_path: Path, sources: tuple[str, ...]) -> None:
    place = Place(tmp_path / "here", *SMALL, *sources, *DEBUG)
    place.train()
    (folder,) = (file.parent for file in place.runs.rglob("run.json"))
    (folder / "stages").mkdir()
    (folder / "old").touch()
    assert place.train(None, 0, "start_over=true")["code"] == 0
    assert not (folder / "stages").exists()
    assert not (folder / "old").exists()


@pytest.mark.slow
def test_a_killed_sweep_resumes_only_what_is_missing_and_names_the_failed_jobs(
    tmp_path: Path, sources: tuple[str, ...]
) -> None:
    sweep = ("seed=0,1", "data.val_size=0,1000", "-m")
    place = Place(tmp_path / "here", *SMALL, *sources, *DEBUG)
    whole = Place(tmp_path / "whole", *place.arguments)
    calls = whole.train(None, 0, *sweep)["calls"]
    assert place.train(calls * 2 // 3, signal.SIGKILL, *sweep)["code"] == -signal.SIGKILL
    again = place.train(None, 0, *sweep)
    assert again["code"] == 1
    assert "is finished already" in again["out"]
    last = again["err"].splitlines()[-1]
    assert last == "error: 2 of 4 jobs failed: seed=0 data.val_size=1000; seed=1 data.val_size=1000."
    assert differences(whole.left(), place.left()) == []
