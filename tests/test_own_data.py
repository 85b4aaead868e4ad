"""Training on your own images, end to end: an array file, a folder of photos, and shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.array_file import save_arrays
from src.data.imagenet import WNIDS, english_names
from src.models.checkpoints import save_weights
from src.models.resnet import resnet8
from src.models.sources import architecture
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import Ran, run

CLASSES = (WNIDS[0], WNIDS[217])


def train(folder: Path, *arguments: object) -> Ran:
    """Train two steps, with runs and teachers in `folder`."""
    here = (f"runs={folder / 'runs'}", f"teacher.store={folder / 'teachers'}", "trainer=debug", "logger=none")
    return run("train", *here, "schedule.batch_size=8", *arguments)


def only_run(folder: Path, method: str) -> Path:
    """Return the run folder of the only finished run of a method."""
    (result,) = (folder / "runs").glob(f"*/*/{method}/*/result.json")
    return result.parent


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos of two ImageNet classes, in several sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (40 + 3 * i, 60 - 2 * i, 3)
                picture = random.normal(60 + 130 * label, 30, size).clip(0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_training_on_an_array_file(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz", **colour_arrays(classes=5))
    pair = ("data=arrays", f"data.path={tmp_path / 'mine.npz'}", "model=resnet20_to_resnet8", "method=kd")
    ran = train(tmp_path, *pair)
    assert (ran.code, ran.err) == (0, "")
    folder = only_run(tmp_path, "kd")
    result = result_of(folder)
    assert folder.parts[-4] == "mine"
    assert result["class_names"] == [f"colour {i}" for i in range(5)]
    assert "The metrics agree with those that the run reported." in run("evaluate", f"run={folder}").out

    student = torch.load(folder / "student.pth", weights_only=True)
    images = colour_arrays(classes=5)["train_images"].reshape(-1, 3) / 255
    np.testing.assert_allclose(student["mean"], images.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(student["std"], images.std(axis=0), atol=1e-4)


def test_a_missing_path_is_reported_in_one_sentence(tmp_path: Path) -> None:
    ran = train(tmp_path, "data=arrays", "model=resnet20_to_resnet8")
    assert ran.code == 1
    assert ran.err.strip() == "error: data=arrays needs data.path=FILE.npz (see docs/data.md for the format)."


def test_a_teacher_of_1000_classes_teaches_the_2_classes_of_a_folder(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    save_weights(architecture("torchvision/mobilenet_v3_small", 1000), tmp_path / "teacher.pth")
    ran = train(
        tmp_path, "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=0",
        "teacher.source=torchvision/mobilenet_v3_small", f"teacher.path={tmp_path / 'teacher.pth'}",
        "teacher.image_size=64", "network@model.student=resnet8", "method=aekt",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    folder = only_run(tmp_path, "aekt")
    assert folder.parts[-4:-2] == ("photos", "mobilenet_v3_small_to_resnet8")
    result = result_of(folder)
    assert result["teacher"]["class_index"] == [0, 217]
    assert result["teacher"]["image_size"] == 64
    assert result["teacher"]["mean"] == [0.485, 0.456, 0.406]
    assert english_names(result["class_names"]) == ["tench", "English springer"]
    assert "The metrics agree with those that the run reported." in run("evaluate", f"run={folder}").out


def test_a_teacher_is_trained_on_the_folder_itself(tmp_path: Path, photos: Path) -> None:
    ran = train(
        tmp_path, "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=1",
        "model=resnet20_to_resnet8", "method=kd", "student.source=null",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert result_of(only_run(tmp_path, "kd"))["teacher"]["class_index"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["teacher.path={tmp}/three.pth"],
            "The teacher has 3 classes (ant, bee, ...) and the data has 2 (n01440764,",
        ),
        (
            ["teacher.view_store=true", "teacher.view_store_gigabytes=1e-9", "teacher.path={tmp}/two.pth"],
            "teacher.view_store could grow to",
        ),
        (["data.root={tmp}"], "train"),
    ],
)
def test_a_wrong_teacher_store_or_folder_is_reported_before_training(
    tmp_path: Path, photos: Path, arguments: list[str], message: str
) -> None:
    save_weights(resnet8(3), tmp_path / "three.pth", class_names=["ant", "bee", "cat"])
    save_weights(resnet8(2), tmp_path / "two.pth")
    ran = train(
        tmp_path, "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=0",
        "model=resnet20_to_resnet8", "network@model.teacher=resnet8", "method=kd",
        *(argument.format(tmp=tmp_path) for argument in arguments),
    )  # fmt: skip
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1
    assert message in ran.err
    assert "Training" not in ran.out


def test_training_on_shards_equals_training_on_the_folder(tmp_path: Path, photos: Path) -> None:
    ran = run("convert", f"data.root={photos}", f"out={tmp_path / 'shards'}")
    assert (ran.code, ran.err) == (0, "")
    options = ("data.image_size=32", "data.resize=36", "data.workers=0", "method=vanilla", "data.name=same")
    one = ("network@model.student=resnet8", "schedule.batch_size=20")  # one batch, because the order of photos differs
    for data in (f"imagefolder data.root={photos}", f"stream data.root={tmp_path / 'shards'}"):
        ran = train(tmp_path / data.split()[0], *one, *options, *f"data={data}".split())
        assert (ran.code, ran.err) == (0, "")
    folder, stream = (result_of(only_run(tmp_path / kind, "vanilla")) for kind in ("imagefolder", "stream"))
    assert stream["class_names"] == folder["class_names"] == list(CLASSES)
    assert stream["test"]["nll"] == pytest.approx(folder["test"]["nll"], abs=1e-4)
