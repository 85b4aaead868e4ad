"""Exported files compute what the student computes, in their own runtime, and hold the metadata."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.common.errors import UserError
from src.exporting.checking import export_checked, predict_in_batches
from src.exporting.forms import Classifier, Form, load_form, make_classifier, write_form
from src.methods.vanilla import Vanilla
from src.models.network import Network
from src.models.resnet import resnet8
from tests.helpers.exports import METADATA, random_classifier, random_images
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import CLASSES, MEAN, STD, tiny_data, tiny_distiller

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")

FAST = {"resnet8", "vgg8"}


@pytest.mark.parametrize(
    "new_network",
    [pytest.param(family, marks=() if family.__name__ in FAST else pytest.mark.slow) for family in FAMILIES],
    ids=lambda make: make.__name__,
)
def test_every_family_computes_the_same_in_onnxruntime(new_network: Any, tmp_path: Path) -> None:
    network, images, file = random_classifier(new_network, 32), random_images(70, 32), tmp_path / "student.onnx"
    expected = predict_in_batches(network, images)
    exported = export_checked(network, file, Form("onnx", "float32"), images[:1], METADATA, images, expected)
    assert exported.shape == (70, CLASSES)  # from a batch of 64 and one of 6
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


@pytest.mark.parametrize(
    ("format", "precision", "tolerance"),
    [
        ("onnx", "float16", 0.01),
        ("exported_program", "float32", 1e-5),
        ("exported_program", "bfloat16", 0.1),
        ("torchscript", "float32", 1e-5),
        ("torchscript", "float16", 0.01),
        ("safetensors", "float32", 0),
        ("safetensors", "bfloat16", 0.1),
    ],
)
def test_every_form_computes_the_same(format: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    network, images, form = random_classifier(), random_images(), Form.parse(format, precision)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = predict_in_batches(network, images)
    exported = export_checked(network, tmp_path / form.file_name, form, images, METADATA, images, expected)
    assert exported.dtype == torch.float32
    assert float((exported - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert precision == "float32" or not torch.equal(exported, expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def stored_metadata(file: Path, format: str) -> dict[str, str]:
    """Read the metadata of an exported file with the library of its format."""
    if format == "onnx":
        return onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    if format == "safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            assert set(opened.keys()) == set(resnet8(CLASSES).state_dict())
            return opened.metadata()
    extra = {"metadata.json": ""}
    if format == "exported_program":
        torch.export.load(file, extra_files=extra)
    else:
        torch.jit.load(str(file), _extra_files=extra)
    return json.loads(extra["metadata.json"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is deprecated
@pytest.mark.parametrize("format", ["onnx", "exported_program", "torchscript", "safetensors"])
def test_the_file_holds_the_metadata(format: str, tmp_path: Path) -> None:
    form = Form(format, "float32")
    file = tmp_path / form.file_name
    network, images = random_classifier(), random_images()
    export_checked(network, file, form, images, METADATA, images, predict_in_batches(network, images))
    stored = {key: json.loads(value) for key, value in stored_metadata(file, format).items()}
    assert stored == {**METADATA, "normalisation": "outside" if format == "safetensors" else "inside"}
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


class Projected(Vanilla):
    """A method with a predictor that has parameters of its own, as SimKD's has."""

    def allocate(self, networks: Any) -> None:
        self.head = nn.Linear(CLASSES, CLASSES)

    def predictor(self, student: Network) -> nn.Module:
        return nn.Sequential(student, self.head)


def test_a_methods_own_predictor_is_exported(tmp_path: Path) -> None:
    distiller = tiny_distiller(tiny_data(tmp_path), Projected())
    images = random_images()
    with torch.no_grad():
        expected = distiller.eval().predict_logits(images)
    network = make_classifier(distiller)
    torch.testing.assert_close(predict_in_batches(network, images), expected)
    file = tmp_path / "student.pt2"
    form = Form("exported_program", "float32")
    exported = export_checked(network, file, form, images, METADATA, images, expected)
    torch.testing.assert_close(exported, expected)
    student_alone = predict_in_batches(Classifier(distiller.student, MEAN, STD), images)
    assert not torch.allclose(exported, student_alone)


@pytest.mark.parametrize(
    ("package", "format", "extra"),
    [
        ("onnx", "onnx", "export"),
        ("safetensors.torch", "safetensors", "export"),
        ("executorch", "executorch", "executorch"),
    ],
)
def test_a_missing_package_is_reported_in_one_sentence(
    package: str, format: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package.partition('.')[0]} is not installed: pip install -e '.\[{extra}\]'"
    with pytest.raises(UserError, match=message):
        write_form(random_classifier(), tmp_path / "file", Form(format, "float32"), random_images(), {})


def test_a_file_that_onnxruntime_cannot_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"onnxruntime cannot load .*student\.onnx"):
        load_form(tmp_path / "student.onnx", Form("onnx", "float32"), nn.Identity())
