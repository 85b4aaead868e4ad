"""ExecuTorch files compute what the student computes, in ExecuTorch's runtime, and change nothing else."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.exporting.checking import export_checked, predict_in_batches
from src.exporting.forms import Form, load_form, quantised
from src.exporting.on_device import load_program, write_program
from tests.helpers.exports import METADATA, random_classifier, random_images

pytest.importorskip("executorch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 file, which was compared with the network."""
    network, images, form = random_classifier(), random_images(66), Form.parse("executorch", "float32")
    file = tmp_path_factory.mktemp("student") / form.file_name
    export_checked(network, file, form, images[:1], METADATA, images, predict_in_batches(network, images))
    return file


def test_any_number_of_images_in_any_memory_format_gets_the_students_logits(student: Path) -> None:
    """The runtime itself takes one image, and reads channels-last images in the wrong order without an error."""
    images = random_images(5)
    expected = predict_in_batches(random_classifier(), images)
    predictor = load_form(student, Form("executorch", "float32"), random_classifier())
    torch.testing.assert_close(predictor(images), expected, rtol=1e-5, atol=1e-6)
    strided = images.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert torch.equal(predictor(strided), predictor(images))
    first = predictor(images[:1])
    predictor(images[1:])
    torch.testing.assert_close(first, expected[:1], rtol=1e-5, atol=1e-6)  # no later call overwrites it


def test_the_metadata_are_methods_of_the_file(student: Path) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(student)
    stored = {name: json.loads(program.load_method(name).execute([])[0]) for name in program.method_names - {"forward"}}
    assert stored == {**METADATA, "normalisation": "inside"}


def test_int8_is_small_and_near(student: Path, tmp_path: Path) -> None:
    network, images = random_classifier(), random_images(70)
    expected = predict_in_batches(network, images)
    form = Form.parse("executorch", "int8")
    file = tmp_path / form.file_name
    exported = export_checked(network, file, form, images, METADATA, images, expected)
    assert file.name == "student-int8.pte"
    assert file.stat().st_size < 0.5 * student.stat().st_size
    assert 0 < float((exported - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert torch.equal(exported, predict_in_batches(load_program(file, 2), images))


def test_every_layer_is_quantised_and_the_normalisation_is_not() -> None:
    """Means and standard deviations would be rounded to 8 bits, and with them all pixels."""
    classifier, images = random_classifier(), random_images(70)
    found: Any = quantised(classifier, images)
    nodes = found.network.graph.graph.nodes
    assert sum("dequantize_per_channel" in str(node.target) for node in nodes) == 10  # 9 convolutions, 1 linear layer
    assert found.mean == classifier.mean
    assert quantised(found, images) is found


def test_logging_and_stderr_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without handlers of its own, the root logger gets one from the first message of a library."""
    network, images, root = random_classifier(), random_images(2), logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])
    write_program(network, tmp_path / "student.pte", images, {})
    load_program(tmp_path / "student.pte", 1)(images)
    assert (root.handlers, root.level) == ([], level)
    assert capfd.readouterr().err == ""


def test_operators_that_xnnpack_leaves_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_program(random_classifier(), tmp_path / "student.pte", random_images(1), {})
    (message,) = [record.getMessage() for record in caplog.records if "XNNPACK" in record.getMessage()]
    assert "aten_mean_dim (1)" in message
    assert "convolution" not in message


def test_a_file_that_the_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student.pte").write_bytes(b"noise")
    with pytest.raises(UserError, match=r"executorch cannot load .*student\.pte"):
        load_program(tmp_path / "student.pte", 1)
