"""Accuracies that others published, by data, pair of networks and method: `published.csv`, each with its source.

Its column `epoch` says which epoch's accuracy it is: RepDistiller's tables (KD to CRD) give the last epoch's, those of
DKD, CTKD and logit standardization the best one's on the test images, others do not say.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

from src.analysis.results import Finished

NOTE = (
    "Published: CIFAR-100 after 240 epochs on all 50,000 training images (ImageNet: 100 epochs), by others' code and "
    "teachers; (last) or (best) epoch, (?) where the source does not say. Tables of DKD, CTKD and logit "
    "standardization give the best epoch on the test images, about 0.3 points above the last."
)


class Published(NamedTuple):
    """A number and where it stands."""

    accuracy: float
    """Top-1, in %."""
    epoch: str
    """last, best or unstated."""
    source: str
    note: str

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
    """What was published for a run's data, pair and method; None where nothing was."""
    result = run.result
    if result["serialization"] != "none":
        return None
    teacher = result["teacher"]["name"] if result["teacher"] else ""
    return _table().get((result["data"], teacher, result["student"], result["method"]))
