"""The facts about a data set that are known before any image is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Split = Literal["train", "held_out", "val", "test"]
"""`held_out` are training images that are evaluated, and `val` is the data's own validation split."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Labels and classes of a training split, a test split and, if the data has one, a validation split."""

    train_labels: Tensor
    """[N] int64, classes of the training images. At the end are the images without a label, whose class is -1."""
    test_labels: Tensor
    """[M] int64, classes of the test images."""
    val_labels: Tensor | None = None
    """[V] int64, classes of the images of the data's own validation split."""
    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...] | None = None
    superclass_of: tuple[int, ...] | None = None
    """The superclass number of each class."""
    digest: str
    """Hash of the content."""
    labelled_digest: str | None = None
    """Hash of the content without the images that have no label, if they can be told apart. None: `digest`."""
    places: Mapping[str, str] = field(default_factory=dict)
    """By split, where its images are. Empty if that is no question."""
    notes: tuple[str, ...] = ()
    """Sentences for the log: what has been converted, left out or left unread."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that the data brings along."""
        return ("train", "test") if self.val_labels is None else ("train", "test", "val")

    def labels(self, split: Split) -> Tensor:
        """Return the classes of the images of a split, int64. Held-out images are among the training images."""
        if split == "val":
            assert self.val_labels is not None
            return self.val_labels
        return self.test_labels if split == "test" else self.train_labels


def distinct_names(names: Sequence[str]) -> list[str]:
    """Append its number to each name that occurs more than once.

    >>> distinct_names(["crane", "dog", "crane"])
    ['crane (0)', 'dog', 'crane (2)']
    """
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
