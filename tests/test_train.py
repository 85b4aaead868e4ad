"""`python -m src.train`: what a run leaves in its folder."""

import csv
import json
from importlib.metadata import version

import pytest
import torch
import wandb
from omegaconf import OmegaConf
from torch.nn import functional as F

from src.data.array_file import save_arrays
from src.methods.method import Method
from src.models.resnet import resnet8
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import assert_refused
from tests.helpers.place import RUNS, Place, result_of

TERMS = {
    "vanilla": {"cross_entropy"},
    "kd": {"cross_entropy", "kd"},
    "dkd": {"cross_entropy", "tckd", "nckd"},
    "aekt": {"cross_entropy", "tckd", "nckd", "explicit_transfer"},
}


@pytest.mark.parametrize(("method", "layer"), RUNS)
def test_a_run_folder_holds_everything_about_its_run(finished: Place, method: str, layer: str) -> None:
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
    record = json.loads((folder / "run.json").read_text())
    assert {"python", "torch", "lightning"} <= record["versions"].keys()
    assert record["versions"]["torch"] == version("torch")

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
        wandb.teardown()  # as at the end of a process: until then its service may still be writing
        assert ran.code == 0, ran.err
        (folder,) = [folder for folder in place.folders("vanilla") if f"seed{seed}-" in folder.name]
        (written,) = folder.glob(pattern)
        assert b"train/loss" in written.read_bytes()


def test_held_out_images_are_validated_on_and_test_images_are_used_once_at_the_end(place: Place) -> None:
    ran = place.train("method=vanilla", "data.val_size=40")
    assert (ran.code, ran.err) == (0, "")
    result = result_of(place.folder("vanilla"))
    assert {"accuracy", "top5", "nll", "ece"} == result["test"].keys() == result["val"].keys()
    assert result["best_epoch"]["split"] == "val"
    assert result["train_images"] == 160
    (row,) = csv.DictReader((place.folder("vanilla") / "metrics.csv").read_text().splitlines())
    assert "val/accuracy" in row
    assert not any(name.startswith("test/") for name in row)


def test_two_methods_are_combined(place: Place) -> None:
    ran = place.train("method=dkd", "method@also=kd")
    assert (ran.code, ran.err) == (0, "")
    folder = place.folder("dkd+kd")
    assert result_of(folder)["method"] == "dkd+kd"
    (row,) = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    terms = {name.removeprefix("train/") for name in row if name.startswith("train/")}
    assert terms == {"cross_entropy", "tckd", "nckd", "kd", "loss"}
    assert "The metrics agree with those that the run reported." in place.evaluate(f"run={folder}").out


def test_duplicates_are_logged_and_part_of_the_result(place: Place) -> None:
    arrays = colour_arrays()
    arrays["test_images"][:3] = arrays["train_images"][40:43]
    place.data = place.path / "overlapping.npz"
    save_arrays(place.data, **arrays)
    ran = place.train("method=vanilla")
    assert (ran.code, ran.err) == (0, "")
    assert "3 of the 60 test images are training images too." in ran.out.splitlines()
    folder = place.folder("vanilla")
    assert result_of(folder)["train_duplicates"] == {"test": 3}
    assert json.loads((folder / "run.json").read_text())["train_duplicates"] == {"test": 3}


def test_a_run_that_diverges_has_no_result_and_says_what_to_try(place: Place) -> None:
    ran = place.train("method=vanilla", "schedule.learning_rate=1e30")
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    assert "not finite" in line
    assert "try a lower schedule.learning_rate" in line
    assert not list(place.runs.rglob("result.json"))
    assert not list(place.runs.rglob("last.ckpt")), "the first epoch's weights are not finite"
    (failure,) = place.runs.rglob("failure.txt")
    assert "not finite" in failure.read_text()
    assert place.train("method=vanilla").code == 0


# Networks and methods of one's own


def write_option(place: Place, group: str, text: str) -> str:
    """Write an option of a group, and return the override that lets Hydra find it."""
    file = place.path / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return f"hydra.searchpath=[file://{place.path / 'conf'}]"


def test_a_network_of_ones_own_needs_a_target_a_name_and_a_learning_rate(place: Place) -> None:
    text = "_target_: src.models.resnet.resnet14\nname: mine\nlearning_rate: 0.1\n"
    ran = place.train("method=vanilla", "network@model.student=mine", write_option(place, "network", text))
    assert (ran.code, ran.err) == (0, "")
    folder = place.folder("vanilla")
    assert folder.parts[-3] == "mine"
    assert result_of(folder)["settings"]["schedule"]["learning_rate"] == 0.1
    assert place.evaluate(f"run={folder}").code == 0


@pytest.mark.parametrize("missing", ["name", "learning_rate"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_without_a_name_or_a_learning_rate_is_refused(place: Place, role: str, missing: str) -> None:
    keys = {"_target_": "src.models.resnet.resnet14", "name": "mine", "learning_rate": "0.1"}
    text = "\n".join(f"{key}: {value}" for key, value in keys.items() if key != missing)
    ran = place.train("method=kd", f"network@model.{role}=mine", write_option(place, "network", text))
    assert_refused(ran, f"model.{role}.{missing} is missing: add the key '{missing}' to the file in conf/network.")
    assert "Training" not in ran.out
    assert not place.runs.exists()


class CrossEntropy(Method):
    def weights(self, epoch):
        return {"cross_entropy": 1.0}

    def terms(self, batch):
        return {"cross_entropy": F.cross_entropy(batch.student.logits, batch.target)}


def test_a_method_of_ones_own_needs_a_target_and_a_name(place: Place) -> None:
    text = f"_target_: {__name__}.CrossEntropy\nname: mine\n"
    ran = place.train("method=mine", "network@model.teacher=resnet8", write_option(place, "method", text))
    assert (ran.code, ran.err) == (0, "")
    (row,) = csv.DictReader((place.folder("mine") / "metrics.csv").read_text().splitlines())
    assert {name for name in row if name.startswith("train/")} == {"train/cross_entropy", "train/loss"}
