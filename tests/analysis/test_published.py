"""Published accuracies, found by the data, the pair and the method of a run."""

import csv
from pathlib import Path

import pytest

from src.analysis import published as module
from src.analysis.published import published
from src.analysis.results import Finished
from src.config.names import method_name
from tests.helpers.configure import configure
from tests.helpers.run_folders import TEACHER, finished


def run_of(method: str, teacher: str | None, student: str, layer: str = "none") -> Finished:
    facts = None if teacher is None else {**TEACHER, "name": teacher}
    return finished(data="cifar100", method=method, student=student, teacher=facts, layer=layer)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (run_of("vanilla", None, "wrn16_2"), "73.26 (last)"),
        (run_of("kd", "wrn40_2", "wrn16_2"), "74.92 (last)"),
        (run_of("kd+standardized", "wrn40_2", "wrn16_2"), "76.11 (best)"),
        (run_of("dkd", "resnet32x4", "resnet8x4"), "76.32 (best)"),
        (run_of("wttm", "vgg13", "vgg8"), "74.44 (?)"),
        (run_of("mlkd", "wrn40_2", "wrn16_2"), "76.63 (best; longer training)"),
        (run_of("aekt", "wrn40_2", "wrn16_2"), "None"),
        (run_of("kd", "resnet20", "resnet8"), "None"),
    ],
)
def test_published_numbers(run: Finished, text: str) -> None:
    assert str(published(run)) == text


def test_nothing_is_published_with_a_serialization_layer() -> None:
    assert published(run_of("kd", "wrn40_2", "wrn16_2"))
    assert published(run_of("kd", "wrn40_2", "wrn16_2", layer="serial")) is None


@pytest.mark.parametrize(
    ("switch", "accuracy"), [("standardize_logits=true", "76.62"), ("optimizer=dot", "75.12"), ("seed=1", "73.33")]
)
def test_published_numbers_are_found_by_the_method_name_of_a_run(switch: str, accuracy: str) -> None:
    method = method_name(configure("method=kd", switch))
    run = run_of(method, "resnet32x4", "resnet8x4")
    assert str(published(run)).startswith(accuracy)
    assert run.label == method


def test_every_row_has_a_source_an_epoch_and_a_key_of_its_own() -> None:
    with Path(module.__file__).with_name("published.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    keys = [(row["data"], row["teacher"], row["student"], row["method"]) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert 0 < float(row["accuracy"]) < 100
        assert row["epoch"] in ("last", "best", "unstated")
        assert row["source"]
