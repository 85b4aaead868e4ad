"""Photos are decoded once before training: damaged ones are listed, and the result is kept."""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.common.errors import UserError
from src.common.files import one_process_at_a_time
from src.data import photo_check
from src.data.photo_folders import File, Listing, listing_digest, relative
from src.data.sharding import write_shards
from src.data.stream_data import INDEX, StreamData
from tests.helpers.batches import batches
from tests.helpers.photo_folders import encoded, load, picture, write_folder


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder in which two of 42 + 15 photos are damaged: one is cut short, one is empty."""
    root = write_folder(tmp_path / "photos")
    photo = root / "train/bee/d.Jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    (root / "val/cat/e.png").write_bytes(b"")
    return root


def test_damaged_photos_are_listed_before_training(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(damaged, cache=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"In data.root={damaged}, 2 of 57 photos cannot be read: train/bee/d.Jpg (image file is")
    assert "val/cat/e.png (cannot identify image file)" in message
    assert message.endswith("set data.skip_corrupt=true to leave them out.")


def test_damaged_photos_are_left_out_before_the_splits_are_drawn(damaged: Path, tmp_path: Path) -> None:
    data = load(damaged, cache=tmp_path, skip_corrupt=True, val_size=6)
    assert data.source.train_labels.bincount().tolist() == [14, 13, 14]
    assert data.source.test_labels.bincount().tolist() == [5, 5, 4]
    assert len(data.val_index) + len(data.train_index) == 41
    batches(data.train_dataloader())
    (note,) = data.source.notes
    assert note.startswith(f"Left out of {damaged}: 2 of 57 photos cannot be read: train/bee/d.Jpg (")
    for photo in ("train/bee/d.Jpg", "val/cat/e.png"):
        (damaged / photo).unlink()
    assert load(damaged, cache=tmp_path).source.digest == data.source.digest, "the same photos are the same data"


def test_a_class_without_readable_photos_is_refused(damaged: Path, tmp_path: Path) -> None:
    for file in (damaged / "val/cat").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"There are no photos in .*val/cat"):
        load(damaged, cache=tmp_path, skip_corrupt=True)


def test_photos_are_checked_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    looked: list[str] = []
    inspect = photo_check._inspect

    def noted(file: str) -> photo_check.Inspected:
        looked.append(file)
        return inspect(file)

    monkeypatch.setattr(photo_check, "_inspect", noted)
    for _ in range(2):
        load(own, cache=tmp_path / "cache")
    assert len(looked) == len(set(looked)) == 57
    os.utime(own / "train/ant/a.jpg", (1, 1))
    load(own, cache=tmp_path / "cache")
    assert len(looked) == 2 * 57
    for kept in (tmp_path / "cache/checked").glob("*.json"):
        kept.write_text("{")
    load(own, cache=tmp_path / "cache")
    assert len(looked) == 3 * 57


def test_an_unwritable_cache_does_no_harm(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert load(folder, cache=tmp_path / "file").source.digest == load(folder).source.digest


@pytest.mark.parametrize("kind", ["turned", "16 bits"])
def test_data_that_is_decoded_otherwise_than_before_has_another_digest(folder: Path, tmp_path: Path, kind: str) -> None:
    """Version 0.1 neither turned nor scaled photos: its runs and answers belong to other data."""
    own = write_folder(tmp_path / "own")
    sizes = {"turned": encoded(picture(0, 40, 30), "JPEG"), "16 bits": encoded(picture(0, 9, 9).convert("L"), "TIFF")}
    file = own / "train/ant/a.jpg"
    file.write_bytes(sizes[kind])
    before = load(own).source.digest
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.new("F", (9, 9), 0.5)
    now = encoded(picture(0, 40, 30), "JPEG", exif=exif) if kind == "turned" else encoded(grey, "TIFF")
    size = max(len(now), file.stat().st_size)
    digests = []
    for content in (sizes[kind], now):
        file.write_bytes(content.ljust(size, b"\0"))
        digests.append(load(own).source.digest)
    assert len({before, *digests}) == 3, "only the pixels differ between the last two"
    write_shards(load(own), tmp_path / "shards")
    assert load(tmp_path / "shards", StreamData).source.digest == digests[1]


def test_shards_of_an_earlier_version_are_other_data(folder: Path, shards: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(shards, tmp_path / "own"))
    with np.load(own / INDEX) as arrays:
        np.savez(own / INDEX, **{name: arrays[name] for name in arrays.files if name != "decoding"})
    earlier, now = load(own, StreamData), load(shards, StreamData)
    assert earlier.source.digest != now.source.digest == load(folder).source.digest
    assert earlier.photos["train"].cache == now.photos["train"].cache, "downloaded shards stay in use"


def test_a_broken_link_is_a_photo_that_cannot_be_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos")
    (root / "train/ant/gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"1 of 58 photos cannot be read: train/ant/gone.jpg \(No such file or"):
        load(root, cache=tmp_path)
    assert load(root, cache=tmp_path, skip_corrupt=True).source.train_labels.bincount().tolist() == [14, 14, 14]


def test_an_interrupted_check_does_not_decode_all_other_photos(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def interrupt(blocks: Iterator[Any], *_: Any, **__: Any) -> Iterator[Any]:
        yield next(blocks)
        raise KeyboardInterrupt

    def inspect(file: str) -> photo_check.Inspected:
        looked.append(file)
        time.sleep(0.02)
        return photo_check.Inspected(None)

    monkeypatch.setattr(photo_check, "BLOCK", 1)
    monkeypatch.setattr(photo_check, "_inspect", inspect)
    monkeypatch.setattr(photo_check, "track", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(folder, cache=tmp_path)
    assert len(looked) < 10


def write_alike(root: Path, seed: int, kind: str, **options: Any) -> Path:
    """Write two classes of two splits. The files of all seeds have equal names, times and, if uncompressed, sizes."""
    for number, photo in enumerate(f"{split}/{label}/a.{kind}" for split in ("train", "val") for label in "ab"):
        file = root / photo
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(picture(10 * seed + number, 24, 18), {"tif": "TIFF"}.get(kind, kind), **options))
        os.utime(file, (1, 1))
    return root


@pytest.mark.parametrize("kind", ["bmp", "ppm", "tif"])
def test_uncompressed_photos_of_other_pixels_are_other_data(tmp_path: Path, kind: str) -> None:
    """Their files have equal sizes, whatever they show."""
    one, other = (write_alike(tmp_path / str(seed), seed, kind) for seed in range(2))
    first, second = (load(root, cache=tmp_path / "cache").source.digest for root in (one, other))
    assert first != second
    moved = Path(shutil.copytree(one, tmp_path / "moved"))
    assert load(moved, cache=tmp_path / "cache").source.digest == first
    shutil.copy(other / f"val/b/a.{kind}", one / "val/b")
    assert load(one, cache=tmp_path / "cache").source.digest not in (first, second), "one photo has changed"
    write_shards(load(moved), tmp_path / "shards")
    assert load(tmp_path / "shards", StreamData).source.digest == first


@pytest.mark.parametrize(
    ("kind", "options", "is_compressed"),
    [("JPEG", {}, True), ("PNG", {}, True), ("WEBP", {}, True), ("BMP", {}, False), ("PPM", {}, False),
     ("TIFF", {}, False), ("TIFF", {"compression": "tiff_lzw"}, True)],
)  # fmt: skip
def test_the_content_of_uncompressed_photos_only_is_hashed(
    tmp_path: Path, kind: str, options: dict[str, Any], is_compressed: bool
) -> None:
    """The digests of all other folders stay as they were."""
    file = tmp_path / "a"
    file.write_bytes(encoded(picture(0, 24, 18), kind, **options))
    assert (photo_check._inspect(str(file)).checksum is None) == is_compressed


def test_the_digest_of_compressed_photos_is_that_of_earlier_versions() -> None:
    listing = Listing(Path("/photos/train"), "train/", {"ant": [File("ant/a.jpg", 5, 0)]}, [])
    assert listing_digest({"train": listing}, [], {}) == hashlib.sha256(b"[{'ant': [('ant/a.jpg', 5)]}]").hexdigest()


def test_damaged_photos_of_a_split_elsewhere_are_left_out(damaged: Path, tmp_path: Path) -> None:
    val = shutil.move(damaged / "val", tmp_path / "elsewhere")
    options: dict[str, Any] = {"cache": tmp_path / "cache", "test_folder": str(val)}
    with pytest.raises(
        UserError, match=r"2 of 57 photos cannot be read: train/bee/d\.Jpg .*, \.\./elsewhere/cat/e\.png"
    ):
        load(damaged, **options)
    data = load(damaged, **options, skip_corrupt=True)
    assert data.source.test_labels.bincount().tolist() == [5, 5, 4]
    assert len(list(data.test_dataloader())) > 0


def test_a_split_on_another_drive_of_windows_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_drive(*_: Any) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert relative(Path("D:/val"), Path("C:/photos")) == "D:/val"


def test_a_command_says_that_it_waits_for_the_check_of_another_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder, cache=tmp_path)
    (kept,) = (tmp_path / "checked").glob("*.json")
    kept.unlink()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with one_process_at_a_time(kept):
            held.set()
            release.wait()

    def let_go(_: logging.LogRecord) -> bool:  # the message makes the other thread release the lock
        release.set()
        return True

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    caplog.set_level("INFO", photo_check.__name__)
    caplog.handler.addFilter(let_go)
    load(folder, cache=tmp_path)
    other.join()
    assert caplog.messages[0] == "Waiting for another command that checks these photos."


def test_photos_that_are_checked_already_are_not_listed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of a million photos take seconds, and neither they nor the lock are needed."""
    load(folder, cache=tmp_path)
    monkeypatch.setattr(photo_check, "_check", None)
    monkeypatch.setattr(photo_check, "one_process_at_a_time", None)
    load(folder, cache=tmp_path)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()], ids=["disk", "memory"])
def test_a_reason_that_may_pass_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))

    def fail(self: Any, *arguments: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        if isinstance(error, OSError):
            patched.setattr(Path, "read_bytes", fail)
        else:
            patched.setattr("src.data.photos.to_rgb", fail)
        with pytest.raises(UserError, match=r"57 of 57 photos cannot be read: .*(Input/output error|MemoryError)"):
            load(own, cache=tmp_path / "cache")
    assert len(load(own, cache=tmp_path / "cache").source.train_labels) == 42


def test_a_narrow_jpeg_is_not_damaged(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "train/ant/a.jpg").write_bytes(encoded(picture(0, 40, 5), "JPEG"))
    assert len(load(own, cache=tmp_path / "cache").source.train_labels) == 42
