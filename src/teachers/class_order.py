"""Match the teacher's classes with the classes of the data."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.common.errors import UserError
from src.data.imagenet import WNIDS, english_names
from src.teachers.answers import Answers

REMEDY = "name the teacher's class for each class of the data with teacher.class_map=FILE (see docs/data.md)"


def class_index(
    names: Sequence[str] | None, outputs: int, wanted: Sequence[str], class_map: Path | None = None
) -> list[int] | None:
    """Find the index of each of the data's classes among a teacher's logits: by `class_map`, else by name.

    Returns None if the teacher has the same classes in the same order. This is assumed of a teacher without names and
    with as many classes as the data; `check_class_order` tests it later. A teacher without names and with 1,000 logits
    is assumed to be one of ImageNet if the data's classes are wnids. Wnids and their English names match.

    Raises `UserError` if a class of the data is not one of the teacher's, if a name that two classes share would have
    to tell them apart, or if the numbers of classes differ and there are no names.

    >>> class_index(["cat", "dog", "owl"], 3, ["owl", "cat"])
    [2, 0]
    """
    if names is None and outputs == len(WNIDS) and set(wanted) <= set(WNIDS):
        names = WNIDS
    if class_map is not None:
        return mapped_index(class_map, names, outputs, wanted)
    if names is not None and (are_stated(names) or outputs == len(wanted)):
        for known, own in ((names, wanted), (english_names(names), english_names(wanted))):
            if set(own) <= set(known):
                found = _positions(known, own)
                return None if found == list(range(outputs)) else found
    if outputs == len(wanted) and not (are_stated(names) and are_stated(wanted)):
        return None
    raise UserError(f"{_describe_mismatch(names, outputs, wanted)}: choose a teacher of the same classes, or {REMEDY}.")


def are_stated(names: Sequence[str] | None) -> bool:
    """Return whether classes have names. The numbers from 0 stand for classes without names.

    >>> are_stated(["cat", "dog"]), are_stated(["0", "1"]), are_stated(None)
    (True, False, False)
    """
    return names is not None and list(names) != [str(number) for number in range(len(names))]


def _positions(known: Sequence[str], wanted: Sequence[str]) -> list[int]:
    if list(known) == list(wanted):  # positions tell apart what names do not
        return list(range(len(wanted)))
    counts, places = Counter(known) | Counter(wanted), {name: place for place, name in enumerate(known)}
    shared = [name for name in wanted if counts[name] > 1]
    if shared:
        raise UserError(
            f"Two classes are called {shared[0]}, and the teacher's classes have another order than the data's, so "
            f"names cannot match them: give each class its own name, or {REMEDY}."
        )
    return [places[name] for name in wanted]


def _describe_mismatch(names: Sequence[str] | None, outputs: int, wanted: Sequence[str]) -> str:
    example = f" ({_some(names)})" if names else ""
    unknown = [name for name in wanted if name not in names] if names else []
    of_which = f", of which the teacher does not know {len(unknown)}, such as {unknown[0]}" if unknown else ""
    return f"The teacher has {outputs} classes{example} and the data has {len(wanted)} ({_some(wanted)}){of_which}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def mapped_index(file: Path, names: Sequence[str] | None, outputs: int, wanted: Sequence[str]) -> list[int]:
    """Find the index of each of the data's classes among a teacher's logits by a class map (see `read_class_map`).

    Raises `UserError` if a class is unknown or ambiguous, if the map does not hold each class of the data once, or if
    two of them have the same class of the teacher.
    """
    option = f"teacher.class_map={file}"
    found: dict[int, int] = {}
    for own, of_teacher in read_class_map(file):
        place = _place(own, wanted, len(wanted), f"{option}: {own!r} is no class of the data")
        if place in found:
            raise UserError(f"{option} holds the class {own!r} of the data twice: keep one of the lines.")
        found[place] = _place(of_teacher, names, outputs, f"{option}: {of_teacher!r} is no class of the teacher")
    if missing := [name for place, name in enumerate(wanted) if place not in found]:
        raise UserError(
            f"{option} lacks {len(missing)} of the {len(wanted)} classes of the data, such as {missing[0]}: name the "
            "teacher's class for each of them."
        )
    shared = [place for place, count in Counter(found.values()).items() if count > 1]
    if shared:
        called = names[shared[0]] if names else shared[0]
        raise UserError(f"{option} gives several classes of the data the teacher's class {called}: correct the map.")
    return [found[place] for place in range(len(wanted))]


def _place(text: str, names: Sequence[str] | None, count: int, problem: str) -> int:
    """Find a class by its name, or by its number from 0. Raises `UserError`, starting with `problem`."""
    spellings = zip(names, english_names(names), strict=True) if names else ()
    named = [place for place, spelled in enumerate(spellings) if text in spelled]
    if len(named) == 1:
        return named[0]
    if not named and text in map(str, range(count)):
        return int(text)
    if named:
        numbers = ", ".join(map(str, named))
        raise UserError(f"{problem} that a name can tell from others: give its number instead ({numbers}).")
    choices = f"a name such as {_some(names)}, or " if names else ""
    raise UserError(f"{problem}: give {choices}a number from 0 to {count - 1}.")


def read_class_map(file: Path) -> list[tuple[str, str]]:
    """Read pairs of a class of the data and the teacher's class, each a name or a number.

    A file that ends in `.json` holds one object. Any other file is CSV, in UTF-8: one pair per line, without a header.
    Raises `UserError` if the file cannot be read, or has another form.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows: Any = json.loads(text, object_pairs_hook=list) if file.suffix.lower() == ".json" else _csv_rows(text)
    except OSError as error:
        raise UserError(f"teacher.class_map={file} cannot be read ({error.strerror}): give a file.") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"teacher.class_map={file} is not a class map ({error}): see docs/data.md.") from None
    if not isinstance(rows, list) or not all(_is_pair(row) for row in rows):
        raise UserError(
            f"teacher.class_map={file} is not a class map: write one line 'class of the data,class of the teacher' for "
            "each class of the data (see docs/data.md)."
        )
    return [(str(own), str(of_teacher)) for own, of_teacher in rows]


def _is_pair(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and len(row) == 2 and type(row[1]) in (str, int)


def _csv_rows(text: str) -> list[list[str]]:
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    return [[cell.strip() for cell in row] for row in rows if row]


def check_class_order(answers: Answers, name: str) -> None:
    """Raise `UserError` if the teacher's accuracy is much higher after a permutation of its classes.

    The permutation is found on one half of the images and tested on the other half, so that a weak teacher passes.
    """
    from scipy.optimize import linear_sum_assignment  # this import takes half a second

    classes = answers.logits.shape[1]
    shuffled = torch.randperm(len(answers.target), generator=torch.Generator().manual_seed(0))
    predicted, target = answers.logits.argmax(dim=1)[shuffled], answers.target[shuffled]
    half = len(target) // 2
    counts = torch.bincount(target[:half] * classes + predicted[:half], minlength=classes**2).view(classes, classes)
    renamed = torch.as_tensor(np.asarray(linear_sum_assignment(counts.T.numpy(), maximize=True)[1]))
    right, right_renamed = predicted[half:] == target[half:], renamed[predicted[half:]] == target[half:]
    plain, better = (float(answered.double().mean()) for answered in (right, right_renamed))
    # Only images on which the two orders differ tell them apart. The bound is four standard deviations of chance.
    chance = 4 * float((right != right_renamed).sum()) ** 0.5 / len(right)
    if better > plain + 0.1 + chance:
        raise UserError(
            f"The teacher {name} gets {100 * plain:.0f} % of the images right, but {100 * better:.0f} % if its classes "
            "are put into another order: it was trained with another class order than the data's. Add the list "
            f"class_names to its checkpoint, {REMEDY}, or choose another teacher."
        )
