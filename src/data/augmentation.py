"""Augmentation of training images: crops and flips, a policy of random operations, and mixing."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from src.data.mixing import Mixing

Policy = Callable[[Tensor, Tensor], Tensor]
"""Maps uint8 images [B, 3, H, W] on the CPU and their 63 random bits [B] to augmented images."""


@dataclass(frozen=True)
class Augmentation:
    """How a view of a training image is made. Both networks get the same view.

    Without `crop_and_flip`, it starts from the image as in evaluation. The `policy` acts on the views from number
    `policy_from_view` on, for methods with several views per image. At the end, `mixing` mixes the view with a view of
    another training image.
    """

    crop_and_flip: bool = True
    policy: Policy | None = None
    policy_from_view: int = 0
    mixing: Mixing | None = None

    @property
    def is_geometric(self) -> bool:
        """Whether the views are crops and flips only, or the images themselves."""
        return self.policy is None and self.mixing is None

    @property
    def is_constant(self) -> bool:
        """Whether all views of an image are the image itself."""
        return self.is_geometric and not self.crop_and_flip

    @property
    def key(self) -> str:
        """A hash of everything but the data's own options, as part of a file name. Empty for crops and flips only."""
        if self == Augmentation():
            return ""
        made = [part and (type(part).__qualname__, sorted(vars(part).items())) for part in (self.policy, self.mixing)]
        decides = (self.crop_and_flip, self.policy_from_view, made)  # a part's own repr could hold a memory address
        return "-" + hashlib.sha256(repr(decides).encode()).hexdigest()[:8]
