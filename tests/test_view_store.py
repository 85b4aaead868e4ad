"""The store of answered views: exact, shared, and never wrong about what it has."""

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

from src.errors import UserError
from src.methods.kd import KD
from src.models.resnet import resnet14
from src.models.wide_resnet import wrn_16_1
from src.teacher import ASKED_AT_ONCE, Teacher
from src.view_store import ViewStore
from tests.data.photo_folders import load, write_folder
from tests.tiny import CLASSES, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

IMAGES, VIEWS = 7, 5


def store(folder: Path, **options) -> ViewStore:
    return ViewStore(folder / "a.views", IMAGES, VIEWS, CLASSES, **options)


def places(*pairs: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    index, views = torch.tensor(pairs).T
    return index, views


class Counting:
    """Counts the images that a teacher is asked about, fillers among them."""

    def __init__(self, teacher: Teacher) -> None:
        self.asked = 0
        network = teacher.network.forward_features

        def forward_features(images):
            self.asked += len(images)
            return network(images)

        teacher.network.forward_features = forward_features  # type: ignore[method-assign]


def kd() -> KD:
    return KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)


def test_a_view_is_asked_once_whoever_asks_again(tmp_path: Path) -> None:
    teacher, images = tiny_teacher(), torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    index, views = places((0, 0), (1, 4), (2, 4), (3, 3), (4, 1), (6, 4))
    expected = teacher.view_logits(images, index, views)
    torch.testing.assert_close(expected, teacher(images).logits, atol=1e-5, rtol=1e-5)
    count = Counting(teacher)
    for opened in range(2):  # the second as another process finds it
        teacher.store = store(tmp_path)
        assert torch.equal(teacher.view_logits(images, index, views), expected)
        assert count.asked == ASKED_AT_ONCE, opened
    other = views.clone()
    other[2] = 0
    assert torch.equal(teacher.view_logits(images, index, other), expected)
    assert count.asked == 2 * ASKED_AT_ONCE


@pytest.mark.parametrize(("new_teacher", "batch_size"), [(resnet14, 21), (wrn_16_1, 16)])
def test_training_is_the_same_to_the_last_bit_with_and_without_the_store(tmp_path, batch_size, new_teacher) -> None:
    data, teacher = tiny_data(tmp_path, batch_size=batch_size), tiny_teacher(new_teacher)
    trained = []
    for kept in (None, ViewStore(tmp_path / "a.views", 44, data.view_count(2), CLASSES)):
        teacher.store = kept
        for _ in range(1 if kept is None else 2):  # with the store: filling it, and filled
            distiller = tiny_distiller(data, kd(), teacher=teacher)
            tiny_trainer().fit(distiller, datamodule=data)
            trained.append(weights(distiller.student))
    without, filling, filled = trained
    assert same(without, filling)
    assert same(without, filled)


def test_float16_rounds_alike_with_and_without_the_store_by_as_much_as_is_said(tmp_path: Path) -> None:
    exact, teacher = tiny_teacher(), tiny_teacher()
    teacher.answer_dtype = torch.float16
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    index, views = torch.arange(5), torch.arange(5)
    rounded = teacher.view_logits(images, index, views)
    teacher.store = store(tmp_path, dtype=torch.float16)
    for _ in range(2):
        assert torch.equal(teacher.view_logits(images, index, views), rounded)
    logits = exact.view_logits(images, index, views)
    assert not torch.equal(rounded, logits)
    assert ((rounded - logits).abs() <= logits.abs() / 2048).all()
    assert (tmp_path / "a.views").stat().st_size == IMAGES * VIEWS * (2 * CLASSES + 8)


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=CLASSES, max_size=CLASSES))
def test_what_was_written_is_read_bit_for_bit_and_the_rest_is_unknown(tmp_path_factory, bits: list[int]) -> None:
    opened = store(tmp_path_factory.mktemp("store"))
    logits = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))  # zeros, infinities, NaN among them
    opened.write(*places((3, 2)), logits)
    for index in range(IMAGES):
        for view in range(VIEWS):
            found, unknown = opened.read(*places((index, view)))
            assert bool(unknown) == ((index, view) != (3, 2))
    found, _ = opened.read(*places((3, 2)))
    assert np.array_equal(found.numpy().view(np.uint32)[0], np.array(bits, np.uint32))


def test_no_part_of_an_answer_passes_for_one(tmp_path: Path) -> None:
    opened, place = store(tmp_path), places((6, 4))
    opened.write(*place, torch.randn(1, CLASSES))
    file, size = tmp_path / "a.views", 4 * CLASSES + 8
    whole = file.read_bytes()
    start = len(whole) - size
    for kept in range(size - 3):  # what a kill leaves; the check's last three bytes are zero anyway
        with file.open("r+b") as torn:
            torn.seek(start + kept)
            torn.write(b"\0" * (size - kept))
        assert opened.read(*place)[1].all(), kept
        file_bytes = bytearray(whole)
        file_bytes[start : start + kept] = bytes(kept)  # what a crash leaves where its disk writes the end first
        with file.open("r+b") as torn:
            torn.write(file_bytes)
        assert opened.read(*place)[1].all() == (kept > 0), kept
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
def test_a_file_that_was_cut_loses_what_is_missing_alone(tmp_path: Path, kept: int) -> None:
    file, index, view = tmp_path / "a.views", torch.arange(IMAGES).repeat(VIEWS), torch.arange(VIEWS)
    everywhere = index, view.repeat_interleave(IMAGES)
    opened = store(tmp_path)
    opened.write(*everywhere, torch.ones(IMAGES * VIEWS, CLASSES))
    size = file.stat().st_size
    kept = min(kept, size // 2) % size
    os.truncate(file, kept)
    with pytest.raises(UserError, match=r"a\.views was cut while it was in use"):
        opened.read(*everywhere)
    again = store(tmp_path)
    assert file.stat().st_size == size
    logits, unknown = again.read(*everywhere)
    whole = kept // again.records.itemsize + (size - kept < 4)  # the check's last three bytes are zero anyway
    assert (~unknown).tolist() == [row < whole for row in range(IMAGES * VIEWS)]
    assert (logits[~unknown] == 1).all()


@pytest.mark.parametrize("target", ["precious", "nothing", "folder"])
def test_a_link_is_refused_and_what_it_leads_to_stays_as_it_is(tmp_path: Path, target: str) -> None:
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.views").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"a\.views is no file of its own.*remove it"):
        store(tmp_path)
    assert (tmp_path / "precious").read_text() == "keep me"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.views")
    with pytest.raises(UserError, match="is no file of its own"):
        store(tmp_path)


def work(folder: Path, seed: int) -> None:
    """Ask and answer in an order of its own; every answer tells its place."""
    opened, random = store(folder), np.random.default_rng(seed)
    for _ in range(200):
        index, views = torch.tensor(random.integers(0, [IMAGES, VIEWS], (4, 2))).T
        logits, unknown = opened.read(index, views)
        right = (index * 10 + views)[:, None].float().expand(-1, CLASSES) + torch.arange(CLASSES) / 8
        assert torch.equal(logits[~unknown], right[~unknown])
        opened.write(index, views, right.contiguous())


def test_processes_share_a_store_as_they_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not store(tmp_path).read(torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64))[1].any()


def test_a_new_store_uses_next_to_no_disk(tmp_path: Path) -> None:
    ViewStore(tmp_path / "a.views", 50_000, 162, 100, asked=0)
    assert (tmp_path / "a.views").stat().st_size == 50_000 * 162 * 408
    assert (tmp_path / "a.views").stat().st_blocks * 512 < 1e6


@pytest.mark.parametrize(
    ("images", "options", "says"),
    [
        (10**12, {}, r"teacher\.view_store needs 660,.* bytes at .* are free: set it to false"),
        (10**6, {"gigabytes": 0.5}, r"could come to 0\.66 GB, more than teacher\.store_gigabytes=0\.5: raise that"),
        (10**12, {"asked": 100, "gigabytes": 0.0008}, r"could come to 0\.000825 GB"),
    ],
)
def test_what_has_no_room_is_said_before_anything_is_made(tmp_path: Path, images: int, options, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ViewStore(tmp_path / "new" / "a.views", images, 11, 13, **options)
    assert not (tmp_path / "new").exists()


def test_only_what_can_be_asked_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    ViewStore(tmp_path / "a.views", 10**6, 11, 1, asked=100)
    assert os.stat(tmp_path / "a.views").st_size == 10**6 * 11 * 12
    with pytest.raises(UserError, match=r"needs 1,640,800 bytes at .* and 1,000,000 are free"):
        ViewStore(tmp_path / "b.views", 10**6, 11, 1, asked=200)


def test_a_full_disk_is_an_error_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = store(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left on device.*view_store=false; the same command resumes"):
        opened.write(*places((0, 0)), torch.ones(1, CLASSES))
    assert opened.read(*places((0, 0)))[1].all()


def test_a_sweep_over_photos_asks_each_view_of_a_seed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", classes=("ant", "bee", "cat", "dog"))
    teacher = tiny_teacher()
    names = set()
    for seed in (0, 1):
        data = load(folder, seed=seed)
        names.add(data.views_name)
        photos = len(data.source.train_labels)
        teacher.store = ViewStore(tmp_path / f"{seed}.views", photos, data.view_count(2), CLASSES)
        for temperature in (4.0, 2.0):
            method = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=temperature)
            tiny_trainer(limit_val_batches=0).fit(tiny_distiller(data, method, teacher=teacher), datamodule=data)
            index, views = torch.arange(photos).repeat(2), torch.arange(2).repeat_interleave(photos)
            logits, unknown = teacher.store.read(index, views)
            assert not unknown.any()
            if temperature == 4.0:
                first = logits
                assert not torch.equal(*logits.view(2, photos, CLASSES))
                teacher.logits = refuse  # type: ignore[method-assign]
        assert torch.equal(logits, first)
        del teacher.logits
    assert len(names) == 2


def refuse(images: torch.Tensor) -> torch.Tensor:
    raise AssertionError("asked again")
