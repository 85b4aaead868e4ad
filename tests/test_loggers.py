import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from src.loggers import csv_logger, tensorboard_logger, wandb_logger


class Terminal(io.StringIO):
    """Standard input that somebody could answer at, and nobody does."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:  # type: ignore[override]
        pytest.fail("the logger asked for input")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "cifar10" / "resnet20_to_resnet8" / "kd" / "none-seed0-0123abcd"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine where W&B knows no key and no mode; what the test changes of it is undone."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "")  # remembers what was there, whoever changes it
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("sys.stdin", Terminal())
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def finish() -> None:
    """As the end of the process does: until then W&B's service may still be writing."""
    wandb.finish()
    wandb.teardown()


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("mode", [None, "offline"])
def test_wandb_without_a_key_logs_offline_and_never_asks(
    nobody: pytest.MonkeyPatch, folder: Path, mode: str | None
) -> None:
    if mode:
        nobody.setenv("WANDB_MODE", mode)
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    assert logger.experiment.id == "cifar10-resnet20_to_resnet8-kd-none-seed0-0123abcd"
    assert logger.experiment.group == "cifar10/resnet20_to_resnet8/kd/none"
    assert set(logger.experiment.tags or ()) == {"cifar10", "resnet20_to_resnet8", "kd", "none"}
    finish()
    (written,) = offline_runs(folder)
    assert written.stat().st_size > 0
    assert "train/loss" in written.read_bytes().decode("latin-1")


def test_wandb_disabled_writes_nothing(nobody: pytest.MonkeyPatch, folder: Path) -> None:
    nobody.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    finish()
    assert offline_runs(folder) == []
    assert os.environ["WANDB_MODE"] == "disabled"


@pytest.mark.slow  # W&B tries for 20 seconds
def test_wandb_with_a_key_but_no_server_warns_and_logs_offline(
    nobody: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nobody.setenv("WANDB_API_KEY", "0" * 40)
    nobody.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = wandb_logger(folder, "aekt")
    logger.log_metrics({"train/loss": 1.5}, step=0)
    finish()
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "src.loggers"]
    assert warning.startswith("W&B cannot be reached (")
    assert warning.endswith("logging offline.")
    assert len(warning.splitlines()) == 1
    assert len(offline_runs(folder)) == 1


def test_csv_has_a_row_a_step_and_a_new_file_at_each_resume(folder: Path) -> None:
    for value in (1.5, 2.5):
        logger = csv_logger(folder)
        logger.log_metrics({"train/loss": value}, step=3)
        logger.save()
    for version, text in enumerate(("1.5", "2.5")):
        with (folder / "steps" / f"version_{version}" / "metrics.csv").open(newline="") as lines:
            assert list(csv.DictReader(lines)) == [{"step": "3", "train/loss": text}]


def test_tensorboard_writes_into_one_folder(folder: Path) -> None:
    for value in (1.5, 2.5):
        logger = tensorboard_logger(folder)
        logger.log_metrics({"train/loss": value}, step=3)
        logger.finalize("success")
    assert [file.parent for file in folder.rglob("events.out.tfevents.*")] == [folder / "tensorboard"] * 2
