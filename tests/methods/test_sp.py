"""Similarity-preserving distillation: values worked by hand, and samples without features."""

import math

import pytest
import torch

from src.methods.sp import similarities, similarity_loss
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("sp"), cross_entropy=1.0, similarity=3000.0)


def test_a_value_worked_by_hand():
    """Rows (1, 0) and (0, 1) against (1, 1) / sqrt(2) twice: four squares, two of each kind."""
    value = similarity_loss(torch.eye(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    half = 1 / math.sqrt(2)
    assert value.item() == pytest.approx((2 * (1 - half) ** 2 + 2 * half**2) / 4)


def test_a_sample_without_features_is_similar_to_none():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert similarities(features).tolist() == [[0.0, 0.0], [0.0, 1.0]]
