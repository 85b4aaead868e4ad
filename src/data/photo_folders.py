"""The folders of a data set of photos: which one is which split, and the files in them."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src.common.errors import UserError
from src.data.photos import SUFFIXES

NAMED = 3
"""The number of files or classes that a message names."""


class File(NamedTuple):
    """A photo in a class folder."""

    name: str
    """Its path relative to the folder of the split."""
    size: int
    """In bytes."""
    modified: int
    """Nanoseconds since the epoch."""


class Listing(NamedTuple):
    """The photos of one split."""

    folder: Path
    classes: dict[str, list[File]]
    """By class, both sorted."""
    skipped: list[str]
    """Paths of files that are not photos by their suffix."""

    @property
    def files(self) -> list[File]:
        """All photos, class by class."""
        return [file for files in self.classes.values() for file in files]

    def without(self, left_out: set[Path]) -> "Listing":
        """Leave out photos, which are given by their paths."""
        names = {str(path.relative_to(self.folder)) for path in left_out if path.is_relative_to(self.folder)}
        kept = {label: [file for file in files if file.name not in names] for label, files in self.classes.items()}
        return self._replace(classes=kept)


def split_folders(root: Path, train: str | None, val: str | None, test: str | None) -> dict[str, Path]:
    """Choose the folders of the splits `train`, `test` and, if there is one, `val`. Folders that are named are used.

    By default, test/ and val/ are the splits of their name. If only one of them has classes, it is the split `test`.
    Raises `UserError` if a folder has no class folders, or if one folder is named for two splits.
    """
    train = train or "train"
    labelled = [name for name in ("val", "test") if _is_labelled(root / name, class_folders(root / train))]
    if val is None and test is None:
        test = "test" if "test" in labelled else "val"
        val = "val" if labelled == ["val", "test"] else None
    chosen = {"train": train, "test": test or "test", **({"val": val} if val else {})}
    folders = {split: root / name for split, name in chosen.items()}
    if len(set(folders.values())) < len(folders):
        named = ", ".join(f"{split}: {name}" for split, name in chosen.items())
        raise UserError(f"One folder would be two splits ({named}): correct data.val_folder and data.test_folder.")
    for folder in folders.values():
        if not class_folders(folder):
            raise UserError(
                f"There are no class folders in {folder}: arrange the photos in data.root={root} as train/<class>/... "
                "and val/<class>/... (or test/ instead of val/), or name the folders with data.train_folder, "
                "data.val_folder and data.test_folder."
            )
    return folders


def _is_labelled(folder: Path, classes: Sequence[str]) -> bool:
    """Return whether the folders in a folder are classes. A single one that training lacks just holds the photos."""
    found = class_folders(folder)
    return len(found) > 1 or (len(found) == 1 and found[0] in classes)


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden folders. `folder` need not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_photos(folder: Path) -> Listing:
    """List the photos in the class folders of a split, at any depth. Hidden files are left out: macOS leaves them."""
    listing = Listing(folder, {name: [] for name in class_folders(folder)}, [])
    start = len(str(folder)) + 1
    try:
        for entry in os.scandir(folder):
            if entry.name in listing.classes:
                _list_files(entry.path, start, listing.classes[entry.name], listing.skipped)
            elif not entry.is_dir() and not entry.name.startswith("."):
                listing.skipped.append(entry.path)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}): repair or remove it.") from None
    for files in listing.classes.values():
        files.sort()
    return listing


def _list_files(folder: str, start: int, files: list[File], skipped: list[str]) -> None:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _list_files(entry.path, start, files, skipped)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            facts = entry.stat()
            files.append(File(entry.path[start:], facts.st_size, facts.st_mtime_ns))
        else:
            skipped.append(entry.path)


def check_classes(listings: Mapping[str, Listing]) -> None:
    """Raise `UserError` if a class has no photos, or if a split has other classes than `train`."""
    for listing in listings.values():
        if empty := [name for name, files in listing.classes.items() if not files]:
            raise UserError(
                f"There are no photos in {listing.folder / empty[0]} ({', '.join(sorted(SUFFIXES))}): "
                "add some, or remove the folder."
            )
    train = listings["train"]
    for other in listings.values():
        for one, two in ((train, other), (other, train)):
            if extra := sorted(one.classes.keys() - two.classes.keys()):
                raise UserError(
                    f"{one.folder} has classes that {two.folder} lacks ({named(extra)}): both need the same class "
                    "folders. To use other folders, set data.val_folder or data.test_folder."
                )


def named(names: Sequence[str]) -> str:
    """Join the first names.

    >>> named(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def unread_notes(root: Path, listings: Mapping[str, Listing]) -> list[str]:
    """Say which folders of a data set are left unread, and which files are skipped."""
    used = {listing.folder for listing in listings.values()}
    unread = [name for name in class_folders(root) if not any(folder.is_relative_to(root / name) for folder in used)]
    skipped = sorted(os.path.relpath(file, root) for listing in listings.values() for file in listing.skipped)
    notes = []
    if unread:
        notes.append(f"Left unread in {root}: {named([f'{name}/' for name in unread])}.")
    if skipped:
        notes.append(f"Files skipped in {root}, because their format is not read: {len(skipped):,} ({named(skipped)}).")
    return notes


def listing_digest(listings: Mapping[str, Listing], adjusted: Sequence[str]) -> str:
    """Hash the names and sizes of all files, and the names of the photos that decoding turns or scales.

    Earlier versions did not turn or scale them, so that such data is other data. The contents are not hashed.
    """
    sizes = [
        {label: [(file.name, file.size) for file in files] for label, files in listing.classes.items()}
        for listing in listings.values()
    ]
    return hashlib.sha256(repr([*sizes, *([sorted(adjusted)] if adjusted else [])]).encode()).hexdigest()
