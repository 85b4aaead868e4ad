"""Lightning's loggers, pointed at a run folder."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

log = logging.getLogger(__name__)


def wandb_logger(folder: Path, project: str) -> WandbLogger:
    """W&B under the run folder's own id, so that a resumed run goes on in the same chart.

    Repetitions of a method share a group; data, pair, method and serialization are tags; scores are drawn by epoch.
    Online where a key is at hand and the server answers, offline otherwise; it never prompts.
    """
    if wandb.run is not None:  # a teacher's or an earlier job's: it must not take this one's rows
        wandb.finish()
    name = "/".join(folder.parts[-4:])
    data, pair, method, last = folder.parts[-4:]
    serialization = last.partition("-seed")[0]
    arguments: dict[str, Any] = {
        "project": project,
        "name": name,
        "id": name.replace("/", "-"),
        "group": f"{data}/{pair}/{method}/{serialization}"[:128],
        "tags": [tag[:64] for tag in dict.fromkeys((data, pair, method, serialization))],
        "save_dir": str(folder),
        "resume": "allow",
    }
    wanted = os.environ.get("WANDB_MODE", "online")
    if wanted == "online" and wandb.api.api_key:
        logger = WandbLogger(**arguments, settings=wandb.Settings(init_timeout=20, silent=True, x_disable_meta=True))
        try:
            _ = logger.experiment
        except Exception as error:  # whatever W&B raises, a run does not end because of it
            log.warning("W&B cannot be reached (%s): logging offline.", str(error).splitlines()[0])
            wandb.teardown()  # its service still holds the run's id
        else:
            return _by_epoch(logger)
    mode: Literal["disabled", "offline"] = "disabled" if wanted == "disabled" else "offline"
    os.environ["WANDB_MODE"] = mode  # for the jobs that follow too
    settings = wandb.Settings(mode=mode, silent=True, x_disable_meta=True)  # no command line: tokens
    logger = WandbLogger(**arguments, offline=mode == "offline", settings=settings)
    return _by_epoch(logger)


def _by_epoch(logger: WandbLogger) -> WandbLogger:
    """Scores by epoch instead of by step; this starts the run: a forked child would never close one of its own."""
    for split in ("val", "test"):
        logger.experiment.define_metric(f"{split}/*", step_metric="epoch")
    return logger


def csv_logger(folder: Path) -> CSVLogger:
    """Every logged step in `steps/version_N/metrics.csv`, a new N at each resume."""
    return CSVLogger(folder, name="steps")


def tensorboard_logger(folder: Path) -> TensorBoardLogger:
    """TensorBoard event files in `tensorboard/`."""
    return TensorBoardLogger(folder, name="tensorboard", version="")
