"""The copy of a view store in device memory answers like the file, and its answers reach the file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.teachers.device_view_store import PENDING, DeviceViewStore, device_bytes
from src.teachers.view_store import ViewStore
from tests.helpers.tiny import CLASSES, kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

IMAGES, VIEWS = 7, 5
CPU = torch.device("cpu")


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> ViewStore:
    return ViewStore(folder / "a.views", IMAGES, VIEWS, CLASSES, dtype=dtype)


def places(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    index, views = torch.tensor(pairs).T
    return index, views


def rows(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([view * IMAGES + index for index, view in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_copy_answers_like_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    file, known, other = opened(tmp_path, dtype), places((0, 0), (6, 4)), places((6, 4), (3, 2), (0, 0))
    file.write(*known, torch.randn(2, CLASSES).to(dtype))
    copy = DeviceViewStore(file, rows((0, 0), (3, 2), (6, 4)), CPU)
    assert not copy.is_complete
    logits, unknown = copy.read(*other)
    expected, expected_unknown = file.read(*other)
    assert unknown.tolist() == expected_unknown.tolist() == [False, True, False]
    assert torch.equal(logits[[0, 2]], expected[[0, 2]])
    assert logits.dtype == torch.float32


def test_a_complete_copy_knows_that_it_is_complete(tmp_path: Path) -> None:
    file, known = opened(tmp_path), places((0, 0), (6, 4))
    written = torch.randn(2, CLASSES)
    file.write(*known, written)
    copy = DeviceViewStore(file, rows((0, 0), (6, 4)), CPU)
    assert copy.is_complete
    logits, unknown = copy.read(*known)
    assert not unknown.any()
    assert torch.equal(logits, written)


def test_a_view_that_the_run_does_not_need_gets_nan(tmp_path: Path) -> None:
    copy = DeviceViewStore(opened(tmp_path), rows((0, 0)), CPU)
    logits, unknown = copy.read(*places((1, 0)))
    assert logits.isnan().all()
    assert not unknown.any()


def test_new_answers_are_known_at_once_and_reach_the_file(tmp_path: Path) -> None:
    file, some = opened(tmp_path), places((2, 1), (5, 3))
    copy = DeviceViewStore(file, rows((2, 1), (5, 3)), CPU)
    written = torch.randn(2, CLASSES)
    copy.write(*some, written, torch.tensor([True, False]))
    logits, unknown = copy.read(*some)
    assert not unknown.any()
    assert torch.equal(logits, written)
    copy.flush()
    stored, missing = opened(tmp_path).read(*some)
    assert torch.equal(stored[0], written[0])
    assert missing.tolist() == [False, True], "only new answers are written"


def test_a_damaged_record_is_unknown(tmp_path: Path) -> None:
    file, some = opened(tmp_path), places((2, 1), (5, 3))
    file.write(*some, torch.randn(2, CLASSES))
    content = bytearray((tmp_path / "a.views").read_bytes())
    content[(1 * IMAGES + 2) * file.records.itemsize] ^= 1
    (tmp_path / "a.views").write_bytes(content)
    _, unknown = DeviceViewStore(file, rows((2, 1), (5, 3)), CPU).read(*some)
    assert unknown.tolist() == [True, False]


def test_a_write_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = DeviceViewStore(opened(tmp_path), rows((2, 1)), CPU)

    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(copy.store, "write", full)
    copy.write(*places((2, 1)), torch.randn(1, CLASSES), torch.tensor([True]))
    with pytest.raises(UserError, match="the disk is full"):
        copy.flush()
    copy.flush()  # it is reported once
    for _ in range(PENDING + 1):
        copy.pending.append(copy.writer.submit(full))
    with pytest.raises(UserError, match="the disk is full"):
        copy.write(*places((2, 1)), torch.randn(1, CLASSES), torch.tensor([True]))


def test_the_bytes_of_a_copy_are_known_before_it_is_made(tmp_path: Path) -> None:
    file = opened(tmp_path, torch.float16)
    copy = DeviceViewStore(file, rows((0, 0), (1, 1), (2, 2)), CPU)
    held = sum(each[:3].nbytes for each in (copy.logits, copy.unknown)) + copy.slots.nbytes
    assert device_bytes(file, 3) == held


def test_training_is_the_same_to_the_last_bit_with_the_copy_and_the_second_run_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where answers are always computed in the same batches."""
    data, teacher = tiny_data(tmp_path, batch_size=21), tiny_teacher()
    data.device_memory = True
    file = ViewStore(tmp_path / "a.views", 44, data.view_count(2), CLASSES)
    trained, complete = [], []
    for store in (None, *(DeviceViewStore for _ in range(2))):
        teacher.view_store = store and store(file, data.view_records(2), CPU)
        if teacher.view_store:
            complete.append(teacher.view_store.is_complete)
        distiller = tiny_distiller(data, kd(), teacher=teacher)
        tiny_trainer().fit(distiller, datamodule=data)
        teacher.finish_writing()
        trained.append(weights(distiller.student))
    assert complete == [False, True]
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
