"""What a sweep announces before its first run."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.config.schema import TrainOptions
from src.runs.identity import run_path
from src.setup import sweep_cost
from src.setup.sweep_cost import SAMPLE, STEPS, Announce, Clock, estimate, in_words, jobs_of_sweep, seconds_left
from tests.helpers.configure import CONF, changed, configure
from tests.helpers.tiny import write_arrays


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"),
        (119, "119 seconds"),
        (150, "2.5 minutes"),
        (7199, "120 minutes"),
        (36000, "10 hours"),
        (3 * 86400, "3.0 days"),
        (40.2 * 86400, "40 days"),
    ],
)
def test_times_are_written_in_a_unit_that_fits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_estimate_grows_with_the_runs() -> None:
    sentence = estimate([3600.0, 7200.0, 0.0, 3600.0], 48)
    assert sentence.startswith(
        "About 2.0 days of training, one run after another, give or take 20 hours. A run takes 0 seconds to 2.0 hours, "
        f"estimated from {STEPS} steps of 4 runs on this machine."
    )
    assert "give or take" not in estimate([60.0], 1)


def test_the_first_step_is_not_timed() -> None:
    clock = Clock()
    clock.ends = [100.0, 101.0, 102.0, 103.0]
    assert clock.seconds_per_step == 1.0


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """A small pair on tiny arrays: 44 images in batches of 8, 10 epochs."""
    composed = configure(
        "model=resnet20_to_resnet8", "data=arrays", "method=kd", "trainer=cpu", "schedule.batch_size=8",
        "schedule.epochs=10",
    )  # fmt: skip
    values = {"data__path": str(write_arrays(tmp_path / "tiny.npz")), "runs": str(tmp_path / "runs")}
    return changed(composed, **values)


def test_the_time_of_a_run_is_that_of_all_its_steps(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def seconds_per_step(clock: Clock) -> float:
        timed.append(len(clock.ends))
        return 2.0

    monkeypatch.setattr(Clock, "seconds_per_step", property(seconds_per_step))
    before = OmegaConf.to_yaml(cfg)
    assert seconds_left(cfg) == 10 * 6 * 2.0
    assert timed == [1 + STEPS]
    assert OmegaConf.to_yaml(cfg) == before
    assert not Path(cfg.runs).exists(), "no run folder and no teacher"


def test_a_finished_run_takes_no_time(cfg: DictConfig) -> None:
    folder = run_path(cfg)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    assert seconds_left(cfg) == 0.0


def test_a_run_that_cannot_start_has_no_estimate(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match=r"missing\.npz is not a file: set data\.path"):
        seconds_left(changed(cfg, data__path="missing.npz"))


@pytest.fixture
def hydra_of_a_sweep(request: pytest.FixtureRequest) -> Any:
    """Hydra as it is when a sweep starts."""
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance()


def sweep(params: dict[str, str] | None, *overrides: str) -> DictConfig:
    node = {"sweeper": {"params": params}, "overrides": {"task": list(overrides)}}
    return OmegaConf.create({"hydra": node})


@pytest.mark.usefixtures("hydra_of_a_sweep")
def test_the_jobs_of_a_sweep_are_the_combinations_of_its_values() -> None:
    jobs = jobs_of_sweep(sweep({"method.gamma": "0.1,0.2"}, "seed=0,1", "method=aekt").hydra)
    assert sorted(map(sorted, jobs)) == sorted(
        sorted(["method=aekt", f"method.gamma={gamma}", f"seed={seed}"]) for gamma in (0.1, 0.2) for seed in (0, 1)
    )
    assert jobs_of_sweep(sweep(None, "seed=3").hydra) == [["seed=3"]]


@pytest.mark.usefixtures("hydra_of_a_sweep")
def test_an_announcement_tries_a_sample_of_the_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[DictConfig] = []

    def seconds(cfg: DictConfig) -> float:
        tried.append(cfg)
        return 60.0

    monkeypatch.setattr(sweep_cost, "seconds_left", seconds)
    Announce().on_multirun_start(sweep(None, "seed=range(0,20)", "method=kd"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"This sweep has 20 runs. Measuring {SAMPLE} of them for an estimate ..."
    assert lines[1].startswith("About 20 minutes of training, one run after another. A run takes 60 seconds to 60 sec")
    assert len({cfg.seed for cfg in tried}) == SAMPLE
    assert all(OmegaConf.get_type(cfg) is TrainOptions and cfg.method.name == "kd" for cfg in tried)


@pytest.mark.usefixtures("hydra_of_a_sweep")
def test_a_sweep_without_an_estimate_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(cfg: DictConfig) -> float:
        raise UserError("The data is missing.")

    monkeypatch.setattr(sweep_cost, "seconds_left", seconds)
    Announce().on_multirun_start(sweep(None, "seed=0", "method=kd"))
    assert capsys.readouterr().out.splitlines()[1] == "There is no estimate: The data is missing."
