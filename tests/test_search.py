"""Searches for a method's constants: by Optuna, and by the agent of W&B with conf/sweep.yaml."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from src.common.errors import UserError
from src.data.array_file import save_arrays
from src.training import fitting
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import Ran, run

ROOT = Path(__file__).parents[1]


def search(place: Path, data: Path, *arguments: str) -> Ran:
    return run(
        "train", "-m", "experiment=search", "data=cifar10", f"data.path={data}", "network@model.teacher=resnet8",
        "network@model.student=resnet8", "trainer=debug", "logger=none", f"runs={place}", f"teacher.store={place}",
        *arguments,
    )  # fmt: skip


def test_a_search_chooses_by_held_out_images(tmp_path: Path, array_file: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = search(tmp_path, array_file, "data.val_size=40", "hydra.sweeper.n_trials=2")
    assert ran.code == 0, ran.err
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert set(found.best_params) == {"method.gamma", "method.beta", "method.temperature"}
    assert 0 <= found.best_value <= 1
    assert len(list(tmp_path.glob("*/*/aekt/*/result.json"))) == 2


def test_a_search_goes_on_after_a_trial_that_fails(
    tmp_path: Path, array_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    calls, original = itertools.count(), fitting.fit

    def fit(cfg: DictConfig, *arguments: Any) -> Any:
        if cfg.method.name == "aekt" and next(calls) == 0:
            raise UserError("The loss is NaN.")
        return original(cfg, *arguments)

    monkeypatch.setattr("src.training.fitting.fit", fit)
    ran = search(tmp_path, array_file, "data.val_size=40", "hydra.sweeper.n_trials=2")
    assert ran.code == 1
    assert ran.err.count("error: The loss is NaN.") == 1
    assert "error: 1 of 2 jobs failed: " in ran.err
    assert "best_value" in OmegaConf.load(tmp_path / "optimization_results.yaml")


def test_a_search_within_a_time_is_refused(tmp_path: Path, array_file: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = search(tmp_path, array_file, "data.val_size=40", "hydra.sweeper.n_trials=1", "trainer.max_time=01:00:00")
    assert ran.code == 1
    assert "error: A search cannot use the result of a run that trainer.max_time has paused: leave it out." in ran.err


def test_a_search_without_a_trial_is_one_sentence(tmp_path: Path, array_file: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = search(tmp_path, array_file, "data.val_size=40", "hydra.sweeper.n_trials=0")
    assert (ran.code, "Traceback" in ran.err) == (1, False)
    assert "error: The search has no completed trial: see the errors above, or raise hydra.sweeper.n_trials." in ran.err


def test_a_search_by_test_images_is_refused(tmp_path: Path, array_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ran = search(tmp_path, array_file, "data.val_size=0", "hydra.sweeper.n_trials=2")
    assert ran.code == 1
    assert "would choose by test images: hold training images out with data.val_size=N" in ran.err
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    ran = run("train", "data=cifar10", f"data.path={array_file}", f"runs={tmp_path}", "method=vanilla", "logger=none")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "would choose by test images" in ran.err
    assert not list(tmp_path.rglob("run.json"))


def test_a_search_may_choose_by_the_datas_own_validation_split(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    contents = colour_arrays(train=40, test=20)
    val = {f"val_{name}": contents[f"test_{name}"] for name in ("images", "labels")}
    save_arrays(tmp_path / "colours.npz", **contents, **val)
    ran = search(tmp_path, tmp_path / "colours.npz", "data.val_size=0", "hydra.sweeper.n_trials=1")
    assert ran.code == 0, ran.err
    assert 0 <= OmegaConf.load(tmp_path / "optimization_results.yaml").best_value <= 1


def test_the_command_of_a_wandb_agent_composes() -> None:
    sweep = load_sweep_config(str(ROOT / "conf" / "sweep.yaml"))
    assert sweep is not None
    chosen = {
        name: {"value": space.get("value", space.get("min", (space.get("values") or [None])[0]))}
        for name, space in sweep["parameters"].items()
    }
    assert not any(value["value"] is None for value in chosen.values())  # W&B writes None, but Hydra needs null
    command = create_sweep_command(list(sweep["command"]))
    assert command[:4] == ["${env}", "${interpreter}", "-m", "src.train"]
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    with initialize(version_base="1.3", config_path="../conf"):
        cfg = compose("train", overrides=[*command[4:-1], *arguments])
    assert command[-1] == "${args_no_hyphens}"
    assert (cfg.method.name, cfg.method.gamma, cfg.method.temperature) == ("aekt", 0.05, 1.0)
    assert cfg.data.val_size == 5000
    assert cfg.teacher.train_if_missing is False
    split, _, score = sweep["metric"]["name"].partition("/")
    assert (split, score, sweep["metric"]["goal"]) == ("val", "accuracy", "maximize")
