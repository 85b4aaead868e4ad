"""A command that runs out of time saves and ends. The same command goes on to the end, as if it had never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.runs import time_budget
from src.runs.time_budget import TimeBudget, describe_pause
from tests.helpers.commands import assert_refused, run
from tests.helpers.configure import changed, configure
from tests.helpers.interruption import SMALL
from tests.helpers.tiny import write_arrays

BASE = (*SMALL, "logger=none", "schedule.epochs=4", "trainer.check_val_every_n_epoch=1", "gradients.every=0")
EARLY = (
    "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: test/accuracy, "
    "mode: max, stopping_threshold: 0}]"
)
TIMER = "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer, duration: '00:00:00:05'}]"


class Clock:
    """A clock that runs on by one second each time somebody looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time_budget, "time", made)
    return made


@pytest.fixture
def data(tmp_path: Path) -> str:
    return f"data.path={write_arrays(tmp_path / 'tiny.npz')}"


def test_a_budget_is_over_after_its_time(clock: Clock) -> None:
    budget = TimeBudget(3)
    assert [budget.is_over for _ in range(4)] == [False, False, True, True]
    assert budget.is_limited
    assert not TimeBudget().is_limited
    assert not TimeBudget().is_over


@pytest.mark.parametrize(("given", "seconds"), [(None, None), ("00:00:05", 5), ({"minutes": 1}, 60)])
def test_the_budget_comes_from_the_trainer(given: Any, seconds: float | None) -> None:
    assert time_budget.time_budget(changed(configure("method=vanilla"), trainer__max_time=given)).seconds == seconds


def test_the_pause_is_told_in_numbers() -> None:
    assert describe_pause(Path("runs/a"), 3, 50) == (
        "runs/a: the time of trainer.max_time is over after 3 of 50 epochs. The same command resumes."
    )


def left(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """Return a run's result without its times and paths, the weights, and the losses of all epochs."""
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    losses = [row[rows[0].index("train/loss")] for row in rows]
    result = json.loads((folder / "result.json").read_text())
    del result["seconds"]
    if result["teacher"]:
        del result["teacher"]["source"]
    return result, torch.load(folder / "student.pth", weights_only=True)["model"], losses


@pytest.mark.parametrize("method", ["vanilla", "kd", "fitnet"])
def test_a_time_budget_resumes_until_all_epochs_are_done(tmp_path: Path, data: str, clock: Clock, method: str) -> None:
    """Each command makes a few batches. The teacher that is trained first and the stages of a method count too."""
    arguments = (*BASE, data, f"method={method}")
    whole = run("train", *arguments, f"runs={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    pauses = []
    for _ in range(40):
        ran = run("train", *arguments, f"runs={tmp_path / 'paused'}", "+trainer.max_time=00:00:11")
        assert ran.code == 0, ran.err
        if "The same command resumes." not in ran.out:
            break
        assert not list((tmp_path / "paused").glob(f"tiny/*/{method}/*/result.json"))
        assert not list((tmp_path / "paused").rglob("failure.txt"))
        pauses.append(ran.out.splitlines()[-1])
    assert len(pauses) >= 2
    assert all("of 4 epochs. The same command resumes." in line for line in pauses)
    one, other = (next((tmp_path / place).glob(f"tiny/*/{method}/*/result.json")) for place in ("whole", "paused"))
    assert one.relative_to(tmp_path / "whole") == other.relative_to(tmp_path / "paused")
    (result, weights, losses), (again, same, equal) = left(one.parent), left(other.parent)
    assert (result["epochs"], result["epochs_wanted"]) == (4, 4)
    assert again == result
    assert equal == losses
    assert all(torch.equal(value, same[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("option", "epochs", "end"),
    [
        ("+trainer.max_steps=8", 2, "after 8 steps, in epoch 2 of 4."),
        ("+trainer.max_steps=100", 4, "after 24 steps, in epoch 4 of 4."),
        (EARLY, 1, "after epoch 1 of 4, in which a callback ended the run."),
    ],
)
def test_a_run_of_an_intended_shorter_length_is_finished_and_says_its_length(
    tmp_path: Path, data: str, option: str, epochs: int, end: str
) -> None:
    arguments = (*BASE, data, "method=vanilla", f"runs={tmp_path / 'runs'}")
    ran = run("train", *arguments, option)
    assert ran.code == 0, ran.err
    assert ran.out.rstrip().endswith(end)
    assert run("train", *arguments, option).out.rstrip().endswith(end)
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    assert (result["epochs"], result["epochs_wanted"]) == (epochs, 4)
    assert run("train", *arguments).out.rstrip().endswith("after the last epoch."), "another run, of all epochs"


def test_a_budget_that_ends_with_the_last_step_of_the_run_does_not_pause_it(tmp_path: Path, data: str) -> None:
    arguments = (*BASE, data, "method=vanilla", f"runs={tmp_path / 'runs'}", "trainer.max_steps=3")
    pauses = 0
    while "The same command resumes." in (ran := run("train", *arguments, "trainer.max_time={seconds: 0.001}")).out:
        pauses += 1
    assert (ran.code, ran.err, pauses) == (0, "", 2)
    (file,) = tmp_path.rglob("result.json")
    assert json.loads(file.read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("option", "phrase"),
    [
        ("+trainer.fast_dev_run=true", "trainer=debug"),
        ("+trainer.fast_dev_run=3", "trainer=debug"),
        ("trainer.max_time=5", "give a time as HH:MM:SS"),
        ("+trainer.max_steps=0", "positive number of steps"),
        (TIMER, "use trainer.max_time=HH:MM:SS"),
    ],
)
def test_an_end_that_makes_no_run_is_refused(tmp_path: Path, data: str, option: str, phrase: str) -> None:
    assert_refused(run("train", *BASE, data, "method=vanilla", f"runs={tmp_path / 'runs'}", option), phrase)
