"""Which folder is which split, what is left unread, and what is skipped."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.data.photo_folders import split_folders
from tests.helpers.batches import batches
from tests.helpers.photo_folders import load, write_folder

CLASSES = ("ant", "bee")


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def layout(root: Path, *splits: str) -> Path:
    """Make class folders without photos."""
    touch(root, *(f"{split}/{label}/a.jpg" for split in splits for label in CLASSES))
    return root


@pytest.mark.parametrize(
    ("splits", "options", "chosen"),
    [
        (("train", "val"), {}, {"train": "train", "test": "val"}),
        (("train", "test"), {}, {"train": "train", "test": "test"}),
        (("train", "val", "test"), {}, {"train": "train", "test": "test", "val": "val"}),
        (("train", "val", "test"), {"test": "test"}, {"train": "train", "test": "test"}),
        (("train", "val", "test"), {"test": "val"}, {"train": "train", "test": "val"}),
        (("train", "valid", "test"), {}, {"train": "train", "test": "test"}),
        (("train", "valid", "test"), {"val": "valid"}, {"train": "train", "test": "test", "val": "valid"}),
        (("a/b", "c", "d"), {"train": "a/b", "val": "c", "test": "d"}, {"train": "a/b", "test": "d", "val": "c"}),
    ],
)
def test_the_splits_are_detected_or_named(
    tmp_path: Path, splits: tuple[str, ...], options: dict[str, str], chosen: dict[str, str]
) -> None:
    layout(tmp_path, *splits)
    names: dict[str, Any] = {"train": None, "val": None, "test": None, **options}
    assert split_folders(tmp_path, **names) == {split: tmp_path / name for split, name in chosen.items()}


@pytest.mark.parametrize("name", ["val", "../{folder}/val", "{tmp}/val"])
def test_one_folder_cannot_be_two_splits(tmp_path: Path, name: str) -> None:
    layout(tmp_path, "train", "val")
    name = name.format(folder=tmp_path.name, tmp=tmp_path)
    with pytest.raises(UserError, match=rf"One folder would be two splits \(train: train, test: val, val: {name}\)"):
        split_folders(tmp_path, None, name, "val")


def test_a_split_named_by_another_path_is_not_called_unread(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", CLASSES)
    assert load(root, test_folder="../photos/val").source.notes == ()


def test_an_unlabelled_test_folder_is_no_split(tmp_path: Path) -> None:
    """As in Tiny ImageNet: train/<wnid>/images/, val/<wnid>/ and test/images/."""
    root = write_folder(tmp_path, CLASSES)
    for label in CLASSES:
        (root / "train" / label / "a.jpg").rename(root / "train" / label / "x.jpg")
        shutil.move(root / "train" / label / "nested", root / "train" / label / "images")
        touch(root, f"train/{label}/{label}_boxes.txt")
    touch(root, "test/images/1.JPEG", "words.txt", "val/val_annotations.txt")
    data = load(root, batch_size=16)
    assert data.validates_on == "test"
    assert data.source.test_labels.tolist() == [0] * 5 + [1] * 5
    assert data.notes() == [
        f"Data: 28 training images ({root}/train/), 10 test images ({root}/val/). The test images are "
        "the validation images, too.",
        f"Left unread in {root}: test/.",
        f"Files skipped in {root}, because their format is not read: 3 (train/ant/ant_boxes.txt, "
        "train/bee/bee_boxes.txt, val/val_annotations.txt).",
    ]


def test_val_is_the_validation_split_beside_test(tmp_path: Path) -> None:
    root = write_folder(tmp_path, CLASSES)
    shutil.copytree(root / "val", root / "test")
    for label in CLASSES:
        (root / "val" / label / "a.jpg").unlink()
    data = load(root)
    assert data.validates_on == "val"
    assert (len(data.train_index), data.split_size("val"), data.split_size("test")) == (28, 8, 10)
    (batch,) = data.val_dataloader()
    assert batch.target.tolist() == [0] * 4 + [1] * 4
    (scored,) = data.test_dataloader()
    assert torch.equal(batch.images[0][0], scored.images[0][1])
    assert len(torch.cat([each.index for each in batches(data.train_dataloader())])) == 28
    assert "8 validation images" in data.notes()[0]
    assert data.notes()[0].endswith("The test images are scored once, at the end.")
    alone = load(root, test_folder="test")
    assert (alone.validates_on, alone.split_size("val")) == ("test", 0)
    assert alone.source.digest != data.source.digest
    assert f"Left unread in {root}: val/." in alone.notes()
    with pytest.raises(UserError, match=r"data.val_size=6 holds .*/val/ has .* data.val_size=0 .* data.test_folder"):
        load(root, val_size=6)
    assert load(root, val_size=6, test_folder="test").split_size("val") == 6


def test_other_classes_beside_the_training_classes_are_refused(tmp_path: Path) -> None:
    layout(tmp_path, "train", "val", "test")
    shutil.rmtree(tmp_path / "val/bee")
    with pytest.raises(UserError, match=r"/train has classes that \S+/val lacks \(bee\).* data.val_folder"):
        load(tmp_path)


def test_the_first_skipped_files_are_named_and_all_are_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path, CLASSES)
    touch(root, *(f"train/ant/{i}.gif" for i in range(5)), "train/ant/._a.txt", "val/loose.jpg")
    (note,) = load(root).source.notes
    assert note.endswith(": 6 (train/ant/0.gif, train/ant/1.gif, train/ant/2.gif and 3 more).")


def test_a_folder_without_class_folders_is_answered_with_the_folders_beside_it(tmp_path: Path) -> None:
    layout(tmp_path, "train", "valid")
    with pytest.raises(UserError, match=r"no class folders in \S+/val: .*, which holds train, valid, as train/<class>"):
        load(tmp_path)


def test_photos_that_a_list_sorts_by_class_are_answered_with_the_list(tmp_path: Path) -> None:
    layout(tmp_path, "train")
    touch(tmp_path, "val/images/val_0.JPEG", "val/val_annotations.txt")
    with pytest.raises(UserError, match=r"val/images are not sorted by class: .* by the list val_annotations\.txt\."):
        load(tmp_path)


@pytest.mark.parametrize("link", ["train/ant/up", "train/self"])
def test_a_link_to_a_folder_that_contains_it_is_refused(tmp_path: Path, link: str) -> None:
    layout(tmp_path, "train", "val")
    (tmp_path / link).symlink_to("..")
    with pytest.raises(UserError, match=rf"^\S+/{link} is a link to a folder that contains it: remove it\.$"):
        load(tmp_path)


@pytest.mark.parametrize("target", ["gone", "bird"])
def test_a_broken_link_in_the_place_of_a_class_is_refused(tmp_path: Path, target: str) -> None:
    layout(tmp_path, "train", "val")
    (tmp_path / "train/bird").symlink_to(target)
    with pytest.raises(UserError, match=r"/train/bird is a link to a missing file or folder: repair or remove it\.$"):
        load(tmp_path)


def test_a_linked_class_folder_is_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", CLASSES)
    shutil.move(root / "train/bee", tmp_path / "elsewhere")
    (root / "train/bee").symlink_to(tmp_path / "elsewhere")
    assert load(root).source.train_labels.bincount().tolist() == [14, 14]


def test_a_named_pipe_is_skipped(tmp_path: Path) -> None:
    root = write_folder(tmp_path, CLASSES)
    os.mkfifo(root / "train/ant/pipe.jpg")
    (note,) = load(root).source.notes
    assert note.endswith(": 1 (train/ant/pipe.jpg).")
