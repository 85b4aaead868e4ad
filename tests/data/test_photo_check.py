"""Photos are decoded once before training: damaged ones are listed, and the result is kept."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.common.errors import UserError
from src.data import photo_check
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
    looked: list[Path] = []
    inspect = photo_check._inspect

    def noted(file: Path) -> tuple[str | None, bool]:
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
