"""Views of training images that are made when the images are read: photos, policies and mixing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from src.data.augmentation import Augmentation
from src.data.batches import Share
from src.data.image_data import Reader, Samples
from src.data.mixing import Mixing
from src.data.views import DrawnView, draw_view, further_bits, uniform

PARTNER = 300
"""The number of the random number and of the further random bits that choose a partner and its view."""


@dataclass
class ViewReader(Reader):
    """Reads finished views of training images. A view is a function of 63 random bits of (seed, epoch, position, view).

    A subclass defines `crops`.
    """

    labels: Tensor
    """[N] int64, by position in the whole training data."""
    augmentation: Augmentation
    partners: Tensor
    """[P] int64, the positions of the images that images with a label may be mixed with."""
    unlabelled_partners: Tensor
    """[U] int64, the same for images without a label."""
    views_per_image: int
    seed: int
    fixed_views: int | None
    blocks: Tensor | None = field(default=None, kw_only=True)
    """[N] int64, the storage block of each position. With it, the partner of an image is in the image's block."""

    def crops(self, index: Tensor, bits: Sequence[Tensor]) -> list[Tensor]:
        """Read the images at `index` [B] and crop and flip each by the `bits` [B] of each view.

        Returns uint8 images [B, 3, H, W] for each view.
        """
        raise NotImplementedError

    def __getitem__(self, share: Share) -> Samples:
        """Return the views of the share's epoch at these positions of the training data."""
        index = torch.as_tensor(share.positions)
        drawn = [self._draw(index, share.epoch, view) for view in range(self.views_per_image)]
        numbers, bits = zip(*drawn, strict=True)
        views = self._augmented(index, bits)
        samples = Samples(tuple(views), self.labels[index], index, numbers)
        return samples if self.augmentation.mixing is None else self._mixed(samples, bits, self.augmentation.mixing)

    def _draw(self, index: Tensor, epoch: int, view: int) -> DrawnView:
        if self.augmentation.is_constant:
            return DrawnView(torch.zeros_like(index), torch.zeros_like(index))
        per_image, fixed = self.views_per_image, self.fixed_views
        return draw_view(index, seed=self.seed, epoch=epoch, view=view, views_per_image=per_image, fixed_views=fixed)

    def _augmented(self, index: Tensor, bits: Sequence[Tensor], first_view: int = 0) -> list[Tensor]:
        views = self.crops(index, bits)
        policy, start = self.augmentation.policy, self.augmentation.policy_from_view
        if policy is None:
            return views
        return [
            policy(images, of_view) if number >= start else images
            for number, (images, of_view) in enumerate(zip(views, bits, strict=True), first_view)
        ]

    def _mixed(self, samples: Samples, bits: Sequence[Tensor], mixing: Mixing) -> Samples:
        """Mix each view with a view of another image. The labels are those of the first view."""
        others = [self._partners(samples, each) for each in bits]
        mixed = []
        for view, (images, of_view, other) in enumerate(zip(samples.images, bits, others, strict=True)):
            (partners,) = self._augmented(other, [further_bits(of_view, PARTNER)], view)
            mixed.append(mixing(images, partners, of_view))
        views, shares = zip(*mixed, strict=True)
        return samples._replace(images=views, other_target=self.labels[others[0]], share=shares[0])

    @cached_property
    def _pools(self) -> list[tuple[Tensor, Tensor]]:
        """The partners of each kind, ordered by block, and their blocks. Without blocks, both are the partners."""
        pools = (self.partners, self.unlabelled_partners)
        if self.blocks is None:
            return [(pool, pool) for pool in pools]
        ordered = [pool[self.blocks[pool].argsort(stable=True)] for pool in pools]
        return [(pool, self.blocks[pool]) for pool in ordered]

    def _partners(self, samples: Samples, bits: Tensor) -> Tensor:
        """Draw the position of another image of the same kind, with or without a label, for each image."""
        draw, chosen = uniform(bits, PARTNER), torch.empty_like(samples.index)
        kinds = (samples.target >= 0, samples.target < 0)
        for (pool, stored), of_kind in zip(self._pools, kinds, strict=True):
            if not len(pool):
                continue
            first, end = torch.zeros_like(samples.index), torch.full_like(samples.index, len(pool))
            if self.blocks is not None:
                block = self.blocks[samples.index]
                first, end = (torch.searchsorted(stored, block, right=right) for right in (False, True))
            place = first + (draw * (end - first)).long()
            chosen = torch.where(of_kind, pool[place.clamp(max=len(pool) - 1)], chosen)
        return chosen
