"""A run, or a bare checkpoint, is opened for evaluation without executing what its files ask for."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.data.array_file import save_arrays
from src.models.checkpoints import read_state_dict, save_weights
from src.models.resnet import resnet8, resnet14
from src.models.sources import pretrained
from src.setup.reopen import (
    blank_teacher,
    find_targets,
    is_trusted,
    known_targets,
    open_run,
    open_run_or_checkpoint,
    read_config,
    read_result,
    read_teacher,
)
from tests.helpers.arrays import colour_arrays
from tests.helpers.configure import changed, configure
from tests.helpers.place import Place, result_of
from tests.helpers.tiny import same, weights


@pytest.fixture
def aekt(finished: Place) -> Path:
    """The folder of a finished run. Tests only read it."""
    return finished.folder("aekt", "serial")


@pytest.fixture
def copied(copies: Place) -> Path:
    """A copy of the run, which a test may change."""
    return copies.folder("aekt", "serial")


# Configurations


@pytest.mark.parametrize("strategy", ["ddp", {"_target_": "lightning.pytorch.strategies.DDPStrategy"}])
def test_a_runs_configuration_is_adapted_to_one_device_of_this_machine(copied: Path, strategy: Any) -> None:
    config: Any = OmegaConf.load(copied / "config.yaml")
    config.trainer.update(accelerator="gpu", devices=8, strategy=strategy)
    config.data.root = "/nowhere"
    OmegaConf.save(config, copied / "config.yaml")
    cfg = read_config(copied, "here")
    assert (cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.strategy) == ("auto", 1, "auto")
    assert (cfg.data.root, cfg.data.path) == ("here", config.data.path)
    assert read_config(copied, "here", "other.npz").data.path == "other.npz"


def test_an_existing_data_root_is_kept(copied: Path, tmp_path: Path) -> None:
    config: Any = OmegaConf.load(copied / "config.yaml")
    config.data.root = str(tmp_path)
    OmegaConf.save(config, copied / "config.yaml")
    assert read_config(copied, "here").data.root == str(tmp_path)


def test_photos_without_labels_may_be_gone(copied: Path, tmp_path: Path) -> None:
    config: Any = OmegaConf.load(copied / "config.yaml")
    config.data.update(unlabelled=str(tmp_path / "gone"), unlabelled_share=0.5)
    OmegaConf.save(config, copied / "config.yaml")
    data = read_config(copied, str(tmp_path)).data
    assert (data.unlabelled, data.unlabelled_share) == (None, None)


def test_options_that_a_configuration_lacks_have_their_defaults(copied: Path) -> None:
    config: Any = OmegaConf.load(copied / "config.yaml")
    del config["averaging"]
    del config.teacher["fold"]
    OmegaConf.save(config, copied / "config.yaml")
    cfg = read_config(copied, "here")
    assert cfg.averaging is None
    assert cfg.teacher.fold is False


@pytest.mark.parametrize("text", ["model: [", "seed: abc", "- a\n- b", "teacher: 3", "nonsense: 1"])
def test_a_damaged_configuration_is_refused(copied: Path, text: str) -> None:
    (copied / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or was written by another version .*choose another"):
        read_config(copied, "here")


def test_targets_are_found_at_every_depth() -> None:
    node = {"a": {"_target_": "one", "b": [1, {"_target_": "two"}, [{"c": {"_target_": "three"}}]]}, "_target_": "four"}
    assert sorted(find_targets(node)) == ["four", "one", "three", "two"]
    assert find_targets(3) == []


def test_targets_of_conf_and_of_torchs_optimisers_are_trusted() -> None:
    methods, networks = {"src.methods.aekt.AEKT"}, {"src.models.resnet.resnet8", "src.models.sources.architecture"}
    known = {*methods, *networks, "src.data.folder_data.FolderData", "lightning.Trainer"}
    assert known <= known_targets()
    for target in [*known, "torch.optim.AdamW", "torch.optim.lr_scheduler.StepLR"]:
        assert is_trusted(target)
    for target in ("os.system", "src.common.files.write_text", "torch.hub.load", "torch.optim.nothing", "torch.optim"):
        assert not is_trusted(target)


# Runs


def test_an_opened_run_has_the_last_weights_and_the_teachers_predictions(finished: Place, aekt: Path) -> None:
    cfg, distiller, data = open_run(aekt, read_config(aekt, "here"))
    assert (cfg.method.name, data.num_classes) == ("aekt", 10)
    assert same(weights(distiller.student), read_state_dict(aekt / "student.pth"))
    (trained,) = [folder for folder in finished.folders("vanilla") if folder.parts[-3] == "resnet20"]
    assert distiller.teacher is not None
    assert not same(weights(distiller.teacher.network), read_state_dict(trained / "student.pth"))
    predicted = distiller.teacher_predictions["test"]
    assert predicted.shape == (60,)
    scored = predicted[predicted >= 0]
    right = (scored == data.source.test_labels[predicted >= 0]).double().mean().item()
    assert right == pytest.approx(result_of(aekt)["teacher"]["accuracy"])


def test_a_run_whose_stored_answers_are_gone_has_no_predictions(copied: Path) -> None:
    shutil.rmtree(copied.parents[3] / "teachers")
    assert open_run(copied, read_config(copied, "here")).distiller.teacher_predictions == {}


def test_a_run_without_a_teacher_has_none(finished: Place) -> None:
    folder = next(path for path in finished.folders("vanilla") if path.parts[-3] == "resnet8")
    opened = open_run(folder, read_config(folder, "here"))
    assert opened.distiller.teacher is None
    assert read_teacher(folder) is None


def test_a_run_without_its_record_is_named(copied: Path) -> None:
    (copied / "run.json").unlink()
    with pytest.raises(UserError, match=r"has no run\.json, which describes its teacher: choose another run\.$"):
        read_teacher(copied)


@pytest.mark.parametrize("new_head", ["false", "true"])
def test_a_finished_run_is_opened_without_its_initial_weights(place: Place, new_head: str) -> None:
    initial = place.path / "initial.pth"
    save_weights(resnet8(10), initial, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert place.train("method=vanilla", f"student.path={initial}", f"student.new_head={new_head}").code == 0
    initial.unlink()
    folder = place.folder("vanilla")
    opened = open_run(folder, read_config(folder, "here"))
    assert same(weights(opened.distiller.student), read_state_dict(folder / "student.pth"))
    assert (opened.distiller.settings.mean, opened.distiller.settings.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "student.pth").unlink()
    with pytest.raises(UserError, match=r"initial\.pth"):
        open_run(folder, read_config(folder, "here"))


def test_the_weights_of_a_library_are_not_downloaded_for_a_finished_run(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.setup.networks.pretrained", Mock(side_effect=UserError("There is no network.")))
    monkeypatch.setattr("src.setup.reopen.prepare", lambda cfg: cfg)  # the configuration of the run has its network
    opened = open_run(copied, changed(read_config(copied, "here"), student__source="timm/resnet8"))
    assert same(weights(opened.distiller.student), read_state_dict(copied / "student.pth"))


def test_a_run_without_a_checkpoint_cannot_be_opened(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(
        UserError, match=r"has no checkpoints/last\.ckpt, so there is nothing to open: choose another run"
    ):
        open_run(copied, read_config(copied, "here"))


def test_a_checkpoint_of_other_networks_does_not_fit(copied: Path) -> None:
    cfg = changed(read_config(copied, "here"), model__student___target_="src.models.resnet.resnet14")
    with pytest.raises(UserError, match=r"last\.ckpt does not fit the networks of .*config\.yaml \("):
        open_run(copied, cfg)


def test_a_run_that_does_not_describe_its_teacher_is_refused(copied: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    del record["teacher"]["key"]
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json does not describe the run's teacher: choose another run"):
        open_run(copied, read_config(copied, "here"))


def test_a_blank_teacher_has_the_classes_of_the_runs_teacher(aekt: Path) -> None:
    cfg, _, data = open_run(aekt, read_config(aekt, "here"))
    facts = read_teacher(aekt)
    assert facts is not None
    assert blank_teacher(cfg, data, facts).network.classifier_layer.out_features == 10
    chosen = facts.model_copy(update={"class_index": [*range(9), 41], "mean": [0.1, 0.2, 0.3]})
    teacher = blank_teacher(cfg, data, chosen)
    assert teacher.network.classifier_layer.out_features == 42
    assert teacher.mean == (0.1, 0.2, 0.3)


def test_a_result_is_that_of_a_finished_run(aekt: Path, tmp_path: Path) -> None:
    result = read_result(str(aekt))
    assert result is not None
    assert result.test.accuracy == result_of(aekt)["test"]["accuracy"]
    assert read_result(str(tmp_path)) is None
    assert read_result(None) is None


# What the commands open


def test_a_checkpoint_becomes_the_configured_student(finished: Place, tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = resnet8(10)
    save_weights(network, tmp_path / "a.pth", mean=[0.1, 0.2, 0.3])
    overrides = ("data=cifar10", "network@model.student=resnet8")
    cfg = changed(
        configure(*overrides, command="evaluate"), checkpoint=str(tmp_path / "a.pth"), data__path=str(finished.data)
    )
    opened = open_run_or_checkpoint(cfg)
    assert same(weights(opened.distiller.student), weights(network))
    assert opened.distiller.settings.mean == (0.1, 0.2, 0.3)
    assert opened.distiller.teacher is None
    trained_from_others = changed(cfg, student__new_head=True, student__pretrained=False)
    assert same(weights(open_run_or_checkpoint(trained_from_others).distiller.student), weights(network))
    save_weights(resnet14(10), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth does not hold the weights of"):
        open_run_or_checkpoint(cfg)
    save_weights(resnet8(7), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"7 classes, but the network has 10: give a checkpoint of a network with the"):
        open_run_or_checkpoint(cfg)
    save_weights(network, tmp_path / "a.pth", classifies=False)
    with pytest.raises(UserError, match=r"The classifier in .*a\.pth is not trained, .*run=FOLDER instead\."):
        open_run_or_checkpoint(cfg)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, None),
        ([str(number) for number in range(10)], None),
        ([f"colour {number}" for number in range(10)], None),
        ([f"shade {number}" for number in range(10)], "calls a class shade 0 that the data calls colour 0"),
        ([f"colour {9 - number}" for number in range(10)], "calls a class colour 9 that the data calls colour 0"),
    ],
)
def test_a_checkpoint_of_other_classes_is_refused(
    finished: Place, tmp_path: Path, names: list[str] | None, message: str | None
) -> None:
    save_weights(resnet8(10), tmp_path / "a.pth", class_names=names)
    composed = configure("data=cifar10", "network@model.student=resnet8", command="evaluate")
    cfg = changed(composed, checkpoint=str(tmp_path / "a.pth"), data__path=str(finished.data))
    if message is None:
        assert open_run_or_checkpoint(cfg).data.num_classes == 10
        return
    with pytest.raises(UserError, match=rf"^checkpoint=.*a\.pth was trained on other classes.*{message}"):
        open_run_or_checkpoint(cfg)


def test_a_checkpoint_of_a_library_has_its_normalisation_and_other_data_are_named(
    finished: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = pretrained("torchvision/resnet18", 10, download=False).network
    save_weights(network, tmp_path / "a.pth", data="other")
    composed = configure("data=cifar10", "student.source=torchvision/resnet18", command="evaluate")
    cfg = changed(composed, checkpoint=str(tmp_path / "a.pth"), data__path=str(finished.data))
    opened = open_run_or_checkpoint(cfg)
    assert opened.distiller.settings.mean == (0.485, 0.456, 0.406)
    assert caplog.messages[-1].endswith("a.pth was trained on other data, or at another image size, than is read now.")


def test_a_run_is_opened_on_data_of_its_classes(aekt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other images of the same classes get a warning. Other classes are refused."""
    arrays = colour_arrays()
    open_run(aekt, read_config(aekt, "here"))
    assert "was trained on other data" not in caplog.text
    save_arrays(tmp_path / "images.npz", **{**arrays, "test_images": 255 - arrays["test_images"]})
    open_run(aekt, read_config(aekt, "here", str(tmp_path / "images.npz")))
    assert f"{aekt} was trained on other data than the data that is read now." in caplog.messages
    save_arrays(tmp_path / "names.npz", **{**arrays, "class_names": arrays["class_names"][::-1]})
    with pytest.raises(UserError, match="it calls a class colour 0 that the data calls colour 9"):
        open_run(aekt, read_config(aekt, "here", str(tmp_path / "names.npz")))


def test_a_run_is_opened_on_the_accelerator_of_the_command(finished: Place, aekt: Path) -> None:
    cfg = changed(configure("trainer=cpu", command="evaluate"), run=str(aekt), data__path=str(finished.data))
    opened = open_run_or_checkpoint(cfg)
    assert (opened.cfg.trainer.accelerator, opened.cfg.method.name) == ("cpu", "aekt")


def test_a_given_data_root_replaces_that_of_the_run_even_if_it_exists(
    finished: Place, aekt: Path, tmp_path: Path
) -> None:
    for given in ({}, {"data__root": str(tmp_path)}):
        cfg = changed(configure(command="evaluate"), run=str(aekt), data__path=str(finished.data), **given)
        own = read_config(aekt, cfg.data.root).data.root
        assert open_run_or_checkpoint(cfg).cfg.data.root == given.get("data__root", own)


@pytest.mark.parametrize(("run", "checkpoint"), [(None, None), ("runs/x", "x.pth")])
def test_exactly_one_of_run_and_checkpoint_is_opened(run: str | None, checkpoint: str | None) -> None:
    cfg = changed(configure(command="evaluate"), run=run, checkpoint=checkpoint)
    with pytest.raises(UserError, match=r"^Give exactly one of run=FOLDER .* and checkpoint=FILE"):
        open_run_or_checkpoint(cfg)


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder, because it has no config\.yaml: choose another run"):
        open_run_or_checkpoint(changed(configure(command="evaluate"), run=str(tmp_path)))
