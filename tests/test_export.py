"""The command `python -m src.export`: it writes the student and a model card, or refuses in one sentence."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from src.exporting.checking import predict_in_batches
from src.exporting.forms import SUFFIXES, Classifier
from src.models.checkpoints import read_facts, read_state_dict, save_weights
from src.models.resnet import resnet8
from src.models.sources import architecture
from tests.helpers.commands import SOURCE, Ran, assert_refused, run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")

REAL_CHECKPOINT = Path(os.environ.get("AEKT_DATA", "data")) / "teachers" / "slimnet_300k_cifar100.pth"


def export_run(folder: Path, out: Path, data: Path, *arguments: str) -> Ran:
    return run("export", f"run={folder}", f"out={out}", f"data.path={data}", "images=50", *arguments)


def test_a_run_becomes_an_onnx_file_and_a_card(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = export_run(finished_run, out, array_file)
    assert (ran.code, ran.err) == (0, "")
    assert "same top-1 on 50 of 50 images" in ran.out
    assert {file.name for file in out.iterdir()} == {"student.onnx", "student.onnx.md"}

    session = onnxruntime.InferenceSession(out / "student.onnx")
    stored = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    result = json.loads((finished_run / "result.json").read_text())
    assert stored["class_names"] == result["class_names"]
    assert stored["source"] == "/".join(finished_run.parts[-4:])
    assert stored["teacher"]["accuracy"] == result["teacher"]["accuracy"]
    assert stored["test"] == result["test"]
    assert (stored["method"], stored["serialization"]) == ("aekt", "serial")
    assert (stored["seed"], stored["epochs"]) == (result["seed"], result["epochs"])
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
    expected = predict_in_batches(Classifier(student, stored["mean"], stored["std"]), images)
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_out_may_name_the_file_itself(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    ran = export_run(finished_run, tmp_path / "bird.onnx", array_file)
    assert (ran.code, ran.err) == (0, "")
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} >= {"bird.onnx", "bird.onnx.md"}
    assert (tmp_path / "bird.onnx").is_file()
    refused = export_run(finished_run, tmp_path / "bird.pt2", array_file)
    assert_refused(refused, "bird.pt2 has the name of a file: give a folder")


def test_weights_alone_are_the_students(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = f"checkpoint={finished_run / 'student.pth'}"
    for source in ([f"run={finished_run}"], [checkpoint, "network@model.student=resnet8", "data=cifar10"]):
        ran = run(
            "export", *source, f"data.path={array_file}", f"out={tmp_path}", "images=50", "format=safetensors"
        )  # fmt: skip
        assert (ran.code, ran.err) == (0, "")
        weights, expected = load_file(tmp_path / "student.safetensors"), read_state_dict(finished_run / "student.pth")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        (tmp_path / "student.safetensors").unlink()


@pytest.mark.slow
def test_a_run_becomes_an_executorch_file(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    ran = export_run(finished_run, tmp_path / "out", array_file, "format=executorch", "precision=int8")
    assert (ran.code, ran.err) == (0, "")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"student-int8.pte", "student-int8.pte.md"}
    assert "executorch int8 in executorch: largest difference" in ran.out
    assert "Operators outside XNNPACK: dim_order_ops__to_dim_order_copy_default (3), aten_mean_dim (1)." in ran.out
    assert len(ran.out.splitlines()) < 8
    assert "one image per call" in (tmp_path / "out" / "student-int8.pte.md").read_text()


def test_a_mismatch_fails_and_leaves_nothing(
    finished_run: Path, array_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.export.save
    monkeypatch.setattr(torch.export, "save", lambda program, *a, **k: save(spoiled(program), *a, **k))
    ran = export_run(finished_run, tmp_path / "out", array_file, "format=exported_program")
    assert_refused(ran, "does not compute the student's logits and is not kept")
    assert not list((tmp_path / "out").iterdir())


def spoiled(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Change one weight."""
    name = next(name for name in program.state_dict if name.endswith("weight"))
    program.state_dict[name] = torch.nn.Parameter(1.5 * program.state_dict[name], requires_grad=False)
    return program


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["format=nonsense"], "format=nonsense is unknown: choose one of onnx, executorch, exported_program"),
        (["precision=int4"], "precision=int4 is unknown: choose one of float32"),
        (["format=torchscript", "precision=int8"], "does not support precision=int8: use format=onnx or executorch"),
        (["format=executorch", "precision=float16"], "format=executorch does not support precision=float16: use"),
        (["precision=bfloat16"], "onnxruntime does not compute in bfloat16"),
        (["format=hub", "precision=float16"], "format=hub does not support precision=float16: leave it out"),
        (["format=hub", "precision=int8"], "format=hub does not support precision=int8"),
        (["images=0"], "images=0 does not fit: input should be greater than 0"),
        ([], "Give exactly one of run=FOLDER"),
        (["run={tmp}"], "because it has no config.yaml"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments: list[str], phrase: str, tmp_path: Path) -> None:
    assert_refused(run("export", *(argument.format(tmp=tmp_path) for argument in arguments)), phrase)


def lines_of_the_card(folder: Path, more: str) -> None:
    """Run the Python lines of a folder's card, and more lines, in a process without a connection."""
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert 2 <= len(list(filter(None, lines.splitlines()))) <= 4
    cut_off = "import socket, numpy, torch\nsocket.socket.connect = socket.getaddrinfo = None\n"
    ran = subprocess.run(
        [sys.executable, "-c", cut_off + lines.replace("FOLDER", str(folder)) + more],
        cwd=SOURCE.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")


def refuse_traces(folder: Path, *private: Path) -> None:
    """Assert that no file of a folder contains the path of the home folder or of another private place."""
    for file in folder.iterdir():
        for path in (Path.home(), Path.cwd(), SOURCE.parent, *private):
            assert str(path).encode() not in file.read_bytes(), f"{file.name} contains {path}"


@pytest.fixture
def without_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip a test without the packages of the extra `hub`, and refuse all connections."""
    pytest.importorskip("timm")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)


@pytest.mark.usefixtures("without_internet")
def test_a_run_becomes_a_folder_for_the_hub(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "private" / "moved"
    shutil.copytree(finished_run, moved)
    result = json.loads((moved / "result.json").read_text())
    result["settings"]["student"]["source"] = "torchvision/resnet18"
    (moved / "result.json").write_text(json.dumps(result))
    out = tmp_path / "out"
    ran = export_run(moved, out, array_file, "format=hub")
    assert (ran.code, ran.err) == (0, "")
    assert "same top-1 on 50 of 50 images" in ran.out
    assert f"hf upload USER/NAME {out}" in ran.out
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    refuse_traces(out, tmp_path, moved.parent, finished_run, array_file.parent)

    text = (out / "README.md").read_text()
    assert f"| from | {'/'.join(finished_run.parts[-4:-1])}/moved |" in text
    assert "| initial weights | those of torchvision/resnet18 |" in text
    block = yaml.safe_load(text.split("---\n")[1])
    scores = {each["type"]: each["value"] for each in block["model-index"][0]["results"][0]["metrics"]}
    assert scores["accuracy"] == pytest.approx(result["test"]["accuracy"], abs=1e-5)
    assert scores["agreement"] == pytest.approx(result["test"]["agreement"], abs=1e-5)
    assert "datasets" not in block  # an array file of the user

    with np.load(array_file) as arrays:
        images = torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2).contiguous()
    student, facts = resnet8(10), read_facts(finished_run / "student.pth")
    student.load_state_dict(read_state_dict(finished_run / "student.pth"))
    expected = predict_in_batches(Classifier(student, facts["mean"], facts["std"]), images)
    np.save(tmp_path / "images.npy", images.numpy())
    lines_of_the_card(
        out,
        f"images = torch.from_numpy(numpy.load('{tmp_path}/images.npy'))\n"
        f"numpy.save('{tmp_path}/logits.npy', student(images).numpy())",
    )
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected)


@pytest.mark.usefixtures("without_internet")
def test_a_student_of_timm_becomes_a_folder_that_timm_loads(array_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = architecture("timm/test_resnet", 10)
    student.train()(torch.randn(16, 3, 32, 32))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save_weights(student, tmp_path / "student.pth", mean=mean, std=std)
    out = tmp_path / "out"
    ran = run(
        "export", f"checkpoint={tmp_path / 'student.pth'}", "student.source=timm/test_resnet", "data=cifar10",
        f"data.path={array_file}", f"out={out}", "images=50", "format=hub",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert "same top-1 on 50 of 50 images" in ran.out
    assert "Loading" not in ran.out
    refuse_traces(out, tmp_path, array_file.parent)

    with np.load(array_file) as arrays:
        pixels = arrays["test_images"][:5]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    expected = predict_in_batches(Classifier(student, mean, std), images)
    np.save(tmp_path / "pixels.npy", pixels)
    lines_of_the_card(
        out,
        "from PIL import Image\n"
        f"images = [transform(Image.fromarray(each)) for each in numpy.load('{tmp_path}/pixels.npy')]\n"
        f"numpy.save('{tmp_path}/logits.npy', student(torch.stack(images)).detach().numpy())",
    )
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=1e-4, atol=1e-4)


def test_help_is_a_guide() -> None:
    ran = run("export", "--help")
    assert ran.code == 0
    assert "python -m src.export run=" in ran.out
    assert all(format in ran.out for format in SUFFIXES)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CHECKPOINT.is_file(), reason=f"needs real data: AEKT_DATA=FOLDER with {REAL_CHECKPOINT}")
def test_int8_of_a_real_network_on_real_images(tmp_path: Path) -> None:
    ran = run(
        "export", f"checkpoint={REAL_CHECKPOINT}", "network@model.student=slimnet300k", "data=cifar100",
        "precision=int8", f"out={tmp_path}",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    by_file, by_student = (float(part.split()[-2]) for part in ran.out.rsplit("accuracy on them", 1)[1].split(",")[:2])
    assert by_student > 60
    assert by_file > by_student - 3
