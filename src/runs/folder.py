"""The folder of a run. Its name follows from the configuration, so that the same command finds it again.

It holds config.yaml (resolved), run.json (versions, fingerprints, teacher), metrics.csv (one row per epoch),
gradients.csv, checkpoints/last.ckpt, student.pth (the student alone) and, once the run is finished, result.json. With
W&B, wandb_id.txt is a part of the run's id there. With keep_best=true, student_best.pth is the student of another
epoch. If an error ended the run, failure.txt holds its message.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.common.files import write_text
from src.common.secrecy import plain_config, without_secrets
from src.runs.identity import identity, run_path
from src.runs.lock import locked
from src.runs.result import Result, RunRecord, read_record


class RunFolder:
    """One run's folder on disk."""

    def __init__(self, cfg: DictConfig, is_rank_zero: bool = True) -> None:
        """Find the folder of a run. Only rank zero writes to it and locks it.

        The identity is computed once, because a file whose content is part of it may change while the run trains.
        """
        self.cfg = cfg
        self.is_rank_zero = is_rank_zero
        self.identity = identity(cfg)
        self.path = run_path(cfg, self.identity)
        self.result_file = self.path / "result.json"
        self.student_file = self.path / "student.pth"
        self.failure_file = self.path / "failure.txt"
        self.record_file = self.path / "run.json"

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """Lock the folder of an unfinished run.

        Raises `BusyError` if another command trains here. With `wait`, waits for that command's end instead. Raises
        `UserError` if the folder cannot be written.
        """
        finished = self.result_file.is_file() and not self.cfg.start_over
        if finished or not self.is_rank_zero:
            yield
            return
        with _report_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, wait):
            yield

    def begin(self, record: RunRecord, wait: bool = False) -> Result | None:
        """Prepare the folder for a run, or return the result if the run is finished.

        With `start_over`, a finished run is deleted. With `wait` too, a result for the same data is still returned: the
        command that this one has waited for may have trained it just now, for both.

        Raises `UserError` if the run was trained with other code, another teacher or other data, or if the folder
        cannot be written.
        """
        is_shared = wait and self.result_file.is_file() and self.data_digest() == record.fingerprints.data
        if self.cfg.start_over and not is_shared:
            if self.is_rank_zero:
                with _report_unwritable(self.path):
                    self._clear()
        elif self.result_file.is_file() or self._has_checkpoint():  # else nothing is trained that could be mixed
            self._check_fingerprints(record)
            if self.result_file.is_file():
                return read_record(Result, self.result_file)
        if self.is_rank_zero:
            with _report_unwritable(self.path):
                for partial in self.path.rglob(".[0-9]*.*"):  # left by `atomic_write` in a process that was killed
                    partial.unlink(missing_ok=True)
                self.failure_file.unlink(missing_ok=True)
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(plain_config(self.cfg)))
                record.write(self.record_file)
        return None

    def _clear(self) -> None:
        """Delete all files of an earlier run.

        The result goes first and run.json last, so that an interrupted clean-up is never mistaken for a finished run.
        """
        self.result_file.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self.record_file:
                entry.unlink()
        self.record_file.unlink(missing_ok=True)

    def _has_checkpoint(self) -> bool:
        return any(self.path.rglob("checkpoints/last.ckpt")) or any(self.path.rglob("checkpoints/previous.ckpt"))

    def _check_fingerprints(self, record: RunRecord) -> None:
        if not self.record_file.is_file():
            return
        earlier = read_record(RunRecord, self.record_file).fingerprints
        now = record.fingerprints
        changed = [name for name, value in now.model_dump().items() if getattr(earlier, name) != value]
        if changed:
            names, verb = " and the ".join(changed), "has" if len(changed) == 1 else "have"
            raise UserError(
                f"The {names} {verb} changed since {self.path} was made: add start_over=true to train again, or "
                "runs=... to keep both."
            )

    def data_digest(self) -> str | None:
        """Read the digest of the data that an earlier run in this folder was made with. None without a run.json."""
        if not self.record_file.is_file():
            return None
        return read_record(RunRecord, self.record_file).fingerprints.data

    def fail(self, error: Exception) -> None:
        """Write the error's message to failure.txt, for reports. The same command still resumes the run."""
        with suppress(OSError):  # a full disk may have ended the run
            write_text(self.failure_file, without_secrets(str(error)) or type(error).__name__)

    def finish(self, result: Result) -> None:
        """Write the result. From now on, the same command returns it at once. Only the last checkpoint is kept."""
        result.write(self.result_file)
        for previous in self.path.rglob("checkpoints/previous.ckpt"):
            previous.unlink()


@contextmanager
def _report_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written ({error.strerror}): choose another with runs=..."
        ) from None
