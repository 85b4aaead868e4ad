"""Lightning's loggers, set up for a run folder."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

log = logging.getLogger(__name__)


def wandb_logger(folder: Path, project: str) -> WandbLogger:
    """Log to W&B under an id that follows from the run folder, so that a resumed run continues the same charts.

    Data, pair, method and serialization together name the group, and each of them is a tag. Metrics are drawn by
    epoch. The run is online if an API key is found and the server answers, disabled if WANDB_MODE says so, and offline
    otherwise. One log line says which of the three it is. W&B never prompts.
    """
    if wandb.run is not None:  # from an earlier job or the teacher: its charts must not get this run's rows
        wandb.finish()
    arguments = _run_arguments(folder, project)
    wanted = os.environ.get("WANDB_MODE", "online")
    if wanted == "online" and wandb.api.api_key and (logger := _online_logger(arguments)):
        return _by_epoch(logger)
    mode: Literal["disabled", "offline"] = "disabled" if wanted == "disabled" else "offline"
    os.environ["WANDB_MODE"] = mode  # later jobs of a sweep read it
    settings = wandb.Settings(mode=mode, silent=True, x_disable_meta=True)  # the metadata would hold the command line
    logger = WandbLogger(**arguments, offline=mode == "offline", settings=settings)
    if mode == "offline":
        log.info("W&B: offline. To upload the run later: wandb sync %s/wandb/offline-run-*", folder)
    else:
        log.info("W&B: disabled, because WANDB_MODE says so.")
    return _by_epoch(logger)


def _run_arguments(folder: Path, project: str) -> dict[str, Any]:
    """Return the logger's arguments that follow from the run folder, within W&B's limits of length."""
    name = "/".join(folder.parts[-4:])
    data, pair, method, last = folder.parts[-4:]
    serialization = last.partition("-seed")[0]
    return {
        "project": project,
        "name": name,
        "id": name.replace("/", "-"),
        "group": f"{data}/{pair}/{method}/{serialization}"[:128],
        "tags": [tag[:64] for tag in dict.fromkeys((data, pair, method, serialization))],
        "save_dir": str(folder),
        "resume": "allow",
    }


def _online_logger(arguments: dict[str, Any]) -> WandbLogger | None:
    """Start an online run. Returns None, after a warning, if the server does not answer within 20 seconds."""
    logger = WandbLogger(**arguments, settings=wandb.Settings(init_timeout=20, silent=True, x_disable_meta=True))
    try:
        url = logger.experiment.url
    except Exception as error:  # W&B may raise anything, and training must not end because of it
        log.warning("W&B cannot be reached (%s).", str(error).splitlines()[0])
        wandb.teardown()  # its service still holds the run's id
        return None
    log.info("W&B: online, %s", url)
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
