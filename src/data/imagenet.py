"""The 1000 classes of ImageNet (ILSVRC 2012), sorted by WordNet ID (wnid).

The logits of all published networks have this order.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

with Path(__file__).with_name("imagenet_classes.csv").open(encoding="utf-8", newline="") as _rows:
    _ENGLISH = {row["wnid"]: row["name"] for row in csv.DictReader(_rows)}

WNIDS = tuple(_ENGLISH)
"""Folder names such as "n01440764", by class number."""


def english_names(names: Sequence[str]) -> list[str]:
    """Replace wnids by English names, which all differ. Other names stay the same.

    >>> english_names(["n01440764", "apple"])
    ['tench', 'apple']
    """
    return [_ENGLISH.get(name, name) for name in names]
