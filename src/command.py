"""What all commands do alike: run jobs, tell what failed in one sentence, and end."""

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

from src.errors import UserError
from src.resume import BusyError, ended_by_signal
from src.secrecy import DiscreetRecord, DiscreetStream, without_secrets

WORKERS = re.compile(r"</torch_|shared memory|DataLoader worker .* (killed|exited)|ancdata|Too many open files")
"""What torch and Python say where processes cannot share tensors."""
PROCESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")
"""What Lightning tells the processes of a run, and takes for a cluster's word in the next one."""


class SweepError(UserError):
    """Jobs of a sweep failed, each with its own message before."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[list[str]] = []
        self.failed: list[list[str]] = []

    def __str__(self) -> str:
        """Names the failed jobs by what is not the same in all jobs."""
        same = set.intersection(*map(set, self.jobs)) if len(self.jobs) > 1 else set()
        names = [" ".join(override for override in job if override not in same) for job in self.failed]
        return f"{len(self.failed)} of {len(self.jobs)} jobs failed: {'; '.join(names)}."


def job(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """A task for `hydra.main` that tells its failure at once, and in a sweep by one error that names all failed jobs:
    Hydra raises the first job's, after the last job.
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
            _clean(Path(HydraConfig.get().sweep.dir) / "multirun.yaml")
            with _own_processes(overrides):
                return task(cfg)
        except Exception as error:
            sentence = _sentence(error)
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                if sentence is None:
                    raise
                sys.exit(f"error: {sentence}")
            if isinstance(error, BusyError):
                print(f"{sentence} Left to it.")
                return None
            print(f"error: {sentence}" if sentence else traceback.format_exc(), file=sys.stderr)
            sweep.failed.append(overrides)
            raise sweep from None

    return run


def _clean(file: Path) -> None:
    """Take the secrets out of what Hydra has written of the command line."""
    text = file.read_text() if file.is_file() else ""
    if text != (clean := without_secrets(text)):
        file.write_text(clean)


@contextlib.contextmanager
def _own_processes(overrides: Sequence[str]) -> Iterator[None]:
    """The processes that Lightning starts for several devices do this job of a sweep and end; the next has new ones."""
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
    """Raise `UserError` for `group=[a,b]`, which Hydra merges into one node: what b names hides what a does."""
    for override in overrides:
        group, _, chosen = override.partition("=")
        if "." not in group.partition("@")[0] and group != "forms" and chosen.startswith("["):
            raise UserError(f"{override} would merge them into one: choose one, and combine methods by method@also=...")


def run_command(main: Callable[[], Any]) -> None:
    """Run a command; what the user can mend ends in one sentence and exit code 1 instead of a traceback."""
    _quiet()
    try:
        for override in sys.argv[1:]:
            if re.match(r"[+~]*(@[^=]*)?=", override):  # Hydra would end in a traceback
                raise UserError(f"{override} names no option: write option=value, see `--help` for what there is.")
        with ended_by_signal():
            main()
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


def _sentence(error: Exception) -> str | None:
    """What a user can do something about, in one line and without secrets; None for any other error."""
    sentence = _told(error)
    return None if sentence is None else without_secrets(sentence)


def _told(error: BaseException) -> str | None:
    if "iter(combined_loader)" in str(error) and error.__context__:  # Lightning hides why workers did not start
        return _told(error.__context__)
    if isinstance(error, (UserError, MisconfigurationException)):
        return " ".join(str(error).split())
    if isinstance(error, (hydra.errors.HydraException, OmegaConfBaseException)):
        return _first_sentence(error)
    kept = "what a run had saved before is kept, the same command resumes."
    if WORKERS.search(str(error)) and isinstance(error, (OSError, RuntimeError)):
        reason = str(error).strip().splitlines()[-1].rpartition("Error: ")[2].rstrip(".")
        return f"The data's workers lack memory to share, or open files ({reason}): set data.workers=0; {kept}"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}; {kept}"
    return None


def _quiet() -> None:
    """Leave out what Lightning says at every start and nobody can act upon; let Hydra pass errors on."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.setLogRecordFactory(DiscreetRecord)
    sys.stderr = cast(Any, DiscreetStream(sys.stderr))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "treespec, LeafSpec",
        "resuming from a checkpoint that ended before the epoch ended",  # `EpochBatches` goes on there
        "[Cc]heckpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _first_sentence(error: Exception) -> str:
    """Hydra's message without the stack of contexts behind it and the places where it looked."""
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for text in dict.fromkeys([str(error), str(cause)]) for line in text.splitlines()]
    left_out = ("full_key", "object_type", "reference_type", "Set the", "Config search path", "provider=", "See http")
    kept = [line.rstrip(".") for line in dict.fromkeys(lines) if line and not line.startswith(left_out)]
    return "; ".join([*kept, "see `--help` for what there is."]).replace(":;", ":")
