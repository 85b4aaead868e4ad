"""Loggers write into the run folder, and W&B says in one line whether it is online, offline or disabled."""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import Logger

from src.common.errors import UserError
from src.config.instantiate import instantiate
from src.runs import loggers
from src.runs.loggers import ForgivingLogger, csv_logger, tensorboard_logger, wandb_logger, wandb_name
from tests.helpers.configure import changed, configure


class Terminal(io.StringIO):
    """A terminal at which nobody answers."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:  # type: ignore[override]
        pytest.fail("the logger prompted")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "cifar10" / "resnet20_to_resnet8" / "kd" / "none-seed0-0123abcd"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine where W&B finds no key and no mode. Changes of the environment are undone after the test."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # makes monkeypatch restore the old value, whoever changes it
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("sys.stdin", Terminal())
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """A function that returns the messages of `src.runs.loggers` so far, without those of W&B itself."""
    caplog.set_level("INFO", loggers.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == loggers.__name__]


def finish() -> None:
    """End W&B's service as the end of a process does. Until then it may still be writing."""
    wandb.finish()
    wandb.teardown()


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("mode", [None, "offline"])
def test_wandb_without_a_key_logs_offline_and_never_prompts(
    nobody: pytest.MonkeyPatch, folder: Path, lines: Lines, mode: str | None
) -> None:
    if mode:
        nobody.setenv("WANDB_MODE", mode)
    logger = wandb_logger(folder, "aekt", setting="4567cdef")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    name, _, random = str(logger.experiment.id).rpartition("-")
    assert (name, len(random)) == ("cifar10-resnet20_to_resnet8-kd-none-seed0-0123abcd", 8)
    assert logger.experiment.group == "cifar10/resnet20_to_resnet8/kd/none-4567cdef"
    assert set(logger.experiment.tags or ()) == {"cifar10", "resnet20_to_resnet8", "kd", "none"}
    finish()
    (written,) = offline_runs(folder)
    assert written.stat().st_size > 0
    assert "train/loss" in written.read_bytes().decode("latin-1")
    upload = f"wandb sync {folder}/wandb/offline-run-*"
    assert lines() == [f"W&B: offline. To upload the run later: {upload}"]


def test_disabled_wandb_writes_nothing(nobody: pytest.MonkeyPatch, folder: Path, lines: Lines) -> None:
    nobody.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    finish()
    assert offline_runs(folder) == []
    assert os.environ["WANDB_MODE"] == "disabled"
    assert lines() == ["W&B: disabled, because WANDB_MODE or `wandb disabled` says so."]


def test_a_resumed_run_keeps_its_id_and_a_new_run_gets_another(nobody: pytest.MonkeyPatch, folder: Path) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    server, ids = Server(), []
    nobody.setattr(loggers, "WandbLogger", server)
    for is_new in (True, False, True):
        if is_new:
            (folder / "wandb_id.txt").unlink(missing_ok=True)
        wandb_logger(folder, "aekt")
        ids.append(server.arguments["id"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_mode_that_wandb_has_stored_is_obeyed(
    nobody: pytest.MonkeyPatch, folder: Path, lines: Lines, mode: str
) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    nobody.setattr(wandb.setup().settings, "mode", mode)
    wandb_logger(folder, "aekt")
    finish()
    (line,) = lines()
    assert line.startswith(f"W&B: {mode}")


class Server:
    """A logger whose server answers, or raises an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.arguments, self.axes = error, dict[str, Any](), dict[str, str]()

    def __call__(self, **arguments: Any) -> "Server":
        self.arguments = arguments
        return self

    @property
    def experiment(self) -> Any:
        if self.error and not self.arguments.get("offline"):
            raise self.error

        def define_metric(name: str, step_metric: str) -> None:
            self.axes[name] = step_metric

        return SimpleNamespace(url="https://wandb.ai/me/aekt/runs/1", define_metric=define_metric)


def test_wandb_with_a_key_and_a_server_is_online(nobody: pytest.MonkeyPatch, folder: Path, lines: Lines) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    server = Server()
    nobody.setattr(loggers, "WandbLogger", server)
    assert wandb_logger(folder, "aekt") is server  # type: ignore[comparison-overlap]
    assert lines() == ["W&B: online, https://wandb.ai/me/aekt/runs/1"]
    assert (server.arguments["project"], server.arguments["resume"]) == ("aekt", "allow")
    assert server.axes == {"val/*": "epoch", "test/*": "epoch"}
    assert "WANDB_MODE" not in os.environ


def test_an_error_of_wandb_is_one_line_and_the_run_is_logged_offline(
    nobody: pytest.MonkeyPatch, folder: Path, lines: Lines
) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    server = Server(RuntimeError("the server is down\nand says why\nin many lines"))
    nobody.setattr(loggers, "WandbLogger", server)
    wandb_logger(folder, "aekt")
    assert server.arguments["offline"]
    assert lines()[0] == "W&B cannot be reached (the server is down)."
    assert [message[:13] for message in lines()[1:]] == ["W&B: offline."]
    assert os.environ["WANDB_MODE"] == "offline", "later jobs of a sweep must not wait for the server again"


def test_names_are_cut_to_the_lengths_that_wandb_takes(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    server = Server()
    nobody.setattr(loggers, "WandbLogger", server)
    long = tmp_path / ("d" * 100) / "pair" / ("m" * 100) / "serial-seed3-0123abcd"
    long.mkdir(parents=True)
    wandb_logger(long, "aekt", setting="4567cdef")
    assert len(server.arguments["group"]) == 128
    assert server.arguments["group"].endswith("/serial-4567cdef")
    assert server.arguments["tags"] == ["d" * 64, "pair", "m" * 64, "serial"]


@pytest.mark.slow  # W&B tries for 20 seconds
def test_wandb_with_a_key_but_no_server_warns_and_logs_offline(
    nobody: pytest.MonkeyPatch, folder: Path, lines: Lines
) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    nobody.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    finish()
    warning, line = lines()
    assert warning.startswith("W&B cannot be reached (")
    assert line.startswith("W&B: offline.")
    assert len(warning.splitlines()) == len(line.splitlines()) == 1
    assert len(offline_runs(folder)) == 1


def test_csv_has_a_row_per_step_and_a_new_file_after_each_resume(folder: Path) -> None:
    for value in (1.5, 2.5):
        logger = csv_logger(folder)
        logger.log_metrics({"train/loss": value}, step=3)
        logger.save()
    for version, text in enumerate(("1.5", "2.5")):
        with (folder / "steps" / f"version_{version}" / "metrics.csv").open(newline="") as rows:
            assert list(csv.DictReader(rows)) == [{"step": "3", "train/loss": text}]


def test_tensorboard_writes_into_one_folder(folder: Path) -> None:
    for value in (1.5, 2.5):
        logger = tensorboard_logger(folder)
        logger.log_metrics({"train/loss": value}, step=3)
        logger.finalize("success")
    assert [file.parent for file in folder.rglob("events.out.tfevents.*")] == [folder / "tensorboard"] * 2


# Names of users, and loggers that fail


@pytest.mark.parametrize("data", ["flowers, v2", "a:b;c#d?e'f", "größe", "50% / x", " x", "a" * 200])
def test_wandb_accepts_data_of_any_name(nobody: pytest.MonkeyPatch, tmp_path: Path, data: str) -> None:
    folder = tmp_path / data.replace("/", "_") / "resnet20_to_resnet8" / "kd" / "none-seed0-0123abcd"
    folder.mkdir(parents=True)
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    name = str(logger.experiment.id)
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,128}", name)
    assert name.rpartition("-")[0].endswith("-resnet20_to_resnet8-kd-none-seed0-0123abcd")
    finish()
    assert len(offline_runs(folder)) == 1


def test_names_that_wandb_accepts_stay() -> None:
    assert wandb_name("cifar100/a_to_b/dkd+kd/none-seed0-0123abcd") == "cifar100-a_to_b-dkd+kd-none-seed0-0123abcd"


def test_wandb_starts_without_a_warning(
    nobody: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb_logger(folder, "aekt").log_metrics({"train/loss": 1.5}, step=0)
    finish()
    assert "WARNING" not in capfd.readouterr().err


class Fails(Logger):
    """A logger that fails at everything."""

    calls = 0

    @property
    def name(self) -> str:
        return "fails"

    @property
    def version(self) -> str:
        return "0"

    @property
    def experiment(self) -> Any:
        raise ConnectionError("The server is gone.\nReally.")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        raise ConnectionError("The server is gone.\nReally.")

    log_hyperparams = log_metrics  # type: ignore[assignment]


def test_a_failing_logger_warns_once_and_is_silent_from_then_on(lines: Lines) -> None:
    inner = Fails()
    logger = ForgivingLogger(inner)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.log_hyperparams({"a": 1})
    logger.save()
    logger.finalize("success")
    logger.experiment.log({"a": 1})
    assert inner.calls == 1
    assert lines() == [
        "The logger failed (ConnectionError: The server is gone). The run goes on without it and writes metrics.csv."
    ]


@pytest.mark.parametrize("project", ["a/b", "a#b", "", "x" * 129])
def test_a_project_that_wandb_does_not_accept_is_refused(project: str) -> None:
    with pytest.raises(UserError, match=r"^logger\.project=.* does not fit: give 1 to 128 characters, without /"):
        instantiate(changed(configure("logger=wandb").logger, project=project), "logger", folder=Path("x"))
