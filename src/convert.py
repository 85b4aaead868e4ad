"""`python -m src.convert`: photos in folders to shards that can be streamed. `--help` is the guide."""

import io
import logging
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track

from src.command import job, run_command
from src.data.folder_data import FolderData, FolderPhotos
from src.data.image_data import Split
from src.data.stream_data import INDEX, shard_name
from src.data.views import epoch_order
from src.errors import UserError

log = logging.getLogger(__name__)

SHARD_BYTES = 64_000_000
READERS = 16


def convert(data: FolderData, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the shards of a loaded `data` and their index to the folder `out`, all or nothing.

    Rows keep their order in the index; training photos lie in the shards in random order, so that a few shards hold a
    fair sample of all classes. Raises `UserError` where `out` exists, or a photo cannot be read.
    """
    if out.exists():
        raise UserError(f"out={out} is there already: choose another folder, or remove it.")
    index: dict[str, np.ndarray] = {
        "class_names": np.array(data.class_names),
        "digest": np.array(data.files_digest),
        "train_labels": data.source.train_labels.numpy().astype(np.int32),
        "test_labels": data.source.test_labels.numpy().astype(np.int32),
    }
    orders = {"train": epoch_order(0, 0, len(index["train_labels"])), "test": torch.arange(len(index["test_labels"]))}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        partial.mkdir()
        for split, order in orders.items():
            index |= _write_split(data, split, order.numpy(), partial, shard_bytes)  # type: ignore[arg-type]
        np.savez_compressed(partial / INDEX, **index)  # type: ignore[arg-type]
        partial.rename(out)


def _write_split(
    data: FolderData, split: Split, order: np.ndarray, folder: Path, shard_bytes: int
) -> dict[str, np.ndarray]:
    """The columns of the index."""
    photos = data.photos[split]
    assert isinstance(photos, FolderPhotos)
    shard_of = np.cumsum(photos.sizes[order]) // shard_bytes
    shards = np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)
    columns = {name: np.zeros(len(order), dtype=np.int64) for name in ("shards", "offsets", "sizes")}
    test_or_val = Path(photos.folder).name
    for shard, rows in enumerate(track(shards, description=split)):
        columns["shards"][rows] = shard
        with tarfile.open(folder / shard_name(split, shard), "w", format=tarfile.PAX_FORMAT) as tar:
            for row, encoded in zip(rows, _read(photos, rows), strict=True):
                columns["offsets"][row] = _add(tar, f"{test_or_val}/{photos.relative(row)}", encoded)
                columns["sizes"][row] = len(encoded)
    return {f"{split}_{name}": column for name, column in columns.items()}


def _read(photos: FolderPhotos, rows: np.ndarray) -> Iterator[bytes]:
    """Small files come from many readers at once, or each would wait for the disk's arm."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda row: photos.read([row])[0], rows.tolist())


def _add(tar: tarfile.TarFile, name: str, encoded: bytes) -> int:
    """Where the file's bytes start."""
    member = tarfile.TarInfo(name)
    member.size = len(encoded)
    tar.addfile(member, io.BytesIO(encoded))
    return tar.offset - -(-len(encoded) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@hydra.main(version_base="1.3", config_path="../conf", config_name="convert")
@job
def main(cfg: DictConfig) -> None:
    """Write the shards."""
    data = hydra.utils.instantiate(cfg.data, batch_size=1, seed=0)
    if type(data) is not FolderData:
        raise UserError(f"data={cfg.data.name} cannot be converted: choose data=imagefolder or data=imagenet.")
    out = Path(cfg.out).expanduser()
    data.load()
    convert(data, out)
    log.info("Written: %s. Train on it by python -m src.train data=stream data.root=%s ...", out, out)


if __name__ == "__main__":
    run_command(main)
