"""Photos in shards, in a folder or in object storage, for data that does not fit on one disk.

`python -m src.convert` makes the shards from a folder of photos. A shard is a tar file. Unpacking all shards restores
the folder. `index.npz` beside them lists the position of each photo. Labels and classes are therefore known before a
shard is fetched.
"""

import hashlib
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

from src.common.errors import UserError
from src.common.files import list_members
from src.data.folder_data import FolderData
from src.data.source import Source, Split

INDEX = "index.npz"
DECODING = 2
"""How photos are decoded: 2 turns them by their EXIF orientation and scales more than 8 bits. Part of the index."""
CACHED = f"{'[0-9a-f]' * 16}/*-{'[0-9]' * 5}.tar"
"""The shards in the cache of all data. Other archives beside them are the user's own."""


def shard_name(split: str, shard: int) -> str:
    """Return the file name of a shard.

    >>> shard_name("train", 7)
    'train-00007.tar'
    """
    return f"{split}-{shard:05d}.tar"


@dataclass
class ShardPhotos:
    """The photos of a split. Each photo is a range of bytes in a shard.

    Remote shards are downloaded whole to the folder `cache`. If they exceed `cache_bytes`, the least recently used ones
    are deleted. While another process downloads a shard, its photos are read directly from the remote storage. Without
    a `cache`, all photos are read from there.
    """

    root: str
    split: str
    shards: np.ndarray
    """[N] integers, the shard of each photo."""
    offsets: np.ndarray
    """[N] integers, the position of its first byte in the shard."""
    sizes: np.ndarray
    """[N] integers, in bytes."""
    cache: Path | None
    cache_bytes: float

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the bytes of photos, read shard by shard. Raises `UserError` if a shard cannot be read."""
        wanted = np.asarray(rows)
        encoded: dict[int, bytes] = {}
        for shard in np.unique(self.shards[wanted]).tolist():
            of_shard = wanted[self.shards[wanted] == shard].tolist()
            encoded.update(zip(of_shard, self._read(shard, of_shard), strict=True))
        return [encoded[row] for row in rows]

    def name(self, row: int) -> str:
        """Describe a photo by its shard and its position there."""
        shard = f"{self.root}/{shard_name(self.split, int(self.shards[row]))}"
        return f"The photo at byte {self.offsets[row]} of {shard}"

    def _read(self, shard: int, rows: list[int]) -> list[bytes]:
        starts = self.offsets[rows].tolist()
        ends = (self.offsets[rows] + self.sizes[rows]).tolist()
        name = shard_name(self.split, shard)
        try:
            files, root = open_root(self.root)
            encoded = self._read_local(files, f"{root}/{name}", name, starts, ends)
            if encoded is None:
                encoded = files.cat_ranges([f"{root}/{name}"] * len(rows), starts, ends, on_error="raise")
        except Exception as error:  # each storage raises its own exceptions
            raise UserError(
                f"{self.root}/{name} cannot be read ({reason(error)}): "
                "check the storage, or copy the shard there again."
            ) from None
        if any(len(photo) != size for photo, size in zip(encoded, self.sizes[rows].tolist(), strict=True)):
            raise UserError(f"{self.root}/{name} is shorter than {INDEX} says: copy or convert it again.")
        return encoded

    def _read_local(self, files: Any, path: str, name: str, starts: list[int], ends: list[int]) -> list[bytes] | None:
        """Read from a local file, after downloading it if necessary. Return None if it is not available locally."""
        if isinstance(files, LocalFileSystem):
            return _ranges(path, starts, ends)
        if self.cache is None:
            return None
        file = self.cache / name
        try:
            if not file.exists():
                self._fetch(files, path, file)
            os.utime(file)  # marks it as recently used
            return _ranges(str(file), starts, ends)
        except (FileNotFoundError, Timeout):  # deleted by another process meanwhile, or still being downloaded by it
            return None

    def _fetch(self, files: Any, path: str, file: Path) -> None:
        """Download a shard. Raises `Timeout` if another process is downloading it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")).acquire(timeout=0):
            if file.exists():
                return
            partial = file.with_suffix(".part")
            files.get_file(path, str(partial))
            partial.replace(file)
            self._make_room(file)

    def _make_room(self, fetched: Path) -> None:
        """Delete the least recently used shards of the cache until it fits, but not `fetched`."""
        assert self.cache is not None
        kept = []
        for file in self.cache.parent.glob(CACHED):
            with suppress(FileNotFoundError):  # another process may delete it meanwhile
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
    """Return the file system of a folder or URL, and its path there. Raises `UserError` if a package is missing."""
    try:
        files, path = fsspec.core.url_to_fs(os.path.expanduser(root).rstrip("/"))
    except (ImportError, ValueError) as error:  # fsspec's message names the package to install
        raise UserError(f"data.root={root} cannot be opened here: {error}.") from None
    return files, str(path)


def reason(error: Exception) -> str:
    """Describe an exception in a few words: the first line of its message, or its name.

    >>> reason(OSError("Access denied\\nRequest 123")), reason(TimeoutError())
    ('Access denied', 'TimeoutError')
    """
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error).partition("\n")[0] or type(error).__name__


class StreamData(FolderData):
    """The photos of a `FolderData` in shards, as written by `python -m src.convert`.

    `root` is a folder, or a URL that fsspec supports (s3://, gs://, hf://datasets/, https://). Shards from a URL are
    cached in the folder `cache`, up to `cache_gigabytes`. Images, views and evaluation are the same as for the folder.
    Only the order of training images differs: it runs through about 16 shards at a time.
    """

    how_to_ignore_val = ""

    def __init__(self, *, cache_gigabytes: float = 100, **options: Any) -> None:
        super().__init__(**options)
        self.cache_gigabytes = cache_gigabytes

    def read(self) -> Source:
        """Read the index. Raises `UserError` if it is missing or inconsistent."""
        index = read_index(self.root)
        self.files_digest = str(index["digest"])
        cache = Path(self.cache).expanduser() / self.files_digest[:16]
        splits: tuple[Split, ...] = ("train", "test", "val") if "val_labels" in index else ("train", "test")
        shards = {
            split: ShardPhotos(
                root=self.root.rstrip("/"),
                split=split,
                shards=index[f"{split}_shards"],
                offsets=index[f"{split}_offsets"],
                sizes=index[f"{split}_sizes"],
                cache=cache,
                cache_bytes=self.cache_gigabytes * 1e9,
            )
            for split in splits
        }
        # held-out photos are few, from many shards: downloading whole shards would not pay
        self.photos = {**shards, "held_out": replace(shards["train"], cache=None)}
        self.blocks = torch.from_numpy(shards["train"].shards.astype(np.int64))
        if self.unlabelled_folder is not None:
            raise UserError("data.unlabelled=FOLDER needs data=imagefolder: shards have labels only.")
        if "decoding" not in index:  # from a version that did not turn photos, so pixels may differ now
            self.files_digest = hashlib.sha256(f"{self.files_digest} {DECODING}".encode()).hexdigest()
        return Source(
            train_labels=_labels(index["train_labels"]),
            val_labels=_labels(index["val_labels"]) if "val" in shards else None,
            test_labels=_labels(index["test_labels"]),
            class_names=tuple(str(name) for name in index["class_names"]),
            digest=self.digest(self.files_digest),
            places={split: f"{self.root.rstrip('/')}/{split}-*.tar" for split in splits},
        )


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


COLUMNS = ("labels", "shards", "offsets", "sizes")


def read_index(root: str) -> dict[str, np.ndarray]:
    """Read the index of the shards in `root`: its arrays by name.

    - `class_names`: strings [C].
    - `digest`: the hash of the converted folder's file list, a string.
    - `<split>_<column>` for train, test and perhaps val, and each of `COLUMNS`: integers [N], one per photo.
    - `decoding`: `DECODING` at the time of the conversion. Shards of version 0.1 lack it.

    Raises `UserError` if the index is missing, damaged or inconsistent.
    """
    files, path = open_root(root)
    try:
        content = io.BytesIO(files.cat_file(f"{path}/{INDEX}"))
        list_members(Path(f"{root}/{INDEX}"), content)
        with np.load(content, allow_pickle=False) as arrays:
            index = {key: arrays[key] for key in arrays.files if isinstance(arrays[key], np.ndarray)}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"data.root={root} has no {INDEX}: make shards with python -m src.convert data.root=PHOTOS out=FOLDER."
        ) from None
    except Exception as error:  # each storage raises its own exceptions
        raise UserError(
            f"{root}/{INDEX} cannot be read ({reason(error)}): check the storage, or copy the file there again."
        ) from None
    # the digest names a folder of the cache: checking its form keeps an index from reaching other folders
    named = index.get("class_names", np.array(0)).ndim == 1 and re.fullmatch("[0-9a-f]{64}", str(index.get("digest")))
    splits = ("train", "test", *(("val",) if "val_labels" in index else ()))
    if not named or not all(_fits(index, split) for split in splits):
        raise UserError(f"{root}/{INDEX} was not written by python -m src.convert: convert the photos again.")
    return index


def _fits(index: dict[str, np.ndarray], split: str) -> bool:
    """Return whether a split has all columns, of one length and of integers, and its labels are class numbers."""
    columns = [index.get(f"{split}_{column}", np.array([])) for column in COLUMNS]
    same = len({column.shape for column in columns}) == 1 and columns[0].ndim == 1 and columns[0].size > 0
    whole = all(column.dtype.kind in "iu" for column in columns)
    return same and whole and bool(np.isin(columns[0], np.arange(len(index["class_names"]))).all())
