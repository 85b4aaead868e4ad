"""Training images without labels: their source, their batches, and what is refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.common.errors import UserError
from src.data.array_data import ArrayData
from src.data.array_file import save_arrays
from src.data.augmentation import Augmentation
from src.data.batches import MixedBatches, Share
from src.data.folder_data import FolderPhotos, JoinedPhotos
from src.data.image_data import ImageData
from src.data.mixing import CutMix
from src.data.stream_data import StreamData
from tests.helpers.arrays import arrays
from tests.helpers.batches import as_rank, batches, fit, images_by_index
from tests.helpers.photo_folders import files, load, picture

Make = Callable[..., ArrayData]


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """A folder with 12 photos, some of them in further folders."""
    folder = tmp_path / "loose photos"
    for number, (name, content) in enumerate(list(files(7).items())[:12]):
        file = folder / ("deep/er" if number % 3 else "") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (folder / "notes.txt").write_text("not a photo")
    return folder


def loaded(data: ImageData) -> Any:
    data.load()
    return data


def kinds(data: ImageData, epoch: int = 0) -> list[tuple[int, int]]:
    """The numbers of images with and without labels in each batch."""
    return [
        (int((batch.target >= 0).sum()), int((batch.target < 0).sum()))
        for batch in batches(data.train_dataloader(), epoch)
    ]


# Where they come from


def test_the_rest_of_the_training_images_lose_their_labels(make_data: Make) -> None:
    data = loaded(make_data(val_size=12, train_size=18, unlabelled="rest"))
    both = [*data.train_index.tolist(), *data.unlabelled_index.tolist()]
    assert sorted([*both, *data.val_index.tolist()]) == list(range(60))
    assert (len(data.train_index), len(data.unlabelled_index)) == (18, 30)
    for batch in batches(data.train_dataloader()):
        has_label = torch.isin(batch.index, data.train_index)
        assert torch.equal(batch.target, torch.where(has_label, data.source.train_labels[batch.index], -1))
    assert (data.source.train_labels >= 0).all()
    assert (data.trained_labels[data.unlabelled_index] == -1).all()
    without = loaded(make_data(val_size=12, train_size=18))
    assert torch.equal(without.train_index, data.train_index)
    assert torch.equal(without.val_index, data.val_index)


def test_a_view_store_of_mixed_images_is_not_that_of_other_labels(make_data: Make, tmp_path: Path) -> None:
    """An image is mixed with others of its kind. Here the trained images are the same, with and without labels."""
    names = []
    for options in ({}, {"train_size": 0, "unlabelled": "rest"}):
        data = make_data(augmentation=Augmentation(mixing=CutMix(alpha=1.0)), **options)
        save_arrays(tmp_path / "small.npz", **arrays(), unlabelled_images=arrays(train=9)["train_images"])
        data.load()
        assert data.trained_index.tolist() == list(range(69))
        names.append(data.views_name)
    assert len(set(names)) == 2


def test_an_array_file_brings_images_without_labels(make_data: Make, tmp_path: Path) -> None:
    extra = arrays(train=9)["train_images"][::-1].copy()
    plain = loaded(make_data(val_size=12))
    data = make_data(val_size=12)
    save_arrays(tmp_path / "small.npz", **arrays(), unlabelled_images=extra)
    data.load()
    assert data.unlabelled_index.tolist() == list(range(60, 69))
    assert torch.equal(data.arrays.train_images[60:], torch.from_numpy(extra).permute(0, 3, 1, 2))
    assert torch.equal(data.train_index, plain.train_index)
    assert torch.equal(data.val_index, plain.val_index)
    assert data.source.digest != plain.source.digest
    assert "9 unlabelled training images (unlabelled_images)" in data.notes()[0]
    also_rest = make_data(val_size=12, train_size=18, unlabelled="rest")
    save_arrays(tmp_path / "small.npz", **arrays(), unlabelled_images=extra)
    also_rest.load()
    assert len(also_rest.unlabelled_index) == 9 + 30


def test_grey_and_transposed_images_without_labels_become_rgb(make_data: Make, tmp_path: Path) -> None:
    data = make_data()
    height, width = data_size = arrays()["train_images"].shape[1:3]
    save_arrays(tmp_path / "small.npz", **arrays(), unlabelled_images=np.zeros((4, *data_size), np.uint8))
    data.load()
    assert data.arrays.train_images.shape == (64, 3, height, width)
    assert "unlabelled_images are grey, and become RGB." in data.source.notes


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (np.zeros((4, 5, 5, 3), np.uint8), r"unlabelled_images \[5, 5\]: resize all images to one size"),
        (np.array(5, np.uint8), r"unlabelled_images must be uint8 \[N, H, W, 3\], but they are uint8 \[\]"),
        (np.zeros((4, 8, 8, 3), np.float32), r"unlabelled_images must be uint8 \[N, H, W, 3\], but they are float32"),
    ],
)
def test_bad_images_without_labels_are_refused(
    make_data: Make, tmp_path: Path, extra: np.ndarray, message: str
) -> None:
    data = make_data()
    save_arrays(tmp_path / "small.npz", **arrays(), unlabelled_images=extra)
    with pytest.raises(UserError, match=message):
        data.load()


@pytest.mark.parametrize("names", [True, False])
def test_an_array_file_needs_no_labels_for_training(make_data: Make, tmp_path: Path, names: bool) -> None:
    whole = arrays()
    kept = ["test_images", "test_labels", *(["class_names"] if names and "class_names" in whole else [])]
    data = make_data()
    save_arrays(tmp_path / "small.npz", **{key: whole[key] for key in kept}, unlabelled_images=whole["train_images"])
    data.load()
    assert (len(data.train_index), len(data.unlabelled_index), data.labelled_share) == (0, 60, 0.0)
    assert data.num_classes == len(np.unique(whole["test_labels"]))
    assert kinds(data) == [(0, 16)] * 3
    assert data.notes()[0].startswith("Data: 60 unlabelled training images (unlabelled_images), ")


def test_photos_without_labels_join_the_training_photos(folder: Path, loose: Path) -> None:
    plain, data = load(folder, batch_size=16), load(folder, batch_size=16, unlabelled=str(loose))
    assert data.unlabelled_index.tolist() == list(range(42, 54))
    assert data.source.digest != plain.source.digest
    assert data.class_names == plain.class_names
    names = sorted(data.photos["train"].name(row) for row in range(42, 54))
    assert names == sorted(str(file) for file in loose.rglob("*.*") if file.suffix != ".txt")
    assert any("notes.txt" in note for note in data.source.notes)
    assert f"12 unlabelled training images ({loose}/)" in data.notes()[0]
    views, alone = (images_by_index(batches(each.train_dataloader(), 2)) for each in (data, plain))
    shared = views.keys() & alone.keys()
    assert len(shared) > 20
    assert all(torch.equal(views[i], alone[i]) for i in shared)  # the views of a photo do not depend on the others


def test_photos_need_no_labels_for_training(folder: Path, loose: Path, tmp_path: Path) -> None:
    root = tmp_path / "only val"
    shutil.copytree(folder / "val", root / "val")
    data = load(root, unlabelled=str(loose))
    assert (len(data.train_index), len(data.unlabelled_index)) == (0, 12)
    assert data.class_names == ("ant", "bee", "cat")
    assert kinds(data) == [(0, 8)]
    with pytest.raises(UserError, match="There are no class folders in"):
        load(root)


def test_joined_photos_keep_their_order() -> None:
    class Named:
        def __init__(self, letter: str) -> None:
            self.letter = letter

        def read(self, rows: Any) -> list[bytes]:
            return [self.name(row).encode() for row in rows]

        def name(self, row: int) -> str:
            return f"{self.letter}{row}"

    joined = JoinedPhotos(Named("a"), Named("b"), 3)
    assert joined.read([4, 0, 3, 2]) == [b"b1", b"a0", b"b0", b"a2"]
    assert [joined.name(row) for row in (2, 3)] == ["a2", "b0"]
    assert joined.read([1]) == [b"a1"]


# Batches


@pytest.mark.parametrize(("share", "without", "count"), [(None, 10, 3), (0.5, 8, 3), (0.9, 14, 9), (0.01, 1, 30)])
def test_each_batch_has_both_kinds_in_the_same_proportion(
    make_data: Make, share: float | None, without: int, count: int
) -> None:
    data = loaded(make_data(val_size=12, train_size=18, unlabelled="rest", unlabelled_share=share))
    assert data.unlabelled_per_batch == without
    assert data.labelled_share == pytest.approx(1 - without / 16)
    for epoch in range(3):
        assert kinds(data, epoch) == [(16 - without, without)] * count
    assert data.count_training_batches() == count
    said = f"Each of the {count} batches of an epoch has {16 - without} images with and {without} without labels."
    assert said in data.notes()


def test_an_epoch_reads_one_kind_once_and_the_other_in_several_passes(make_data: Make) -> None:
    data = loaded(make_data(val_size=12, train_size=6, unlabelled="rest", unlabelled_share=0.75))
    assert kinds(data) == [(4, 12)] * 3
    orders = set()
    for epoch in range(2):
        read = torch.cat([batch.index for batch in batches(data.train_dataloader(), epoch)])
        with_label = read[torch.isin(read, data.train_index)]
        without = read[torch.isin(read, data.unlabelled_index)]
        assert len(without.unique()) == len(without) == 36
        assert (with_label[:6].unique() == data.train_index).all()
        assert (with_label[6:].unique() == data.train_index).all()
        orders |= {tuple(with_label[:6].tolist()), tuple(with_label[6:].tolist())}
    assert len(orders) == 4  # each pass of each epoch has an order of its own


def test_images_of_both_kinds_meet_by_chance(make_data: Make) -> None:
    data = loaded(make_data(val_size=12, train_size=24, unlabelled="rest"))
    met = torch.zeros(60, 60)
    epochs = 200
    for epoch in range(epochs):
        for share in data.train_dataloader().batch_sampler:
            positions = torch.tensor(share.positions)
            met[positions[:, None], positions] += 1
        data.first_batch = (epoch + 1, 0)
    together = met[data.train_index[:, None], data.unlabelled_index] / epochs
    assert together.mean() == pytest.approx(1 / 3, abs=0.01)
    assert (together - 1 / 3).abs().max() < 0.16  # more than four standard errors


@pytest.mark.parametrize("world_size", [2, 4])
def test_devices_share_each_batch(make_data: Make, world_size: int) -> None:
    options = {"val_size": 12, "train_size": 18, "unlabelled": "rest"}
    whole = [set(batch.index.tolist()) for batch in batches(loaded(make_data(**options)).train_dataloader(), 1)]
    parts = []
    for rank in range(world_size):
        loader = as_rank(loaded(make_data(**options)), rank, world_size).train_dataloader()
        parts.append([batch.index.tolist() for batch in batches(loader, 1)])
    assert all(len(part) == 16 // world_size for rank in parts for part in rank)
    joined = [{position for part in of_batch for position in part} for of_batch in zip(*parts, strict=True)]
    assert joined == whole


def test_a_resumed_training_reads_the_same_batches(make_data: Make, tmp_path: Path) -> None:
    def fresh() -> ArrayData:
        return loaded(make_data(val_size=12, train_size=18, unlabelled="rest"))

    whole = fit(fresh(), tmp_path / "whole", 3).trained
    first, rest = fit(fresh(), tmp_path / "parts", 1).trained, fit(fresh(), tmp_path / "parts", 3).trained
    assert [part[0] for part in [*first, *rest]] == [part[0] for part in whole] == [0] * 3 + [1] * 3 + [2] * 3
    for (_, index, images), (_, other_index, other_images) in zip([*first, *rest], whole, strict=True):
        assert torch.equal(index, other_index)
        assert torch.equal(images, other_images)
    batches_of = fresh().train_dataloader().batch_sampler
    assert isinstance(batches_of, MixedBatches)
    batches_of.done = 2
    resumed = [share.positions for share in batches_of]
    batches_of.done = 0
    assert resumed == [share.positions for share in batches_of][2:]


def test_batches_from_the_memory_of_a_device_are_the_same(make_data: Make) -> None:
    def read(memory: bool) -> list[tuple[list[int], list[int]]]:
        data = loaded(make_data(train_size=18, unlabelled="rest", device_memory=memory))
        trainer: Any = as_rank(data, 0, 1).trainer
        trainer.strategy.root_device = torch.device("cpu")
        return [(batch.index.tolist(), batch.target.tolist()) for batch in batches(data.train_dataloader(), 1)]

    assert read(True) == read(False)


def test_images_are_mixed_with_images_of_their_own_kind(make_data: Make) -> None:
    augmentation = Augmentation(mixing=CutMix())
    data = loaded(make_data(train_size=18, unlabelled="rest", augmentation=augmentation))
    for batch in batches(data.train_dataloader(), 1):
        assert batch.other_target is not None
        assert torch.equal(batch.target < 0, batch.other_target < 0)
        assert (batch.other_target >= 0).any()


def test_wrong_labels_go_to_images_with_labels_alone(make_data: Make) -> None:
    data = loaded(make_data(train_size=18, unlabelled="rest", wrong_labels=0.9))
    assert (data.train_labels[data.unlabelled_index] == -1).all()
    assert (data.train_labels[data.train_index] >= 0).all()


def test_the_view_store_has_records_for_all_images(make_data: Make) -> None:
    data = loaded(make_data(train_size=18, unlabelled="rest"))
    read = {
        int(number) * 60 + int(index)
        for epoch in range(3)
        for batch in (data.augment(each, epoch) for each in batches(data.train_dataloader(), epoch))
        for index, number in zip(batch.index, batch.view_numbers[0], strict=True)
    }
    assert read <= set(data.view_records(3).tolist())


# Unread images and refusals


def test_a_method_that_distils_nothing_leaves_them_unread(make_data: Make) -> None:
    data = loaded(make_data(val_size=12, train_size=18, unlabelled="rest", reads_unlabelled=False))
    assert kinds(data) == [(16, 0), (2, 0)]
    assert "30 training images without labels are left unread, because the method distils nothing." in data.notes()


def test_a_share_of_0_leaves_them_unread(make_data: Make) -> None:
    data = loaded(make_data(val_size=12, train_size=18, unlabelled="rest", unlabelled_share=0.0))
    assert data.labelled_share == 1
    assert "30 training images without labels are left unread, because data.unlabelled_share is 0." in data.notes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"unlabelled": "rest"},
            "data.unlabelled=rest uses the training images that data.train_size leaves out, but there are none: set "
            "data.train_size.",
        ),
        (
            {"unlabelled_share": 0.5},
            "data.unlabelled_share=0.5 has no images without labels: set data.unlabelled to a folder of photos, or to "
            "rest.",
        ),
        (
            {"unlabelled": "photos/"},
            "data.unlabelled=photos/ is not possible for an array file: put the images into its array "
            "unlabelled_images, or choose data.unlabelled=rest.",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(make_data: Make, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make_data(**options).load()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"unlabelled_share": 0.1},
            "A batch needs 14 training images with and 2 without labels, but there are 6 and 54: lower "
            "schedule.batch_size or change data.unlabelled_share.",
        ),
        (
            {"batch_size": 1},
            "schedule.batch_size=1 does not fit images with and without labels, because each batch holds both: choose "
            "2 or more.",
        ),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(make_data: Make, options: dict[str, Any], sentence: str) -> None:
    data = loaded(make_data(train_size=6, unlabelled="rest", **options))
    with pytest.raises(UserError) as caught:
        data.notes()
    assert str(caught.value) == sentence


def test_a_link_to_test_photos_is_refused(folder: Path, loose: Path) -> None:
    (loose / "more").symlink_to(folder / "val")
    with pytest.raises(UserError, match=rf"{re.escape(str(folder / 'val'))} share photos, but they must not"):
        load(folder, unlabelled=str(loose))


def test_a_namesake_does_not_hide_a_damaged_photo(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "root"))
    shutil.copytree(folder / "train", tmp_path / "train")
    (root / "train" / "ant" / "a.jpg").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)  # both photos are train/ant/a.jpg, below root and below the working directory
    with pytest.raises(UserError, match=r"1 of 99 photos cannot be read: train/ant/a\.jpg"):
        load(root, unlabelled="train")


def test_the_digest_does_not_depend_on_where_the_folder_is(
    folder: Path, loose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, 40, 30).save(loose / "turned.jpg", exif=exif)
    first = load(folder, unlabelled=str(loose))
    moved = Path(shutil.copytree(loose, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    second, third = (load(folder, unlabelled=str(path)) for path in (moved, "elsewhere"))
    plain = load(folder)
    assert first.source.digest == second.source.digest == third.source.digest != plain.source.digest
    assert first.labelled_digest == plain.labelled_digest == plain.source.digest


def test_unlabelled_photos_that_all_fail_are_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^No photo in data\.unlabelled=.*bad can be read"):
        load(folder, unlabelled=str(tmp_path / "bad"), skip_corrupt=True)


def test_shards_are_read_in_order_for_both_kinds_and_partners_are_near(shards: Path) -> None:
    data = load(
        shards, StreamData, train_size=12, unlabelled="rest", batch_size=6, augmentation=Augmentation(mixing=CutMix())
    )
    reader: Any = data.reader("train")
    reader.labels = torch.arange(len(data.source.train_labels))  # so that a label names a photo
    reader.labels[data.unlabelled_index] *= -1
    for share in data.train_dataloader().batch_sampler:
        batch = reader[share]
        assert torch.equal(data.blocks[batch.index], data.blocks[batch.other_target.abs()])
    blocks = data.blocks[data.unlabelled_index]
    batches_of: Any = data.train_dataloader().batch_sampler
    assert torch.equal(batches_of.unlabelled_blocks, blocks)


def test_folders_that_do_not_fit_are_refused(folder: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (folder, f"data.unlabelled={folder} and {folder / 'train'} share photos, but they must not"),
        (folder / "val/ant", f"data.unlabelled={folder / 'val/ant'} and {folder / 'val'} share photos"),
        (tmp_path / "missing", "cannot be read (No such file or directory): set it to a folder of photos, or to rest."),
        (tmp_path / "empty", f"There are no photos in data.unlabelled={tmp_path / 'empty'}"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load(folder, unlabelled=str(path))
    with pytest.raises(UserError, match=r"data\.unlabelled=FOLDER needs data=imagefolder"):
        load(shards, StreamData, unlabelled=str(tmp_path))
    assert load(shards, StreamData, train_size=12, unlabelled="rest").unlabelled_per_batch == 6


def test_a_damaged_photo_without_a_label_is_reported(folder: Path, loose: Path) -> None:
    (loose / "deep" / "bad.jpg").write_bytes(b"not a photo")
    with pytest.raises(UserError, match=r"1 of 70 photos cannot be read: .*bad\.jpg"):
        load(folder, unlabelled=str(loose))
    data = load(folder, unlabelled=str(loose), skip_corrupt=True)
    assert len(data.unlabelled_index) == 12
    assert isinstance(data.photos["unlabelled"], FolderPhotos)
    images = data.reader("held_out", data.trained_index)[Share(0, list(range(50, 54)))].images[0]
    assert images.shape == (4, 3, 16, 16)
