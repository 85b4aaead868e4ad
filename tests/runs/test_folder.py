"""A run folder is made, continued, found again, started over, and refused if it was made with something else."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.common.secrecy import plain_config
from src.runs.folder import RunFolder
from src.runs.identity import identity, run_path
from src.runs.lock import BusyError, is_locked, locked
from src.runs.result import Fingerprints, RunRecord, read_record
from tests.helpers.configure import changed, configure
from tests.helpers.run_folders import make_result

FINGERPRINTS = {"code": "c0de", "data": "da7a", "teacher": "7eac"}
RECORD = RunRecord(fingerprints=Fingerprints(**FINGERPRINTS), seed=0)


def other(**fingerprints: str | None) -> RunRecord:
    """Make a run record with other fingerprints."""
    return RunRecord(fingerprints=Fingerprints.model_validate({**FINGERPRINTS, **fingerprints}), seed=0)


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    return changed(configure("method=kd", "model=resnet20_to_resnet8"), runs=str(tmp_path / "runs"))


@pytest.fixture
def folder(cfg: DictConfig) -> RunFolder:
    """The locked folder of a new run."""
    folder = RunFolder(cfg)
    with folder.locked():
        assert folder.begin(RECORD) is None
    return folder


def start_over(cfg: DictConfig, **options: Any) -> RunFolder:
    return RunFolder(changed(cfg, start_over=True), **options)


def names(folder: RunFolder) -> set[str]:
    return {str(file.relative_to(folder.path)) for file in folder.path.rglob("*") if file.is_file()}


def test_a_new_folder_holds_the_resolved_configuration_and_the_record(cfg: DictConfig, folder: RunFolder) -> None:
    assert names(folder) == {"config.yaml", "run.json"}
    assert OmegaConf.to_container(OmegaConf.load(folder.path / "config.yaml")) == plain_config(cfg)
    assert read_record(RunRecord, folder.record_file) == RECORD


def test_the_identity_is_that_of_the_begin_of_the_run(cfg: DictConfig, tmp_path: Path) -> None:
    initial = tmp_path / "initial.pth"
    initial.write_text("first")
    cfg = changed(cfg, student__path=str(initial))
    folder, expected = RunFolder(cfg), identity(cfg)
    initial.write_text("second")
    assert identity(cfg) != expected
    assert (folder.identity, folder.path) == (expected, run_path(cfg, expected))
    assert RunFolder(cfg).path != folder.path


def test_a_finished_run_returns_its_result_and_keeps_one_checkpoint(folder: RunFolder) -> None:
    for place in (folder.path, folder.path / "stages" / "first"):
        (place / "checkpoints").mkdir(parents=True)
        (place / "checkpoints" / "last.ckpt").touch()
        (place / "checkpoints" / "previous.ckpt").touch()
    result = make_result()
    folder.finish(result)
    assert not [name for name in names(folder) if "previous" in name]
    before = names(folder)
    assert folder.begin(RECORD) == result
    assert names(folder) == before


def test_an_unfinished_run_continues_without_the_remains_of_the_last_attempt(folder: RunFolder) -> None:
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "last.ckpt").write_text("kept")
    (folder.path / "checkpoints" / ".123.last.ckpt").write_text("partly written")
    (folder.path / ".123.metrics.csv").write_text("partly written")
    folder.fail(UserError("The disk is full."))
    assert folder.begin(RECORD) is None
    assert names(folder) == {"config.yaml", "run.json", "checkpoints/last.ckpt"}


@pytest.mark.parametrize(
    ("record", "difference"),
    [
        (other(code="new"), "The code has"),
        (other(data="new"), "The data has"),
        (other(teacher=None), "The teacher has"),
        (other(code="new", data="new"), "The code and the data have"),
    ],
)
def test_a_folder_made_with_something_else_is_refused_and_left_alone(
    folder: RunFolder, record: RunRecord, difference: str
) -> None:
    folder.finish(make_result())
    before = {name: (folder.path / name).read_bytes() for name in names(folder)}
    with pytest.raises(
        UserError, match=rf"{difference} changed since .* was made: add start_over=true .* or runs=\.\.\."
    ):
        folder.begin(record)
    assert {name: (folder.path / name).read_bytes() for name in names(folder)} == before


@pytest.mark.parametrize("checkpoint", ["checkpoints/last.ckpt", "stages/first/checkpoints/previous.ckpt"])
def test_code_may_change_until_there_is_a_checkpoint(folder: RunFolder, checkpoint: str) -> None:
    folder.fail(ZeroDivisionError())
    (folder.path / "stages" / "first" / "checkpoints").mkdir(parents=True)
    (folder.path / "stages" / "first" / "checkpoints" / ".123.last.ckpt").write_text("partly written")
    corrected = other(code="new")
    assert folder.begin(corrected) is None
    assert names(folder) == {"config.yaml", "run.json"}
    assert read_record(RunRecord, folder.record_file) == corrected
    (folder.path / checkpoint).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / checkpoint).touch()
    with pytest.raises(UserError, match="The code has changed since"):
        folder.begin(RECORD)


def test_starting_over_deletes_a_run_whatever_it_was_made_with(cfg: DictConfig, folder: RunFolder) -> None:
    (folder.path / "stages" / "first").mkdir(parents=True)
    (folder.path / "stages" / "first" / "metrics.csv").touch()
    folder.finish(make_result())
    record = other(code="new")
    assert start_over(cfg).begin(record) is None
    assert names(folder) == {"config.yaml", "run.json"}
    assert read_record(RunRecord, folder.record_file) == record


def test_starting_over_after_waiting_keeps_what_the_other_command_has_trained(
    cfg: DictConfig, folder: RunFolder
) -> None:
    folder.finish(make_result())
    assert start_over(cfg).begin(RECORD, wait=True) == make_result()
    assert start_over(cfg).begin(other(data="new"), wait=True) is None, "of other data"
    assert not folder.result_file.exists()


@pytest.mark.parametrize("deletions", range(6))
def test_an_interrupted_clean_up_is_never_mistaken_for_a_finished_run(
    cfg: DictConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    """The process is killed after some deletions. The same command then trains again."""
    (folder.path / "student.pth").touch()
    (folder.path / "checkpoints").mkdir()
    folder.finish(make_result())
    left = [deletions]

    def limited(delete: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", limited(Path.unlink))
        patched.setattr(shutil, "rmtree", limited(shutil.rmtree))
        try:
            start_over(cfg).begin(RECORD)
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("raise the number of deletions")
    assert folder.result_file.exists() == (deletions == 0)
    assert folder.record_file.exists() or names(folder) == set()
    if deletions == 0:
        with pytest.raises(UserError, match="The code has changed since"):
            folder.begin(other(code="new"))
    else:
        assert folder.begin(other(code="new")) is None


def test_other_ranks_read_and_write_nothing(cfg: DictConfig, folder: RunFolder) -> None:
    rank_one = RunFolder(cfg, is_rank_zero=False)
    before = names(folder)
    (folder.path / ".123.metrics.csv").touch()
    with rank_one.locked():
        assert not is_locked(folder.path)
        assert rank_one.begin(RECORD) is None
        assert start_over(cfg, is_rank_zero=False).begin(RECORD) is None
    assert names(folder) == {*before, ".123.metrics.csv"}
    folder.finish(make_result())
    assert rank_one.begin(RECORD) == make_result()


def test_a_failure_is_noted_without_secrets(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-of-mine")
    folder.fail(UserError("https://me:s3cr3t-of-mine@host/x cannot be read."))
    assert folder.failure_file.read_text() == "https://host/x cannot be read."
    folder.fail(ZeroDivisionError())
    assert folder.failure_file.read_text() == "ZeroDivisionError"


def test_a_failure_that_cannot_be_noted_raises_no_other_error(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)
    folder.fail(OSError("No space left on device"))
    assert not folder.path.exists()


def test_an_unfinished_run_is_locked_and_a_finished_one_is_not(cfg: DictConfig, folder: RunFolder) -> None:
    with folder.locked():
        assert is_locked(folder.path)
    folder.finish(make_result())
    with folder.locked():
        assert not is_locked(folder.path)
    with start_over(cfg).locked():
        assert is_locked(folder.path)


def test_a_run_that_another_command_trains_is_busy(folder: RunFolder) -> None:
    with locked(folder.path, wait=False), pytest.raises(BusyError), folder.locked():
        pass
    folder.finish(make_result())
    with locked(folder.path, wait=False), folder.locked():  # a finished run needs no lock
        pass


@pytest.mark.parametrize("blocked", ["run", "parent"])
def test_a_folder_that_cannot_be_written_is_reported(cfg: DictConfig, blocked: str) -> None:
    folder = RunFolder(cfg)
    place = folder.path if blocked == "run" else folder.path.parent
    place.parent.mkdir(parents=True)
    place.write_text("a file in the place of a folder")
    message = rf"The run folder {folder.path} cannot be written \(.*\): choose another with runs=\.\.\."
    with pytest.raises(UserError, match=message), folder.locked():
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported(folder: RunFolder) -> None:
    folder.path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        folder.begin(RECORD)
    folder.path.chmod(0o700)
