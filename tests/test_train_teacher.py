"""`python -m src.train`: a teacher that is given, found in the store, or trained first."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from src.common.errors import UserError
from src.config.schema import TrainOptions, marked
from src.data.array_file import save_arrays
from src.models.checkpoints import read_state_dict, save_weights, weights_digest
from src.models.resnet import resnet20
from src.train import teacher_config
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import assert_refused
from tests.helpers.configure import changed, configure
from tests.helpers.place import RUNS, Place, result_of


def test_the_teacher_is_measured_and_named(finished: Place) -> None:
    (trained,) = [path for path in finished.folders("vanilla") if path.parts[-3] == "resnet20"]
    teacher = resnet20(10)
    teacher.load_state_dict(read_state_dict(trained / "student.pth"))
    for method, layer in RUNS[1:]:
        folder = finished.folder(method, layer)
        facts = result_of(folder)["teacher"]
        assert facts["name"] == "resnet20"
        assert facts["sha256"] == weights_digest(teacher)
        assert facts["source"] == str(trained / "student.pth")
        assert facts["accuracy"] == result_of(trained)["test"]["accuracy"]
        assert json.loads((folder / "run.json").read_text())["fingerprints"]["teacher"] == facts["sha256"]
        assert 0 <= result_of(folder)["test"]["agreement"] <= 1
    alone = finished.folders("vanilla")
    assert [result_of(folder)["teacher"] for folder in alone] == [None, None]
    assert all("agreement" not in result_of(folder)["test"] for folder in alone)


def test_a_missing_teacher_is_trained_once_for_all_methods(place: Place) -> None:
    first = place.train("method=kd")
    assert (first.code, first.err) == (0, "")
    (line,) = [line for line in first.out.splitlines() if line.startswith("There is no teacher")]
    assert line.startswith("There is no teacher resnet20 for cifar10: training it first")
    assert "teacher.path" in line
    assert str(place.path / "teachers" / "cifar10" / "resnet20.pth") in line
    assert first.out.count("Training ") == 2

    other = place.train("method=dkd")
    assert "There is no teacher" not in other.out
    assert other.out.count("Training ") == 1


@pytest.mark.parametrize("where", ["path", pytest.param("store", marks=pytest.mark.slow), "published"])
def test_an_existing_teacher_is_used(place: Place, where: str) -> None:
    torch.manual_seed(7)
    teacher = resnet20(10)
    store = place.path / "teachers" / "cifar10"
    file = {
        "path": place.path / "anywhere.pth",
        "store": store / "resnet20.pth",
        "published": store / "resnet20_vanilla" / "ckpt_epoch_240.pth",
    }[where]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(teacher, file)
    ran = place.train("method=kd", "teacher.train_if_missing=false", *([f"teacher.path={file}"] * (where == "path")))
    assert (ran.code, ran.err) == (0, "")
    facts = result_of(place.folder("kd"))["teacher"]
    assert facts["source"] == str(file)
    assert facts["sha256"] == weights_digest(teacher)


def test_a_finished_teacher_of_other_data_with_the_same_name_is_refused(place: Place, tmp_path: Path) -> None:
    assert place.train("method=kd").code == 0
    other = tmp_path / "other" / place.data.name
    arrays = colour_arrays()
    save_arrays(other, **{**arrays, "train_images": 255 - arrays["train_images"]})
    ran = place.train("method=dkd", f"data.path={other}")
    assert_refused(ran, "was trained on other data that is called cifar10 too: rename this data with data.name=NAME")
    assert place.folders("dkd") == []

    assert place.train("method=dkd", f"data.path={other}", "data.name=inverted").code == 0
    again = place.train("method=dkd", f"data.path={other}", "start_over=true")
    assert (again.code, again.out.count("Training ")) == (0, 2)
    facts = [result_of(folder)["teacher"] for folder in place.folders("dkd")]
    assert facts[0]["sha256"] == facts[1]["sha256"], "both teachers saw the same images"
    assert facts[0]["sha256"] != result_of(place.folder("kd"))["teacher"]["sha256"]


def test_a_teacher_at_another_path_is_the_same_run(place: Place) -> None:
    torch.manual_seed(7)
    save_weights(resnet20(10), place.path / "a.pth")
    shutil.copy(place.path / "a.pth", place.path / "b.pth")
    assert place.train("method=kd", f"teacher.path={place.path / 'a.pth'}").code == 0
    (place.path / "a.pth").unlink()
    ran = place.train("method=kd", f"teacher.path={place.path / 'b.pth'}")
    assert f"{place.folder('kd')} is finished already" in ran.out


def test_a_teacher_of_other_names_needs_a_class_map(place: Place) -> None:
    torch.manual_seed(7)
    teacher = resnet20(10)
    save_weights(teacher, place.path / "a.pth", class_names=[f"shade {number}" for number in range(10)])
    named = ("method=kd", f"teacher.path={place.path / 'a.pth'}")
    assert_refused(
        place.train(*named), "The teacher has 10 classes (shade 0, shade 1, ...) and the data has 10 (colour 0, colour"
    )
    (place.path / "map.csv").write_text("".join(f"colour {number},shade {9 - number}\n" for number in range(10)))
    assert place.train(*named, f"teacher.class_map={place.path / 'map.csv'}").code == 0
    folder = place.folder("kd")
    assert result_of(folder)["teacher"]["class_index"] == list(range(9, -1, -1))
    assert "The metrics agree with those that the run reported." in place.evaluate(f"run={folder}").out


# The configuration that trains a missing teacher


def untyped(cfg: DictConfig) -> DictConfig:
    """Return a copy whose options accept any value."""
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[return-value]


def another(value: Any) -> Any:
    """Return a value that differs from an option's value, of the same kind where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, DictConfig):
        return {key: another(value[key]) for key in value}
    if isinstance(value, ListConfig):
        return [*value, 1]
    return f"another {value}"


def test_exactly_the_options_of_the_student_alone_have_their_defaults() -> None:
    defaults, schema = OmegaConf.structured(TrainOptions), [option.name for option in dataclasses.fields(TrainOptions)]
    student_only = marked(TrainOptions, "student_only")
    cfg = untyped(configure("method=kd"))
    for option in student_only:
        cfg[option] = another(defaults[option])
        assert cfg[option] != defaults[option]
    alone = teacher_config(cfg)
    assert {option: alone[option] for option in student_only} == {option: defaults[option] for option in student_only}
    replaced = {"model", "method", "serialization", "seed"}
    for option in {*schema} - {*student_only} - replaced:
        if not OmegaConf.is_interpolation(cfg, option):
            kept, own = (OmegaConf.to_container(OmegaConf.create({"x": node[option]})) for node in (alone, cfg))
            assert kept == own, option


def test_method_serialization_and_seed_come_from_the_teachers_options() -> None:
    cfg = configure(
        "method=aekt", "seed=3", "teacher.seed=5", "method@teacher.method=tfkd",
        "serialization@teacher.serialization=parallel",
    )  # fmt: skip
    alone = teacher_config(cfg)
    assert (alone.method.name, alone.serialization._target_, alone.seed) == (
        "tfkd", "src.training.serialization.Parallel", 5,
    )  # fmt: skip
    assert (cfg.method.name, cfg.seed) == ("aekt", 3)


def test_the_teachers_network_is_trained_at_its_own_learning_rate() -> None:
    cfg = configure("model=vgg13_to_mobilenetv2", "method=kd")
    assert cfg.schedule.learning_rate == 0.01
    alone = teacher_config(cfg)
    assert alone.model == {"student": cfg.model.teacher, "teacher": None, "name": "vgg13"}
    assert alone.schedule.learning_rate == 0.05
    assert alone.schedule.epochs == cfg.schedule.epochs


def test_a_student_from_elsewhere_does_not_change_its_teacher() -> None:
    cfg = configure(
        "method=kd", "student.source=timm/resnet18", "standardize_logits=true", "averaging=ema", "optimizer=dot"
    )
    plain = teacher_config(configure("method=kd"))
    assert teacher_config(cfg) == changed(plain, method=cfg.teacher.method)


def test_a_teacher_cannot_be_trained_by_a_method_that_needs_one(place: Place) -> None:
    ran = place.train("method=kd", "method@teacher.method=kd")
    assert_refused(
        ran, "teacher.method=kd learns from a teacher itself, so it cannot train a missing teacher: choose method@te"
    )
    with pytest.raises(UserError, match=r"teacher\.method=dkd learns from a teacher itself"):
        teacher_config(configure("method@teacher.method=dkd"))


def test_a_teacher_by_another_method_is_another_teacher(place: Place) -> None:
    for method in ("vanilla", "tfkd"):
        assert place.train("method=kd", f"method@teacher.method={method}", "network@model.teacher=resnet8").code == 0
    assert len(place.folders("kd")) == 2
    sources = {Path(result_of(folder)["teacher"]["source"]).parts[-3] for folder in place.folders("kd")}
    assert sources == {"vanilla", "tfkd"}
