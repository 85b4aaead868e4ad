"""What every source of images tells about itself before an image is read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Source:
    """Labels and classes of a training and a test split."""

    train_labels: Tensor
    """[N] int64"""
    test_labels: Tensor
    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...] | None = None
    superclass_of: tuple[int, ...] | None = None
    """The superclass of each class."""
    digest: str
    """Of the content."""
