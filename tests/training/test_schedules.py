"""One cycle peaks at each parameter group's own learning rate and leaves the momentum alone."""

import pytest
import torch
from torch import nn

from src.training.schedules import one_cycle

STEPS = 50


@pytest.fixture
def optimizer() -> torch.optim.SGD:
    """SGD with two groups, whose learning rates differ by a factor of ten."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)]
    return torch.optim.SGD(groups, momentum=0.9)


def test_each_group_rises_to_its_own_rate_and_falls_to_nearly_zero(optimizer: torch.optim.SGD) -> None:
    scheduler = one_cycle(optimizer, STEPS)
    rates: list[list[float]] = []
    for _ in range(STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    first, second = zip(*rates, strict=True)
    assert (max(first), max(second)) == pytest.approx((0.1, 0.01))
    assert first == pytest.approx([10 * rate for rate in second])
    peak = first.index(max(first))
    assert list(first) == sorted(first[:peak]) + sorted(first[peak:], reverse=True)
    assert first[0] == pytest.approx(0.1 / 25)
    assert first[-1] < 1e-6


def test_the_momentum_stays_the_same(optimizer: torch.optim.SGD) -> None:
    scheduler = one_cycle(optimizer, STEPS)
    for _ in range(STEPS):
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
        optimizer.step()
        scheduler.step()
