"""The 1000 classes of ImageNet (ILSVRC 2012) in the order of every published network's logits: their wnids, sorted."""

import csv
from collections.abc import Sequence
from pathlib import Path

with Path(__file__).with_name("imagenet_classes.csv").open(encoding="utf-8", newline="") as _rows:
    _ENGLISH = {row["wnid"]: row["name"] for row in csv.DictReader(_rows)}

WNIDS = tuple(_ENGLISH)
"""Folder names such as "n01440764", by class number."""


def readable(names: Sequence[str]) -> list[str]:
    """Wnids as English names, no two of which are the same; every other name as it is."""
    return [_ENGLISH.get(name, name) for name in names]
