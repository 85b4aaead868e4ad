"""What would quietly make a result wrong is said, and never saved."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from src.data.arrays import save_arrays
from src.errors import UserError
from src.methods.method import Method
from src.models.checkpoints import save_weights
from src.models.resnet import resnet20
from src.teacher import Teacher, answers_file, view_store_file
from tests.commands import assert_refused
from tests.conftest import colour_arrays
from tests.test_commands import Place, result_of
from tests.test_config import configure
from tests.tiny import CLASSES, MEAN, STD, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer


class Spoils(Method):
    """Cross-entropy, until in epoch 1 something goes wrong."""

    distils_logits = True

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def build(self, networks):
        self.teacher = networks.teacher

    def weights(self, epoch):
        return {"cross_entropy": 1.0, "match": 0.1}

    def terms(self, batch):
        match = F.mse_loss(batch.student.distillation_logits, batch.teacher.distillation_logits)
        if batch.step == 8 and self.what in ("nan", "inf"):  # 44 images in batches of 8: the third batch of epoch 1
            match = match * float(self.what)
        if batch.step == 8 and self.what == "teacher":
            self.teacher.network.classifier_layer.bias[0] += 1e-3
        if batch.step == 8 and self.what == "statistics":
            next(m for m in self.teacher.network.modules() if hasattr(m, "running_var")).running_var.mul_(1.01)
        self.last = batch.step == 11
        return {"cross_entropy": F.cross_entropy(batch.student.logits, batch.target), "match": match}

    def backward(self, loss, weighted_terms):
        loss.backward()
        if self.last and self.what == "gradient":
            self.student_weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nan", r"The loss is not finite in epoch 1, batch 2 \(cross_entropy [\d.]+, match nan\)"),
        ("inf", r"The loss is not finite in epoch 1, batch 2 \(cross_entropy [\d.]+, match inf\)"),
        ("gradient", r"student\.fc\.weight is not finite in epoch 1: the last checkpoint is kept; try a lower"),
        ("teacher", "The teacher's weights changed during training"),
        ("statistics", "The teacher's weights changed during training"),
    ],
)
def test_training_ends_and_keeps_the_last_good_checkpoint(tmp_path: Path, what: str, says: str) -> None:
    data, method = tiny_data(tmp_path), Spoils(what)
    distiller = tiny_distiller(data, method, teacher=tiny_teacher())
    method.__dict__["student_weight"] = distiller.student.classifier_layer.weight  # not a parameter of its own
    kept: dict[str, torch.Tensor] = {}

    class Copy(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            kept.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    checkpoint = Copy(dirpath=tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    with pytest.raises(UserError, match=says) as caught:
        tiny_trainer(3, enable_checkpointing=True, callbacks=[checkpoint]).fit(distiller, datamodule=data)
    assert "teacher" in str(caught.value) or "try a lower schedule.learning_rate" in str(caught.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert same(saved["state_dict"], kept)
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_nothing_goes_wrong_without_a_cause(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(2)
    trainer.fit(tiny_distiller(data, Spoils("nothing"), teacher=tiny_teacher()), datamodule=data)
    assert trainer.current_epoch == 2


@pytest.fixture
def place(tmp_path: Path, array_file: Path) -> Place:
    """A folder of its own."""
    return Place(tmp_path, array_file)


def test_a_run_that_diverges_has_no_result_and_goes_on_with_what_it_was_told_to_try(place: Place) -> None:
    rate = "schedule.learning_rate=1e30"
    ran = place.train("method=vanilla", rate)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    assert "not finite" in line
    assert "try a lower schedule.learning_rate" in line
    assert not list(place.runs.rglob("result.json"))
    assert not list(place.runs.rglob("last.ckpt")), "the first epoch's weights are spoiled"
    assert place.train("method=vanilla").code == 0


# Images that are seen twice


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_duplicates_are_counted_pixel_for_pixel(
    tmp_path_factory: pytest.TempPathFactory, seed: int, train: int, test: int, hold_out: bool
) -> None:
    folder = tmp_path_factory.mktemp("duplicates")
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {
        "train_images": random.integers(0, 2, (train * 4, 1, 1, 3), dtype=np.uint8),
        "test_images": random.integers(0, 2, (test, 1, 1, 3), dtype=np.uint8),
        "train_labels": np.arange(train * 4) % CLASSES,
        "test_labels": np.arange(test) % CLASSES,
    }
    save_arrays(folder / "tiny.npz", **arrays)
    data = tiny_data(folder)
    if hold_out:
        data.val_size = 4 * (train - 1)
        data.load()
    trained_on = {image.tobytes() for image in arrays["train_images"][data.train_index]}
    held_out = arrays["train_images"][data.val_index]
    expected = {"test": sum(image.tobytes() in trained_on for image in arrays["test_images"])}
    if len(held_out):
        expected["val"] = sum(image.tobytes() in trained_on for image in held_out)
    assert data.train_duplicates == expected


def test_duplicates_are_told_in_the_log_and_beside_the_result(place: Place) -> None:
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


def test_cifar100_has_ten_duplicates() -> None:
    folder = os.environ.get("AEKT_DATA")
    if folder is None:
        pytest.skip("AEKT_DATA names no folder with real data")
    data = tiny_data(Path(folder))
    data.path = str(Path(folder) / "cifar100.npz")
    data.load()
    assert data.train_duplicates == {"test": 10}


# A teacher that is fed in another way than it was trained


def test_an_accuracy_off_the_published_one_is_said_with_what_to_check(place: Place) -> None:
    torch.manual_seed(0)
    save_weights(resnet20(10), place.path / "teacher.pth")
    published = "+model.teacher.published_accuracy.cifar10=90"
    common = ("method=kd", f"teacher.path={place.path / 'teacher.pth'}", published)
    ran = place.train(*common, "trainer.limit_val_batches=null", "teacher.mean=[0.1,0.2,0.3]")
    assert (ran.code, ran.err) == (0, "")
    assert "(published: 90.00 %)." in ran.out
    assert "more than one point off" in ran.out
    assert "teacher.mean=[0.1,0.2,0.3] teacher.std=[" in ran.out
    assert "one point off" not in place.train(*common).out, "two batches tell nothing"


# What was kept of other data, another teacher, other views


def test_answers_and_view_stores_are_those_of_one_data_teacher_and_augmentation(tmp_path: Path) -> None:
    cfg = configure("model=resnet20_to_resnet8", "trainer=cpu")
    teacher, data = tiny_teacher(), tiny_data(tmp_path)
    contents = {**np.load(tmp_path / "tiny.npz")}
    contents["train_images"][0, 0, 0, 0] ^= 1
    save_arrays(tmp_path / "changed.npz", **contents)
    changed = tiny_data(tmp_path)
    changed.path = str(tmp_path / "changed.npz")
    changed.load()
    unflipped, padded, held_out = tiny_data(tmp_path), tiny_data(tmp_path), tiny_data(tmp_path)
    unflipped.flip, padded.padding, held_out.val_size = False, 3, 4
    held_out.load()
    darker = Teacher(teacher.network, MEAN, (0.3, 0.3, 0.3))

    stores = [(teacher, data), (teacher, changed), (darker, data), (teacher, unflipped), (teacher, padded)]
    assert len({view_store_file(cfg, *one) for one in stores}) == len(stores)
    asked = [(teacher, data, "test"), (teacher, changed, "test"), (darker, data, "test"), (teacher, held_out, "val")]
    files = {answers_file(cfg, tmp_path, one.key, of, split) for one, of, split in asked}
    assert len(files) == len(asked)
    assert view_store_file(cfg, Teacher(teacher.network, MEAN, STD), data) == view_store_file(cfg, teacher, data)


@pytest.mark.parametrize("changed", ["data", "teacher"])
def test_a_finished_run_of_other_data_or_another_teacher_is_left_alone(place: Place, changed: str) -> None:
    place.data = place.path / "own.npz"
    save_arrays(place.data, **colour_arrays())
    torch.manual_seed(0)
    teacher = resnet20(10)
    save_weights(teacher, place.path / "teacher.pth")
    command = ("method=kd", f"teacher.path={place.path / 'teacher.pth'}")
    assert place.train(*command).code == 0
    if changed == "data":
        save_arrays(place.data, **{**colour_arrays(), "test_labels": colour_arrays()["test_labels"][::-1]})
    else:
        with torch.no_grad():
            teacher.classifier_layer.bias[0] += 1e-4
        save_weights(teacher, place.path / "teacher.pth")
    before = {file: file.read_bytes() for file in place.folder("kd").rglob("*") if file.is_file()}
    assert_refused(place.train(*command), f"was made with another {changed} than today's", "start_over=true")
    assert {file: file.read_bytes() for file in place.folder("kd").rglob("*") if file.is_file()} == before
