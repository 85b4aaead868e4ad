"""Cached answers and view stores belong to one data set, one teacher and one augmentation."""

from pathlib import Path

import numpy as np

from src.data.array_file import save_arrays
from src.teachers.answers import answers_file, view_store_file
from src.teachers.teacher import Teacher
from tests.helpers.configure import configure
from tests.helpers.tiny import MEAN, STD, tiny_data, tiny_teacher


def test_other_data_another_teacher_and_another_augmentation_have_other_files(tmp_path: Path) -> None:
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
