"""Accuracies that others published, by data, pair and method: `published.csv`, each with its source.

The column `epoch` says which epoch an accuracy belongs to. RepDistiller's tables (KD to CRD) give the last epoch. The
tables of DKD, CTKD and logit standardization give the best epoch on the test images. Other sources do not say.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from src.analysis.results import Finished

NOTE = (
    "published: top-1 in % from the literature, with other code and other teachers, after 240 epochs on all 50,000 "
    "training images of CIFAR-100, or after 100 epochs on ImageNet. (last) and (best) name the epoch. (?) marks a "
    "source that does not say. DKD, CTKD and logit standardization give the best epoch on the test images, "
    "about 0.3 points above the last one in the released logs of logit standardization."
)


class Published(NamedTuple):
    """A published accuracy and its source."""

    accuracy: float
    """Top-1, in %."""
    epoch: str
    """`last`, `best` or `unstated`."""
    source: str
    note: str
    """Differences from the protocol, or empty."""

    def __str__(self) -> str:
        epoch = "?" if self.epoch == "unstated" else self.epoch
        return f"{self.accuracy:.2f} ({'; '.join(filter(None, [epoch, self.note]))})"


@cache
def _table() -> dict[tuple[str, str, str, str], Published]:
    with Path(__file__).with_name("published.csv").open(newline="", encoding="utf-8") as rows:
        return {
            (row["data"], row["teacher"], row["student"], row["method"]): Published(
                float(row["accuracy"]), row["epoch"], row["source"], row["note"]
            )
            for row in csv.DictReader(rows)
        }


def published(run: Finished) -> Published | None:
    """Look up the published accuracy for a run's data, pair and method. Returns None if there is none."""
    result = run.result
    if result.serialization != "none":
        return None
    teacher = result.teacher.name if result.teacher else ""
    return _table().get((result.data, teacher, result.student, result.method))
