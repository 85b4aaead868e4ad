"""Networks of a configuration: the pair's, a library's, and the student with its initial weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.models.checkpoints import save_weights
from src.models.resnet import resnet8
from src.models.torchvision_networks import TorchvisionNetwork, resnet18
from src.setup.networks import load_student, make_network, stated_facts, with_library_networks
from tests.helpers.configure import changed, configure, without
from tests.helpers.tiny import same, weights

DATA: Any = SimpleNamespace(num_classes=2, mean=[0.4, 0.4, 0.4], std=[0.2, 0.2, 0.2])


def small(**values: Any) -> Any:
    return changed(configure("model=resnet20_to_resnet8"), **values)


# Networks of libraries replace those of the pair


def test_a_source_replaces_the_network_and_keeps_its_learning_rate() -> None:
    before = configure(
        "model=resnet34_to_resnet18", "teacher.source=timm/resnet26t", "student.source=torchvision/resnet18"
    )
    text = OmegaConf.to_yaml(before)
    cfg = with_library_networks(before)
    assert OmegaConf.to_yaml(before) == text
    assert (cfg.model.teacher.name, cfg.model.student.name) == ("resnet26t", "resnet18")
    assert cfg.model.name == "resnet26t_to_resnet18"
    assert cfg.model.teacher.published_accuracy == {}
    assert cfg.model.student.published_accuracy == {"imagenet": 69.76}
    assert cfg.schedule.learning_rate == 0.2
    assert with_library_networks(cfg) == cfg


def test_a_program_gives_the_teacher_its_name() -> None:
    cfg = with_library_networks(
        changed(configure(), teacher__allow_program=True, teacher__path="somewhere/efficientnet_lite0.pt2")
    )
    assert cfg.model.name == "efficientnet_lite0_to_wrn16_2"
    assert cfg.model.teacher.published_accuracy == {}


def test_a_network_without_published_accuracy_can_be_replaced() -> None:
    cfg = without(changed(configure(), teacher__source="timm/wrn40_2"), "model.teacher.published_accuracy")
    assert with_library_networks(cfg).model.teacher.published_accuracy == {}


def test_the_release_of_mdistiller_keeps_the_pairs_network() -> None:
    cfg = changed(configure(), teacher__source="mdistiller")
    assert with_library_networks(cfg).model == cfg.model


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("source", ["keras/resnet50", "torchvision", "timm/", "somewhere/teacher.pth"])
def test_an_unknown_source_is_refused(source: str, role: str) -> None:
    with pytest.raises(
        UserError,
        match=f"^{role}.source={source} is unknown: choose one of mdistiller, torchvision/NAME, timm/NAME, or give a "
        rf"checkpoint with {role}\.path=FILE\.$",
    ):
        with_library_networks(changed(configure(), **{f"{role}__source": source}))


# Networks of conf/


def test_a_network_has_as_many_outputs_as_classes() -> None:
    assert make_network(configure().model.student, "model.student", 7).classifier_layer.out_features == 7


def test_facts_of_a_file_take_precedence_over_those_of_the_yaml(tmp_path: Path) -> None:
    node = configure("network@model.teacher=resnet20_option_a").model.teacher
    assert stated_facts(node, None) == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    save_weights(resnet8(2), tmp_path / "own.pth", mean=[0.1, 0.2, 0.3], class_names=["cat", "dog"])
    assert stated_facts(node, tmp_path / "own.pth") == {
        "mean": [0.1, 0.2, 0.3], "std": [0.229, 0.224, 0.225], "class_names": ["cat", "dog"],
    }  # fmt: skip
    assert stated_facts(configure().model.teacher, None) == {}


# The student's initial weights


def test_a_student_starts_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(2)
    saved = resnet8(2)
    save_weights(saved, tmp_path / "a.pth", mean=[0.1, 0.2, 0.3], std=[0.7, 0.8, 0.9])
    student = load_student(small(student__path=str(tmp_path / "a.pth")), DATA)
    assert same(weights(student.network), weights(saved))
    assert (student.mean, student.std) == ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    save_weights(resnet8(3), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth"):
        load_student(small(student__path=str(tmp_path / "a.pth")), DATA)


def test_a_student_of_other_classes_starts_from_a_file_with_a_new_head(tmp_path: Path) -> None:
    saved, file = resnet8(1000), str(tmp_path / "a.pth")
    save_weights(saved, tmp_path / "a.pth", mean=[0.1, 0.2, 0.3], class_names=["x"] * 1000)
    with pytest.raises(UserError, match=r"on 1000 classes, but the network has 2: add student\.new_head=true"):
        load_student(small(student__path=file), DATA)
    torch.manual_seed(3)
    student = load_student(small(student__path=file, student__new_head=True), DATA)
    torch.manual_seed(3)
    loaded, fresh, before = student.network.state_dict(), resnet8(2).state_dict(), saved.state_dict()
    assert all(
        torch.equal(value, (fresh if name.startswith("fc.") else before)[name]) for name, value in loaded.items()
    )
    assert student.mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("source", [None, "torchvision/resnet18"])
def test_a_new_head_needs_a_file(source: str | None) -> None:
    with pytest.raises(UserError, match=r"^student\.new_head=true .*: add student\.path=FILE, or leave it out"):
        load_student(small(student__new_head=True, student__source=source), DATA)


def test_a_student_starts_from_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    published = resnet18()
    state = published.state_dict()
    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", lambda *_, **__: state)
    student = load_student(small(student__source="torchvision/resnet18"), DATA)
    assert isinstance(student.network, TorchvisionNetwork)
    assert student.network.classifier_layer.out_features == 2
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    assert all(torch.equal(student.network.state_dict()[name], value) for name, value in body.items())
    assert student.mean == (0.485, 0.456, 0.406)


def test_a_librarys_network_with_fresh_weights_takes_the_normalisation_of_the_data() -> None:
    cfg = with_library_networks(changed(configure(), student__source="torchvision/resnet18", student__pretrained=False))
    torch.manual_seed(5)
    student = load_student(cfg, DATA)
    torch.manual_seed(5)
    assert same(weights(student.network), weights(TorchvisionNetwork(resnet18(num_classes=2))))
    assert student.mean == DATA.mean


@pytest.mark.parametrize("others", [{}, {"student__source": "torchvision/resnet18", "student__path": "a.pth"}])
def test_fresh_weights_of_a_library_need_its_name_and_no_file(others: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^student\.pretrained=false .* add student\.source=.* leave out student"):
        load_student(small(student__pretrained=False, **others), DATA)


def test_fresh_weights_and_the_normalisation_of_the_data_are_the_default() -> None:
    torch.manual_seed(3)
    student = load_student(small(), DATA)
    torch.manual_seed(3)
    assert same(weights(student.network), weights(resnet8(2)))
    assert student.mean == DATA.mean


def test_the_release_of_mdistiller_has_no_students() -> None:
    with pytest.raises(UserError, match=r"^student\.source=mdistiller does not exist, .* teachers only: give a file"):
        load_student(small(student__source="mdistiller"), DATA)
