"""The study of AEKT: equal effort for all settings, a choice by held-out images, and files that two processes share."""

import argparse
import csv
import json
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from benchmarks import aekt_study
from benchmarks.aekt_study import (
    BEDS,
    COMMON,
    CONFIRMATIONS,
    CONFIRMED,
    CONFIRMED_IN,
    KEPT,
    SETTINGS,
    TRIALS,
    Job,
    append_row,
    constants,
)
from src.config.validation import validate
from src.runs.lock import BusyError
from src.runs.result import Result
from tests.helpers.configure import configure
from tests.helpers.run_folders import TEACHER, make_result

TAUGHT = [setting for setting in SETTINGS if setting not in ("vanilla", "kd")]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(aekt_study, "TRIALS_FILE", tmp_path / "trials.csv")
    monkeypatch.setattr(aekt_study, "FROZEN_FILE", tmp_path / "frozen.json")
    return tmp_path


def write_trials(file: Path, accuracy: dict[tuple[int, int], float]) -> None:
    """Write the same accuracies for all settings, by trial and seed."""
    for setting in SETTINGS:
        for (trial, seed), value in accuracy.items():
            row = {"bed": "cifar10", "setting": setting, "trial": trial, "seed": seed, "val_accuracy": value}
            append_row(file, row)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_trial_has_the_same_shared_constants_in_all_settings(trial: int) -> None:
    drawn = {setting: constants(setting, trial) for setting in SETTINGS}
    assert len({found["schedule.learning_rate"] for found in drawn.values()}) == 1
    for name in ("method.temperature", "method.beta"):
        assert len({drawn[setting][name] for setting in TAUGHT}) == 1
    assert drawn["aekt"] == constants("aekt", trial)


def test_trials_differ() -> None:
    for setting in SETTINGS:
        assert len({str(constants(setting, trial)) for trial in range(TRIALS)}) == TRIALS


@pytest.mark.parametrize("setting", SETTINGS)
def test_trials_compose(setting: str) -> None:
    for trial in (0, 1, 5):
        validate(configure(*COMMON, *BEDS["cifar10"], *aekt_study.overrides_of(setting, trial)))


@pytest.mark.parametrize("name", CONFIRMATIONS)
def test_confirmations_compose_and_score_once(name: str) -> None:
    cfg = configure(*COMMON, CONFIRMED_IN, *CONFIRMATIONS[name], *aekt_study.overrides_of("aekt", 0))
    validate(cfg)
    assert cfg.trainer.check_val_every_n_epoch == cfg.schedule.epochs
    assert cfg.data.val_size == 0


def test_the_second_rung_continues_the_best_trials(study: Path) -> None:
    write_trials(study / "trials.csv", {(trial, 0): trial % 7 / 10 for trial in range(TRIALS - 1)})
    rows = aekt_study.read_trials("cifar10")
    with pytest.raises(SystemExit, match=f"{TRIALS - 1} of {TRIALS} trials: finish it first"):
        list(aekt_study.jobs_of_rung(2, rows))
    write_trials(study / "trials.csv", {(TRIALS - 1, 0): 0.95})
    jobs = list(aekt_study.jobs_of_rung(2, aekt_study.read_trials("cifar10")))
    assert len(jobs) == len(SETTINGS) * KEPT * 3
    assert {job.trial for job in jobs} == {TRIALS - 1, 6, 5}
    assert jobs[0] == Job("vanilla", TRIALS - 1, 1)


def test_the_choice_is_the_best_mean_over_all_seeds(study: Path) -> None:
    rung = {(trial, 0): trial / 100 for trial in range(TRIALS)}
    write_trials(study / "trials.csv", rung)
    options = argparse.Namespace(bed="cifar10")
    with pytest.raises(SystemExit, match="Rung 2 of vanilla is not finished"):
        aekt_study.choose(options)
    better = TRIALS - 2
    write_trials(
        study / "trials.csv",
        {(trial, seed): 0.9 if trial == better else 0.1 for trial in range(TRIALS - 3, TRIALS) for seed in (1, 2, 3)},
    )
    aekt_study.choose(options)
    frozen = json.loads((study / "frozen.json").read_text())
    searched = {setting: aekt_study.overrides_of(setting, better) for setting in SETTINGS}
    serial = aekt_study.with_layer_of(searched["dkd serial"], searched["aekt"])
    assert frozen == {"cifar10": {**searched, "aekt serial": serial}}
    assert set(CONFIRMED) <= set(frozen["cifar10"])


def test_a_row_is_written_once(tmp_path: Path) -> None:
    row = {"bed": "b", "setting": "s", "trial": 1, "seed": 0, "val_accuracy": 0.5}
    for each in (row, {**row, "seed": 1}, {**row, "val_accuracy": 0.7}):
        append_row(tmp_path / "trials.csv", each)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [(found["seed"], found["val_accuracy"]) for found in rows] == [("0", "0.5"), ("1", "0.5")]


def test_copied_results_name_no_folder_of_this_machine() -> None:
    teacher = {**TEACHER, "source": "/home/me/teachers/resnet20.pth"}
    copied = aekt_study.without_folder(make_result(teacher=teacher))
    assert copied.teacher is not None
    assert copied.teacher.source == "resnet20.pth"
    alone = make_result("vanilla")
    assert aekt_study.without_folder(alone) == alone


def test_a_run_that_another_process_trains_is_left_to_it(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(cfg: DictConfig) -> Result:
        raise BusyError("Another command trains here.")

    monkeypatch.setattr(aekt_study, "TRIALS", 1)
    monkeypatch.setattr(aekt_study, "train", busy)
    aekt_study.search(argparse.Namespace(bed="cifar10", rung=1, teacher="teacher.pth", runs=str(study)))
    assert not (study / "trials.csv").exists()


def test_a_confirmation_with_a_result_file_is_not_trained_again(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(cfg: DictConfig) -> Result:
        trained.append((cfg.method.name, cfg.seed))
        return make_result()

    monkeypatch.setattr(aekt_study, "STUDY", study)
    monkeypatch.setattr(aekt_study, "FROZEN_FILE", aekt_study.ROOT / "results" / "aekt_study" / "frozen.json")
    monkeypatch.setattr(aekt_study, "CONFIRMATION_SEEDS", (0,))
    monkeypatch.setattr(aekt_study, "train", train)
    file = study / aekt_study.result_file("cifar10", "vanilla", 0)
    file.parent.mkdir(parents=True)
    make_result("vanilla").write(file)
    for _ in range(2):
        aekt_study.confirm(
            argparse.Namespace(bed="cifar10", settings=("vanilla", "kd"), teacher="teacher.pth", runs=str(study))
        )
    assert trained == [("kd", 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--bed", "cifar100", "--teacher", "teacher.pth", "--runs", "runs"], "invalid choice: 'cifar100'"),
        (["confirm", "--bed", "cifar100", "--runs", "runs"], "the following arguments are required: --teacher"),
    ],
)
def test_a_command_that_lacks_a_bed_or_a_teacher_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aekt_study", *arguments])
    monkeypatch.setattr(aekt_study, "set_up_process", lambda: None)
    with pytest.raises(SystemExit):
        aekt_study.main()
    assert message in capsys.readouterr().err
