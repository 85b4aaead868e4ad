"""The metrics of an evaluation against their definitions, and at their extremes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from src.common.metrics import ExpectedCalibrationError, evaluation_metrics, metrics_of_split


def measure(*batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metric = evaluation_metrics(batches[0][0].shape[1])
    for logits, target in batches:
        metric.update(logits, target)
    return {name: float(value) for name, value in metric.compute().items()}


def stated(logits: np.ndarray, target: np.ndarray, bins: int = 15) -> dict[str, float]:
    """Compute the metrics by their definitions, one sample after the other."""
    accuracy, top5, nll = [], [], []
    gap_in_bin: dict[int, float] = {}
    for row, label in zip(logits.astype(np.float64), target, strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        correct = row.argmax() == label
        accuracy.append(correct)
        top5.append(label in np.argsort(-row)[:5])
        nll.append(row.max() - row[label] + math.log(np.exp(row - row.max()).sum()))
        bin_index = next(k for k in range(bins) if probabilities.max() <= (k + 1) / bins or k == bins - 1)
        gap_in_bin[bin_index] = gap_in_bin.get(bin_index, 0.0) + probabilities.max() - correct
    ece = sum(abs(gap) for gap in gap_in_bin.values()) / len(target)
    return {
        "accuracy": float(np.mean(accuracy)),
        "top5": float(np.mean(top5)),
        "nll": float(np.mean(nll)),
        "ece": float(ece),
    }


def logits_of(confidence: float, classes: int) -> list[float]:
    """Return logits that give class 0 this probability, and each other class an equal share of the rest."""
    return [math.log(confidence)] + [math.log((1 - confidence) / (classes - 1))] * (classes - 1)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits [N, C] without ties in a row, on a grid that keeps samples off the edges of bins, and targets [N]."""
    count, classes = draw(st.integers(1, 12)), draw(st.integers(2, 9))
    rows = [draw(st.permutations(range(classes))) for _ in range(count)]
    scale = draw(arrays(np.float32, (count, 1), elements=st.sampled_from([0.013, 0.37, 1.1, 7.7])))
    target = draw(arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    return np.array(rows, dtype=np.float32) * scale, target


@given(predictions())
@settings(deadline=None)
def test_metrics_match_the_definitions(sample: tuple[np.ndarray, np.ndarray]) -> None:
    logits, target = sample
    measured = measure((torch.from_numpy(logits), torch.from_numpy(target)))
    assert measured == pytest.approx(stated(logits, target), rel=1e-5, abs=1e-5)


@given(predictions(), st.integers(1, 5))
@settings(deadline=None)
def test_batches_add_up_to_the_whole(sample: tuple[np.ndarray, np.ndarray], batch_size: int) -> None:
    logits, target = (torch.from_numpy(array) for array in sample)
    parts = zip(logits.split(batch_size), target.split(batch_size), strict=True)
    assert measure(*parts) == pytest.approx(measure((logits, target)), rel=1e-5, abs=1e-6)


def test_a_perfect_prediction_of_confidence_one() -> None:
    logits = 1000.0 * torch.eye(7)
    assert logits.softmax(dim=1).max() == 1
    assert measure((logits, torch.arange(7))) == {"accuracy": 1.0, "top5": 1.0, "nll": 0.0, "ece": 0.0}


def test_a_wrong_prediction_of_confidence_one_is_the_worst_calibration() -> None:
    logits = 1000.0 * torch.eye(7)
    measured = measure((logits, (torch.arange(7) + 1) % 7))
    assert measured["accuracy"] == 0
    assert measured["ece"] == 1
    assert measured["nll"] == 1000


def test_confidence_one_shares_a_bin_with_confidence_just_below() -> None:
    """The gaps of a wrong prediction, 1, and of a right one, -0.05, cancel in part because they are in one bin."""
    certain, nearly = [1000.0, 0.0], logits_of(0.95, 2)
    target = torch.tensor([1, 0])
    metric = ExpectedCalibrationError()
    metric.update(torch.tensor([certain, nearly]), target)
    assert float(metric.compute()) == pytest.approx((1 - 0.05) / 2, abs=1e-6)


def test_calibration_is_perfect_if_the_confidence_is_the_frequency() -> None:
    logits = torch.tensor([logits_of(0.75, 4)] * 8)
    target = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    measured = measure((logits, target))
    assert measured["accuracy"] == 0.75
    assert measured["ece"] == pytest.approx(0, abs=1e-6)
    assert measured["nll"] == pytest.approx(-(6 * math.log(0.75) + 2 * math.log(0.25 / 3)) / 8)


def test_equal_logits_have_the_entropy_of_all_classes() -> None:
    measured = measure((torch.zeros(10, 10), torch.arange(10)))
    assert measured["nll"] == pytest.approx(math.log(10))
    assert measured["ece"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_top5_of_up_to_five_classes_is_always_right(classes: int) -> None:
    logits = torch.arange(classes * classes, dtype=torch.float32).reshape(classes, classes)
    assert measure((logits, torch.arange(classes)))["top5"] == 1


def test_bfloat16_logits_are_evaluated_in_float32() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.arange(64) % 10
    assert measure((logits, target)) == measure((logits.float(), target))


def test_a_reset_forgets_all_batches() -> None:
    metric = evaluation_metrics(3)
    metric.update(torch.eye(3), torch.tensor([1, 2, 0]))
    metric.reset()
    metric.update(torch.eye(3), torch.arange(3))
    assert float(metric.compute()["accuracy"]) == 1


def test_metrics_of_one_split_are_selected_by_its_full_name() -> None:
    logged = {"val/nll": 0.5, "test/nll": 0.6, "test/accuracy": 0.7, "train/loss": 1.0, "testing/nll": 9.0}
    assert metrics_of_split(logged, "test") == {"nll": 0.6, "accuracy": 0.7}
    assert metrics_of_split(logged, "other") == {}
