"""What is exported is the student and nothing else, and answers as it does in its own runtime."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import src.export
from src.errors import UserError
from src.export import (
    Classifier,
    Form,
    answers,
    card,
    classifier,
    compare,
    export,
    load_form,
    refuse_mismatch,
    spread_out,
    write,
)
from src.methods.vanilla import Vanilla
from src.models.checkpoints import read_state_dict
from src.models.network import Network
from src.models.resnet import resnet8
from tests.commands import Ran, assert_refused, run
from tests.test_families import FAMILIES
from tests.tiny import CLASSES, MEAN, STD, tiny_data, tiny_distiller

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")

FAST = {"resnet8", "vgg8"}
FACTS: dict[str, Any] = {
    "network": "resnet8", "class_names": ["red", "a|b", "<i>", "yellow"], "image_size": [16, 16], "resize": [16, 16],
    "mean": list(MEAN), "std": list(STD), "data": {"name": "tiny", "digest": "1234"}, "versions": {"torch": "2"},
    "source": "here", "method": None, "teacher": None, "test": None,
}  # fmt: skip


def random_images(count: int = 7, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fresh(new_network: Any = resnet8, size: int = 16) -> Classifier:
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    network = new_network(CLASSES)
    network.train()(torch.randn(16, 3, size, size))
    return Classifier(network, MEAN, STD)


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


# Files


@pytest.mark.parametrize(
    "new_network",
    [pytest.param(family, marks=() if family.__name__ in FAST else pytest.mark.slow) for family in FAMILIES],
    ids=lambda make: make.__name__,
)
def test_every_family_answers_the_same_in_onnxruntime(new_network: Any, tmp_path: Path) -> None:
    network, images, file = fresh(new_network, 32), random_images(70, 32), tmp_path / "student.onnx"
    ours = answers(network, images)
    exported = export(network, file, Form("onnx", "float32"), images[:1], FACTS, images, ours)
    assert exported.shape == (70, CLASSES)  # in a batch of 64 and one of 6
    torch.testing.assert_close(exported, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
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
def test_every_form_answers_the_same(format: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    network, images, form = fresh(), random_images(), Form.parse(format, precision)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ours = answers(network, images)
    exported = export(network, tmp_path / form.file_name, form, images, FACTS, images, ours)
    assert exported.dtype == torch.float32
    assert float((exported - ours).abs().max()) <= tolerance * float(ours.abs().max())
    assert precision == "float32" or not torch.equal(exported, ours)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("format", ["onnx", "exported_program", "torchscript", "safetensors"])
def test_metadata_is_in_the_file(format: str, tmp_path: Path) -> None:
    form = Form(format, "float32")
    file = tmp_path / form.file_name
    network, images = fresh(), random_images()
    export(network, file, form, images, FACTS, images, answers(network, images))
    told: dict[str, str]
    if format == "onnx":
        told = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    elif format == "exported_program":
        extra = {"metadata.json": ""}
        torch.export.load(file, extra_files=extra)
        told = json.loads(extra["metadata.json"])
    elif format == "torchscript":
        extra = {"metadata.json": ""}
        torch.jit.load(str(file), _extra_files=extra)
        told = json.loads(extra["metadata.json"])
    else:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            told = opened.metadata()
            assert set(opened.keys()) == set(resnet8(CLASSES).state_dict())
    place = "outside" if format == "safetensors" else "inside"
    assert {key: json.loads(value) for key, value in told.items()} == {**FACTS, "normalisation": place}


def test_int8_is_small_and_nearly_as_accurate(trained: tuple[Classifier, Tensor, Tensor], tmp_path: Path) -> None:
    network, images, target = trained
    ours = answers(network, images)
    sizes = {}
    for precision in ("float32", "int8"):
        form = Form("onnx", precision)
        file = tmp_path / form.file_name
        exported = export(network, file, form, images[:32], FACTS, images, ours)
        sizes[precision] = file.stat().st_size
    check = compare(ours, exported, target)
    assert check.student_accuracy > 0.95
    assert check.accuracy > 0.9
    assert check.difference > 0
    assert sizes["int8"] < 0.6 * sizes["float32"]
    told = onnxruntime.InferenceSession(tmp_path / "student-int8.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(told["class_names"]) == FACTS["class_names"]


class Projected(Vanilla):
    """Has a predictor of its own, with parameters of its own, as SimKD has."""

    def build(self, networks: Any) -> None:
        self.head = nn.Linear(CLASSES, CLASSES)

    def predictor(self, student: Network) -> nn.Module:
        return nn.Sequential(student, self.head)


def test_a_methods_own_predictor_is_what_is_exported(tmp_path: Path) -> None:
    distiller = tiny_distiller(tiny_data(tmp_path), Projected())
    images = random_images()
    with torch.no_grad():
        expected = distiller.eval().predict_logits(images)
    network = classifier(distiller)
    torch.testing.assert_close(answers(network, images), expected)
    file = tmp_path / "student.pt2"
    exported = export(network, file, Form("exported_program", "float32"), images, FACTS, images, expected)
    torch.testing.assert_close(exported, expected)
    assert not torch.allclose(exported, answers(Classifier(distiller.student, MEAN, STD), images))


# Checks


def test_compare_and_refuse() -> None:
    ours = torch.tensor([[4.0, 0], [0, 4], [1, 0], [0, 1]])
    theirs = torch.tensor([[4.0, 0], [0, 4], [0, 1], [0, 1]])
    check = compare(ours, theirs, torch.tensor([0, 1, 1, 0]))
    assert check == (4, 1.0, 4.0, 3, 0.5, 0.75)
    with pytest.raises(UserError, match=r"does not answer as the student does.*same top-1 on 3 of 4"):
        refuse_mismatch(check, Form("onnx", "int8"))
    refuse_mismatch(compare(ours, ours + 1e-4, torch.zeros(4)), Form("onnx", "float32"))
    for wrong in (ours + 1e-2, torch.full((4, 2), torch.nan)):
        with pytest.raises(UserError):
            refuse_mismatch(compare(ours, wrong, torch.zeros(4)), Form("onnx", "float32"))


@pytest.mark.parametrize(("count", "wanted"), [(10, 3), (3, 10), (7, 7), (10_000, 1), (1000, 999)])
def test_positions_are_spread_out(count: int, wanted: int) -> None:
    positions = spread_out(count, wanted)
    gaps = positions.diff()
    assert len(positions) == min(count, wanted)
    assert positions[0] == 0
    assert positions[-1] < count
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_a_card_escapes_what_markdown_would_take(tmp_path: Path) -> None:
    file = tmp_path / "student.onnx"
    file.write_bytes(b"content")
    logits = torch.eye(CLASSES)
    text = card(file, Form("onnx", "float32"), FACTS, compare(logits, logits, torch.arange(CLASSES)))
    assert r"red, a\|b, &lt;i>, yellow" in text
    assert hashlib.sha256(b"content").hexdigest() in text
    assert "uint8, 0 to 255, normalised inside by mean [0.5, 0.5, 0.5]" in text


# The command


def export_run(folder: Path, out: Path, data: Path, *arguments: str) -> Ran:
    return run("export", f"run={folder}", f"out={out}", f"data.path={data}", "images=50", *arguments)


def test_a_run_becomes_an_onnx_file_and_a_card(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = export_run(finished_run, out, array_file)
    assert (ran.code, ran.err) == (0, "")
    assert "same top-1 on 50 of 50 images" in ran.out
    assert {file.name for file in out.iterdir()} == {"student.onnx", "student.onnx.md"}

    session = onnxruntime.InferenceSession(out / "student.onnx")
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    result = json.loads((finished_run / "result.json").read_text())
    assert told["class_names"] == result["class_names"]
    assert told["source"] == "/".join(finished_run.parts[-4:])
    assert told["teacher"]["accuracy"] == result["teacher"]["accuracy"]
    assert told["test"] == result["test"]
    assert (told["method"], told["serialization"]) == ("aekt", "serial")
    text = (out / "student.onnx.md").read_text()
    for fact in (
        f"{100 * result['test']['accuracy']:.2f} % of the test images",
        "resnet20, top-1",
        "| trained by | aekt,",
    ):
        assert fact in text

    with np.load(array_file) as arrays:
        images = torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2).contiguous()
    student = resnet8(10)
    student.load_state_dict(read_state_dict(finished_run / "student.pth"))
    expected = answers(Classifier(student, told["mean"], told["std"]), images)
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_weights_alone_are_the_students(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for arguments in ([], [f"checkpoint={finished_run / 'student.pth'}", "network@model.student=resnet8"]):
        if arguments:
            ran = run(
                "export", *arguments, "data=cifar10", f"data.path={array_file}", "format=safetensors", f"out={tmp_path}"
            )
        else:
            ran = export_run(finished_run, tmp_path, array_file, "format=safetensors")
        assert (ran.code, ran.err) == (0, "")
        weights, expected = load_file(tmp_path / "student.safetensors"), read_state_dict(finished_run / "student.pth")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        (tmp_path / "student.safetensors").unlink()


def test_a_mismatch_fails_and_leaves_nothing(
    finished_run: Path, array_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.export.save
    monkeypatch.setattr(torch.export, "save", lambda program, *a, **k: whole(spoiled(program), *a, **k))
    ran = export_run(finished_run, tmp_path / "out", array_file, "format=exported_program")
    assert_refused(ran, "does not answer as the student does, and is not kept")
    assert not list((tmp_path / "out").iterdir())


def spoiled(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """One weight is another."""
    name = next(name for name in program.state_dict if name.endswith("weight"))
    program.state_dict[name] = torch.nn.Parameter(1.5 * program.state_dict[name], requires_grad=False)
    return program


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["format=nonsense"], "format=nonsense is not known, these are: onnx, exported_program"),
        (["precision=int4"], "precision=int4 is not known"),
        (["format=torchscript", "precision=int8"], "quantisation is for format=onnx"),
        (["precision=bfloat16"], "onnxruntime does not compute in bfloat16"),
        (["images=0"], "images=0 does not fit: it must be positive"),
        ([], "Give one of run=FOLDER"),
        (["run={tmp}"], "is no run folder"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments: list[str], phrase: str, tmp_path: Path) -> None:
    assert_refused(run("export", *(argument.format(tmp=tmp_path) for argument in arguments)), phrase)


@pytest.mark.parametrize(("package", "format"), [("onnx", "onnx"), ("safetensors.torch", "safetensors")])
def test_a_missing_package_is_one_sentence(
    package: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package.partition('.')[0]}: pip install -e '.\[export\]'"):
        write(fresh(), tmp_path / "file", Form(format, "float32"), random_images(), {})


def test_a_file_that_onnxruntime_refuses(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"noise")
    with pytest.raises(UserError, match="onnxruntime refuses"):
        load_form(tmp_path / "student.onnx", Form("onnx", "float32"), nn.Identity())


def test_help_is_a_guide() -> None:
    ran = run("export", "--help")
    assert ran.code == 0
    assert "python -m src.export run=" in ran.out
    assert all(suffix in ran.out for suffix in src.export.SUFFIXES)


@pytest.mark.slow
@pytest.mark.skipif("AEKT_DATA" not in os.environ, reason="needs real data: AEKT_DATA=FOLDER")
def test_int8_of_a_real_network_on_real_images(tmp_path: Path) -> None:
    checkpoint = Path(os.environ["AEKT_DATA"]) / "teachers" / "slimnet_300k_cifar100.pth"
    ran = run(
        "export", f"checkpoint={checkpoint}", "network@model.student=slimnet300k", "data=cifar100", "precision=int8",
        f"out={tmp_path}",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    by_file, by_student = (float(part.split()[-2]) for part in ran.out.rsplit("accuracy on them", 1)[1].split(",")[:2])
    assert by_student > 60
    assert by_file > by_student - 3
