"""Copy photos from folders into shards that can be streamed."""

import io
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from src.common.errors import UserError
from src.data.folder_data import FolderData, FolderPhotos
from src.data.source import Split
from src.data.stream_data import DECODING, INDEX, shard_name
from src.data.views import epoch_order

SHARD_BYTES = 64_000_000
"""Approximate size of the photos in one shard."""
READERS = 16
"""Threads that read photos."""


def write_shards(data: FolderData, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the shards of a loaded `data` and their index to the folder `out`, atomically.

    The index lists the photos in the order of `data`. The shards hold the training photos in random order, so that a
    few shards are a fair sample of all classes. Raises `UserError` if `out` exists, or if a photo cannot be read.
    """
    if out.exists():
        raise UserError(f"out={out} exists already: choose another folder, or remove it.")
    splits = data.source.splits
    index: dict[str, np.ndarray] = {
        "class_names": np.array(data.class_names),
        "digest": np.array(data.files_digest),
        "decoding": np.array(DECODING),
        **{f"{split}_labels": data.source.labels(split).numpy().astype(np.int32) for split in splits},
    }
    sizes = {split: len(index[f"{split}_labels"]) for split in splits}
    orders = {split: epoch_order(0, 0, n) if split == "train" else torch.arange(n) for split, n in sizes.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        partial.mkdir()
        for split, order in orders.items():
            index |= _write_split(data, split, order.numpy(), partial, shard_bytes)
        np.savez_compressed(partial / INDEX, **index)  # type: ignore[arg-type]
        partial.rename(out)


def _write_split(
    data: FolderData, split: Split, order: np.ndarray, folder: Path, shard_bytes: int
) -> dict[str, np.ndarray]:
    """Write a split's shards, with photos in the given `order`. Returns the split's columns of the index."""
    photos = data.photos[split]
    assert isinstance(photos, FolderPhotos)
    shard_of = np.cumsum(photos.sizes[order]) // shard_bytes
    shards = np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)
    columns = {name: np.zeros(len(order), dtype=np.int64) for name in ("shards", "offsets", "sizes")}
    split_folder = Path(photos.folder).name
    for shard, rows in enumerate(track(shards, description=split)):
        columns["shards"][rows] = shard
        with tarfile.open(folder / shard_name(split, shard), "w", format=tarfile.PAX_FORMAT) as tar:
            for row, encoded in zip(rows, _read(photos, rows), strict=True):
                columns["offsets"][row] = _add(tar, f"{split_folder}/{photos.relative(row)}", encoded)
                columns["sizes"][row] = len(encoded)
    return {f"{split}_{name}": column for name, column in columns.items()}


def _read(photos: FolderPhotos, rows: np.ndarray) -> Iterator[bytes]:
    """Read photos with many threads. A single thread would wait for the disk at each small file."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda row: photos.read([row])[0], rows.tolist())


def _add(tar: tarfile.TarFile, name: str, encoded: bytes) -> int:
    """Add a file to the archive. Returns the offset of its first byte."""
    member = tarfile.TarInfo(name)
    member.size = len(encoded)
    tar.addfile(member, io.BytesIO(encoded))
    blocks = -(-len(encoded) // tarfile.BLOCKSIZE)  # the archive pads a file to whole blocks
    return tar.offset - blocks * tarfile.BLOCKSIZE
