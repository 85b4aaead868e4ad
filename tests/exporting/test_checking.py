"""An exported file is compared with the student, and a file that computes something else is not kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.data.array_file import load_arrays
from src.exporting import checking
from src.exporting.checking import (
    compare,
    export_checked,
    predict_in_batches,
    refuse_mismatch,
    sample_test_images,
    sample_training_images,
    spread_out,
)
from src.exporting.forms import Classifier, Form, write_form
from src.models.resnet import resnet8
from tests.helpers.exports import METADATA, random_classifier, random_images
from tests.helpers.tiny import CLASSES, MEAN, STD, tiny_data


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, Tensor, Tensor]:
    """A student that tells colours apart, images and their classes."""
    torch.manual_seed(0)
    network, target = resnet8(CLASSES), torch.arange(64) % CLASSES
    colours = torch.tensor([[200.0, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])
    images = (colours[target][:, :, None, None] + 40 * torch.randn(64, 3, 16, 16)).clamp(0, 255).to(torch.uint8)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(30):
        nn.functional.cross_entropy(network((images / 255 - 0.5) / 0.25), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Classifier(network, MEAN, STD), images, target


def test_int8_is_small_and_nearly_as_accurate(trained: tuple[Classifier, Tensor, Tensor], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, images, target = trained
    student = predict_in_batches(network, images)
    sizes = {}
    for precision in ("float32", "int8"):
        form = Form("onnx", precision)
        file = tmp_path / form.file_name
        exported = export_checked(network, file, form, images[:32], METADATA, images, student)
        sizes[precision] = file.stat().st_size
    check = compare(student, exported, target)
    assert check.student_accuracy > 0.95
    assert check.accuracy > 0.9
    assert check.difference > 0
    assert sizes["int8"] < 0.6 * sizes["float32"]
    stored = onnxruntime.InferenceSession(tmp_path / "student-int8.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(stored["class_names"]) == METADATA["class_names"]


def test_int8_in_onnx_has_unsigned_activations_and_weights_of_7_bits(tmp_path: Path) -> None:
    """8 bits saturate without VNNI, and signed activations are slow on x86."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_form(random_classifier(), tmp_path / "x.onnx", Form("onnx", "int8"), random_images(8), {})
    tensors = onnx.load(tmp_path / "x.onnx").graph.initializer
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    weights = [value for name, value in values.items() if name.endswith("weight_quantized")]
    assert {value.dtype for value in weights} == {np.dtype("int8")}
    assert max(np.abs(value.astype(int)).max() for value in weights) == 64
    assert {value.dtype for name, value in values.items() if name.startswith("relu") and "zero_point" in name} == {
        np.dtype("uint8")
    }


def test_compare_and_refuse() -> None:
    student = torch.tensor([[4.0, 0], [0, 4], [1, 0], [0, 1]])
    exported = torch.tensor([[4.0, 0], [0, 4], [0, 1], [0, 1]])
    check = compare(student, exported, torch.tensor([0, 1, 1, 0]))
    assert check == (4, 1.0, 4.0, 3, 0.5, 0.75)
    with pytest.raises(UserError, match=r"does not compute the student's logits.*same top-1 on 3 of 4"):
        refuse_mismatch(check, Form("onnx", "int8"))
    refuse_mismatch(compare(student, student + 1e-4, torch.zeros(4)), Form("onnx", "float32"))
    for wrong in (student + 1e-2, torch.full((4, 2), torch.nan)):
        with pytest.raises(UserError):
            refuse_mismatch(compare(student, wrong, torch.zeros(4)), Form("onnx", "float32"))


def test_a_mismatch_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, file = random_classifier(), random_images(), tmp_path / "student.pt"
    file.write_text("before")
    student = predict_in_batches(network, images)
    monkeypatch.setattr(checking, "load_form", lambda *_: lambda batch: network(batch) + 1)
    with pytest.raises(UserError, match="is not kept"):
        export_checked(network, file, Form("torchscript", "float32"), images, METADATA, images, student)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(("count", "wanted"), [(10, 3), (3, 10), (7, 7), (10_000, 1), (1000, 999)])
def test_positions_are_spread_out(count: int, wanted: int) -> None:
    positions = spread_out(count, wanted)
    gaps = positions.diff()
    assert len(positions) == min(count, wanted)
    assert positions[0] == 0
    assert positions[-1] < count
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_samples_are_images_as_evaluation_sees_them(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    images, target = sample_test_images(data, 5)
    chosen = spread_out(17, 5)
    assert torch.equal(images, data.test_images(chosen.tolist()))
    assert torch.equal(target, data.source.test_labels[chosen])
    assert sample_test_images(data, 1000)[0].shape == (17, 3, 16, 16)
    training = sample_training_images(data, 4)
    assert (training.dtype, training.shape) == (torch.uint8, (4, 3, 16, 16))
    stored = load_arrays(tmp_path / "tiny.npz").train_images
    assert torch.equal(training, stored[data.train_index[spread_out(44, 4)]])
