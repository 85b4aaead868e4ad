"""The shared wrapper of all commands: run jobs, report a failure in one sentence, and end with an exit code."""

import contextlib
import functools
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import distributed

import src.config  # noqa: F401  # registers the schemas and resolvers of conf/
from src.common.allocator import keep_freed_memory
from src.common.errors import UserError
from src.common.gpus import pin_gpu
from src.common.secrecy import RedactingRecord, RedactingStream, without_secrets
from src.config.known_options import check_options, check_run_options
from src.config.overrides import explain, forced, readable
from src.runs.lock import BusyError
from src.runs.signals import stop_on_signal
from src.runs.sweep import JobError, failures_reported, is_pinned

NO_SHARED_MEMORY = re.compile(
    r"</torch_|shared memory|DataLoader worker .* (killed|exited)|ancdata|Too many open files"
)
"""Messages by which torch and Python report that processes cannot share tensors."""
NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""Part of torch's message about an operator of a library's network that deterministic=true does not allow."""
NO_TRIAL = "No trials are completed yet"
"""Part of Optuna's message after a search without a result."""
PROCESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")
"""Variables that Lightning sets for the processes of a run. The next run would mistake them for a cluster's."""


LISTS = ("forms", "scores")
"""Options without a dot whose value is a list. All others are groups, with one choice each."""
MISSING_EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/sweeper/optuna": "search",
}
"""Configurations that come with an extra of pyproject.toml, and its name."""


def job(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a task for `hydra.main`, so that each failure is reported at once and a sweep continues.

    A launcher may call the wrapped task in another process, which the wrapper then sets up like the command's own.
    """

    reported: set[str] = set()  # by the jobs of a sweep

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        set_up_process()
        overrides = list(HydraConfig.get().overrides.task)
        try:
            _check_choices(overrides)
            given = {override.lstrip("+~").partition("=")[0] for override in overrides}
            check_options(cfg, given)
            check_run_options(cfg, given)
            if HydraConfig.get().mode is not RunMode.MULTIRUN:
                return task(cfg)
            if is_pinned(HydraConfig.get()):
                pin_gpu()
            with _own_processes(overrides), _own_handlers():
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
            if HydraConfig.get().job.num == 0:  # a sweep starts
                reported.clear()
            if sentence in reported:  # jobs share most of their options, and so most mistakes
                sentence = "the same as above."
            print(f"error: {sentence}" if sentence else traceback.format_exc(), file=sys.stderr)
            reported.add(sentence or "")
            raise JobError from None  # any other error might not survive the way from a worker process

    return run


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


def _own_handlers() -> contextlib.AbstractContextManager[None]:
    """Handle signals in a worker process that has no handlers. The command itself, and submitit, have their own."""
    is_unhandled = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return stop_on_signal() if is_unhandled else contextlib.nullcontext()


def _check_choices(overrides: Sequence[str]) -> None:
    """Reject `group=[a,b]`: Hydra merges them, and b silently overrides a."""
    for override in overrides:
        group, _, chosen = override.partition("=")
        if "." not in group.partition("@")[0] and group not in LISTS and chosen.startswith("["):
            raise UserError(
                f"{override} would merge several choices into one: choose one. To combine two methods, add "
                "method@also=..."
            )


def run_command(main: Callable[[], Any]) -> None:
    """Run a command. A mistake of the user ends the command with one sentence and exit code 1, without a traceback."""
    set_up_process()
    try:
        sys.argv[1:] = readable(sys.argv[1:])
        with stop_on_signal(), failures_reported():
            _call(main)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")


def _call(main: Callable[[], Any]) -> None:
    """Call Hydra's main function, again if it does not know an option: `check_options` knows more of them."""
    try:
        main()
    except ConfigCompositionException as error:
        arguments = forced(sys.argv[1:], error)
        if arguments is None:
            raise
        sys.argv[1:] = arguments
        _call(main)


def _sentence(error: Exception) -> str | None:
    """Describe an error that the user can correct, in one line without secrets. Returns None for any other error."""
    sentence = _describe(error)
    return None if sentence is None else without_secrets(sentence)


def _describe(error: BaseException) -> str | None:
    if "iter(combined_loader)" in str(error) and error.__context__:  # Lightning hides why the workers did not start
        return _describe(error.__context__)
    if isinstance(error, (UserError, MisconfigurationException)):
        return " ".join(str(error).split())
    if isinstance(error, hydra.errors.MissingConfigException) and error.missing_cfg_file in MISSING_EXTRAS:
        extra = MISSING_EXTRAS[error.missing_cfg_file]
        return f"{error.missing_cfg_file} needs the extra {extra}, which is not installed: pip install -e '.[{extra}]'."
    if isinstance(error, (hydra.errors.HydraException, OmegaConfBaseException)):
        return explain(error) or _shorten(error)
    if isinstance(error, yaml.YAMLError):
        return f"A configuration file is not valid YAML ({' '.join(str(error).split())}): correct it."
    kept = "All checkpoints are kept, and the same command resumes a run."
    if isinstance(error, BrokenProcessPool):
        return (
            "A process of the sweep was killed, perhaps for lack of memory: run fewer jobs at once with "
            f"hydra.launcher.n_jobs=N. {kept}"
        )
    if NO_TRIAL in str(error):
        return "The search has no completed trial: see the errors above, or raise hydra.sweeper.n_trials."
    if isinstance(error, RuntimeError) and NOT_DETERMINISTIC in str(error):
        operator = str(error).partition(NOT_DETERMINISTIC)[0].strip()
        cure = "set trainer.deterministic=false (see docs/gpu.md)"
        return f"{operator} has no deterministic form on this device: {cure}."
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


def set_up_process() -> None:
    """Silence unhelpful messages, redact secrets from logs and stderr, and let Hydra raise its errors. Keep memory.

    Every process that runs a job needs this, once. Further calls change nothing.
    """
    keep_freed_memory()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.setLogRecordFactory(RedactingRecord)
    if not isinstance(sys.stderr, RedactingStream):
        sys.stderr = cast(Any, RedactingStream(sys.stderr))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # logs a failed import before it raises the error
    for message in (
        "does not have many workers",
        "Grad strides do not match bucket view strides",  # of 1x1 convolutions, whose strides have two valid forms
        "treespec, LeafSpec",
        "Corrupt EXIF data|corrupt EXIF data|Truncated File Read|Tag data larger than file",  # of a photo
        "recommended to use .*sync_dist=True",  # TermLog and torchmetrics have reduced the values over the devices
        "resuming from a checkpoint that ended before the epoch ended",  # `EpochBatches` resumes in mid-epoch
        "A worker stopped while some jobs were given to the executor",  # joblib starts another one
        "[Cc]heckpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def _shorten(error: Exception) -> str:
    """Return a message of Hydra in one line, without its stack of contexts and its search path."""
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for text in dict.fromkeys([str(error), str(cause)]) for line in text.splitlines()]
    left_out = (
        "full_key",
        "object_type",
        "reference_type",
        "Set the",
        "Config search path",
        "provider=",
        "See http",
        "To append",
    )
    kept = [line.rstrip(".") for line in dict.fromkeys(lines) if line and not line.startswith(left_out)]
    return "; ".join([*kept, "--help lists the options."]).replace(":;", ":")
