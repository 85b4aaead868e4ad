"""The facts about a data set that are known before any image is read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Source:
    """Labels and classes of a training and a test split."""

    train_labels: Tensor
    """[N] int64, classes of the training images."""
    test_labels: Tensor
    """[M] int64, classes of the test images."""
    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...] | None = None
    superclass_of: tuple[int, ...] | None = None
    """The superclass number of each class."""
    digest: str
    """Hash of the content."""
