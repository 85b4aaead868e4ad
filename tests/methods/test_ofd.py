"""Overhaul of feature distillation: the margin of each channel, and a distance worked by hand."""

import torch

from src.methods.ofd import Transfer, partial_distance
from tests.helpers.features import drawn
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    assert_published_weights(configured("ofd"), cross_entropy=1.0, distance=1e-3)


def test_the_weight_is_smaller_on_imagenet():
    assert configured("ofd", "resnet50_to_mobilenetv1").weights(0)["distance"] == 1e-4


def test_positions_worked_by_hand():
    """Of margin -1: a negative target counts only from above, and the teacher's response is cut at the margin."""
    student = torch.tensor([-3.0, 0.0, -3.0, 5.0]).view(1, 1, 2, 2).requires_grad_()
    teacher = torch.tensor([-9.0, -9.0, 2.0, 2.0]).view(1, 1, 2, 2)
    distance = partial_distance(student, teacher, torch.tensor([-1.0]))
    assert distance == 0 + 1 + 25 + 9
    (gradient,) = torch.autograd.grad(distance, student)
    assert gradient.flatten().tolist() == [0.0, 2.0, -10.0, 6.0]


def test_the_margin_is_the_mean_of_all_negative_responses_so_far():
    transfer = Transfer(2, 3)
    seen = [drawn((4, 3, 2, 2), i).float() * scale for i, scale in enumerate((1.0, 100.0, 0.01))]
    for x in seen:
        x[:, 2] = x[:, 2].abs()
        transfer(torch.randn(4, 2, 4, 4), x)
    everything = torch.cat(seen)
    wanted = [everything[:, c][everything[:, c] < 0].mean() for c in (0, 1)]
    torch.testing.assert_close(transfer.margin, torch.stack([*wanted, torch.tensor(0.0)]))
    assert {"margin", "count"} <= transfer.state_dict().keys()
