"""SRRL: both losses of connected features against a second statement."""

import math

import pytest
import torch
from torch import nn

from src.models.network import Network
from tests.helpers.features import dot, drawn, flat, mean_square
from tests.helpers.maps import batch_of_maps
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    made = configured("srrl", "resnet34_to_resnet18")
    assert_published_weights(made, cross_entropy=1.0, feature=1.0, regression=1.0)


def test_terms_are_the_stated_ones():
    method = configured("srrl")
    torch.manual_seed(0)
    method.connector, method.classifier = nn.Conv2d(2, 4, 1).double(), nn.Linear(4, 3).double()
    method.pool = Network.pool
    ours, theirs, logits = drawn((3, 2, 4, 4), 1), drawn((3, 4, 2, 2), 2), drawn((3, 3), 3)
    connected = [[math.fsum(flat(channel)) / 16 for channel in sample] for sample in method.connector(ours).tolist()]
    weight, bias = method.classifier.weight.tolist(), method.classifier.bias.tolist()
    answers = [[dot(row, x) + b for row, b in zip(weight, bias, strict=True)] for x in connected]
    terms = method.terms(batch_of_maps(ours, theirs, logits))
    wanted = [[math.fsum(flat(channel)) / 4 for channel in sample] for sample in theirs.tolist()]
    assert terms["feature"].item() == pytest.approx(mean_square(connected, wanted), rel=1e-12)
    assert terms["regression"].item() == pytest.approx(mean_square(answers, logits.tolist()), rel=1e-12)
