"""The shared wrapper of all commands: run jobs, report a failure in one sentence, and end with an exit code."""

import contextlib
import functools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import distributed

import src.config  # noqa: F401  # registers the schemas and resolvers of conf/
from src.common.errors import UserError
from src.common.secrecy import RedactingRecord, RedactingStream, without_secrets
from src.runs.lock import BusyError
from src.runs.signals import stop_on_signal

NO_SHARED_MEMORY = re.compile(
    r"</torch_|shared memory|DataLoader worker .* (killed|exited)|ancdata|Too many open files"
)
"""Messages by which torch and Python report that processes cannot share tensors."""
PROCESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")
"""Variables that Lightning sets for the processes of a run. The next run would mistake them for a cluster's."""


class SweepError(UserError):
    """Some jobs of a sweep failed. Each of them has already reported its own message."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[list[str]] = []
        self.failed: list[list[str]] = []

    def __str__(self) -> str:
        """List the failed jobs, each by the overrides that not all jobs share."""
        shared = set.intersection(*map(set, self.jobs)) if len(self.jobs) > 1 else set()
        names = [" ".join(override for override in job if override not in shared) for job in self.failed]
        return f"{len(self.failed)} of {len(self.jobs)} jobs failed: {'; '.join(names)}."


def job(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a task for `hydra.main`, so that each failure is reported at once and a sweep continues.

    After a sweep, the wrapped task raises one error that lists all failed jobs. Hydra alone would raise only the error
    of the first failed job.
    """
    sweep = SweepError()

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        overrides = list(HydraConfig.get().overrides.task)
        sweep.jobs.append(overrides)
        try:
            _check_choices(overrides)
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                return task(cfg)
            _redact(Path(HydraConfig.get().sweep.dir) / "multirun.yaml")
            with _own_processes(overrides):
                return task(cfg)
        except Exception as error:
            sentence = _sentence(error)
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                if sentence is None:
                    raise
                sys.exit(f"error: {sentence}")
            if isinstance(error, BusyError):
                print(f"{sentence} This sweep skips the run.")
                return None
            print(f"error: {sentence}" if sentence else traceback.format_exc(), file=sys.stderr)
            sweep.failed.append(overrides)
            raise sweep from None

    return run


def _redact(file: Path) -> None:
    """Remove secrets from a file to which Hydra has written the command line."""
    text = file.read_text() if file.is_file() else ""
    if text != (clean := without_secrets(text)):
        file.write_text(clean)


@contextlib.contextmanager
def _own_processes(overrides: Sequence[str]) -> Iterator[None]:
    """Let Lightning start new processes for each job of a sweep that trains on several devices."""
    argv, before = sys.argv, {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    sys.argv = [argv[0], *overrides]
    try:
        yield
    finally:
        sys.argv = argv
        if before["LOCAL_RANK"] is None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _check_choices(overrides: Sequence[str]) -> None:
    """Reject `group=[a,b]`: Hydra merges them, and b silently overrides a."""
    for override in overrides:
        group, _, chosen = override.partition("=")
        if "." not in group.partition("@")[0] and group != "forms" and chosen.startswith("["):
            raise UserError(
                f"{override} would merge several choices into one: choose one. To combine two methods, add "
                "method@also=..."
            )


def run_command(main: Callable[[], Any]) -> None:
    """Run a command. A mistake of the user ends the command with one sentence and exit code 1, without a traceback."""
    _quiet()
    try:
        for override in sys.argv[1:]:
            if re.match(r"[+~]*(@[^=]*)?=", override):  # Hydra would end with a traceback
                raise UserError(f"{override} does not name an option: write option=value. --help lists the options.")
        with stop_on_signal():
            main()
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


def _sentence(error: Exception) -> str | None:
    """Describe an error that the user can correct, in one line without secrets. Returns None for any other error."""
    sentence = _describe(error)
    return None if sentence is None else without_secrets(sentence)


def _describe(error: BaseException) -> str | None:
    if "iter(combined_loader)" in str(error) and error.__context__:  # Lightning hides why the workers did not start
        return _describe(error.__context__)
    if isinstance(error, (UserError, MisconfigurationException)):
        return " ".join(str(error).split())
    if isinstance(error, (hydra.errors.HydraException, OmegaConfBaseException)):
        return _shorten(error)
    kept = "All checkpoints are kept, and the same command resumes a run."
    if _lacks_shared_memory(error):
        reason = str(error).strip().splitlines()[-1].rpartition("Error: ")[2].rstrip(".")
        return f"The data's workers ran out of shared memory or open files ({reason}): set data.workers=0. {kept}"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}. {kept}"
    return None


def _lacks_shared_memory(error: BaseException) -> bool:
    """Return whether processes could not share tensors or semaphores. Both lie in the system's shared memory."""
    if not isinstance(error, (OSError, RuntimeError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    in_semaphore = bool(frames) and Path(frames[-1].filename).parts[-2:] == ("multiprocessing", "synchronize.py")
    return in_semaphore or NO_SHARED_MEMORY.search(str(error)) is not None


def _quiet() -> None:
    """Silence messages on which nobody can act, redact secrets, and let Hydra pass errors on."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.setLogRecordFactory(RedactingRecord)
    sys.stderr = cast(Any, RedactingStream(sys.stderr))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # logs a failed import before it raises the error
    for message in (
        "does not have many workers",
        "treespec, LeafSpec",
        "resuming from a checkpoint that ended before the epoch ended",  # `EpochBatches` resumes in mid-epoch
        "[Cc]heckpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _shorten(error: Exception) -> str:
    """Return a message of Hydra in one line, without its stack of contexts and its search path."""
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for text in dict.fromkeys([str(error), str(cause)]) for line in text.splitlines()]
    left_out = ("full_key", "object_type", "reference_type", "Set the", "Config search path", "provider=", "See http")
    kept = [line.rstrip(".") for line in dict.fromkeys(lines) if line and not line.startswith(left_out)]
    return "; ".join([*kept, "--help lists the options."]).replace(":;", ":")
