"""The metrics of an evaluation: accuracy, likelihood and calibration."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class NegativeLogLikelihood(Metric):
    """NLL: the mean of -log softmax(z)_t, in nats."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [B, C] and targets [B]."""
        self.total += F.cross_entropy(preds.float(), target, reduction="sum")
        self.count += len(target)

    def compute(self) -> Tensor:
        """Return the mean over all samples so far."""
        return self.total / self.count


class ExpectedCalibrationError(Metric):
    """ECE (Guo et al. 2017, arXiv 1706.04599): the mean gap between confidence and accuracy over 15 equal bins (a, b].

    torchmetrics' own metric is not used: it keeps every confidence of the data set in memory, and it puts confidence 1
    into an extra bin.
    """

    full_state_update = False
    confidence: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        for name in ("confidence", "correct", "count"):
            self.add_state(name, torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits [B, C] and targets [B]."""
        confidence, predicted = preds.float().softmax(dim=1).max(dim=1)
        bins = len(self.count)
        bin_index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        self.confidence.index_add_(0, bin_index, confidence)
        self.correct.index_add_(0, bin_index, (predicted == target).float())
        self.count.index_add_(0, bin_index, torch.ones_like(confidence))

    def compute(self) -> Tensor:
        """Return the sum over bins of |confidence - accuracy|, weighted by each bin's share of the samples."""
        return (self.confidence - self.correct).abs().sum() / self.count.sum()


class Agreement(Metric):
    """The share of samples for which a network predicts the same class as another one."""

    full_state_update = False
    agreed: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("agreed", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, answer: Tensor) -> None:
        """Add logits [B, C] and the classes [B] that the other network predicts. Samples of class -1 do not count."""
        self.agreed += (preds.argmax(dim=1) == answer).sum()
        self.count += (answer >= 0).sum()

    def compute(self) -> Tensor:
        """Return the share over all samples so far."""
        return self.agreed / self.count


def evaluation_metrics(num_classes: int) -> MetricCollection:
    """Make the metrics of every evaluation. Update them with logits [B, C] and targets [B].

    All are fractions of 1, except the NLL, which is in nats. The accuracies do not validate their inputs, because on a
    GPU the host would wait for the result.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes), validate_args=False),
            "nll": NegativeLogLikelihood(),
            "ece": ExpectedCalibrationError(),
        },
        compute_groups=False,
    )


def metrics_of_split(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """Select the metrics logged as `<split>/<name>` and return them by name.

    >>> metrics_of_split({"val/nll": 0.5, "test/nll": 0.6}, "test")
    {'nll': 0.6}
    """
    return {name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")}
