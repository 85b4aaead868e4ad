"""Augmentation policies: torchvision's operations and strengths, and the distribution of the draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from src.common.errors import UserError
from src.config.instantiate import instantiate
from src.data.policies import BINS, OPERATIONS, RANDAUGMENT, TRIVIAL, RandAugment, Space, TrivialAugment
from src.data.views import random_bits, uniform
from tests.helpers.configure import configure


def pictures(count: int, height: int = 20, width: int = 28) -> Tensor:
    """Smooth random images, uint8 [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 5, 5, generator=generator)
    return (torch.nn.functional.interpolate(small, (height, width), mode="bilinear") * 255).byte()


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize(
    ("space", "theirs"), [(TRIVIAL, v2.TrivialAugmentWide()), (RANDAUGMENT, v2.RandAugment())], ids=["trivial", "rand"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_and_strengths_are_torchvisions(space: Space, theirs: v2.Transform, sign: int) -> None:
    (image,) = pictures(1)
    picture, table = pillow(image), theirs._AUGMENTATION_SPACE
    assert len(table) == len(OPERATIONS)
    for (name, (strengths, is_signed)), operation in zip(table.items(), OPERATIONS, strict=True):
        magnitudes = strengths(BINS, picture.height, picture.width)
        for level in range(BINS):
            magnitude = 0.0 if magnitudes is None else float(magnitudes[level]) * (sign if is_signed else 1)
            expected = theirs._apply_image_or_video_transform(
                picture, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=theirs._fill
            )
            ours = operation(picture, level, sign, space)
            assert np.array_equal(np.asarray(ours), np.asarray(expected)), (name, level)


@pytest.mark.parametrize(
    ("policy", "operations", "strength"),
    [(TrivialAugment(), 1, None), (RandAugment(operations=3, strength=20), 3, 20), (RandAugment(), 2, 9)],
)
def test_each_operation_strength_and_sign_is_as_likely_as_any_other(
    monkeypatch: pytest.MonkeyPatch, policy: Callable[[Tensor, Tensor], Tensor], operations: int, strength: int | None
) -> None:
    count = 6000
    called: list[tuple[int, int, int]] = []

    def spy(number: int) -> Callable[..., Image.Image]:
        def operation(image: Image.Image, level: int, sign: int, space: Space) -> Image.Image:
            called.append((number, level, sign))
            return image

        return operation

    monkeypatch.setattr("src.data.policies.OPERATIONS", tuple(spy(number) for number in range(14)))
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    assert torch.equal(policy(images, random_bits(0, 0, torch.arange(count), 1)), images)
    numbers, levels, signs = np.array(called).T
    assert len(called) == operations * count
    assert np.abs(np.bincount(numbers, minlength=14) / len(called) - 1 / 14).max() < 0.01
    assert abs(signs.mean()) < 0.03
    assert set(levels) == (set(range(BINS)) if strength is None else {strength})
    assert abs(np.corrcoef(numbers, signs)[0, 1]) < 0.03
    if strength is None:
        assert np.abs(np.bincount(levels) / count - 1 / BINS).max() < 0.01
        assert abs(np.corrcoef(numbers, levels)[0, 1]) < 0.03
    else:  # the operations of one image are independent
        of_image = numbers.reshape(operations, count)
        assert abs(np.corrcoef(of_image)[0, 1]) < 0.03


def test_a_view_depends_on_its_own_bits_alone() -> None:
    images, bits = pictures(6), random_bits(0, 0, torch.arange(6), 1)
    for policy in (TrivialAugment(), RandAugment()):
        together = policy(images, bits)
        alone = [policy(images[i : i + 1], bits[i : i + 1])[0] for i in range(6)]
        assert (together.shape, together.dtype) == (images.shape, torch.uint8)
        assert torch.equal(together, torch.stack(alone))
        assert not torch.equal(together, images)


def test_the_draws_are_not_those_of_a_crop() -> None:
    bits = random_bits(0, 0, torch.arange(4000), 1)
    crop = uniform(bits, torch.arange(23)[:, None])
    policy = uniform(bits, torch.arange(100, 106)[:, None])
    assert np.abs(np.corrcoef(torch.cat([crop, policy]).numpy())[:23, 23:]).max() < 0.07


@pytest.mark.parametrize(
    ("option", "reason"), [("strength=31", "input should be less than 31"), ("operations=0", "greater than 0")]
)
def test_a_value_out_of_range_is_one_sentence(option: str, reason: str) -> None:
    cfg = configure("augmentation=randaugment", f"augmentation.policy.{option}")
    with pytest.raises(UserError, match=rf"^augmentation\.policy\.{option} does not fit: .*{reason}\.$"):
        instantiate(cfg.augmentation.policy, "augmentation.policy")
