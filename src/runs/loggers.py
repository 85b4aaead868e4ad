"""Lightning's loggers, set up for a run folder."""

import logging
import os
import re
import secrets
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only
from pydantic import AfterValidator

log = logging.getLogger(__name__)

LONGEST_NAME = 128
"""Characters that W&B allows in the name of a project, a group, a run's id or an artifact."""


def _check_project(project: str) -> str:
    if not 0 < len(project) <= LONGEST_NAME or re.search(r"[/\\#?%:]", project):
        raise ValueError(f"give 1 to {LONGEST_NAME} characters, without / \\ # ? % and :, which W&B does not allow")
    return project


class ForgivingLogger(Logger):
    """A logger around another one. If that one fails, it warns once and is silent from then on. Training goes on."""

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner, self.has_failed = inner, False

    def _try(self, act: Callable[[], Any], otherwise: Any = None) -> Any:
        if self.has_failed:
            return otherwise
        try:
            return act()
        except Exception as error:
            self.has_failed = True
            log.warning("%s", describe_failure(error))
            return otherwise

    @property
    def name(self) -> str | None:
        """Return the name of the inner logger."""
        return self._try(lambda: self.inner.name)  # type: ignore[no-any-return]

    @property
    def version(self) -> int | str | None:
        """Return the version of the inner logger."""
        return self._try(lambda: self.inner.version)  # type: ignore[no-any-return]

    @property
    def save_dir(self) -> str | None:
        """Return the folder of the inner logger."""
        return self._try(lambda: self.inner.save_dir)  # type: ignore[no-any-return]

    @property
    def experiment(self) -> Any:
        """Return the experiment of the inner logger, or one that does nothing."""
        return self._try(lambda: getattr(self.inner, "experiment", None), DummyExperiment())

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Pass metrics on."""
        self._try(lambda: self.inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        """Pass the configuration on."""
        self._try(lambda: self.inner.log_hyperparams(params, *arguments, **options))

    def save(self) -> None:
        """Write what the inner logger holds."""
        self._try(self.inner.save)

    def finalize(self, status: str) -> None:
        """End the inner logger."""
        self._try(lambda: self.inner.finalize(status))


def describe_failure(error: Exception) -> str:
    """Say that a logger failed, and that the run goes on."""
    reason = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"The logger failed ({type(error).__name__}: {reason}). The run goes on without it and writes metrics.csv."


def wandb_name(name: str) -> str:
    """Replace what W&B does not allow in ids and in names of artifacts. The end, where the digests are, is kept.

    >>> wandb_name("flowers, v2/kd+sp/none-seed0-0123abcd")
    'flowers--v2-kd+sp-none-seed0-0123abcd'
    """
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", name)[-LONGEST_NAME:]


def wandb_logger(
    folder: Path, project: Annotated[str, AfterValidator(_check_project)], setting: str = ""
) -> WandbLogger:
    """Log to W&B under an id that the run folder holds, so that a resumed run continues the same charts.

    Data, pair, method, serialization and the digest `setting` together name the group. The first four are tags. Metrics
    are drawn by epoch. The run is online if an API key is found and the server answers, disabled if WANDB_MODE or W&B's
    own settings say so, and offline otherwise. One log line says which of the three it is. W&B never prompts.
    """
    import wandb  # here, because the other loggers work without it

    if wandb.run is not None:  # from an earlier job or the teacher: its charts must not get this run's rows
        wandb.finish()
    wandb.setup(wandb.Settings(silent=True))  # otherwise it warns of an option that Lightning sets in every run
    arguments = _run_arguments(folder, project, setting)
    wanted = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode or "online"
    if wanted == "online" and wandb.api.api_key and (logger := _online_logger(arguments)):
        return _by_epoch(logger)
    mode: Literal["disabled", "offline"] = "disabled" if wanted == "disabled" else "offline"
    os.environ["WANDB_MODE"] = mode  # later jobs of a sweep read it
    settings = wandb.Settings(mode=mode, silent=True, x_disable_meta=True)  # the metadata would hold the command line
    logger = WandbLogger(**arguments, offline=mode == "offline", settings=settings)
    if mode == "offline":
        place = shlex.quote(str(folder))
        rank_zero_only(log.info)("W&B: offline. To upload the run later: wandb sync %s/wandb/offline-run-*", place)
    else:
        rank_zero_only(log.info)("W&B: disabled, because WANDB_MODE or `wandb disabled` says so.")
    return _by_epoch(logger)


def _run_arguments(folder: Path, project: str, setting: str) -> dict[str, Any]:
    """Return the logger's arguments that follow from the run folder, within W&B's limits of length."""
    name = "/".join(folder.parts[-4:])
    data, pair, method, last = folder.parts[-4:]
    serialization = last.partition("-seed")[0]
    return {
        "project": project,
        "name": name,
        "id": wandb_name(f"{name}-{_random_part(folder / 'wandb_id.txt')}"),
        "group": "-".join(filter(None, [f"{data}/{pair}/{method}/{serialization}", setting]))[-LONGEST_NAME:],
        "tags": [tag[:64] for tag in dict.fromkeys((data, pair, method, serialization))],
        "save_dir": str(folder),
        "resume": "allow",
    }


def _random_part(file: Path) -> str:
    """Return the random end of a run's id. It is drawn when the run begins, and kept in a file.

    Without it, runs of one configuration in two `runs` folders, or before and after start_over=true, would share their
    charts.
    """
    with suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
        new.write(secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def _online_logger(arguments: dict[str, Any]) -> WandbLogger | None:
    """Start an online run. Returns None, after a warning, if the server does not answer within 20 seconds."""
    import wandb

    logger = WandbLogger(**arguments, settings=wandb.Settings(init_timeout=20, silent=True, x_disable_meta=True))
    try:
        url = logger.experiment.url
    except Exception as error:  # W&B may raise anything, and training must not end because of it
        log.warning("W&B cannot be reached (%s).", next(iter(str(error).splitlines()), type(error).__name__))
        wandb.teardown()  # its service still holds the run's id
        return None
    rank_zero_only(log.info)("W&B: online, %s", url)
    return logger


def _by_epoch(logger: WandbLogger) -> WandbLogger:
    """Draw metrics by epoch instead of by step.

    This starts the W&B run in the parent process. A forked process would never close a run that it had started.
    """
    for split in ("val", "test"):
        logger.experiment.define_metric(f"{split}/*", step_metric="epoch")
    return logger


def csv_logger(folder: Path) -> CSVLogger:
    """Write every logged step to `steps/version_N/metrics.csv`. Each resume gets a new N."""
    return CSVLogger(folder, name="steps")


def tensorboard_logger(folder: Path) -> TensorBoardLogger:
    """Write TensorBoard event files to `tensorboard/`."""
    return TensorBoardLogger(folder, name="tensorboard", version="")
