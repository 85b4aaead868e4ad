"""`python -m src.train`, the same command again: it returns a finished run, resumes it, or refuses to mix two runs."""

import json

import pytest
import torch

from src.data.array_file import save_arrays
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import Ran, assert_refused, run
from tests.helpers.place import SMALL, Place, result_of


def test_the_same_command_returns_a_finished_run_at_once(copies: Place) -> None:
    before = copies.contents()
    again = copies.train("method=kd")
    assert again.code == 0
    assert "is finished already: test accuracy" in again.out
    assert "Training" not in again.out
    assert copies.contents() == before


def test_debug_runs_start_over_unless_told_otherwise(place: Place) -> None:
    def debug(*arguments: str) -> Ran:
        small = [argument for argument in SMALL if argument != "start_over=false"]
        return run("train", *small, f"data.path={place.data}", f"runs={place.runs}", "method=vanilla", *arguments)

    for _ in range(2):
        ran = debug()
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.count("Training ") == 1
    assert len(place.folders("vanilla")) == 1
    before = place.contents()
    again = debug("start_over=false")
    assert "is finished already" in again.out
    assert "Training" not in again.out
    assert place.contents() == before


def test_a_run_made_by_other_code_is_left_alone(copies: Place) -> None:
    record_file = copies.folder("aekt") / "run.json"
    record = json.loads(record_file.read_text())
    record["fingerprints"]["code"] = "another"
    record_file.write_text(json.dumps(record))
    before = copies.contents()
    assert_refused(copies.train("method=aekt"), "The code has changed since", "start_over=true")
    assert copies.contents() == before

    ran = copies.train("method=aekt", "start_over=true")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(record_file.read_text())["fingerprints"]["code"] != "another"
    assert ran.out.count("Training ") == 1, "the teacher was trained again"


def test_a_finished_run_of_other_data_is_left_alone(place: Place) -> None:
    place.data = place.path / "own.npz"
    save_arrays(place.data, **colour_arrays())
    save_weights(resnet20(10), place.path / "teacher.pth")
    command = ("method=kd", f"teacher.path={place.path / 'teacher.pth'}")
    assert place.train(*command).code == 0
    save_arrays(place.data, **{**colour_arrays(), "test_labels": colour_arrays()["test_labels"][::-1]})
    before = {file: file.read_bytes() for file in place.folder("kd").rglob("*") if file.is_file()}
    assert_refused(place.train(*command), "The data has changed since", "start_over=true")
    assert {file: file.read_bytes() for file in place.folder("kd").rglob("*") if file.is_file()} == before


def test_another_teacher_at_the_same_path_is_another_run(place: Place) -> None:
    teacher = resnet20(10)
    save_weights(teacher, place.path / "teacher.pth")
    command = ("method=kd", f"teacher.path={place.path / 'teacher.pth'}")
    assert place.train(*command).code == 0
    (first,) = place.runs.rglob("result.json")
    before = first.read_bytes()
    with torch.no_grad():
        teacher.classifier_layer.bias[0] += 1e-4
    save_weights(teacher, place.path / "teacher.pth")
    assert place.train(*command).code == 0
    assert len(list(place.runs.rglob("result.json"))) == 2
    assert first.read_bytes() == before


def test_a_damaged_checkpoint(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    (folder / "result.json").unlink()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    for ran in (copies.train("method=aekt"), copies.evaluate(f"run={folder}")):
        assert ran.code == 1
        (line,) = ran.err.splitlines()
        assert line.startswith(f"error: {checkpoint} is damaged")
        assert "start_over=true" in line
        assert "epoch 1/" not in ran.out


@pytest.mark.parametrize("name", ["result.json", pytest.param("run.json", marks=pytest.mark.slow)])
def test_a_damaged_file_of_a_run(copies: Place, name: str) -> None:
    folder = copies.folder("aekt", "serial")
    (folder / name).write_text('{"half')
    assert_refused(copies.train("method=aekt"), f"{folder / name} is damaged", "start_over=true")


def test_a_run_that_has_lost_its_result_continues_from_its_last_checkpoint(copies: Place) -> None:
    folder = copies.folder("kd", "none")
    before = result_of(folder)
    (folder / "result.json").unlink()
    ran = copies.train("method=kd")
    assert (ran.code, ran.err) == (0, "")
    assert "epoch 1/" not in ran.out, "the epoch was trained again"
    assert result_of(folder)["test"] == before["test"]
    assert result_of(folder)["teacher"]["sha256"] == before["teacher"]["sha256"]
