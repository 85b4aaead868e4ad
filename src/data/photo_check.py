"""Decode each photo once before training, so that a damaged photo is reported at once and not at a random step."""

import hashlib
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from src.common.errors import UserError
from src.common.files import one_process_at_a_time, write_text
from src.data.photo_folders import Listing, named
from src.data.photos import Photo, damage

log = logging.getLogger(__name__)

VERSION = 1
"""Part of the cache key. Increase it when photos are decoded in another way."""
BLOCK = 64
"""Photos that a thread decodes at a time."""
REDUCTION = 8
"""By this factor, the decoder of a JPEG reduces it. It reads the whole file in any case, but saves half of the time."""


class Checked(NamedTuple):
    """The result of the check. Photos are named by their path below the folder of all splits."""

    unreadable: dict[str, str]
    """By photo, what is wrong with it."""
    adjusted: list[str]
    """Photos that decoding turns or scales, see `Photo.is_adjusted`."""


def check_photos(root: Path, listings: Mapping[str, Listing], workers: int, cache: Path) -> Checked:
    """Decode all photos with `workers` threads.

    The result is kept in the folder `cache`. It holds for files of the same names, sizes and times of modification.
    """
    files = [listing.folder / file.name for listing in listings.values() for file in listing.files]
    facts = [[os.path.relpath(listing.folder, root), listing.classes] for listing in listings.values()]
    key = hashlib.sha256(repr([VERSION, facts]).encode()).hexdigest()
    kept = cache / "checked" / f"{key[:32]}.json"
    with ExitStack() as lock:
        with suppress(OSError):  # the folder cannot be written: check without it
            lock.enter_context(one_process_at_a_time(kept))
        found = _load(kept)
        if found is None:
            log.info("Checking once whether all %s photos in %s can be read.", f"{len(files):,}", root)
            found = _check(root, files, workers)
            with suppress(OSError):
                write_text(kept, json.dumps(found._asdict()))
        return found


def _load(file: Path) -> Checked | None:
    try:
        found = json.loads(file.read_bytes())
        return Checked(dict(found["unreadable"]), list(found["adjusted"]))
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _check(root: Path, files: list[Path], workers: int) -> Checked:
    found = Checked({}, [])
    blocks = [files[start : start + BLOCK] for start in range(0, len(files), BLOCK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.simplefilter("ignore")  # about the metadata of photos
        seen = pool.map(lambda block: [_inspect(file) for file in block], blocks)
        hidden = not sys.stdout.isatty()
        shown = track(seen, "Checking photos", total=len(blocks), transient=True, disable=hidden)
        for file, (reason, is_adjusted) in zip(files, itertools.chain.from_iterable(shown), strict=True):
            if reason is not None:
                found.unreadable[os.path.relpath(file, root)] = reason
            elif is_adjusted:
                found.adjusted.append(os.path.relpath(file, root))
    return found


def _inspect(file: Path) -> tuple[str | None, bool]:
    """Return what is wrong with a photo, and whether decoding turns or scales it."""
    try:
        photo = Photo(file.read_bytes(), str(file))
        photo.decode(REDUCTION)
    except OSError as error:
        return error.strerror or type(error).__name__, False
    except UserError as error:
        return damage(error.__context__ or error), False
    return None, photo.is_adjusted


def describe_unreadable(found: Checked, total: int) -> str:
    """Say how many of all photos cannot be read, and name the first."""
    reasons = [f"{name} ({reason})" for name, reason in found.unreadable.items()]
    return f"{len(reasons):,} of {total:,} photos cannot be read: {named(reasons)}"
