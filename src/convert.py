"""`python -m src.convert`: copy photos from folders into shards that can be streamed. `--help` is the guide."""

import logging

import hydra
from omegaconf import DictConfig

from src.command import job, run_command
from src.common.errors import UserError
from src.common.files import output_folder
from src.data.folder_data import FolderData
from src.data.sharding import write_shards

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="convert")
@job
def main(cfg: DictConfig) -> None:
    """Write the shards of a folder of photos."""
    data = hydra.utils.instantiate(cfg.data, batch_size=1, seed=0)
    if type(data) is not FolderData:
        raise UserError(f"data={cfg.data.name} is not a folder of photos: choose data=imagefolder or data=imagenet.")
    if data.unlabelled is not None:
        raise UserError("Shards have no place for photos without labels: leave data.unlabelled out.")
    out = output_folder(cfg.out)
    data.load()
    for note in data.source.notes:
        log.info("%s", note)
    write_shards(data, out)
    log.info("Shards written to %s. To train on them: python -m src.train data=stream data.root=%s ...", out, out)


if __name__ == "__main__":
    run_command(main)
