"""The pictures of a report: which are drawn, of which runs, and with which captions."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from src.analysis import figures
from src.analysis.answered import Answered
from src.analysis.predictions import Predictions
from src.analysis.report_pictures import check_classes, class_numbers, draw, draw_gained_images
from src.analysis.results import Finished, find_runs, group
from src.common.errors import UserError
from src.common.files import write_rows
from src.training.gradient_anatomy import QUANTILES, RATIOS
from tests.helpers.run_folders import finished, write_run

ALWAYS = {"accuracy.png", "learning_curves.png", "accuracy_by_cost.png"}
TARGET = np.array([0, 1, 0, 1])
GRADIENTS = {
    "step": 0.0, "epoch": 0.0, "cross_entropy/target": -0.5, "cross_entropy/others": 0.5, "cross_entropy/own": 0.7,
    **{f"{ratio}/{level}": 0.5 + level for ratio in RATIOS for level in QUANTILES},
}  # fmt: skip


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few pixels, which is faster."""
    monkeypatch.setitem(figures.STYLE, "figure.dpi", 20)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method, accuracy in (("vanilla", 0.3), ("kd", 0.4), ("aekt", 0.45)):
        write_run(tmp_path / "runs", method, accuracy=accuracy, layer="serial" if method == "aekt" else "none")
    return tmp_path / "runs"


def answered(predicted: list[int], teacher: list[int] | None = None) -> Answered:
    """Make the answers of a network to the four images of `TARGET`."""
    said = Predictions(np.array(predicted)[:, None], np.full((4, 1), 0.8), TARGET)
    data: Any = SimpleNamespace(
        class_names=("red", "green"),
        test_images=lambda picked: torch.zeros(len(picked), 3, 4, 4, dtype=torch.uint8),
    )
    return Answered(said, None if teacher is None else np.array(teacher), 1_000_000, 4_000_000, data)


def names_of(pictures: list) -> set[str]:
    return {picture.file.name for picture in pictures}


def test_result_files_alone_allow_three_pictures(runs: Path, tmp_path: Path) -> None:
    pictures = draw(group(find_runs(runs)[0]), {}, tmp_path, None, "")
    assert names_of(pictures) == ALWAYS
    assert all(picture.file.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert all(picture.caption for picture in pictures)
    for file in runs.rglob("metrics.csv"):
        file.write_text("epoch,test/accuracy\n0,\n1,\n2,0.5\n")
    assert names_of(draw(group(find_runs(runs)[0]), {}, tmp_path, None, "")) == ALWAYS - {"learning_curves.png"}


def test_every_picture_is_drawn_if_the_runs_allow_it(runs: Path, tmp_path: Path) -> None:
    groups = group(find_runs(runs)[0])
    for (run,) in groups.values():
        write_rows(run.folder / "gradients.csv", [GRADIENTS, {**GRADIENTS, "epoch": 1.0}])
    (serial,) = groups["resnet8 by aekt, serial"]
    (serial.folder / "checkpoints").mkdir()
    state = {"serialization.layer.weight": torch.tensor([[1.0, 0.2], [0.1, 1.0]])}
    torch.save({"state_dict": state}, serial.folder / "checkpoints" / "last.ckpt")
    said = {name: answered([0, 1, 1, 1], teacher=[0, 1, 0, 0]) for name in groups}
    said["resnet8 alone"] = answered([1, 1, 1, 1])
    pictures = {picture.file.name: picture for picture in draw(groups, said, tmp_path, ["green"], "2-")}
    assert pictures.keys() == {
        f"2-{name}" for name in (
            *ALWAYS, "reliability.png", "agreement.png", "what_they_say.png", "gradients-2.png", "gradients-3.png",
            "class_relations.png", "strongest_relations.png",
        )
    }  # fmt: skip
    assert pictures["2-gradients-3.png"].caption.endswith("of resnet8 by aekt, serial at the logits, seed 0.")
    wide = {name for name, picture in pictures.items() if picture.wide}
    assert wide == pictures.keys() - {f"2-{name}" for name in (*ALWAYS, "reliability.png", "agreement.png")}


def test_one_figure_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open figures hold memory, and matplotlib warns of more than 20."""
    opened = []

    def save(figure: Figure, file: Path) -> Path:
        opened.append(len(plt.get_fignums()))
        plt.close(figure)
        return file

    monkeypatch.setattr(figures, "save", save)
    for method in ("kd", "dkd", "at"):
        write_rows(write_run(tmp_path, method) / "gradients.csv", [GRADIENTS])
    draw(group(find_runs(tmp_path)[0]), {}, tmp_path, None, "")
    assert opened == [1] * 6


# Test images that a student gained


def groups_of(*methods: str) -> dict[str, list[Finished]]:
    accuracies = {"vanilla": 0.3, "tfkd": 0.35, "kd": 0.4, "dkd": 0.5}
    return {method: [finished(method=method, accuracy=accuracies[method])] for method in methods}


def test_gained_images_are_those_that_only_the_best_taught_student_gets_right() -> None:
    groups = groups_of("vanilla", "kd", "dkd")
    said = {"vanilla": answered([1, 1, 1, 0]), "kd": answered([0, 1, 0, 1]), "dkd": answered([0, 0, 1, 1])}
    figure = draw_gained_images(groups, said)
    assert figure
    assert figure.get_suptitle() == "Gained by distillation: 2 of 4 test images, for example these"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["red", "green"]
    assert [axes.get_ylabel() for axes in figure.axes[2::2]] == ["vanilla", "dkd"]
    plt.close(figure)


def test_at_most_eight_gained_images_are_shown() -> None:
    target = np.zeros(50, dtype=int)
    wrong, right = (Predictions(np.full((50, 1), k), np.ones((50, 1)), target) for k in (1, 0))
    said = {
        "vanilla": answered([0] * 4)._replace(predictions=wrong),
        "kd": answered([0] * 4)._replace(predictions=right),
    }
    figure = draw_gained_images(groups_of("vanilla", "kd"), said)
    assert figure
    assert len(figure.axes) == 3 * 8
    plt.close(figure)


@pytest.mark.parametrize(
    ("methods", "predicted"),
    [
        (("vanilla",), [0, 1, 0, 1]),  # no taught student
        (("kd", "dkd"), [0, 1, 0, 1]),  # no student alone
        (("tfkd", "kd"), [0, 1, 0, 1]),  # without a teacher, but not alone
        (("vanilla", "kd"), [1, 0, 1, 0]),  # nothing gained
    ],
)
def test_without_both_students_or_a_gain_no_images_are_shown(methods: tuple[str, ...], predicted: list[int]) -> None:
    said = {method: answered([1, 0, 1, 0] if method in ("vanilla", "tfkd") else predicted) for method in methods}
    assert draw_gained_images(groups_of(*methods), said) is None


def test_another_network_alone_is_no_counterpart() -> None:
    groups = groups_of("vanilla", "kd")
    (run,) = groups["vanilla"]
    other = dataclasses.replace(run, result=run.result.model_copy(update={"student": "resnet20"}))
    said = {"vanilla": answered([1, 0, 1, 0]), "kd": answered([0, 1, 0, 1])}
    assert draw_gained_images({"vanilla": [other], "kd": groups["kd"]}, said) is None


# Classes by name


def test_classes_are_chosen_by_name() -> None:
    names = [f"{kind} {i}" for i in range(4) for kind in ("animal", "plant")]
    assert class_numbers(names, ["plant 0", "animal 0"]) == [1, 0]
    assert class_numbers(names, ["mineral 0", "plant 1"]) == [3], "a class of other data in the same report"


def test_a_class_that_no_run_has_is_refused() -> None:
    (run,) = groups_of("kd")["kd"]
    other = dataclasses.replace(run, result=run.result.model_copy(update={"class_names": ["apple", "pear"]}))
    check_classes([run, other], ["pear", run.result.class_names[0]])
    with pytest.raises(UserError, match=r"^relations.classes: there is no class plum. Choose from "):
        check_classes([run, other], ["pear", "plum"])


def test_a_name_of_two_classes_chooses_both() -> None:
    assert class_numbers(["crane", "dog", "crane"], ["crane"]) == [0, 2]
