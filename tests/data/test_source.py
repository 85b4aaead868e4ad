"""What every kind of data reports about itself."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.data.array_data import ArrayData
from src.data.image_data import ImageData
from src.data.source import Source
from src.data.stream_data import StreamData
from tests.helpers.photo_folders import load


@pytest.mark.parametrize("kind", ["arrays", "folder", "shards"])
def test_every_kind_of_data_reports_labels_classes_and_a_digest(
    make_data: Callable[..., ArrayData], folder: Path, shards: Path, kind: str
) -> None:
    data: ImageData = {
        "arrays": make_data,
        "folder": lambda: load(folder),
        "shards": lambda: load(shards, StreamData),
    }[kind]()
    data.load()
    source = data.source
    assert isinstance(source, Source)
    assert len(source.class_names) == 3
    for labels in (source.train_labels, source.test_labels):
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == [0, 1, 2]
    assert re.fullmatch("[0-9a-f]{64}", source.digest)
    assert source.superclass_of is None
    assert data.superclasses is None


def test_a_source_cannot_be_changed() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    source = Source(train_labels=labels, test_labels=labels, class_names=("a", "b"), digest="0")
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.digest = "1"  # type: ignore[misc]


def test_superclasses_of_the_same_name_stay_apart() -> None:
    labels = torch.arange(3)
    names = {"class_names": ("a", "b", "c"), "superclass_names": ("bird", "tool", "bird"), "superclass_of": (2, 1, 0)}
    data = ImageData.__new__(ImageData)
    data.source = Source(train_labels=labels, test_labels=labels, digest="0", **names)  # type: ignore[arg-type]
    assert data.superclasses == ["bird (2)", "tool", "bird (0)"]
