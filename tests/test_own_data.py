"""Training on your own images, end to end: an array file, a folder of photos, and shards."""

import csv
import json
import shutil
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
from tests.helpers.commands import Ran, assert_refused, run

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


def only_epoch(folder: Path) -> dict[str, str]:
    """Read the only row of a run's metrics.csv."""
    (row,) = csv.DictReader((folder / "metrics.csv").open(newline=""))
    return row


def test_val_is_scored_in_each_epoch_and_test_once_at_the_end(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos / "val", photos / "test")
    for name in CLASSES:
        (photos / "val" / name / "3.png").unlink()
    sizes = ("data.image_size=32", "data.resize=36", "data.workers=0")
    pair = ("model=resnet20_to_resnet8", "method=kd", "schedule.batch_size=20")
    ran = run("convert", f"data.root={photos}", f"out={tmp_path / 'shards'}")
    assert (ran.code, ran.err) == (0, "")
    results = []
    for kind, data in (("folder", "imagefolder"), ("stream", "stream")):
        root = photos if kind == "folder" else tmp_path / "shards"
        ran = train(tmp_path / kind, f"data={data}", f"data.root={root}", "data.name=same", *sizes, *pair)
        assert (ran.code, ran.err) == (0, "")
        assert "20 training images" in ran.out
        assert "6 validation images" in ran.out
        folder = only_run(tmp_path / kind, "kd")
        row = only_epoch(folder)
        assert "val/accuracy" in row
        assert "test/accuracy" not in row
        results.append(result_of(folder))
        assert results[-1]["best_epoch"]["split"] == "val"
        assert "The metrics agree with those that the run reported." in run("evaluate", f"run={folder}").out
    for split in ("val", "test"):
        assert results[1][split]["nll"] == pytest.approx(results[0][split]["nll"], abs=1e-3)
    refused = train(tmp_path / "folder", "data=imagefolder", f"data.root={photos}", *sizes, *pair, "data.val_size=4")
    assert_refused(refused, "data.val_size=4 holds training images out", "set data.val_size=0 to use them")


def test_the_validation_split_of_an_array_file_is_scored_in_each_epoch(tmp_path: Path) -> None:
    val = colour_arrays(classes=5, test=15)
    extra = {"val_images": val["test_images"], "val_labels": val["test_labels"], "weights": np.ones(3)}
    save_arrays(tmp_path / "mine.npz", **colour_arrays(classes=5), **extra)
    ran = train(tmp_path, "data=arrays", f"data.path={tmp_path / 'mine.npz'}", "model=resnet20_to_resnet8", "method=kd")
    assert (ran.code, ran.err) == (0, "")
    assert "15 validation images (val_images)" in ran.out
    assert "left unread: weights." in ran.out
    folder = only_run(tmp_path, "kd")
    assert "test/accuracy" not in only_epoch(folder)
    assert {"val", "test"} <= result_of(folder).keys()


def test_labels_from_1_in_a_column_and_grey_images_are_trained_on(tmp_path: Path) -> None:
    contents = colour_arrays(classes=5)
    del contents["class_names"]
    for split in ("train", "test"):
        contents[f"{split}_labels"] = contents[f"{split}_labels"][:, None] + 1
        contents[f"{split}_images"] = contents[f"{split}_images"].mean(axis=3).astype(np.uint8)
    save_arrays(tmp_path / "mine.npz", **contents)
    ran = train(tmp_path, "data=arrays", f"data.path={tmp_path / 'mine.npz'}", "model=resnet20_to_resnet8", "method=kd")
    assert (ran.code, ran.err) == (0, "")
    assert result_of(only_run(tmp_path, "kd"))["class_names"] == ["1", "2", "3", "4", "5"]
    assert "run from 1 to 5, and are shifted to 0 to 4." in ran.out


def test_a_rest_of_one_image_does_not_end_a_network_with_batch_norm(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz", **colour_arrays(train=9, test=6, classes=3))
    alone = ("method=vanilla", "network@model.student=imagenet/resnet18", "data=arrays")
    ran = train(tmp_path, *alone, f"data.path={tmp_path / 'mine.npz'}")
    assert (ran.code, ran.err) == (0, "")
    assert "The last batch has 9 images, because batch norm cannot train on a rest of one image." in ran.out
    save_arrays(tmp_path / "one.npz", **colour_arrays(train=3, test=6, classes=2))
    ran = train(tmp_path, *alone, f"data.path={tmp_path / 'one.npz'}", "data.val_size=2")
    assert_refused(ran, "There are too few training images (1), because batch norm needs two on each device")


def test_damaged_photos_are_reported_before_a_teacher_is_trained(tmp_path: Path, photos: Path) -> None:
    file = photos / "train" / CLASSES[0] / "0.png"
    file.write_bytes(file.read_bytes()[:-50])
    arguments = (
        "data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=36", "data.workers=0",
        "model=resnet20_to_resnet8", "method=kd",
    )  # fmt: skip
    ran = train(tmp_path, *arguments)
    assert_refused(ran, "1 of 28 photos cannot be read: train/n01440764/0.png (", "data.skip_corrupt=true")
    assert not (tmp_path / "runs").exists()
    ran = train(tmp_path, *arguments, "data.skip_corrupt=true")
    assert (ran.code, ran.err) == (0, "")
    assert "Left out of" in ran.out
    assert result_of(only_run(tmp_path, "kd"))["train_images"] == 19


def test_photos_without_labels_are_distilled(tmp_path: Path, photos: Path) -> None:
    loose = tmp_path / "loose"
    shutil.copytree(photos / "train" / CLASSES[0], loose / "a")
    data = ("data=imagefolder", f"data.root={photos}", "data.image_size=32", "data.resize=32")
    common = (*data, f"data.unlabelled={loose}", "model=resnet20_to_resnet8", "teacher.view_store=true")
    ran = train(tmp_path, *common, "method=aekt")
    assert (ran.code, ran.err) == (0, "")
    assert f"20 training images ({photos / 'train'}/), 10 unlabelled training images ({loose}/)" in ran.out
    assert "Each of the 4 batches of an epoch has 5 images with and 3 without labels." in ran.out
    result = result_of(only_run(tmp_path, "aekt"))
    assert (result["train_images"], result["unlabelled_images"]) == (20, 10)
    assert_refused(train(tmp_path, *common, "method=crd"), "method=crd needs the label of each image, but 10 training")
    alone = train(tmp_path, *common, "method=vanilla")
    assert alone.code == 0
    assert "10 training images without labels are left unread, because the method distils nothing." in alone.out
    report = run("report", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'report'}")
    assert report.code == 0
    assert "20 training images with labels, 10 without" in report.out
    onnx = run("export", f"run={only_run(tmp_path, 'aekt')}", "images=8")
    assert onnx.code == 0
    card = next((only_run(tmp_path, "aekt") / "export").glob("*.md")).read_text()
    assert "epochs of 20 images with labels and 10 without" in card
    shutil.rmtree(loose)  # evaluation needs the labelled photos alone
    assert run("evaluate", f"run={only_run(tmp_path, 'aekt')}").code == 0


def test_a_student_needs_no_labels(tmp_path: Path) -> None:
    whole = colour_arrays(classes=5)
    kept = {name: array for name, array in whole.items() if not name.startswith("train_")}
    save_arrays(tmp_path / "mine.npz", **kept, unlabelled_images=whole["train_images"])
    torch.manual_seed(0)
    save_weights(resnet8(5), tmp_path / "teacher.pth")
    pair = ("data=arrays", f"data.path={tmp_path / 'mine.npz'}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]")
    networks = ("network@model.teacher=resnet8", "network@model.student=resnet8")
    ran = train(tmp_path, *pair, *networks, f"teacher.path={tmp_path / 'teacher.pth'}", "method=dkd")
    assert (ran.code, ran.err) == (0, "")
    rows = list(csv.DictReader((only_run(tmp_path, "dkd") / "metrics.csv").open()))
    assert float(rows[0]["train/cross_entropy"]) == 0
    assert float(rows[0]["train/nckd"]) > 0
    refused = train(tmp_path, *pair, *networks, f"teacher.path={tmp_path / 'teacher.pth'}", "method=vanilla")
    assert_refused(refused, "No training images are left")


@pytest.mark.parametrize("method", ["dml", "fsp"])
def test_methods_whose_main_stage_reads_no_teacher_train_with_images_without_labels(
    tmp_path: Path, method: str
) -> None:
    save_arrays(tmp_path / "mine.npz", **colour_arrays(classes=5))
    data = ("data=arrays", f"data.path={tmp_path / 'mine.npz'}", "data.train_size=0.5", "data.unlabelled=rest")
    ran = train(tmp_path, *data, "model=resnet20_to_resnet8", f"method={method}", "gradients.every=1")
    assert (ran.code, ran.err) == (0, "")
    assert (only_run(tmp_path, method) / "gradients.csv").is_file()


def test_augmentations_train_by_command_and_the_teacher_keeps_the_standard_one(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz", **colour_arrays(classes=5))
    pair = ("data=arrays", f"data.path={tmp_path / 'mine.npz'}", "model=resnet20_to_resnet8", "teacher.view_store=true")
    for method, augmentation, *more in (
        ("dkd", "cutmix"), ("kd", "trivial", "data.workers=1"), ("mlkd", "weak_and_strong", "+method.views=2"),
    ):  # fmt: skip
        ran = train(tmp_path, *pair, f"method={method}", f"augmentation={augmentation}", *more)
        assert (ran.code, ran.err) == (0, "")
        assert result_of(only_run(tmp_path, method))["settings"]["augmentation"]["name"] == augmentation
    teacher = result_of(only_run(tmp_path, "vanilla"))  # there is one for all three
    assert "augmentation" not in teacher["settings"]
    assert train(tmp_path, *pair, "method=kd", "augmentation=none").code == 0
    stores = {file.name.rpartition("True")[2] for file in (tmp_path / "runs" / "teachers").glob("*.views")}
    assert len(stores) == 4
