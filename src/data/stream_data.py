"""Photos in shards, in a folder or in object storage, for data that outgrows one disk.

A shard is a tar file; unpacking all of them gives the folder back that `python -m src.convert` made them of. Beside
them `index.npz` says what is where, so labels and classes are known before a shard is fetched.
"""

import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from src.data.folder_data import FolderData
from src.data.source import Source
from src.errors import UserError
from src.files import believable_members

INDEX = "index.npz"


def shard_name(split: str, shard: int) -> str:
    """The name of a shard's file."""
    return f"{split}-{shard:05d}.tar"


@dataclass
class ShardPhotos:
    """The photos of a split: each is a range of bytes of a shard.

    Shards that are not local are fetched whole into the folder `cache`, where those that were used least recently make
    room once there are more than `cache_bytes`. Photos of a shard that is on its way are read from where it is, and so
    are all where `cache` is None.
    """

    root: str
    split: str
    shards: np.ndarray
    """[N] int32: the shard of each photo."""
    offsets: np.ndarray
    """[N] int64: where it starts there."""
    sizes: np.ndarray
    """[N] int64, in bytes"""
    cache: Path | None
    cache_bytes: float

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The bytes of each photo, one shard after the other."""
        places = np.asarray(rows)
        encoded: dict[int, bytes] = {}
        for shard in np.unique(self.shards[places]).tolist():
            of_shard = places[self.shards[places] == shard].tolist()
            encoded.update(zip(of_shard, self._read(shard, of_shard), strict=True))
        return [encoded[row] for row in rows]

    def name(self, row: int) -> str:
        """Which photo of which shard."""
        shard = f"{self.root}/{shard_name(self.split, int(self.shards[row]))}"
        return f"The photo at byte {self.offsets[row]} of {shard}"

    def _read(self, shard: int, rows: list[int]) -> list[bytes]:
        starts = self.offsets[rows].tolist()
        ends = (self.offsets[rows] + self.sizes[rows]).tolist()
        name = shard_name(self.split, shard)
        try:
            files, root = open_root(self.root)
            encoded = self._read_file(files, f"{root}/{name}", name, starts, ends)
            if encoded is None:
                encoded = files.cat_ranges([f"{root}/{name}"] * len(rows), starts, ends, on_error="raise")
        except Exception as error:  # each storage has its own
            raise UserError(f"{self.root}/{name} cannot be read ({reason(error)}).") from None
        if any(len(photo) != size for photo, size in zip(encoded, self.sizes[rows].tolist(), strict=True)):
            raise UserError(f"{self.root}/{name} is shorter than {INDEX} says: copy or convert it again.")
        return encoded

    def _read_file(self, files: Any, path: str, name: str, starts: list[int], ends: list[int]) -> list[bytes] | None:
        """From the local file, None where there is none (yet, or any more)."""
        if isinstance(files, LocalFileSystem):
            return _ranges(path, starts, ends)
        if self.cache is None:
            return None
        file = self.cache / name
        try:
            if not file.exists():
                self._fetch(files, path, file)
            os.utime(file)
            return _ranges(str(file), starts, ends)
        except (FileNotFoundError, Timeout):
            return None

    def _fetch(self, files: Any, path: str, file: Path) -> None:
        """One process fetches a shard; raises `Timeout` in the others."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")).acquire(timeout=0):
            if file.exists():
                return
            partial = file.with_suffix(".part")
            files.get_file(path, str(partial))
            partial.replace(file)
            self._make_room(file)

    def _make_room(self, fetched: Path) -> None:
        assert self.cache is not None
        kept = []
        for file in self.cache.parent.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # another process makes room too
                kept.append((file.stat().st_mtime, file.stat().st_size, file))
        excess = sum(size for _, size, _ in kept) - self.cache_bytes
        for _, size, file in sorted(kept):
            if excess > 0 and file != fetched:
                file.unlink(missing_ok=True)
                excess -= size


def _ranges(file: str, starts: list[int], ends: list[int]) -> list[bytes]:
    with open(file, "rb", buffering=0) as opened:
        return [os.pread(opened.fileno(), end - start, start) for start, end in zip(starts, ends, strict=True)]


def open_root(root: str) -> tuple[Any, str]:
    """The file system of a folder or URL, and its path there. Raises `UserError` where a package for it is missing."""
    try:
        return fsspec.core.url_to_fs(os.path.expanduser(root).rstrip("/"))
    except (ImportError, ValueError) as error:  # fsspec says which package to install
        raise UserError(f"data.root={root} cannot be opened here: {error}.") from None


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error).partition("\n")[0] or type(error).__name__


class StreamData(FolderData):
    """What `python -m src.convert` made of a `FolderData`, with the same images, views and evaluation.

    `root` is a folder or a URL that fsspec knows (s3://, gs://, hf://datasets/, https://). Of a URL, shards are kept in
    the folder `cache`, at most `cache_gigabytes` of them. The order of training images differs from the folder's: it
    takes about 16 shards at a time.
    """

    def __init__(self, *, cache: str = "~/.cache/aekt", cache_gigabytes: float = 100, **options: Any) -> None:
        super().__init__(**options)
        self.cache, self.cache_gigabytes = cache, cache_gigabytes

    def read(self) -> Source:
        """Reads the index. Raises `UserError` where there is none, or it does not fit together."""
        index = read_index(self.root)
        self.files_digest = str(index["digest"])
        cache = Path(self.cache).expanduser() / self.files_digest[:16]
        train, test = (
            ShardPhotos(
                root=self.root.rstrip("/"),
                split=split,
                shards=index[f"{split}_shards"],
                offsets=index[f"{split}_offsets"],
                sizes=index[f"{split}_sizes"],
                cache=cache,
                cache_bytes=self.cache_gigabytes * 1e9,
            )
            for split in ("train", "test")
        )
        held_out = replace(train, cache=None)  # a few photos of each shard
        self.photos = {"train": train, "val": held_out, "test": test}
        self.blocks = torch.from_numpy(train.shards.astype(np.int64))
        return Source(
            train_labels=_labels(index["train_labels"]),
            test_labels=_labels(index["test_labels"]),
            class_names=tuple(str(name) for name in index["class_names"]),
            digest=self.digest(),
        )


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


COLUMNS = ("labels", "shards", "offsets", "sizes")


def read_index(root: str) -> dict[str, np.ndarray]:
    """`class_names`, the `digest` of the folder's files, and `<split>_<column>` of train and test."""
    files, path = open_root(root)
    try:
        content = io.BytesIO(files.cat_file(f"{path}/{INDEX}"))
        believable_members(Path(f"{root}/{INDEX}"), content)
        with np.load(content, allow_pickle=False) as arrays:
            index = {key: arrays[key] for key in arrays.files if isinstance(arrays[key], np.ndarray)}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"data.root={root} holds no {INDEX}: make shards by python -m src.convert data.root=PHOTOS out=FOLDER."
        ) from None
    except Exception as error:  # each storage has its own
        raise UserError(f"{root}/{INDEX} cannot be read ({reason(error)}).") from None
    named = index.get("class_names", np.array(0)).ndim == 1 and re.fullmatch("[0-9a-f]{64}", str(index.get("digest")))
    if not named or not all(_fits(index, split) for split in ("train", "test")):
        raise UserError(f"{root}/{INDEX} is not what python -m src.convert writes: convert again.")
    return index


def _fits(index: dict[str, np.ndarray], split: str) -> bool:
    """Whether a split's columns are there, as long as each other, and its labels are classes.

    The digest names a folder of the cache: that it is one keeps an index from reaching elsewhere.
    """
    columns = [index.get(f"{split}_{column}", np.array([])) for column in COLUMNS]
    same = len({column.shape for column in columns}) == 1 and columns[0].ndim == 1 and columns[0].size > 0
    whole = all(column.dtype.kind in "iu" for column in columns)
    return same and whole and bool(np.isin(columns[0], np.arange(len(index["class_names"]))).all())
