"""A teacher's answers to evaluation images: computed once, saved, and computed again if the file is damaged."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from src.data.array_file import save_arrays
from src.teachers.answers import Answers, answers_file, cache_key, view_store_file
from src.teachers.teacher import Teacher
from tests.helpers.configure import changed, configure
from tests.helpers.tiny import MEAN, STD, tiny_data, tiny_teacher

ANSWERS = Answers(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the answers to five images of three classes."""
    file = tmp_path / "teachers" / "answers.npz"
    ANSWERS.save(file)
    return file


def test_answers_are_the_teachers_logits_for_every_image_in_order(tmp_path: Path) -> None:
    teacher, data = tiny_teacher(), tiny_data(tmp_path)
    answers = Answers.compute(teacher, data.evaluation_loader("test"), nullcontext())
    torch.testing.assert_close(answers.logits, teacher(data.arrays.test_images).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(answers.target, data.arrays.test_labels)


def test_answers_are_computed_in_the_given_precision_and_kept_in_float32(tmp_path: Path) -> None:
    teacher, data = tiny_teacher(), tiny_data(tmp_path)
    answers = Answers.compute(teacher, data.evaluation_loader("test"), torch.autocast("cpu", torch.bfloat16))
    assert answers.logits.dtype == torch.float32
    assert torch.equal(answers.logits, answers.logits.bfloat16().float())


def test_answers_survive_their_file(file: Path) -> None:
    loaded = Answers.load(file, 7, 3)
    assert loaded is not None
    assert torch.equal(loaded.logits, ANSWERS.logits)
    assert torch.equal(loaded.target, ANSWERS.target)


def test_an_image_without_an_answer_has_the_prediction_minus_one() -> None:
    assert ANSWERS.predictions(7).tolist() == [*ANSWERS.logits.argmax(1).tolist(), -1, -1]


def test_a_missing_file_holds_no_answers(tmp_path: Path) -> None:
    assert Answers.load(tmp_path / "none.npz", 7, 3) is None


def test_a_damaged_file_holds_no_answers(file: Path) -> None:
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a file of arrays"):
        file.write_bytes(damaged)
        assert Answers.load(file, 7, 3) is None


@pytest.mark.parametrize(
    "change",
    [
        {"logits": np.array([object()])},
        {"logits": ANSWERS.logits.numpy()[:, :2]},
        {"logits": ANSWERS.logits.numpy().astype(np.float64)},
        {"logits": np.full((5, 3), np.nan, np.float32)},
        {"logits": ANSWERS.logits.numpy()[0]},
        {"target": ANSWERS.target.numpy()[:4]},
        {"target": ANSWERS.target.numpy() + 3},
        {"target": ANSWERS.target.numpy() - 1},
        {"target": ANSWERS.target.numpy().astype(np.float32)},
    ],
    ids=[
        "pickled", "fewer classes", "float64", "nan", "one row", "fewer targets", "target too large", "target negative",
        "target no integer",
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_answers_are_none(file: Path, change: dict[str, Any]) -> None:
    np.savez(file, **{"logits": ANSWERS.logits.numpy(), "target": ANSWERS.target.numpy(), **change})
    assert Answers.load(file, 7, 3) is None


def test_more_answers_than_images_belong_to_other_data(file: Path) -> None:
    assert Answers.load(file, 5, 3) is not None
    assert Answers.load(file, 4, 3) is None


def test_metrics_of_answers_match_every_evaluation() -> None:
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [0, 4.0, 0]])
    metrics = Answers(logits, torch.tensor([0, 1, 0, 1])).metrics()
    assert metrics["accuracy"] == pytest.approx(0.75)
    assert metrics.keys() == {"accuracy", "top5", "nll", "ece"}


# Cached files


def test_files_of_answers_differ_by_teacher_data_split_precision_and_number_of_batches(tmp_path: Path) -> None:
    cfg = configure("model=resnet20_to_resnet8", "trainer=cpu")
    data, held_out = tiny_data(tmp_path), tiny_data(tmp_path)
    other = {**np.load(tmp_path / "tiny.npz")}
    other["test_images"][0, 0, 0, 0] ^= 1
    save_arrays(tmp_path / "other.npz", **other)
    changed_data = tiny_data(tmp_path)
    changed_data.path = str(tmp_path / "other.npz")
    changed_data.load()
    in_batches = tiny_data(tmp_path)
    in_batches.evaluation_batch_size = 5  # 4 batches
    held_out.val_size = 4
    held_out.load()
    again = tiny_data(tmp_path)
    key, other_key = "ab" * 32, "cd" * 32
    files = [
        answers_file(cfg, tmp_path, key, data, "test"),
        answers_file(cfg, tmp_path, other_key, data, "test"),
        answers_file(cfg, tmp_path, key, changed_data, "test"),
        answers_file(cfg, tmp_path, key, held_out, "val"),
        answers_file(changed(cfg, trainer__precision="bf16-mixed"), tmp_path, key, data, "test"),
        *(answers_file(limited_to(cfg, limit), tmp_path, key, in_batches, "test") for limit in (1, 0.5)),
    ]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {tmp_path / "teachers"}
    assert answers_file(cfg, tmp_path, key, again, "test") == files[0]
    assert answers_file(cfg, tmp_path, key, held_out, "test") == files[0], "the test images are the same"
    assert answers_file(limited_to(cfg, 2), tmp_path, key, in_batches, "test") == files[-1], "half of 4 batches are 2"
    assert answers_file(limited_to(cfg, 1.0), tmp_path, key, in_batches, "test") == files[0], "these are all images"


def limited_to(cfg: DictConfig, limit: float) -> DictConfig:
    """Limit both evaluations of the test images."""
    return changed(cfg, trainer__limit_val_batches=limit, trainer__limit_test_batches=limit)


def test_files_of_view_stores_differ_by_everything_that_decides_an_answer(tmp_path: Path) -> None:
    cfg = changed(configure("model=resnet20_to_resnet8", "trainer=cpu"), runs=str(tmp_path))
    teacher, data, unflipped, other_seed = tiny_teacher(), tiny_data(tmp_path), tiny_data(tmp_path), tiny_data(tmp_path)
    unflipped.flip = False
    other_seed.seed = 1
    darker = Teacher(teacher.network, MEAN, (0.3, 0.3, 0.3))
    files = [
        view_store_file(cfg, teacher, data),
        view_store_file(cfg, darker, data),
        view_store_file(cfg, teacher, unflipped),
        view_store_file(changed(cfg, channels_last=False), teacher, data),
        view_store_file(changed(cfg, teacher__answer_dtype="float16"), teacher, data),
        view_store_file(changed(cfg, trainer__precision="bf16-mixed"), teacher, data),
    ]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {tmp_path / "teachers"}
    same_teacher = Teacher(teacher.network, MEAN, STD)
    assert view_store_file(changed(cfg, seed=7, method__temperature=2.0), same_teacher, data) == files[0]
    assert view_store_file(cfg, teacher, other_seed) == files[0], "views of arrays are numbered alike for all seeds"


def test_a_cache_key_names_teacher_data_and_precision(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    key = cache_key(configure("trainer=cpu"), "ab" * 32, data)
    assert key == f"{'ab' * 8}-{data.source.digest[:12]}-32-true"
