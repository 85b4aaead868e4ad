"""The view store returns answers bit for bit, is shared by processes, and never returns a damaged answer."""

import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.errors import UserError
from src.methods.kd import KD
from src.models.resnet import resnet14
from src.models.wide_resnet import wrn_16_1
from src.teachers.teacher import ANSWER_BATCH, Teacher
from src.teachers.view_store import ViewStore
from tests.helpers.photo_folders import load, write_folder
from tests.helpers.tiny import CLASSES, kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

IMAGES, VIEWS = 7, 5


def store(folder: Path, **options) -> ViewStore:
    return ViewStore(folder / "a.views", IMAGES, VIEWS, CLASSES, **options)


def places(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    index, views = torch.tensor(pairs).T
    return index, views


class Counter:
    """Count the images that a teacher computes, including those that pad a batch."""

    def __init__(self, teacher: Teacher) -> None:
        self.images = 0
        network = teacher.network.forward_features

        def forward_features(images):
            self.images += len(images)
            return network(images)

        teacher.network.forward_features = forward_features  # type: ignore[method-assign]


def test_the_answer_to_a_view_is_computed_once_for_all_processes(tmp_path: Path) -> None:
    teacher, images = tiny_teacher(), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    index, views = places((0, 0), (1, 4), (2, 4), (3, 3), (4, 1), (6, 4))
    expected = teacher.view_logits(images, index, views)
    torch.testing.assert_close(expected, teacher(images).logits, atol=1e-5, rtol=1e-5)
    counter = Counter(teacher)
    for opened in range(2):  # the second time, as another process opens the store
        teacher.view_store = store(tmp_path)
        assert torch.equal(teacher.view_logits(images, index, views), expected)
        assert counter.images == ANSWER_BATCH, opened
    other = views.clone()
    other[2] = 0
    assert torch.equal(teacher.view_logits(images, index, other), expected)
    assert counter.images == 2 * ANSWER_BATCH


@pytest.mark.parametrize(("new_teacher", "batch_size"), [(resnet14, 21), (wrn_16_1, 16)])
def test_training_is_the_same_to_the_last_bit_with_and_without_the_store(tmp_path, batch_size, new_teacher) -> None:
    data, teacher = tiny_data(tmp_path, batch_size=batch_size), tiny_teacher(new_teacher)
    trained = []
    for opened in (None, ViewStore(tmp_path / "a.views", 44, data.view_count(2), CLASSES)):
        teacher.view_store = opened
        for _ in range(1 if opened is None else 2):  # the first run fills the store, the second reads it
            distiller = tiny_distiller(data, kd(), teacher=teacher)
            tiny_trainer().fit(distiller, datamodule=data)
            trained.append(weights(distiller.student))
    without, filling, reading = trained
    assert same(without, filling)
    assert same(without, reading)


def test_float16_rounds_equally_with_and_without_the_store(tmp_path: Path) -> None:
    exact, teacher = tiny_teacher(), tiny_teacher()
    teacher.answer_dtype = torch.float16
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    index, views = torch.arange(5), torch.arange(5)
    rounded = teacher.view_logits(images, index, views)
    teacher.view_store = store(tmp_path, dtype=torch.float16)
    for _ in range(2):
        assert torch.equal(teacher.view_logits(images, index, views), rounded)
    logits = exact.view_logits(images, index, views)
    assert not torch.equal(rounded, logits)
    assert ((rounded - logits).abs() <= logits.abs() / 2048).all()
    assert (tmp_path / "a.views").stat().st_size == IMAGES * VIEWS * (2 * CLASSES + 8)


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=CLASSES, max_size=CLASSES))
def test_an_answer_is_read_bit_for_bit_and_all_others_are_unknown(tmp_path_factory, bits: list[int]) -> None:
    opened = store(tmp_path_factory.mktemp("store"))
    logits = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))  # including zeros, infinities and NaN
    opened.write(*places((3, 2)), logits)
    for index in range(IMAGES):
        for view in range(VIEWS):
            found, unknown = opened.read(*places((index, view)))
            assert bool(unknown) == ((index, view) != (3, 2))
    found, _ = opened.read(*places((3, 2)))
    assert np.array_equal(found.numpy().view(np.uint32)[0], np.array(bits, np.uint32))


def test_a_partly_written_answer_is_unknown(tmp_path: Path) -> None:
    opened, place = store(tmp_path), places((6, 4))
    opened.write(*place, torch.randn(1, CLASSES))
    file, size = tmp_path / "a.views", 4 * CLASSES + 8
    whole = file.read_bytes()
    start = len(whole) - size
    for length in range(size - 3):  # a kill leaves the start; a checksum's last three bytes are zero anyway
        with file.open("r+b") as torn:
            torn.seek(start + length)
            torn.write(b"\0" * (size - length))
        assert opened.read(*place)[1].all(), length
        file_bytes = bytearray(whole)
        file_bytes[start : start + length] = bytes(length)  # a crash leaves the end if the disk wrote it first
        with file.open("r+b") as torn:
            torn.write(file_bytes)
        assert opened.read(*place)[1].all() == (length > 0), length
    assert opened.read(*places((0, 0), (5, 4)))[1].all()


def test_a_file_grows_for_more_views_and_never_shrinks(tmp_path: Path) -> None:
    small = store(tmp_path)
    small.write(*places((6, 4)), torch.ones(1, CLASSES))
    large = ViewStore(tmp_path / "a.views", IMAGES, 3 * VIEWS, CLASSES)
    large.write(*places((0, 14)), torch.full((1, CLASSES), 2.0))
    again = store(tmp_path)
    assert large.read(*places((6, 4), (0, 14)))[0].tolist() == [[1.0] * CLASSES, [2.0] * CLASSES]
    assert again.read(*places((6, 4)))[0].tolist() == [[1.0] * CLASSES]


@pytest.mark.parametrize("kept", [0, 1, 5000, -1])
def test_a_shortened_file_loses_only_the_missing_answers(tmp_path: Path, kept: int) -> None:
    file, index, view = tmp_path / "a.views", torch.arange(IMAGES).repeat(VIEWS), torch.arange(VIEWS)
    everywhere = index, view.repeat_interleave(IMAGES)
    opened = store(tmp_path)
    opened.write(*everywhere, torch.ones(IMAGES * VIEWS, CLASSES))
    size = file.stat().st_size
    kept = min(kept, size // 2) % size
    os.truncate(file, kept)
    with pytest.raises(UserError, match=r"a\.views was shortened while in use: run the same command again"):
        opened.read(*everywhere)
    again = store(tmp_path)
    assert file.stat().st_size == size
    logits, unknown = again.read(*everywhere)
    whole = kept // again.records.itemsize + (size - kept < 4)  # a checksum's last three bytes are zero anyway
    assert (~unknown).tolist() == [row < whole for row in range(IMAGES * VIEWS)]
    assert (logits[~unknown] == 1).all()


@pytest.mark.parametrize("target", ["precious", "nothing", "folder"])
def test_a_link_is_refused_and_its_target_stays_the_same(tmp_path: Path, target: str) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.views").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"a\.views is a link or not a regular file.*remove it"):
        store(tmp_path)
    assert (tmp_path / "precious").read_text() == "keep me"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.views")
    with pytest.raises(UserError, match="is a link or not a regular file"):
        store(tmp_path)


def work(folder: Path, seed: int) -> None:
    """Read and write in a random order. The value of each answer follows from its place."""
    opened, random = store(folder), np.random.default_rng(seed)
    for _ in range(200):
        index, views = torch.tensor(random.integers(0, [IMAGES, VIEWS], (4, 2))).T
        logits, unknown = opened.read(index, views)
        right = (index * 10 + views)[:, None].float().expand(-1, CLASSES) + torch.arange(CLASSES) / 8
        assert torch.equal(logits[~unknown], right[~unknown])
        opened.write(index, views, right.contiguous())


def test_running_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not store(tmp_path).read(torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64))[1].any()


def test_a_new_store_uses_almost_no_disk_space(tmp_path: Path) -> None:
    ViewStore(tmp_path / "a.views", 50_000, 162, 100, expected_answers=0)
    assert (tmp_path / "a.views").stat().st_size == 50_000 * 162 * 408
    assert (tmp_path / "a.views").stat().st_blocks * 512 < 1e6


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (
            10**12,
            {},
            r"teacher\.view_store needs 660,.* bytes in .* are free: free disk space, or set teacher\.view_store=false",
        ),
        (
            10**6,
            {"gigabytes": 0.5},
            r"could grow to 0\.66 GB, more than teacher\.view_store_gigabytes=0\.5: raise that limit",
        ),
        (10**12, {"expected_answers": 100, "gigabytes": 0.0008}, r"could grow to 0\.000825 GB"),
    ],
)
def test_a_store_without_room_is_refused_before_anything_is_made(
    tmp_path: Path, images: int, options, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ViewStore(tmp_path / "new" / "a.views", images, 11, 13, **options)
    assert not (tmp_path / "new").exists()


def test_only_expected_answers_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    ViewStore(tmp_path / "a.views", 10**6, 11, 1, expected_answers=100)
    assert os.stat(tmp_path / "a.views").st_size == 10**6 * 11 * 12
    with pytest.raises(UserError, match=r"needs 1,640,800 bytes in .* but only 1,000,000 are free"):
        ViewStore(tmp_path / "b.views", 10**6, 11, 1, expected_answers=200)


def test_a_full_disk_raises_an_error_and_stores_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = store(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left on device.*view_store=false. The same command resumes"):
        opened.write(*places((0, 0)), torch.ones(1, CLASSES))
    assert opened.read(*places((0, 0)))[1].all()


def test_a_sweep_over_photos_computes_each_answer_of_a_seed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=("ant", "bee", "cat", "dog"))
    teacher = tiny_teacher()
    names = set()
    for seed in (0, 1):
        data = load(folder, seed=seed)
        names.add(data.views_name)
        photos = len(data.source.train_labels)
        teacher.view_store = ViewStore(tmp_path / f"{seed}.views", photos, data.view_count(2), CLASSES)
        for temperature in (4.0, 2.0):
            method = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=temperature)
            tiny_trainer(limit_val_batches=0).fit(tiny_distiller(data, method, teacher=teacher), datamodule=data)
            index, views = torch.arange(photos).repeat(2), torch.arange(2).repeat_interleave(photos)
            logits, unknown = teacher.view_store.read(index, views)
            assert not unknown.any()
            if temperature == 4.0:
                first = logits
                assert not torch.equal(*logits.view(2, photos, CLASSES))
                teacher.logits = refuse  # type: ignore[method-assign]
        assert torch.equal(logits, first)
        del teacher.logits
    assert len(names) == 2


def refuse(images: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the answers were computed again")
