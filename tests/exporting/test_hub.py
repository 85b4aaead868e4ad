"""Folders for the Hugging Face Hub: they load to the student that was written, or are refused in one sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.data import photos
from src.data.views import normalise
from src.exporting import hub
from src.exporting.checking import predict_in_batches
from src.exporting.forms import Classifier, make_classifier
from src.exporting.hub import (
    CONFIG,
    WEIGHTS,
    Preprocessing,
    export_folder,
    load_hub_folder,
    preprocessing_of,
    refuse_unfit,
    write_network,
)
from src.methods.simkd import SimKD
from src.methods.vanilla import Vanilla
from src.models.sources import architecture
from src.setup.networks import make_network
from src.setup.reopen import Opened
from tests.helpers.configure import configure
from tests.helpers.exports import METADATA, random_classifier, random_images
from tests.helpers.photo_folders import encoded, picture
from tests.helpers.place import Hostile
from tests.helpers.tiny import CLASSES, MEAN, STD, tiny_data, tiny_distiller, tiny_teacher

timm = pytest.importorskip("timm")
pytest.importorskip("huggingface_hub")

RESNET8 = OmegaConf.create({"_target_": "src.models.resnet.resnet8", "name": "resnet8", "learning_rate": 0.05})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the weights and the configuration of a resnet8."""
    write_network(random_classifier(), RESNET8, tmp_path, METADATA)
    return tmp_path


@pytest.mark.parametrize("option", ["resnet8", "wrn16_2", "mobilenetv2", "shufflev2", "torchvision", "timm"])
def test_every_kind_of_network_loads_to_the_same_logits(option: str, tmp_path: Path) -> None:
    if option in ("torchvision", "timm"):
        source = {"torchvision": "torchvision/mobilenet_v3_small", "timm": "timm/test_resnet"}[option]
        node = OmegaConf.create({"_target_": "src.models.sources.architecture", "source": source})
    else:
        node = configure(f"network@model.student={option}").model.student
    classifier = random_classifier(lambda classes: make_network(node, "model.student", classes), 32)
    classifier.mean, classifier.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    size = {"image_size": [32, 32], "resize": [37, 37], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    write_network(classifier, node, tmp_path, {**METADATA, **size})
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG}

    loaded = load_hub_folder(tmp_path)
    images = random_images(5, 32)
    assert torch.equal(predict_in_batches(loaded.classifier, images), predict_in_batches(classifier, images))
    assert loaded[1:] == (METADATA["class_names"], (32, 32), (37, 37))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert ("network" in config) == (option != "timm")
    assert config["num_classes"] == CLASSES


def test_the_preprocessing_is_stored_under_the_names_of_timm(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    assert config["label_names"] == METADATA["class_names"]
    assert config["pretrained_cfg"] == {
        "input_size": [3, 16, 16], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
        "mean": list(MEAN), "std": list(STD),
    }  # fmt: skip
    expected = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    assert {name: list(expected[name]) for name in ("input_size", "mean", "std")} == {
        "input_size": [3, 16, 16], "mean": list(MEAN), "std": list(STD),
    }  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 4096).flatmap(lambda resize: st.tuples(st.integers(1, resize), st.just(resize))))
def test_the_size_before_the_crop_survives_its_division(sizes: tuple[int, int]) -> None:
    size, resize = sizes
    stored = preprocessing_of({**METADATA, "image_size": [size, size], "resize": [resize, resize]})
    assert Preprocessing.model_validate(stored).resize == (resize, resize)


def test_timm_prepares_a_picture_as_evaluation_does(tmp_path: Path) -> None:
    network = Classifier(architecture("timm/test_resnet", CLASSES), MEAN, STD)
    metadata = {**METADATA, "image_size": [25, 25], "resize": [28, 28]}  # 25 / (25 / 28) is less than 28
    write_network(network, RESNET8, tmp_path, metadata)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for width, height in ((60, 45), (28, 90), (25, 25)):
        image = picture(1, width, height)
        cut = photos.centre(photos.Photo(encoded(image, "PNG"), "image"), 28, 25)
        expected = normalise(torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)[None], MEAN, STD)
        torch.testing.assert_close(transform(image)[None], expected)


def test_the_published_weights_of_the_architecture_are_not_described(tmp_path: Path) -> None:
    network = architecture("timm/mobilenetv3_small_050.lamb_in1k", CLASSES)
    described: Any = network.model
    assert described.pretrained_cfg["license"] == "apache-2.0"
    write_network(Classifier(network, MEAN, STD), OmegaConf.create({}), tmp_path, METADATA)
    text = (tmp_path / CONFIG).read_text()
    assert not any(word in text for word in ("lamb_in1k", "apache", "hf_hub_id", "http"))
    assert described.pretrained_cfg["license"] == "apache-2.0"


# Refusals


def test_a_student_that_does_not_predict_alone_is_refused(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, SimKD(feature_weight=1.0, factor=2), teacher=tiny_teacher())
    with pytest.raises(UserError, match=r"predicts through parts of the method: use format=onnx\."):
        refuse_unfit(distiller)
    refuse_unfit(tiny_distiller(data, Vanilla()))


@pytest.mark.parametrize("package", ["timm", "huggingface_hub", "safetensors"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^{package} is not installed: pip install -e '\.\[hub\]'\.$"):
        refuse_unfit(tiny_distiller(tiny_data(tmp_path), Vanilla()))


def test_a_mismatch_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, Vanilla())
    cfg = OmegaConf.create({"model": {"student": RESNET8}, "data": {"name": "tiny", "path": None}})
    opened, classifier = Opened(cfg, distiller, data), make_classifier(distiller)
    images, target = random_images(), torch.zeros(7, dtype=torch.int64)
    out = tmp_path / "place" / "out"

    def export(folder: Path) -> None:
        export_folder(opened, classifier, folder, METADATA, None, images, target)

    export(out)
    (out / ".gitattributes").write_text("a file of the user")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert before.keys() == {WEIGHTS, CONFIG, "README.md", ".gitattributes"}
    export(out)
    assert {file.name for file in out.iterdir()} == before.keys()
    other = hub.HubStudent(random_classifier(), [], (16, 16), (16, 16))
    monkeypatch.setattr(hub, "load_hub_folder", lambda _: other)
    for place in (out, out.parent / "new"):
        with pytest.raises(UserError, match="does not compute the student's logits and is not kept"):
            export(place)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_hub_folder(folder)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_without_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert f"has no {name}: give a folder that src.export wrote with format=hub" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"label_names": []}, "label_names"),
        ({"label_names": [1, 2]}, "label_names"),
        ({"label_names": None}, "label_names"),
        ({"label_names": ["one", "two"]}, "cannot be loaded"),
        ({"pretrained_cfg": {}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [1, 16, 16]}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [3, 16, -16]}}, "pretrained_cfg.input_size"),
        ({"pretrained_cfg": {"input_size": [3, 16, 100_000]}}, "more than 4096 pixels"),
        ({"pretrained_cfg": {"crop_pct": 1e-9}}, "more than 4096 pixels"),
        ({"pretrained_cfg": {"crop_pct": 2}}, "pretrained_cfg.crop_pct"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "pretrained_cfg.std"),
        ({"network": {"_target_": "os.system", "command": "touch executed"}}, "would call os.system"),
        ({"network": {"_target_": "src.models.resnet.resnet8", "x": {"_target_": "os.mkdir"}}}, "would call os.mkdir"),
        ({"network": {"_target_": "src.models.resnet.resnet20"}}, "cannot be loaded"),
        ({"network": {"_target_": "src.models.resnet.resnet8", "depth": 3}}, "network.depth=3 is not an option"),
        ({"network": {"_target_": "src.methods.aekt.AEKT"}}, "network"),
        ({"network": {}}, "cannot be loaded"),
        ({"network": {"_target_": "src.models.resnet.resnet8", "x": "${nonsense:"}}, "cannot be loaded"),
        ({"network": None}, "cannot be loaded"),  # timm has no resnet8
    ],
    ids=str,
)
def test_a_garbled_configuration_is_refused(changes: dict[str, Any], phrase: str, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if key == "pretrained_cfg" and value else value
    (folder / CONFIG).write_text(json.dumps(config))
    assert phrase in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"noise", b"[]", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_damaged_configuration_is_refused(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    assert str(folder / CONFIG) in refusal(folder)


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_damaged_weights_and_pickles_are_refused(kind: str, tmp_path: Path) -> None:
    node = RESNET8
    classifier = random_classifier()
    if kind == "timm":
        classifier = Classifier(architecture("timm/test_resnet", CLASSES), MEAN, STD)
    write_network(classifier, node, tmp_path, METADATA)
    content = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (b"", content[:-100], b"noise" * 100):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        assert "cannot be loaded (" in refusal(tmp_path)
    torch.save(Hostile(tmp_path), tmp_path / WEIGHTS)
    torch.save(Hostile(tmp_path), tmp_path / "pytorch_model.bin")
    assert "cannot be loaded (" in refusal(tmp_path)
    assert not (tmp_path / "executed").exists()
