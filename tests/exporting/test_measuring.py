"""What is measured, in which order, and against which teacher."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.exporting import measuring
from src.exporting.checking import predict_in_batches
from src.exporting.forms import Form, write_form
from src.exporting.measuring import (
    Contender,
    TeacherModule,
    Workplace,
    load_original_teacher,
    make_rows,
    measure_memory,
    parse_forms,
    quartiles,
    time_interleaved,
)
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from src.setup.reopen import open_run_or_checkpoint
from src.training.summary import parameter_count
from tests.helpers.configure import configure
from tests.helpers.exports import random_classifier, random_images
from tests.helpers.run_folders import taught_by_a_lost_file
from tests.helpers.tiny import CLASSES, tiny_teacher

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("safetensors")


def test_every_round_times_every_form_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock that each form moves on by a time of its own, twice as far in the second round."""
    now = 0.0
    calls: list[tuple[str, int]] = []

    def form(name: str, seconds: float) -> Any:
        def predict(images: Tensor) -> Tensor:
            nonlocal now
            now += seconds * (1 + (len(calls) > 9))
            calls.append((name, len(images)))
            return images

        return predict

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(measuring, "CALLS", 4)
    images = torch.zeros(64, 3, 2, 2, dtype=torch.uint8)
    seconds = time_interleaved([form("a", 1), form("b", 3)], images, 16, rounds=2)
    assert [name for name, _ in calls] == ["a", "b", *"aaaabbbb" * 2]
    assert {count for _, count in calls} == {16}
    np.testing.assert_allclose(seconds, [[1, 3], [2, 6]])
    np.testing.assert_allclose(seconds[:, 1] / seconds[:, 0], 3)


def test_quartiles() -> None:
    assert quartiles(np.array([5.0, 1, 2, 3, 4])) == (2, 3, 4)


@pytest.mark.parametrize(
    ("form", "expected"), [("onnx", ("onnx", "float32")), ("torchscript-bfloat16", ("torchscript", "bfloat16"))]
)
def test_a_name_is_a_format_and_a_precision(form: str, expected: tuple[str, str]) -> None:
    assert parse_forms([form]) == [Form(*expected)]


@pytest.mark.parametrize("form", ["safetensors", "hub", "nonsense", "onnx-int4", "onnx-bfloat16"])
def test_an_unknown_form_is_refused(form: str) -> None:
    with pytest.raises(UserError, match=form.rpartition("-")[2]):
        parse_forms(["onnx", form])


def test_a_row_compares_each_form_with_the_first(tmp_path: Path) -> None:
    images = random_images(70)
    network = random_classifier()
    target = predict_in_batches(network, images).argmax(dim=1)
    target[:7] = (target[:7] + 1) % CLASSES
    (tmp_path / "file").write_bytes(bytes(10))
    contenders = [Contender(name, network, tmp_path / "file", "student") for name in ("a", "b")]
    found = {1: np.array([[1.0, 2], [2, 2], [3, 9]]), 64: np.array([[4.0, 2], [4, 2], [4, 2]])}
    seconds = {1: found, 3: {batch: times / 2 for batch, times in found.items()}}
    place = Workplace(tmp_path, images, target)
    first, second = make_rows(contenders, {"student": network}, place, seconds, [(100, 130), (100, 110)])
    assert (first.name, second.name, second.network, second.file_bytes) == ("a", "b", "student", 10)
    assert first.accuracy == second.accuracy == 0.9
    assert first.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert first.activation_bytes == 3 * 4 * 16 * 16**2
    assert (first.seconds[1], second.seconds[1]) == ({1: 2, 64: 4}, {1: 2, 64: 2})
    assert (first.seconds[3], second.seconds[3]) == ({1: 1, 64: 2}, {1: 1, 64: 1})
    assert first.ratios[1] == first.ratios[3] == {1: (1, 1, 1), 64: (1, 1, 1)}
    assert second.ratios[1] == second.ratios[3] == {1: (1.5, 2, 2.5), 64: (0.5, 0.5, 0.5)}
    assert (first.memory, second.memory) == (30, 10)


def test_a_teacher_is_measured_with_its_normalisation(tmp_path: Path) -> None:
    teacher, images = tiny_teacher(), random_images()
    network = TeacherModule(teacher).eval()
    with torch.no_grad():
        assert torch.equal(network(images), teacher.logits(images))
    write_form(network, tmp_path / "teacher.safetensors", Form("safetensors", "float32"), images, {})
    assert (tmp_path / "teacher.safetensors").stat().st_size > 4 * sum(p.numel() for p in teacher.network.parameters())


def test_a_form_that_fails_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"noise")
    place = Workplace(tmp_path, random_images(), torch.zeros(7))
    np.save(place.images_file, place.images.numpy())
    form = Form("onnx", "float32")
    contender = Contender("student, onnx", nn.Identity(), tmp_path / "broken.onnx", "student", form)
    with pytest.raises(UserError, match=r"student, onnx fails in a separate process \(.+\): leave this form out"):
        measure_memory(contender, place)


@pytest.fixture
def moved_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a run whose teacher is gone from where the run found it."""
    return taught_by_a_lost_file(finished_run, tmp_path / "runs", tmp_path / "gone.pth")


def load_teacher_of(folder: Path, data: Path, *overrides: str) -> Any:
    cfg = configure(f"run={folder}", f"data.path={data}", *overrides, command="measure")
    return load_original_teacher(cfg, open_run_or_checkpoint(cfg))


def test_a_teacher_is_measured_without_what_accelerates_training(finished_run: Path, array_file: Path) -> None:
    cfg = configure(f"run={finished_run}", f"data.path={array_file}", command="measure")
    opened = open_run_or_checkpoint(cfg)
    opened.cfg.teacher.update(precision="bfloat16", fold=True)
    in_training, alone = (load_original_teacher(cfg, opened, as_in_training=each) for each in (True, False))
    assert in_training is not None
    assert alone is not None
    assert (in_training.precision, alone.precision) == ("bfloat16", None)
    assert in_training.folded > alone.folded == 0
    assert in_training.parameters == alone.parameters == parameter_count(alone.network)


def test_a_runs_teacher_is_found_or_named(
    finished_run: Path, moved_run: Path, array_file: Path, tmp_path: Path
) -> None:
    facts = json.loads((finished_run / "run.json").read_text())["teacher"]
    assert load_teacher_of(finished_run, array_file).digest == facts["sha256"]
    assert load_teacher_of(moved_run, array_file, f"teacher.path={facts['source']}").digest == facts["sha256"]
    with pytest.raises(UserError, match=r"gone\.pth does not exist: give a checkpoint of resnet20"):
        load_teacher_of(moved_run, array_file)
    torch.manual_seed(5)
    save_weights(resnet20(10), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is not the teacher of .*teacher\.path=FILE"):
        load_teacher_of(moved_run, array_file, f"teacher.path={tmp_path / 'other.pth'}")


def test_a_checkpoint_has_a_teacher_only_if_the_command_names_one(finished_run: Path, array_file: Path) -> None:
    def load(*overrides: str) -> Any:
        given = (f"checkpoint={finished_run / 'student.pth'}", "data=cifar10", "model=resnet20_to_resnet8")
        cfg = configure(*given, f"data.path={array_file}", *overrides, command="measure")
        return load_original_teacher(cfg, open_run_or_checkpoint(cfg))

    facts = json.loads((finished_run / "run.json").read_text())["teacher"]
    assert load() is None
    assert load(f"teacher.path={facts['source']}").digest == facts["sha256"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is deprecated
def test_only_the_command_can_allow_a_program_as_teacher(moved_run: Path, array_file: Path, tmp_path: Path) -> None:
    """The run's folder may come from elsewhere, and loading a program executes its code."""
    config = (moved_run / "config.yaml").read_text()
    assert "allow_program: false" in config
    (moved_run / "config.yaml").write_text(config.replace("allow_program: false", "allow_program: true"))
    torch.jit.trace(resnet20(10).eval(), torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=r"gone\.pth.*executes its code: add teacher\.allow_program=true"):
        load_teacher_of(moved_run, array_file)
    with pytest.raises(UserError, match=r"gone\.pth is not the teacher of"):  # it was loaded
        load_teacher_of(moved_run, array_file, "teacher.allow_program=true")
