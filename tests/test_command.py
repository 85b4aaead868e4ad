"""The frame of all commands: jobs, sweeps, exit codes, and one sentence for each mistake."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import MissingConfigException
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from src import command
from src.command import job, run_command
from src.common.errors import UserError
from src.runs.lock import BusyError
from src.runs.sweep import JobError
from tests.helpers.commands import Ran, assert_refused, run
from tests.helpers.configure import CONF
from tests.helpers.place import ROOT, SMALL, Place, result_of

# Help


@pytest.mark.parametrize("name", ["train", "evaluate", "report"])
def test_help_is_a_guide(name: str) -> None:
    ran = run(name, "--help")
    assert ran.code == 0
    assert f"python -m src.{name} " in ran.out
    if name == "train":
        for group in (
            "data: arrays, cifar10, cifar100, glyphs, imagefolder, imagenet, stream",
            "method: ab, aekt, at, catkd, cc",
            "serialization: none",
        ):
            assert group in ran.out
        assert "seed=0" in ran.out


def test_help_lists_every_group_of_conf_and_no_other() -> None:
    groups = {str(file.parent.relative_to(CONF)) for file in CONF.rglob("*.yaml")} - {".", "hydra/launcher"}
    listed = run("train", "--help").out.partition("Groups")[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert {line.partition(":")[0] for line in listed} == groups
    for line in listed:
        group, _, options = line.partition(": ")
        assert options.split(", ") == sorted(file.stem for file in (CONF / group).glob("*.yaml"))


# Processes


def python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_itself(place: Place) -> None:
    arguments = [*SMALL, f"data.path={place.data}", f"runs={place.runs}", "method=vanilla"]
    ran = python("-m", "src.train", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "test accuracy" in ran.stdout
    assert result_of(place.folder("vanilla"))["epochs"] == 1


@pytest.mark.slow
def test_the_command_itself_reports_a_mistake_in_one_sentence(place: Place) -> None:
    ran = python("-m", "src.train", *SMALL, f"data.path={place.path / 'missing.npz'}", f"runs={place.runs}")
    assert_refused(Ran(ran.returncode, ran.stdout, ran.stderr), "missing.npz is not a file")


# Sweeps


@pytest.mark.slow
def test_a_sweep_makes_one_folder_for_each_job(place: Place) -> None:
    ran = place.train("-m", "method=vanilla,dkd", "seed=0,1", "network@model.teacher=resnet8")
    assert (ran.code, ran.err) == (0, "")
    assert len(place.folders("vanilla")) == 2  # seed 0 alone is the teacher of both
    assert len(place.folders("dkd")) == 2
    assert {result_of(folder)["seed"] for folder in place.folders("dkd")} == {0, 1}


def test_a_job_that_fails_does_not_stop_the_others(place: Place) -> None:
    ran = place.train("-m", "method=vanilla", "data.val_size=1000,1001,20")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    sentences = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert any("data.val_size=1000 " in line for line in sentences)
    assert any("data.val_size=1001 " in line for line in sentences)
    assert sentences[-1] == "error: 2 of 3 jobs failed: data.val_size=1000; data.val_size=1001."
    assert len(place.folders("vanilla")) == 1


def as_job(monkeypatch: pytest.MonkeyPatch, mode: RunMode, *overrides: str) -> None:
    """Let Hydra be in the middle of a job."""
    choices = {"hydra/launcher": "basic"}
    state = {"overrides": {"task": list(overrides)}, "mode": mode, "runtime": {"choices": choices}, "job": {"num": 0}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(state))


def test_a_run_that_another_command_trains_is_skipped_in_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @job
    def task(cfg: Any) -> None:
        raise BusyError("Another command trains here.")

    as_job(monkeypatch, RunMode.MULTIRUN, "seed=0")
    assert task(OmegaConf.create()) is None
    assert capsys.readouterr().out == "Another command trains here. This sweep skips the run.\n"
    as_job(monkeypatch, RunMode.RUN, "seed=0")
    with pytest.raises(SystemExit, match=r"^error: Another command trains here\.$"):
        task(OmegaConf.create())


def test_a_bug_in_a_job_of_a_sweep_has_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @job
    def task(cfg: Any) -> None:
        raise ZeroDivisionError("a bug")

    as_job(monkeypatch, RunMode.MULTIRUN, "seed=0")
    with pytest.raises(JobError):
        task(OmegaConf.create())
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
    as_job(monkeypatch, RunMode.RUN, "seed=0")
    with pytest.raises(ZeroDivisionError):
        task(OmegaConf.create())


def test_a_job_of_a_sweep_has_its_own_arguments_and_process_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = sys.argv[:]

    @job
    def task(cfg: Any) -> list[str]:
        os.environ.update(MASTER_PORT="5678", LOCAL_RANK="1")
        return sys.argv[1:]

    as_job(monkeypatch, RunMode.MULTIRUN, "seed=3", "method=kd")
    assert task(OmegaConf.create()) == ["seed=3", "method=kd"]
    assert sys.argv == before
    assert os.environ["MASTER_PORT"] == "1234"
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.default_int_handler])
def test_a_job_in_a_worker_process_handles_signals_unless_its_launcher_does(
    monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    @job
    def task(cfg: Any) -> Any:
        return signal.getsignal(signal.SIGTERM)

    as_job(monkeypatch, RunMode.MULTIRUN, "seed=0")
    before = signal.signal(signal.SIGTERM, handler)
    try:
        within = task(OmegaConf.create())
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert callable(within)
    assert (within == handler) == (handler != signal.SIG_DFL)


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("method=[kd,dkd]", True),
        ("method@also=[kd,dkd]", True),
        ("experiment=[quickstart,search]", True),
        ("method=kd", False),
        ("data.mean=[0.1,0.2,0.3]", False),
        ("forms=[onnx,torchscript]", False),
        ("scores=[nll,ece]", False),
        ("hydra.searchpath=[file:///conf]", False),
    ],
)
def test_a_list_of_choices_is_refused(monkeypatch: pytest.MonkeyPatch, override: str, is_refused: bool) -> None:
    as_job(monkeypatch, RunMode.RUN, override)
    if is_refused:
        with pytest.raises(SystemExit) as caught:
            job(lambda cfg: None)(OmegaConf.create())
        assert str(caught.value).startswith(f"error: {override} would merge several choices into one: choose one.")
    else:
        job(lambda cfg: None)(OmegaConf.create())


# One sentence


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a command changes in its process."""
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with warnings.catch_warnings():
        yield


def ended(monkeypatch: pytest.MonkeyPatch, error: Exception | None, *arguments: str) -> Any:
    """Run a command that raises an error, and return what it exits with."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def workers_error() -> Exception:
    """The error that Lightning raises if workers cannot start, with the reason as its context."""
    outer = RuntimeError("You called iter(combined_loader) too early")
    outer.__context__ = OSError("unable to open shared memory object </torch_1>: Error: Too many open files (24).")
    return outer


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("seed=x does not\nfit."), "error: seed=x does not fit."),
        (UserError("get https://user:password@host/file?token=abc first."), "error: get https://host/file first."),
        (MisconfigurationException("No\n GPU."), "error: No GPU."),
        (
            OSError(28, "No space left on device", "runs/last.ckpt"),
            "error: No space left on device (runs/last.ckpt). All checkpoints are kept, and the same command resumes a "
            "run.",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
            "error: The data's workers ran out of shared memory or open files (DataLoader worker (pid 7) is killed by "
            "signal: Bus error): set data.workers=0. All checkpoints are kept, and the same command resumes a run.",
        ),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly."),
            "error: A process of the sweep was killed, perhaps for lack of memory: run fewer jobs at once with "
            "hydra.launcher.n_jobs=N. All checkpoints are kept, and the same command resumes a run.",
        ),
        (
            MissingConfigException("In 'hydra/launcher/gpus': ...", missing_cfg_file="hydra/launcher/joblib"),
            "error: hydra/launcher/joblib needs the extra joblib, which is not installed: pip install -e '.[joblib]'.",
        ),
        (
            RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you ..."),
            "error: adaptive_avg_pool2d_backward_cuda has no deterministic form on this device: set "
            "trainer.deterministic=false (see docs/gpu.md).",
        ),
        (
            yaml.scanner.ScannerError("while scanning", None, "found a tab\nin a.yaml"),
            "error: A configuration file is not valid YAML (while scanning found a tab in a.yaml): correct it.",
        ),
        (
            workers_error(),
            "error: The data's workers ran out of shared memory or open files (Too many open files (24)): set "
            "data.workers=0. All checkpoints are kept, and the same command resumes a run.",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_the_user_can_correct_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    assert ended(monkeypatch, error) == sentence


@pytest.mark.usefixtures("restored")
def test_a_bug_has_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command"])

    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("override", ["=1", "+=1", "~=", "++@package=x"])
def test_an_override_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    sentence = f"error: {override} does not name an option: write option=value. --help lists the options."
    assert ended(monkeypatch, None, "seed=0", override) == sentence


def test_a_sweep_over_an_unknown_option_trains_nothing(place: Place) -> None:
    ran = place.train("-m", "epochs=5,6")
    assert ran.code == 1
    assert ran.err.splitlines() == [
        "error: epochs is not an option: did you mean schedule.epochs?",
        "error: the same as above.",
        "error: 2 of 2 jobs failed: epochs=5; epochs=6.",
    ]
    assert not place.folders()


def test_flags_may_follow_options(place: Place) -> None:
    ran = run("train", *SMALL, "seed=3", "--cfg", "job")
    assert ran.code == 0
    assert "seed: 3" in ran.out
    assert_refused(run("train", *SMALL, "--epochs=5"), "--epochs=5 is not a flag of this command")


def test_hydras_message_is_one_line_without_its_search_path(place: Place) -> None:
    ran = place.train("method=nonsense")
    assert_refused(ran, "Could not find 'method/nonsense'", "Available options in 'method': ab; aekt", "--help lists")
    assert "search path" not in ran.err
    assert "provider" not in ran.err


@pytest.mark.parametrize("text", ["name: mine\n\t_target_: a.B\n", "name: mine\nname: yours\n"])
def test_a_file_that_is_not_valid_yaml_is_named(place: Place, tmp_path: Path, text: str) -> None:
    file = tmp_path / "conf" / "method" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    ran = place.train(f"--config-dir={tmp_path / 'conf'}", "method=mine")
    assert_refused(ran, "A configuration file is not valid YAML (", f'in "{file}", line 2, column 1): correct it.')


def test_a_process_is_set_up_once(restored: None) -> None:
    command.set_up_process()
    stderr = sys.stderr
    command.set_up_process()
    assert sys.stderr is stderr


def test_a_message_for_which_nobody_can_act_is_silenced(restored: None) -> None:
    command.set_up_process()
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
        warnings.warn("The data is damaged.", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["The data is damaged."]
