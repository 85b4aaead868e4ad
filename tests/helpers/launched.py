"""A command with the frame of all commands, but without training: `python -m tests.helpers.launched number=0`."""

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from src.command import job, run_command
from src.common.errors import UserError
from src.common.gpus import VISIBLE
from tests.helpers.configure import CONF

log = logging.getLogger(__name__)


@dataclass
class Options:
    folder: str = "."
    number: int = 0
    jobs: int = 1
    url: str | None = None


ConfigStore.instance().store("launched", Options)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="launched")
@job
def main(cfg: DictConfig) -> None:
    """Write the visible GPUs to a file, and wait until all jobs have done so. Job 1 has a mistake, job 2 a bug."""
    folder = Path(cfg.folder)
    (folder / f"{cfg.number}.gpus").write_text(f"{os.getpid()} {os.environ.get(VISIBLE)}")
    while len(list(folder.glob("*.gpus"))) < cfg.jobs:  # so that each job has a process of its own
        time.sleep(0.05)
    logging.getLogger("lightning.pytorch").info("Lightning's chatter")
    log.info("The log of job %d tells %s.", cfg.number, os.environ.get("MY_TOKEN"))
    print(f"The stderr of job {cfg.number} tells {os.environ.get('MY_TOKEN')}.", file=sys.stderr)
    if cfg.number == 1:
        raise UserError(f"number=1 is a mistake, {os.environ.get('MY_TOKEN')}.")
    if cfg.number == 2:
        raise RuntimeError(f"a bug, {os.environ.get('MY_TOKEN')}")
    if cfg.number == 9:
        os.abort()


if __name__ == "__main__":
    run_command(main)
