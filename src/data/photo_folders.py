"""The folders of a data set of photos: which one is which split, and the files in them."""

import hashlib
import itertools
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from src.common.errors import UserError
from src.data.photos import SUFFIXES

UNLABELLED_PLACE = "unlabelled:/"
"""The `place` of the photos without labels. It does not depend on where their folder is."""
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
    place: str
    """The folder's path relative to the data set's, with a separator at the end. With a name, it identifies a photo."""
    classes: dict[str, list[File]]
    """By class, both sorted."""
    skipped: list[str]
    """Paths of files that are not photos by their suffix."""

    @property
    def files(self) -> list[File]:
        """All photos, class by class."""
        return [file for files in self.classes.values() for file in files]

    def without(self, left_out: Container[str]) -> "Listing":
        """Leave out photos, which are given by `place` and name."""
        kept = {
            label: [file for file in files if self.place + file.name not in left_out]
            for label, files in self.classes.items()
        }
        return self._replace(classes=kept)


def split_folders(
    root: Path, train: str | None, val: str | None, test: str | None, *, needs_train: bool = True
) -> dict[str, Path]:
    """Choose the folders of the splits `train`, `test` and, if there is one, `val`. Folders that are named are used.

    By default, test/ and val/ are the splits of their name. If only one of them has classes, it is the split `test`.
    Without `needs_train`, a missing train/ is left out. Raises `UserError` if a folder has no class folders, or if one
    folder is named for two splits.
    """
    is_left_out = not (needs_train or train or (root / "train").exists())
    train = train or "train"
    labelled = [name for name in ("val", "test") if _is_labelled(root / name, class_folders(root / train))]
    if val is None and test is None:
        test = "test" if "test" in labelled else "val"
        val = "val" if labelled == ["val", "test"] else None
    chosen = {"train": train, "test": test or "test", **({"val": val} if val else {})}
    if is_left_out:
        del chosen["train"]
    folders = {split: root / name for split, name in chosen.items()}
    if len({os.path.abspath(folder) for folder in folders.values()}) < len(folders):
        listed = ", ".join(f"{split}: {name}" for split, name in chosen.items())
        raise UserError(f"One folder would be two splits ({listed}): correct data.val_folder and data.test_folder.")
    for folder in folders.values():
        _check_sorted(folder)
        if not class_folders(folder):
            found = f", which holds {named(class_folders(root))}," if class_folders(root) else ""
            raise UserError(
                f"There are no class folders in {folder}: arrange the photos in data.root={root}{found} as "
                "train/<class>/... and val/<class>/... (or test/ instead of val/), or name the folders with "
                "data.train_folder, data.val_folder and data.test_folder."
            )
    return folders


def _check_sorted(folder: Path) -> None:
    """Raise `UserError` if a file lists the labels of the photos in images/, as in the val/ of Tiny ImageNet."""
    lists = sorted(folder.glob("*.txt"))
    if lists and class_folders(folder) == ["images"]:
        raise UserError(
            f"The photos in {folder / 'images'} are not sorted by class: move each of them to {folder}/<class>/, by "
            f"the list {lists[0].name}. docs/data.md has a command that does this for Tiny ImageNet."
        )


def _is_labelled(folder: Path, classes: Sequence[str]) -> bool:
    """Return whether the folders in a folder are classes. A single one that training lacks just holds the photos."""
    found = class_folders(folder)
    return len(found) > 1 or (len(found) == 1 and found[0] in classes)


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in `folder`, without hidden folders. `folder` need not exist."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in os.scandir(folder) if os.path.isdir(entry.path))  # entry.is_dir may raise
    return sorted(name for name in names if not name.startswith("."))


def relative(path: Path | str, root: Path) -> str:
    """Return a path relative to `root`, or the path itself if it is on another drive of Windows."""
    try:
        return os.path.relpath(path, root)
    except ValueError:
        return str(path)


def list_photos(folder: Path, root: Path) -> Listing:
    """List the photos in the class folders of a split of the data set in `root`, at any depth.

    Hidden files are left out: macOS leaves them.
    """
    place = "" if folder == root else os.path.join(relative(folder, root), "")
    listing = Listing(folder, place, {name: [] for name in class_folders(folder)}, [])
    start = len(str(folder)) + 1
    try:
        for entry in os.scandir(folder):
            if entry.name in listing.classes:
                _list_files(entry.path, start, listing.classes[entry.name], listing.skipped)
            elif not entry.name.startswith(".") and not os.path.exists(entry.path):
                raise UserError(f"{entry.path} is a link to a missing file or folder: repair or remove it.")
            elif not entry.is_dir() and not entry.name.startswith("."):
                listing.skipped.append(entry.path)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}): repair or remove it.") from None
    for files in listing.classes.values():
        files.sort()
    return listing


def list_unlabelled(folder: Path, splits: Mapping[str, Path]) -> Listing:
    """List the photos in a folder, at any depth, as those of one class without a name.

    Raises `UserError` if there are none, or if the folder lies within the folder of a split, or the other way round.
    """
    listing = Listing(folder, UNLABELLED_PLACE, {"": []}, [])
    try:
        _list_files(str(folder), len(str(folder)) + 1, listing.classes[""], listing.skipped)
    except OSError as error:
        raise UserError(
            f"data.unlabelled={folder} cannot be read ({error.strerror}): set it to a folder of photos, or to rest."
        ) from None
    if not listing.files:
        raise UserError(f"There are no photos in data.unlabelled={folder} ({', '.join(sorted(SUFFIXES))}): add some.")
    listing.classes[""].sort()
    visited = {os.path.dirname(os.path.join(folder, file.name)) for file in listing.files}
    for own, split in itertools.product(sorted({str(folder), *visited}), splits.values()):
        if Path(own).resolve().is_relative_to(split.resolve()):  # links are followed
            raise UserError(
                f"data.unlabelled={folder} and {split} share photos, but they must not: choose a folder beside it."
            )
    return listing


def _list_files(folder: str, start: int, files: list[File], skipped: list[str]) -> None:
    if os.path.islink(folder) and Path(folder).parent.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{folder} is a link to a folder that contains it: remove it.")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _list_files(entry.path, start, files, skipped)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and _may_be_photo(entry):
            facts = entry.stat(follow_symlinks=os.path.exists(entry.path))
            files.append(File(entry.path[start:], facts.st_size, facts.st_mtime_ns))
        else:
            skipped.append(entry.path)


def _may_be_photo(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file, or a broken link to one. Reading a named pipe would never end."""
    return entry.is_file() or not os.path.exists(entry.path)


def check_classes(listings: Mapping[str, Listing]) -> None:
    """Raise `UserError` if a class has no photos, or if the splits have different classes."""
    for listing in listings.values():
        if empty := [name for name, files in listing.classes.items() if not files]:
            raise UserError(
                f"There are no photos in {listing.folder / empty[0]} ({', '.join(sorted(SUFFIXES))}): "
                "add some, or remove the folder."
            )
    first, *others = listings.values()
    for other in others:
        for one, two in ((first, other), (other, first)):
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
    used = [Path(os.path.abspath(listing.folder)) for listing in listings.values()]
    absolute = os.path.abspath(root)
    unread = [
        name for name in class_folders(root) if not any(folder.is_relative_to(Path(absolute, name)) for folder in used)
    ]
    skipped = sorted(relative(file, root) for listing in listings.values() for file in listing.skipped)
    notes = []
    if unread:
        notes.append(f"Left unread in {root}: {named([f'{name}/' for name in unread])}.")
    if skipped:
        notes.append(f"Files skipped in {root}, because their format is not read: {len(skipped):,} ({named(skipped)}).")
    return notes


def listing_digest(listings: Mapping[str, Listing], adjusted: Sequence[str], checksums: Mapping[str, int]) -> str:
    """Hash the names and sizes of all files, their checksums, and the names of photos that decoding turns or scales.

    Earlier versions did not turn or scale photos, so that such data is other data. The files of uncompressed photos
    have `checksums`, because their sizes tell only the number of pixels.
    """
    sizes = [
        {label: [(file.name, file.size) for file in files] for label, files in listing.classes.items()}
        for listing in listings.values()
    ]
    contents = [
        [(file.name, checksums[photo]) for file in listing.files if (photo := listing.place + file.name) in checksums]
        for listing in listings.values()
    ]
    facts = [*sizes, *([sorted(adjusted)] if adjusted else []), *([contents] if any(contents) else [])]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
