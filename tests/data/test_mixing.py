"""MixUp and CutMix: the mixed pixels, the shares of the labels, and the distribution of the draws."""

import numpy as np
import pytest
import torch
from scipy import stats

from src.data.mixing import CutMix, MixUp, draw_beta
from src.data.views import random_bits, uniform

BITS = random_bits(3, 1, torch.arange(4000), 1)


def images(count: int, height: int = 12, width: int = 18) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_distribution_beta(alpha: float) -> None:
    drawn = draw_beta(alpha, BITS)
    assert drawn.dtype == torch.float32
    quantile = (uniform(BITS, 200) * 65_536).floor().add(0.5) / 65_536
    exact = stats.beta(alpha, alpha).ppf(quantile.numpy())
    assert np.abs(drawn.double().numpy() - exact).max() <= 2**-17


def test_mixup_is_the_weighted_mean() -> None:
    one, other = images(50), images(50).flip(0)
    mixed, share = MixUp(alpha=1.0)(one, other, BITS[:50])
    weights = share.double()[:, None, None, None]
    assert mixed.dtype == torch.uint8
    assert ((mixed.double() - (weights * one + (1 - weights) * other)).abs() <= 0.5).all()
    assert torch.equal(share, draw_beta(1.0, BITS[:50]))


def test_cutmix_pastes_one_rectangle_and_the_share_is_the_rest_of_the_area() -> None:
    count, height, width = 300, 12, 18
    one, other = torch.zeros(count, 3, height, width).byte(), torch.full((count, 3, height, width), 9).byte()
    mixed, share = CutMix(alpha=1.0)(one, other, BITS[:count])
    for image, of_one in zip(mixed, share.tolist(), strict=True):
        pasted = image == 9
        assert torch.equal(pasted[0], pasted[1])
        assert torch.equal(pasted[0], pasted[2])
        assert of_one == pytest.approx(1 - pasted[0].double().mean().item(), abs=1e-6)
        rows, columns = pasted[0].any(dim=1).nonzero()[:, 0], pasted[0].any(dim=0).nonzero()[:, 0]
        assert pasted[0].sum() == len(rows) * len(columns)  # a rectangle
        if len(rows):
            assert len(rows) == rows[-1] - rows[0] + 1
            assert len(columns) == columns[-1] - columns[0] + 1


def test_the_rectangle_is_that_of_torchvision() -> None:
    """In torchvision's CutMix, the centre is uniform over the pixels, and half a side is int(r * side)."""
    count, side = 4000, 64
    one, other = torch.zeros(count, 1, side, side).byte(), torch.ones(count, 1, side, side).byte()
    mixed, share = CutMix(alpha=1.0)(one, other, BITS)
    half = (side * (1 - draw_beta(1.0, BITS)).sqrt() / 2).long()
    assert (mixed[:, 0].sum(dim=(1, 2)) <= (2 * half) ** 2).all()
    columns = mixed[:, 0].any(dim=1)
    inner = (half < 10).nonzero()[:, 0]
    centres = [columns[i].nonzero()[:, 0].double().mean().item() + 0.5 for i in inner if columns[i].any()]
    assert stats.kstest(centres, stats.uniform(0, side).cdf).pvalue > 0.01
    # the mean share of a uniform rectangle that is cut off at the edges, by simulation of torchvision's rule
    generator = torch.Generator().manual_seed(0)
    r = 0.5 * (1 - torch.rand(100_000, generator=generator)).sqrt()
    x, y = (torch.randint(side, (100_000,), generator=generator) for _ in range(2))
    reach = (r * side).long()
    area = ((x + reach).clamp(max=side) - (x - reach).clamp(min=0)) * (
        (y + reach).clamp(max=side) - (y - reach).clamp(min=0)
    )
    assert share.mean().item() == pytest.approx(1 - area.double().mean().item() / side**2, abs=0.015)


@pytest.mark.parametrize("mixing", [MixUp(), CutMix()])
def test_a_mixture_depends_on_its_own_bits_alone(mixing: MixUp | CutMix) -> None:
    one, other, bits = images(7), images(7).flip(0), BITS[:7]
    mixed, share = mixing(one, other, bits)
    for i in range(7):
        alone, of_one = mixing(one[i : i + 1], other[i : i + 1], bits[i : i + 1])
        assert torch.equal(alone[0], mixed[i])
        assert torch.equal(of_one[0], share[i])
