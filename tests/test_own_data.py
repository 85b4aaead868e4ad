"""Your own arrays and photos, end to end as a user types it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.data.arrays import save_arrays
from src.data.imagenet import WNIDS, readable
from src.models.checkpoints import save_weights
from src.models.resnet import resnet8
from src.models.sources import architecture
from tests.commands import Ran, run
from tests.conftest import colour_arrays

CLASSES = (WNIDS[0], WNIDS[217])


def train(folder: Path, *arguments: object) -> Ran:
    here = (f"runs={folder / 'runs'}", f"teacher.store={folder / 'teachers'}", "trainer=debug", "logger=none")
    return run("train", *here, "schedule.batch_size=8", *arguments)


def the_run(folder: Path, method: str) -> Path:
    (result,) = (folder / "runs").glob(f"*/*/{method}/*/result.json")
    return result.parent


def result_of(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of two ImageNet classes, of several sizes."""
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


def test_an_array_file_is_all_it_takes(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz", **colour_arrays(classes=5))
    pair = ("data=arrays", f"data.path={tmp_path / 'mine.npz'}", "model=resnet20_to_resnet8", "method=kd")
    ran = train(tmp_path, *pair)
    assert (ran.code, ran.err) == (0, "")
    folder = the_run(tmp_path, "kd")
    result = result_of(folder)
    assert folder.parts[-4] == "mine"
    assert result["class_names"] == [f"colour {i}" for i in range(5)]
    assert "Agrees with what the run reported." in run("evaluate", f"run={folder}").out

    student = torch.load(folder / "student.pth", weights_only=True)
    images = colour_arrays(classes=5)["train_images"].reshape(-1, 3) / 255
    np.testing.assert_allclose(student["mean"], images.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(student["std"], images.std(axis=0), atol=1e-4)


def test_a_missing_array_file_is_one_sentence(tmp_path: Path) -> None:
    ran = train(tmp_path, "data=arrays", "model=resnet20_to_resnet8")
    assert ran.code == 1
    assert ran.err.strip() == "error: data=arrays needs data.path=FILE.npz (the format: src/data/arrays.py)."


def test_a_teacher_of_1000_classes_teaches_the_two_of_a_folder(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    save_weights(architecture("torchvision/mobilenet_v3_small", 1000), tmp_path / "teacher.pth")
    ran = train(
        tmp_path, "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=0",
        "teacher.source=torchvision/mobilenet_v3_small", f"teacher.path={tmp_path / 'teacher.pth'}",
        "teacher.image_size=64", "network@model.student=resnet8", "method=aekt",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    folder = the_run(tmp_path, "aekt")
    assert folder.parts[-4:-2] == ("photos", "mobilenet_v3_small_to_resnet8")
    result = result_of(folder)
    assert result["teacher"]["class_index"] == [0, 217]
    assert result["teacher"]["image_size"] == 64
    assert result["teacher"]["mean"] == [0.485, 0.456, 0.406]
    assert readable(result["class_names"]) == ["tench", "English springer"]
    assert "Agrees with what the run reported." in run("evaluate", f"run={folder}").out


def test_a_teacher_that_was_trained_on_the_folder_itself(tmp_path: Path, photos: Path) -> None:
    ran = train(
        tmp_path, "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=1",
        "model=resnet20_to_resnet8", "method=kd", "student.source=null",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert result_of(the_run(tmp_path, "kd"))["teacher"]["class_index"] is None


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (
            ["teacher.path={tmp}/three.pth"],
            "The teacher knows 3 classes (ant, bee, ...) and the data has 2 (n01440764,",
        ),
        (
            ["teacher.view_store=true", "teacher.store_gigabytes=1e-9", "teacher.path={tmp}/two.pth"],
            "teacher.view_store could come to",
        ),
        (["data.root={tmp}"], "train"),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    tmp_path: Path, photos: Path, arguments: list[str], phrase: str
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
    assert phrase in ran.err
    assert "Training" not in ran.out


def test_photos_in_shards_are_trained_on_alike(tmp_path: Path, photos: Path) -> None:
    ran = run("convert", f"data.root={photos}", f"out={tmp_path / 'shards'}")
    assert (ran.code, ran.err) == (0, "")
    options = ("data.image_size=32", "data.resize=36", "data.workers=0", "method=vanilla", "data.name=same")
    one = ("network@model.student=resnet8", "schedule.batch_size=20")  # one batch: the order of photos differs
    for data in (f"imagefolder data.root={photos}", f"stream data.root={tmp_path / 'shards'}"):
        ran = train(tmp_path / data.split()[0], *one, *options, *f"data={data}".split())
        assert (ran.code, ran.err) == (0, "")
    folder, stream = (result_of(the_run(tmp_path / kind, "vanilla")) for kind in ("imagefolder", "stream"))
    assert stream["class_names"] == folder["class_names"] == list(CLASSES)
    assert stream["test"]["nll"] == pytest.approx(folder["test"]["nll"], abs=1e-4)
