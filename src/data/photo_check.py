"""Decode each photo once before training, so that a damaged photo is reported at once and not at a random step."""

import hashlib
import itertools
import json
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from src.common.errors import UserError
from src.common.files import one_process_at_a_time, write_text
from src.data.photo_folders import Listing, named
from src.data.photos import FORMATS, Photo, damage

log = logging.getLogger(__name__)

VERSION = 2
"""Part of the cache key. Increase it when photos are decoded in another way, or when the result has other fields."""
BLOCK = 64
"""Photos that a thread decodes at a time."""
REDUCTION = 8
"""By this factor, the decoder of a JPEG reduces it. It reads the whole file in any case, but saves half of the time."""
UNCOMPRESSED = (*FORMATS["BMP"], *FORMATS["PPM"], *FORMATS["TIFF"])
"""Suffixes of files whose sizes may not depend on the values of the pixels."""


class Checked(NamedTuple):
    """The result of the check. Photos are named by their path below the folder of all splits."""

    unreadable: dict[str, str]
    """By photo, what is wrong with it."""
    adjusted: list[str]
    """Photos that decoding turns or scales, see `Photo.is_adjusted`."""
    checksums: dict[str, int]
    """By uncompressed photo, the CRC-32 of its file."""


class Inspected(NamedTuple):
    """The result of decoding one photo."""

    reason: str | None
    """Why it cannot be read. None: it can."""
    is_adjusted: bool = False
    checksum: int | None = None
    """Only of an uncompressed photo."""
    may_pass: bool = False
    """Whether the reason is not in the file's content, but for example in a permission or a network disk."""


def check_photos(root: Path, listings: Mapping[str, Listing], workers: int, cache: Path) -> Checked:
    """Decode all photos with `workers` threads.

    The result is kept in the folder `cache`. It holds for files of the same names, sizes and times of modification, and
    for uncompressed photos in the same folder only. It is not kept if a reason may pass without a change of the files.
    """
    kept = cache / "checked" / f"{_key(listings)[:32]}.json"
    if found := _load(kept):
        return found
    with ExitStack() as lock:
        with suppress(OSError):  # the folder cannot be written: check without it
            lock.enter_context(one_process_at_a_time(kept, _report_wait))
        if found := _load(kept):  # another command has checked them meanwhile
            return found
        files = {
            listing.place + file.name: os.path.join(listing.folder, file.name)  # `Path` takes seconds for a million
            for listing in listings.values()
            for file in listing.files
        }
        log.info("Checking once whether all %s photos in %s can be read.", f"{len(files):,}", root)
        found, holds = _check(files, workers)
        if holds:
            with suppress(OSError):
                write_text(kept, json.dumps(found._asdict()))
        return found


def _report_wait() -> None:
    log.info("Waiting for another command that checks these photos.")


def _key(listings: Mapping[str, Listing]) -> str:
    facts = [[listing.place, listing.classes, *_own_folder(listing)] for listing in listings.values()]
    return hashlib.sha256(repr([VERSION, facts]).encode()).hexdigest()


def _own_folder(listing: Listing) -> list[str]:
    """Return the folder if it has uncompressed photos. Those of an unpacked archive may all have the same time."""
    has_uncompressed = any(file.name.lower().endswith(UNCOMPRESSED) for file in listing.files)
    return [str(listing.folder.resolve())] if has_uncompressed else []


def _load(file: Path) -> Checked | None:
    try:
        found = json.loads(file.read_bytes())
        return Checked(dict(found["unreadable"]), list(found["adjusted"]), dict(found["checksums"]))
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _check(files: Mapping[str, str], workers: int) -> tuple[Checked, bool]:
    """Decode the files, which are given by photo. The second value is whether the result holds for these files."""
    found, holds, paths = Checked({}, [], {}), True, list(files.values())
    blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.simplefilter("ignore")  # about the metadata of photos
        seen = pool.map(lambda block: [_inspect(file) for file in block], blocks)
        hidden = not sys.stdout.isatty()
        shown = track(seen, "Checking photos", total=len(blocks), transient=True, disable=hidden)
        try:
            for photo, inspected in zip(files, itertools.chain.from_iterable(shown), strict=True):
                if inspected.reason is not None:
                    found.unreadable[photo] = inspected.reason
                    holds = holds and not inspected.may_pass
                if inspected.is_adjusted:
                    found.adjusted.append(photo)
                if inspected.checksum is not None:
                    found.checksums[photo] = inspected.checksum
        except BaseException:  # of a signal: the pool would decode all other photos before the command ends
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found, holds


def _inspect(file: str) -> Inspected:
    try:
        photo = Photo(Path(file).read_bytes(), file)
        photo.decode(REDUCTION)
    except OSError as error:
        return Inspected(error.strerror or type(error).__name__, may_pass=True)
    except UserError as error:
        cause = error.__context__ or error
        return Inspected(damage(cause), may_pass=isinstance(cause, MemoryError))
    return Inspected(None, photo.is_adjusted, None if photo.is_compressed else zlib.crc32(photo.encoded))


def describe_unreadable(found: Checked, total: int) -> str:
    """Say how many of all photos cannot be read, and name the first."""
    reasons = [f"{name} ({reason})" for name, reason in found.unreadable.items()]
    return f"{len(reasons):,} of {total:,} photos cannot be read: {named(reasons)}"
