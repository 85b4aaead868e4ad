"""The commands end to end, as a user types them, and what they answer to bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import wandb
from omegaconf import OmegaConf

from src.data import cifar
from src.data.arrays import save_arrays
from src.models.checkpoints import read_state_dict, save_weights, weights_digest
from src.models.resnet import resnet8, resnet14, resnet20
from tests.commands import Ran, assert_refused, run
from tests.conftest import colour_arrays

ROOT = Path(__file__).parents[1]
SMALL = ("data=cifar10", "model=resnet20_to_resnet8", "trainer=debug", "logger=none", "schedule.batch_size=8")
TERMS = {
    "vanilla": {"cross_entropy"},
    "kd": {"cross_entropy", "kd"},
    "dkd": {"cross_entropy", "tckd", "nckd"},
    "aekt": {"cross_entropy", "tckd", "nckd", "explicit_transfer"},
}
RUNS = [
    ("vanilla", "none"),
    ("kd", "none"),
    ("kd", "parallel"),
    ("dkd", "serial"),
    ("aekt", "serial"),
]


class Place:
    """A folder of its own for runs and teachers, and the commands in it."""

    def __init__(self, path: Path, data: Path) -> None:
        self.path, self.data, self.runs = path, data, path / "runs"

    def train(self, *arguments: object) -> Ran:
        """Train on the small array file, two steps, unless told otherwise."""
        here = (f"data.path={self.data}", f"runs={self.runs}", f"teacher.store={self.path / 'teachers'}")
        flags = [argument for argument in arguments if str(argument).startswith("-")]
        return run("train", *flags, *SMALL, *here, *(argument for argument in arguments if argument not in flags))

    def evaluate(self, *arguments: object) -> Ran:
        return run("evaluate", f"data.path={self.data}", *arguments)

    def folders(self, method: str = "*", layer: str = "*") -> list[Path]:
        return sorted(file.parent for file in self.runs.glob(f"*/*/{method}/{layer}-*/run.json"))

    def folder(self, method: str, layer: str = "*") -> Path:
        (folder,) = self.folders(method, layer)
        return folder

    def contents(self) -> dict[Path, tuple[bytes, int]]:
        files = (file for file in self.path.rglob("*") if file.is_file())
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, array_file: Path) -> Place:
    """Short runs of all methods, the teacher's among them; read only."""
    place = Place(tmp_path_factory.mktemp("finished"), array_file)
    for method, layer in RUNS:
        ran = place.train(f"method={method}", f"serialization={layer}")
        assert (ran.code, ran.err) == (0, ""), ran.err
    return place


@pytest.fixture
def place(tmp_path: Path, array_file: Path) -> Place:
    """Empty."""
    return Place(tmp_path, array_file)


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# Training


@pytest.mark.parametrize(("method", "layer"), RUNS)
def test_a_run_is_its_folder(finished: Place, method: str, layer: str) -> None:
    folder = next(path for path in finished.folders(method, layer) if "resnet8" in path.parts[-3])
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        "config.yaml",
        "run.json",
        "metrics.csv",
        "gradients.csv",
        "checkpoints/last.ckpt",
        "student.pth",
        "result.json",
    }

    result = result_of(folder)
    assert next(iter(result)) == "test"
    assert next(iter(result["test"])) == "accuracy"
    assert 0 <= result["test"]["accuracy"] <= 1
    assert (result["method"], result["serialization"], result["student"]) == (method, layer, "resnet8")
    assert (result["data"], result["seed"], result["epochs"], result["train_images"]) == ("cifar10", 0, 1, 200)
    assert result["class_names"][3] == "colour 3"
    assert result["parameters"]["student"] == sum(p.numel() for p in resnet8(10).parameters())
    assert result["parameters"]["training_only"] == {"none": 0, "serial": 110, "parallel": 650}[layer]
    assert result["settings"]["method"]["name"] == method

    config = OmegaConf.load(folder / "config.yaml")
    assert config.method.name == method
    assert config.data.path == str(finished.data)
    about = json.loads((folder / "run.json").read_text())
    assert {"python", "torch", "lightning"} <= about["versions"].keys()
    assert about["versions"]["torch"] == version("torch")

    (row,) = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    logged = {name.removeprefix("train/"): float(row[name]) for name in row if name.startswith("train/")}
    assert logged.pop("loss") == pytest.approx(sum(logged.values()), rel=1e-5)
    assert logged.keys() == TERMS[method]
    assert float(row["test/accuracy"]) == result["test"]["accuracy"]

    student = resnet8(10)
    student.load_state_dict(torch.load(folder / "student.pth", weights_only=True)["model"])
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[f"student.{name}"]) for name, value in student.state_dict().items())
    assert not any("teacher" in name for name in state)


def test_the_teacher_is_measured_and_named(finished: Place) -> None:
    (trained,) = [path for path in finished.folders("vanilla") if path.parts[-3] == "resnet20"]
    teacher = resnet20(10)
    teacher.load_state_dict(read_state_dict(trained / "student.pth"))
    for method, layer in RUNS[1:]:
        folder = finished.folder(method, layer)
        about = result_of(folder)["teacher"]
        assert about["name"] == "resnet20"
        assert about["sha256"] == weights_digest(teacher)
        assert about["source"] == str(trained / "student.pth")
        assert about["accuracy"] == result_of(trained)["test"]["accuracy"]
        assert json.loads((folder / "run.json").read_text())["fingerprints"]["teacher"] == about["sha256"]
        assert 0 <= result_of(folder)["test"]["agreement"] <= 1
    alone = finished.folders("vanilla")
    assert [result_of(folder)["teacher"] for folder in alone] == [None, None]
    assert all("agreement" not in result_of(folder)["test"] for folder in alone)


def test_a_missing_teacher_is_trained_once_and_the_same_command_returns_at_once(place: Place) -> None:
    first = place.train("method=kd")
    assert (first.code, first.err) == (0, "")
    lines = [line for line in first.out.splitlines() if line.startswith("No teacher")]
    assert len(lines) == 1
    assert "No teacher resnet20 for cifar10: training it first" in lines[0]
    assert "teacher.path" in lines[0]
    assert str(place.path / "teachers" / "cifar10" / "resnet20.pth") in lines[0]
    assert first.out.count("Training ") == 2

    before = place.contents()
    again = place.train("method=kd")
    assert again.code == 0
    assert "is finished already: test accuracy" in again.out
    assert "Training" not in again.out
    assert place.contents() == before

    other = place.train("method=dkd")
    assert "No teacher" not in other.out
    assert other.out.count("Training ") == 1


@pytest.mark.parametrize("where", ["path", pytest.param("store", marks=pytest.mark.slow), "published"])
def test_a_teacher_at_hand_is_used(place: Place, where: str) -> None:
    torch.manual_seed(7)
    teacher = resnet20(10)
    store = place.path / "teachers" / "cifar10"
    file = {
        "path": place.path / "anywhere.pth",
        "store": store / "resnet20.pth",
        "published": store / "resnet20_vanilla" / "ckpt_epoch_240.pth",
    }[where]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(teacher, file)
    ran = place.train("method=kd", "teacher.train_if_missing=false", *([f"teacher.path={file}"] * (where == "path")))
    assert (ran.code, ran.err) == (0, "")
    about = result_of(place.folder("kd"))["teacher"]
    assert about["source"] == str(file)
    assert about["sha256"] == weights_digest(teacher)


def test_training_learns(place: Place) -> None:
    ran = place.train("method=vanilla", "trainer=cpu", "schedule=quick", "schedule.epochs=4", "schedule.batch_size=20")
    assert (ran.code, ran.err) == (0, "")
    assert result_of(place.folder("vanilla"))["test"]["accuracy"] > 0.5
    assert result_of(place.folder("vanilla"))["epochs"] == 4


@pytest.mark.slow
def test_every_logger_writes_into_the_run_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for seed, (logger, pattern) in enumerate(
        {
            "csv": "steps/version_0/metrics.csv",
            "tensorboard": "tensorboard/events.out.tfevents.*",
            "wandb": "wandb/offline-run-*/run-*.wandb",
        }.items()
    ):
        ran = place.train("method=vanilla", f"logger={logger}", f"seed={seed}")
        wandb.finish()
        wandb.teardown()  # as the end of the process does: until then its service may still be writing
        assert ran.code == 0, ran.err
        (folder,) = [folder for folder in place.folders("vanilla") if f"seed{seed}-" in folder.name]
        (written,) = folder.glob(pattern)
        assert b"train/loss" in written.read_bytes()


def test_held_out_images_are_validated_on_and_test_images_seen_at_the_end(place: Place) -> None:
    ran = place.train("method=vanilla", "data.val_size=40")
    assert (ran.code, ran.err) == (0, "")
    result = result_of(place.folder("vanilla"))
    assert {"accuracy", "top5", "nll", "ece"} == result["test"].keys() == result["val"].keys()
    assert result["best_epoch"]["split"] == "val"
    assert result["train_images"] == 160
    (row,) = csv.DictReader((place.folder("vanilla") / "metrics.csv").read_text().splitlines())
    assert "val/accuracy" in row
    assert not any(name.startswith("test/") for name in row)


@pytest.mark.slow
def test_a_multirun_makes_one_folder_each(place: Place) -> None:
    ran = place.train("-m", "method=vanilla,dkd", "seed=0,1", "network@model.teacher=resnet8")
    assert (ran.code, ran.err) == (0, "")
    assert len(place.folders("vanilla")) == 2  # seed 0 alone is the teacher of both
    assert len(place.folders("dkd")) == 2
    assert {result_of(folder)["seed"] for folder in place.folders("dkd")} == {0, 1}


def test_a_job_that_fails_does_not_stop_the_others(place: Place) -> None:
    ran = place.train("-m", "method=vanilla", "data.val_size=1000,1001,20")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    told = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert any("data.val_size=1000 " in line for line in told)
    assert any("data.val_size=1001 " in line for line in told)
    assert len(place.folders("vanilla")) == 1


def test_two_methods_at_once(place: Place) -> None:
    ran = place.train("method=dkd", "method@also=kd")
    assert (ran.code, ran.err) == (0, "")
    folder = place.folder("dkd+kd")
    assert result_of(folder)["method"] == "dkd+kd"
    (row,) = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    terms = {name.removeprefix("train/") for name in row if name.startswith("train/")}
    assert terms == {"cross_entropy", "tckd", "nckd", "kd", "loss"}
    assert "Agrees with what the run reported." in place.evaluate(f"run={folder}").out


def test_a_list_of_methods_is_refused_since_all_but_one_would_get_lost(place: Place) -> None:
    assert_refused(place.train("method=[dkd,aekt]"), "method=[dkd,aekt] would merge them", "method@also=")


# Evaluation


@pytest.mark.parametrize(
    ("method", "layer"),
    [("vanilla", "none"), pytest.param("kd", "parallel", marks=pytest.mark.slow), ("aekt", "serial")],
)
def test_evaluation_agrees_with_the_run(finished: Place, method: str, layer: str) -> None:
    folder = next(path for path in finished.folders(method, layer) if "resnet8" in path.parts[-3])
    before = finished.contents()
    ran = finished.evaluate(f"run={folder}")
    assert (ran.code, ran.err) == (0, "")
    assert "Agrees with what the run reported." in ran.out
    assert f"{result_of(folder)['test']['nll']:.6f}" in ran.out
    assert ("agreement" in ran.out) == (method != "vanilla")
    assert finished.contents() == before


def test_evaluation_of_a_checkpoint_alone(finished: Place) -> None:
    folder = finished.folder("aekt", "serial")
    ran = finished.evaluate("data=cifar10", "network@model.student=resnet8", f"checkpoint={folder / 'student.pth'}")
    assert (ran.code, ran.err) == (0, "")
    for name in ("accuracy", "nll", "ece"):
        assert f"{result_of(folder)['test'][name]:.6f}" in ran.out


def copied(finished: Place, tmp_path: Path) -> Path:
    """A run of its own folder to do harm to."""
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    return runs / finished.folder("aekt", "serial").relative_to(finished.runs)


def test_evaluation_that_differs_is_an_error(finished: Place, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    result = result_of(folder)
    result["test"]["accuracy"] += 0.1
    (folder / "result.json").write_text(json.dumps(result))
    assert_refused(finished.evaluate(f"run={folder}"), "differs from what the run reported: accuracy")


@pytest.mark.parametrize("target", ["os.system", "src.config.os.system", "builtins.exec"])
def test_evaluation_calls_nothing_that_is_not_this_projects(finished: Place, tmp_path: Path, target: str) -> None:
    folder = copied(finished, tmp_path)
    config: Any = OmegaConf.load(folder / "config.yaml")
    canary = tmp_path / "executed"
    command = f"open({str(canary)!r}, 'w')" if target == "builtins.exec" else f"touch {canary}"
    config.data.prepare = {"_target_": target, "_args_": [command]}
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(finished.evaluate(f"run={folder}"), f"wants to call {target}", "refused")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([], "Give one of run=FOLDER"),
        (["run={tmp}", "checkpoint=x.pth"], "Give one of run=FOLDER"),
        (["run={tmp}"], "is no run folder: it has no config.yaml"),
        (["checkpoint={tmp}/missing.pth", "data=cifar10"], "missing.pth does not exist"),
        (["checkpoint={tmp}/resnet14.pth", "data=cifar10"], "does not hold the weights of a"),
    ],
)
def test_evaluation_of_nothing(finished: Place, tmp_path: Path, arguments: list[str], phrase: str) -> None:
    save_weights(resnet14(10), tmp_path / "resnet14.pth")
    assert_refused(finished.evaluate(*(argument.format(tmp=tmp_path) for argument in arguments)), phrase)


def test_evaluation_without_a_checkpoint(finished: Place, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert_refused(finished.evaluate(f"run={folder}"), "has no checkpoints/last.ckpt: nothing to evaluate")


def test_evaluation_of_a_checkpoint_that_does_not_fit(finished: Place, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    config: Any = OmegaConf.load(folder / "config.yaml")
    config.model.student._target_ = "src.models.resnet.resnet14"
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(finished.evaluate(f"run={folder}"), "last.ckpt does not fit the networks of")


# Reports


def test_a_report_of_the_runs(finished: Place, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    left = folder.parents[1] / "kd"
    next(left.glob("none-*/result.json")).unlink()
    out = tmp_path / "reports"
    ran = run("report", f"runs={tmp_path / 'runs'}", f"out={out}")
    assert (ran.code, ran.err) == (0, "")
    assert f"Not finished: {left}" in ran.out
    table = (out / "table.md").read_text()
    assert str(left.relative_to(tmp_path / "runs")) in table
    rows = [line for line in table.partition("| compared")[0].splitlines() if line.startswith("| resnet")]
    assert len(rows) == len(RUNS)  # the teacher's and all but the unfinished one
    (row,) = [row for row in rows if "aekt, serial" in row]
    assert f"{100 * result_of(folder)['test']['accuracy']:.1f}" in row
    assert sum("resnet8" in row for row in rows) == len(RUNS) - 1
    for picture in ("accuracy.png", "reliability.png", "agreement.png", "class_relations.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "is in no picture" not in table


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert_refused(run("report", f"runs={tmp_path}", f"out={tmp_path / 'reports'}"), "No finished run below")
    assert not (tmp_path / "reports").exists()


# Bad input


def check_bad_input(place: Place, bad_files: Path, arguments: list[str], phrases: list[str]) -> None:
    ran = place.train(*(argument.format(tmp=bad_files) for argument in arguments))
    assert_refused(ran, *phrases)
    assert not (bad_files / "executed").exists()
    assert not list(place.runs.rglob("result.json"))


def first(value: object) -> str | None:
    return value[0] if isinstance(value, list) else None


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["nonsense=1"], ["nonsense"]),
        (["method=nonsense"], ["method/nonsense", "ab; aekt; at; catkd; cc"]),
        (["seed=abc"], ["seed=abc", "Integer"]),
        (["schedule.epochs=-1"], ["schedule.epochs=-1", "must be positive"]),
        (["method.beta=abc"], ["method.beta=abc does not fit"]),
        (["method=vanilla", "serialization=serial"], ["method=vanilla has no logit term", "serialization=none"]),
        (["data.path={tmp}/missing.npz"], ["missing.npz is no file", "data.path"]),
        (["data.path={tmp}/soft.npz"], ["soft.npz", "train_labels", "float32"]),
        (["teacher.path={tmp}/missing.pth"], ["teacher.path=", "missing.pth is no file"]),
        (["teacher.path={tmp}/resnet14.pth"], ["does not hold the weights of a", "choose the architecture"]),
        (["teacher.path={tmp}/hostile.pth"], ["hostile.pth asks for posix.system", "refused"]),
        (["teacher.train_if_missing=false"], ["No teacher resnet20 for cifar10", "teacher.path"]),
        (["runs={tmp}/noise.pth/below"], ["Cannot write the run folder", "runs=..."]),
        (["trainer.devices=3", "trainer.accelerator=cpu"], ["schedule.batch_size=8", "3 devices"]),
    ],
    ids=first,
)
def test_bad_input_ends_in_one_sentence(
    place: Place, bad_files: Path, arguments: list[str], phrases: list[str]
) -> None:
    check_bad_input(place, bad_files, arguments, phrases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["nonsense"], ["nonsense"]),
        (["schedule.epochs=abc"], ["schedule.epochs=abc", "Integer"]),
        (["method.weighting=foo"], ["method.weighting=foo", "'ratio', 'log_ratio' or 'constant'"]),
        (["data.path={tmp}/truncated.npz"], ["truncated.npz", "damaged"]),
        (["teacher.path={tmp}/hundred.pth"], ["100 classes and the network has 10"]),
        (["schedule.nonsense=1"], ["schedule.nonsense"]),
        (["+method.nonsense=1"], ["method.nonsense=1 is no option", "temperature"]),
        (["+trainer.nonsense=1"], ["nonsense"]),
        (["network@model.student=nonsense"], ["network/nonsense", "resnet110"]),
        (["method=vanilla,kd"], ["method=vanilla,kd", "--multirun"]),
        (["method.temperature=0"], ["method.temperature=0 does not fit", "greater than 0"]),
        (["method._target_=src.methods.nothing.Nothing"], ["src.methods.nothing"]),
        (["schedule.optimizer.momentum=abc"], ["schedule.optimizer", "torch.optim.SGD"]),
        (["data.val_size=1000"], ["data.val_size=1000 does not fit", "200 images"]),
        (["data.train_size=1000"], ["data.train_size=1000 does not fit", "200 images"]),
        (["data.path={tmp}/objects.npz"], ["objects.npz", "pickled objects"]),
        (["teacher.path={tmp}"], ["is no file"]),
        (["teacher.path={tmp}/noise.pth"], ["noise.pth is damaged or no checkpoint"]),
        (["trainer.precision=64-true"], ["precision=64-true does not fit", "32-true or bf16-mixed or 16-mixed"]),
        (["trainer.strategy=nonsense"], ["This trainer cannot be had here", "nonsense"]),
        (["-m", "seed=abc"], ["seed=abc", "Integer"]),
    ],
    ids=first,
)
def test_more_bad_input_ends_in_one_sentence(
    place: Place, bad_files: Path, arguments: list[str], phrases: list[str]
) -> None:
    check_bad_input(place, bad_files, arguments, phrases)


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """Files of every kind that are refused."""
    arrays = colour_arrays(20, 10)
    save_arrays(
        tmp_path / "soft.npz", **{**arrays, "train_labels": np.eye(10, dtype=np.float32)[arrays["train_labels"]]}
    )
    save_arrays(tmp_path / "whole.npz", **arrays)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[: len(content) // 2])
    save_arrays(tmp_path / "objects.npz", **{**arrays, "class_names": np.array([Hostile(tmp_path)] * 10, dtype=object)})
    save_weights(resnet14(10), tmp_path / "resnet14.pth")
    save_weights(resnet20(100), tmp_path / "hundred.pth")
    torch.save({"model": Hostile(tmp_path)}, tmp_path / "hostile.pth")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 8)
    return tmp_path


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.folder / 'executed'}",)


def test_neither_data_nor_a_network(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(cifar, "_download", no_network)
    ran = run("train", *SMALL, f"data.root={place.path}", f"runs={place.runs}")
    assert_refused(ran, "CIFAR10 is neither at", "cifar10.npz", "data.root")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(place: Place) -> None:
    assert_refused(place.train("trainer=gpu", "method=vanilla"), "gpu", "try trainer=auto")


def test_a_run_made_by_other_code_is_left_alone(finished: Place, tmp_path: Path) -> None:
    place = Place(tmp_path, finished.data)
    run_file = copied(finished, tmp_path) / "run.json"
    about = json.loads(run_file.read_text())
    about["fingerprints"]["code"] = "another"
    run_file.write_text(json.dumps(about))
    before = place.contents()
    assert_refused(place.train("method=aekt"), "was made with another code than today's", "start_over=true")
    assert place.contents() == before

    ran = place.train("method=aekt", "start_over=true")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(run_file.read_text())["fingerprints"]["code"] != "another"
    assert ran.out.count("Training ") == 1, "the teacher was trained again"


def test_a_damaged_checkpoint(finished: Place, tmp_path: Path) -> None:
    place = Place(tmp_path, finished.data)
    folder = copied(finished, tmp_path)
    (folder / "result.json").unlink()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    for ran in (place.train("method=aekt"), place.evaluate(f"run={folder}")):
        assert ran.code == 1
        (line,) = ran.err.splitlines()
        assert line.startswith(f"error: {checkpoint} is damaged")
        assert "start_over=true" in line
        assert "epoch 1/" not in ran.out


@pytest.mark.parametrize("name", ["result.json", pytest.param("run.json", marks=pytest.mark.slow)])
def test_a_damaged_file_of_a_run(finished: Place, tmp_path: Path, name: str) -> None:
    place = Place(tmp_path, finished.data)
    folder = copied(finished, tmp_path)
    (folder / name).write_text('{"half')
    assert_refused(place.train("method=aekt"), f"{folder / name} is damaged", "start_over=true")


# As processes


def python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_help_is_a_guide(command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"python -m src.{command} " in ran.out
    if command == "train":
        for group in (
            "data: arrays, cifar10, cifar100, glyphs, imagefolder, imagenet, stream",
            "method: ab, aekt, at, catkd, cc",
            "serialization: none",
        ):
            assert group in ran.out
        assert "seed=0" in ran.out


def test_the_command_itself(place: Place) -> None:
    arguments = [*SMALL, f"data.path={place.data}", f"runs={place.runs}", "method=vanilla"]
    ran = python("-m", "src.train", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "test accuracy" in ran.stdout
    assert result_of(place.folder("vanilla"))["epochs"] == 1


@pytest.mark.slow
def test_the_command_itself_says_one_sentence(place: Place) -> None:
    ran = python("-m", "src.train", *SMALL, f"data.path={place.path / 'missing.npz'}", f"runs={place.runs}")
    assert_refused(Ran(ran.returncode, ran.stdout, ran.stderr), "missing.npz is no file")
