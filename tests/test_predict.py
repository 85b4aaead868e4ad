"""The command `python -m src.predict`: it needs only its runtime, and reads pictures as evaluation does."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from src import predict
from src.data import photos
from src.exporting.forms import Classifier, Form, write_form
from src.exporting.hub import write_network
from src.models.resnet import resnet8
from src.models.sources import architecture
from tests.helpers.commands import SOURCE
from tests.helpers.photo_folders import encoded, files, picture

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

NAMES = ["ant", "bee", "c\x1b[31mat", "dog"]
METADATA: dict[str, Any] = {"class_names": NAMES, "image_size": [16, 16], "resize": [20, 20], "normalisation": "inside"}


def small_student() -> Classifier:
    torch.manual_seed(0)
    network = resnet8(4)
    network.train()(torch.randn(16, 3, 16, 16))
    return Classifier(network, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("student") / "student.onnx"
    write_form(small_student(), file, Form("onnx", "float32"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), METADATA)
    return file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image.png"
    picture(1, 40, 30).save(file)
    return file


def test_it_imports_only_the_runtime() -> None:
    tree = ast.parse((SOURCE / "predict.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {"numpy", "PIL"}


def test_it_runs_without_anything_else(student: Path, image: Path, tmp_path: Path) -> None:
    """Run the file by its path, in a process in which no other package of this project can be imported."""
    blocked = "torch", "torchvision", "lightning", "hydra", "omegaconf", "onnx", "src"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); "
        f"runpy.run_path({str(SOURCE / 'predict.py')!r}, run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, student, image, "--top", "2"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    pixels = torch.from_numpy(np.asarray(photos.centre(photos.Photo(image.read_bytes(), "image"), 20, 16)).copy())
    with torch.no_grad():
        expected = small_student()(pixels.permute(2, 0, 1)[None]).softmax(dim=1)[0]
    shown = [predict.printable(NAMES[k]) for k in expected.argsort(descending=True)[:2]]
    first, *lines = ran.stdout.splitlines()
    assert first == str(image)
    assert [line.split("%  ")[1] for line in lines] == shown
    assert [float(line.split("%")[0]) for line in lines] == pytest.approx(
        [round(100 * float(value), 2) for value in expected.sort(descending=True).values[:2]], abs=0.011
    )


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_a_folder_for_the_hub_predicts_what_the_onnx_file_predicts(
    kind: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    network, folder = small_student(), tmp_path / "folder"
    if kind == "timm":
        network = Classifier(architecture("timm/test_resnet", 4), network.mean, network.std)
    folder.mkdir()
    described = {**METADATA, "network": "resnet8", "mean": network.mean, "std": network.std}
    write_network(network, OmegaConf.create({"_target_": "src.models.resnet.resnet8"}), folder, described)
    onnx_file = tmp_path / "student.onnx"
    write_form(network, onnx_file, Form("onnx", "float32"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), METADATA)
    shown = []
    for student in (folder, onnx_file):
        assert predict.main([str(student), str(image)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        shown.append(out.splitlines())
    assert shown[0][0] == str(image)
    assert [line.split("%")[1] for line in shown[0][1:]] == [line.split("%")[1] for line in shown[1][1:]]
    percent = [[float(line.split("%")[0]) for line in lines[1:]] for lines in shown]
    assert percent[0] == pytest.approx(percent[1], abs=0.011)


@pytest.mark.slow
def test_an_executorch_file_gives_the_probabilities_of_the_onnx_file(
    student: Path, image: Path, tmp_path: Path
) -> None:
    """In a process in which onnxruntime cannot be imported."""
    pytest.importorskip("executorch")
    file, pixels = tmp_path / "student.pte", torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    write_form(small_student(), file, Form("executorch", "float32"), pixels, METADATA)
    outputs = []
    for exported, blocked in ((student, "executorch"), (file, "onnxruntime")):
        code = (
            f"import sys, runpy; sys.modules.update({{'src': None, {blocked!r}: None}}); "
            f"runpy.run_path({str(SOURCE / 'predict.py')!r}, run_name='__main__')"
        )
        command: list[str | Path] = [sys.executable, "-c", code, exported, image]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        outputs.append(ran.stdout)
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == 5


def test_a_missing_runtime_is_named(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    (tmp_path / "student.pte").write_bytes(b"")
    assert refused(tmp_path / "student.pte", image, capsys) == (
        "error: executorch is not installed: pip install executorch."
    )


def test_classes_that_share_a_name_are_told_apart_by_their_numbers(student: Path) -> None:
    loaded = predict.load(student)._replace(class_names=["crane", "dog", "crane", "owl"])
    assert [loaded.label(number) for number in range(4)] == ["crane (0)", "dog", "crane (2)", "owl"]


@pytest.mark.parametrize("name", sorted(files(0)))
def test_pictures_are_read_as_in_evaluation(name: str, tmp_path: Path) -> None:
    file = tmp_path / Path(name).name
    file.write_bytes(files(0)[name])
    cut = predict.central_crop(predict.read_picture(file), (20, 20), (16, 16))
    expected = photos.centre(photos.Photo(file.read_bytes(), name), 20, 16)
    if name == "d.Jpg":  # evaluation decodes large JPEGs at a reduced size
        assert np.abs(np.asarray(cut, dtype=int) - np.asarray(expected, dtype=int)).mean() < 4
    else:
        assert np.array_equal(np.asarray(cut), np.asarray(expected))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 24), st.integers(0, 8))
def test_the_central_crop_is_that_of_evaluation(width: int, height: int, size: int, margin: int) -> None:
    image = picture(width, width, height)
    cut = predict.central_crop(image, (size + margin, size + margin), (size, size))
    expected = photos.centre(photos.Photo(encoded(image, "PNG"), "image"), size + margin, size)
    assert np.array_equal(np.asarray(cut), np.asarray(expected))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 24), st.integers(1, 24))
def test_the_central_crop_has_the_requested_size(width: int, height: int, rows: int, columns: int) -> None:
    cut = predict.central_crop(Image.new("RGB", (width, height), (9, 9, 9)), (rows, columns), (rows, columns))
    assert cut.size == (columns, rows)
    assert (np.asarray(cut) == 9).all()  # no black border


def test_an_image_of_the_networks_size_is_unchanged() -> None:
    image = picture(3, 32, 32)
    assert np.array_equal(np.asarray(predict.central_crop(image, (32, 32), (32, 32))), np.asarray(image))


def test_the_rules_of_reading_are_copies_of_those_of_training() -> None:
    assert predict.FORMATS == photos.FORMATS
    assert predict.TURNS == photos.TURNS
    for name in ("turn", "to_rgb", "scale_to_8_bits", "value_range"):
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (predict, photos))
        assert ours == theirs
    for name in ("ORIENTATION", "BITS", "PHOTOMETRIC", "SAMPLE_FORMAT", "UNSIGNED", "WHITE_IS_ZERO", "STATED_RANGES"):
        assert getattr(predict, name) == getattr(photos, name)


@pytest.mark.parametrize("kind", ["float", "16 bits", "turned"])
def test_pictures_of_many_bits_and_turned_ones_are_read_as_in_evaluation(kind: str, tmp_path: Path) -> None:
    grey, exif = np.asarray(picture(1, 40, 30).convert("L")), Image.Exif()
    exif[0x0112] = 6
    content = {
        "float": encoded(Image.fromarray((grey / 255).astype(np.float32)), "TIFF"),
        "16 bits": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "turned": encoded(Image.fromarray(np.stack([grey] * 3, axis=2)), "PNG", exif=exif),
    }[kind]
    (tmp_path / "x").write_bytes(content)
    expected = np.rot90(grey, 3) if kind == "turned" else grey
    assert np.array_equal(np.asarray(predict.read_picture(tmp_path / "x"))[..., 0], expected)
    assert np.array_equal(np.asarray(photos.Photo(content, "x").decode(1)[0])[..., 0], expected)


# Refusals


def test_a_folder_that_is_not_for_the_hub_is_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"error: {tmp_path} has no config.json: give a folder" in refused(tmp_path, image, capsys)


@pytest.mark.parametrize(
    ("blocked", "phrase"),
    [
        ("onnxruntime", "error: onnxruntime is not installed: pip install onnxruntime"),
        ("torch", "needs the whole project"),
    ],
)
def test_a_missing_package_is_reported(
    blocked: str, phrase: str, student: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, blocked, None)
    assert phrase in refused(student if blocked == "onnxruntime" else tmp_path, image, capsys)


def test_a_picture_of_unknown_range_is_refused_by_name(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tif").write_bytes(encoded(Image.new("I", (4, 4), 100_000), "TIFF"))
    line = refused(student, tmp_path / "x.tif", capsys)
    assert f"{tmp_path / 'x.tif'} cannot be read as a picture (the range of its values is unknown" in line


def test_a_bad_picture_is_refused_and_the_others_are_classified(
    student: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = image.read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.png").write_bytes(b"noise")
    (tmp_path / "narrow.png").write_bytes(encoded(Image.new("RGB", (900, 2)), "PNG"))
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (20_000, 10_000)), "PNG"))
    bad = [tmp_path / name for name in ("cut.png", "noise.png", "narrow.png", "bomb.png", "missing.png", "")]
    assert predict.main([str(student), *map(str, bad), str(image)]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for file, line in zip(bad, lines, strict=True):
        assert line.startswith(f"error: {file} cannot be read as a picture (")
    assert out.splitlines()[0] == str(image)
    assert len(out.splitlines()) == 5
    assert "\x1b" not in out


def test_a_hostile_file_name_cannot_control_the_terminal(
    student: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(student), "missing\x1b[31m.png", str(image)]) == 1
    assert "error: missing [31m.png cannot be read as a picture" in capsys.readouterr().err


def refused(student: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, check that it prints only one error, and return it."""
    assert predict.main([str(student), str(image)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize(
    "garbled",
    [
        {"class_names": None},
        {"class_names": "[half"},
        {"class_names": '{"a": 1}'},
        {"class_names": '["one"]'},
        {"class_names": "[1, 2, 3, 4]"},
        {"class_names": "[" * 100_000},
        {"image_size": "[16]"},
        {"image_size": "[32, 32]", "resize": "[32, 32]"},
        {"image_size": "[-16, 16]"},
        {"image_size": "16"},
        {"image_size": "[true, 16]"},
        {"resize": "[1000000, 1000000]"},
        {"resize": "[8, 8]"},
        {"normalisation": '"outside"'},
    ],
    ids=str,
)
def test_garbled_metadata_is_refused(
    garbled: dict[str, str | None], student: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(student)
    stored = {**{key: json.dumps(value) for key, value in METADATA.items()}, **garbled}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in stored.items() if value is not None})
    onnx.save(model, tmp_path / "garbled.onnx")
    line = refused(tmp_path / "garbled.onnx", image, capsys)
    assert "has no valid metadata (" in line
    assert "export the student again with python -m src.export" in line
    assert len(line) < 1000


def graph_file(file: Path, *, domain: str = "", operator: str = "Add", location: str | None = None) -> Path:
    """Write a graph of one operator on an input and a constant, which may be stored in another file."""
    constant = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    if location is not None:
        constant.ClearField("float_data")
        constant.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            constant.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    node = onnx.helper.make_node(operator, ["x", "w"], ["y"], domain=domain)
    graph = onnx.helper.make_graph([node], "graph", [x], [y], [constant])
    imports = [onnx.helper.make_opsetid(name, 18 if not name else 1) for name in {"", domain}]
    file.write_bytes(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString())
    return file


@pytest.mark.parametrize("location", ["../secret.bin", "{tmp}/secret.bin", "link.bin", "below/../../secret.bin"])
def test_weights_outside_the_files_folder_are_not_read(
    location: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "inside.bin").write_bytes(bytes(16))
    # Weights in the folder are loaded, and only the metadata is missing: the hostile file is refused for its path.
    beside = graph_file(folder / "beside.onnx", location="inside.bin")
    assert "has no valid metadata" in refused(beside, image, capsys)
    file = graph_file(folder / "hostile.onnx", location=location.format(tmp=tmp_path))
    line = refused(file, image, capsys)
    assert "onnxruntime cannot load" in line
    assert "xternal data" in line


def test_operators_of_other_libraries_are_not_run(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = graph_file(tmp_path / "custom.onnx", domain="hostile", operator="Run")
    assert "onnxruntime cannot load" in refused(file, image, capsys)


@pytest.mark.parametrize("content", [b"", b"noise" * 100, None])
def test_a_file_without_a_network_is_refused(
    content: bytes | None, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "student.onnx"
    if content is not None:
        file.write_bytes(content)
    line = refused(file, image, capsys)
    assert line.startswith(
        f"error: {file} is not a file" if content is None else f"error: onnxruntime cannot load {file} ("
    )


def test_a_network_that_computes_nan_is_refused(
    student: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(student)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, np.nan), tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")
    assert "does not return one finite number for each class" in refused(tmp_path / "nan.onnx", image, capsys)
