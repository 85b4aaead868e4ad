"""Photos in folders: listing, training crops, evaluation crops, and errors in the folders."""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from src.common.errors import UserError
from src.data.folder_data import RATIO, FolderData
from src.data.photos import Photo
from src.data.views import FIRST_VIEW, random_bits, resized_crop_boxes
from tests.helpers.batches import (
    as_rank,
    assert_same_images,
    batches,
    fit,
    images_by_index,
    indices_of,
    message_of_unreadable,
)
from tests.helpers.photo_folders import load


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of `folder` that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def test_classes_and_photos_are_listed_in_torchvisions_order(own_folder: Path) -> None:
    (own_folder / "train/ant/notes.txt").write_text("not a photo")
    (own_folder / "train/ant/._a.jpg").write_text("left behind by macOS")
    (own_folder / "train/.cache").mkdir()
    data = load(own_folder)
    assert data.class_names == ("ant", "bee", "cat")
    assert data.source.train_labels.tolist() == [0] * 14 + [1] * 14 + [2] * 14
    assert data.source.test_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.photos["train"].name(13) == str(own_folder / "train/ant/nested/deep/n.tif")
    assert data.image_shape == (3, 16, 16)
    (own_folder / "train/ant/._a.jpg").unlink()
    (own_folder / "train/.cache").rmdir()
    torchvisions = datasets.ImageFolder(str(own_folder / "train"))
    assert [data.photos["train"].name(row) for row in range(42)] == [path for path, _ in torchvisions.samples]


def test_the_folder_test_takes_precedence_over_val_if_it_has_class_folders(own_folder: Path) -> None:
    (own_folder / "test").mkdir()
    (own_folder / "test/unlabelled.jpg").write_bytes(b"")
    assert len(load(own_folder).source.test_labels) == 15
    for name in ("ant", "bee", "cat"):
        (own_folder / "test" / name).mkdir()
        shutil.copy(own_folder / "val" / name / "a.jpg", own_folder / "test" / name)
    assert load(own_folder).source.test_labels.tolist() == [0, 1, 2]


def test_a_view_is_the_crop_that_its_random_bits_determine(folder: Path) -> None:
    data = load(folder)
    data.views_per_image = 2
    for batch in batches(data.train_dataloader(), epoch=3):
        rows = batch.index.tolist()
        assert torch.equal(batch.target, data.source.train_labels[batch.index])
        photos = [Photo(encoded, "x").decode(1)[0] for encoded in data.photos["train"].read(rows)]
        heights, widths = (torch.tensor([getattr(photo, side) for photo in photos]) for side in ("height", "width"))
        for view in range(2):
            bits = random_bits(0, 3, batch.index, FIRST_VIEW + view)
            assert (batch.view_numbers[view] == 3 * 2 + view).all()
            boxes, mirrored = resized_crop_boxes(bits, heights, widths, (0.08, 1.0), RATIO)
            assert batch.images[view].dtype == torch.uint8
            for place, photo in enumerate(photos):
                left, top, width, height = boxes[place].tolist()
                crop = tv.resized_crop(photo, top, left, height, width, [16, 16])
                expected = tv.pil_to_tensor(tv.horizontal_flip(crop) if mirrored[place] else crop)
                difference = (batch.images[view][place].int() - expected.int()).abs().float().mean()
                assert difference <= (4 if min(width, height) >= 32 else 0)  # the decoder reduces larger JPEGs


def test_views_differ_and_do_not_depend_on_the_number_of_views(folder: Path) -> None:
    one, two = load(folder), load(folder)
    two.views_per_image = 2
    epochs = [batches(data.train_dataloader(), 1) for data in (one, two)]
    assert_same_images(images_by_index(epochs[0]), images_by_index(epochs[1]))
    assert not torch.equal(epochs[1][0].images[0], epochs[1][0].images[1])
    assert not torch.equal(epochs[0][0].images[0], images_by_index(batches(one.train_dataloader(), 2))[0])


def test_without_flip_no_view_is_mirrored(folder: Path) -> None:
    flipped, plain = (images_by_index(batches(load(folder, flip=flip).train_dataloader())) for flip in (True, False))
    mirrored = [i for i in plain if not torch.equal(plain[i], flipped[i])]
    assert 10 <= len(mirrored) <= 32
    assert all(torch.equal(plain[i], flipped[i].flip(2)) for i in mirrored)


@pytest.mark.parametrize("val_size", [0, 6])
def test_workers_do_not_change_the_batches(folder: Path, val_size: int) -> None:
    seen = []
    for workers in (0, 2):
        data = load(folder, workers=workers, val_size=val_size)
        train = data.train_dataloader()
        seen.append([*batches(train, 0), *batches(train, 1), *data.val_dataloader()])
    for alone, helped in zip(*seen, strict=True):
        assert torch.equal(alone.images[0], helped.images[0])
        assert torch.equal(alone.target, helped.target)
        assert torch.equal(alone.index, helped.index)
        assert all(map(torch.equal, alone.view_numbers, helped.view_numbers))


def test_workers_start_in_a_process_of_joblib(folder: Path) -> None:
    pytest.importorskip("joblib.externals.loky")
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("loky", force=True)  # as joblib does in its processes
    try:
        found = list(batches(load(folder, workers=1).train_dataloader(), 0))
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert sum(len(batch.index) for batch in found) == 42


def test_several_devices_read_the_batches_of_one_device(folder: Path) -> None:
    alone = batches(load(folder, batch_size=12).train_dataloader(), 2)
    shares = [batches(as_rank(load(folder, batch_size=12), rank, 2).train_dataloader(), 2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(indices_of(parts).sort().values, whole.index.sort().values)
    assert_same_images(images_by_index(shares[0]) | images_by_index(shares[1]), images_by_index(alone))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_reads_the_views_of_its_epoch(folder: Path, tmp_path: Path, workers: int) -> None:
    first = fit(load(folder, workers=workers, batch_size=16), tmp_path / "checkpoints", 1)
    resumed = fit(load(folder, workers=workers, batch_size=16), tmp_path / "checkpoints", 3)
    seen = first.trained + resumed.trained
    loader = load(folder, batch_size=16).train_dataloader()
    expected = [(epoch, batch) for epoch in range(3) for batch in batches(loader, epoch)]
    assert [epoch for epoch, *_ in seen] == [epoch for epoch, _ in expected]
    for (_, index, images), (_, batch) in zip(seen, expected, strict=True):
        assert torch.equal(index, batch.index)
        assert torch.equal(images, batch.images[0])


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_reads_the_centre_of_each_photo(folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderData, "evaluation_batch_size", 4)
    data = load(folder, val_size=6)
    rows = data.val_index.tolist() if split == "val" else list(range(15))
    photos = data.photos["held_out" if split == "val" else "test"]
    seen = list(data.evaluation_loader(split))
    assert max(len(batch.index) for batch in seen) <= 4
    assert torch.equal(indices_of(seen), torch.arange(len(rows)))
    labels = data.source.train_labels[data.val_index] if split == "val" else data.source.test_labels
    assert torch.equal(torch.cat([batch.target for batch in seen]), labels)
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])
    for image, encoded in zip(torch.cat([b.images[0] for b in seen]), photos.read(rows), strict=True):
        photo, _ = Photo(encoded, "x").decode(1)
        assert (image.int() - transform(photo).int()).abs().float().mean() <= (4 if min(photo.size) >= 40 else 0)


def test_held_out_photos_are_not_trained_on(folder: Path) -> None:
    data = load(folder, val_size=6, train_size=30)
    trained = indices_of(batches(data.train_dataloader()))
    assert torch.equal(trained.sort().values, data.train_index)
    assert not set(trained.tolist()) & set(data.val_index.tolist())


def test_the_digest_depends_on_file_names_file_sizes_and_evaluation_sizes(folder: Path, own_folder: Path) -> None:
    same = load(folder).source.digest
    assert load(own_folder).source.digest == same
    assert load(own_folder, resize=21).source.digest != same
    assert load(own_folder, image_size=15).source.digest != same
    photo = own_folder / "val/bee/a.jpg"
    photo.write_bytes(photo.read_bytes() + b"\0")
    changed = load(own_folder).source.digest
    photo.rename(photo.with_name("z.jpg"))
    assert len({same, changed, load(own_folder).source.digest}) == 3


def _without_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def _without_val(root: Path) -> None:
    shutil.rmtree(root / "val")


def _without_class_folders(root: Path) -> None:
    _without_val(root)
    (root / "val").mkdir()
    (root / "val/a.jpg").write_bytes(b"")


def _empty_class(root: Path) -> None:
    (root / "train/dog").mkdir()
    (root / "train/dog/notes.txt").write_text("")


def _class_only_in_train(root: Path) -> None:
    shutil.rmtree(root / "val/bee")


def _classes_only_in_val(root: Path) -> None:
    for name in ("dog", "elk", "fox", "gnu", "hen"):
        shutil.copytree(root / "val/bee", root / "val" / name)


def _dangling_link(root: Path) -> None:
    (root / "train/ant/lost.jpg").symlink_to(root / "nowhere.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _without_train,
            r"no class folders in \S+/train: .* data\.root=\S+ which holds val, as train/<class>/",
        ),
        (_without_val, r"no class folders in \S+/val"),
        (_without_class_folders, r"no class folders in \S+/val"),
        (_empty_class, r"no photos in \S+/train/dog \(\.apng, \.bmp"),
        (_class_only_in_train, r"/train has classes that \S+/val lacks \(bee\)"),
        (_classes_only_in_val, r"/val has classes that \S+/train lacks \(dog, elk, fox and 2 more\)"),
        (_dangling_link, r"1 of 58 photos cannot be read: train/ant/lost\.jpg \(No such file"),
    ],
)
def test_wrong_folders_are_refused(own_folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(own_folder)
    with pytest.raises(UserError, match=message):
        load(own_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 21}, "data.image_size=21"),
        ({"scale": (0.0, 1.0)}, "data.scale="),
        ({"scale": (0.5, 0.2)}, "data.scale="),
        ({"scale": (0.5, 1.5)}, "data.scale="),
        ({"val_size": 2}, "data.val_size=2"),
    ],
)
def test_inconsistent_sizes_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"not a photo", None])
def test_a_damaged_photo_is_named_in_one_sentence(own_folder: Path, workers: int, content: bytes | None) -> None:
    data = load(own_folder, workers=workers)
    damaged = own_folder / "train/bee/c.jpeg"
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    message = message_of_unreadable(data.train_dataloader())
    assert message.startswith(f"{damaged} cannot be read")
    assert message.endswith("repair or remove it.")
    assert "\n" not in message


def test_real_photos_are_evaluated_as_by_torchvision(real_data: Path) -> None:
    root = real_data / "imagenette"
    if not root.is_dir():
        pytest.skip(f"{root} does not exist")
    data = load(root, image_size=224, resize=256, batch_size=32)
    assert (data.num_classes, len(data.train_index), data.split_size("test")) == (10, 1000, 300)
    batch = batches(data.train_dataloader())[0]
    assert batch.images[0].shape == (32, 3, 224, 224)
    assert batch.images[0].float().std() > 30

    torchvisions = datasets.ImageFolder(str(root / "val"), v2.Compose([v2.Resize(256), v2.CenterCrop(224)]))
    images = data.test_images(list(range(0, 300, 50)))
    for image, row in zip(images, range(0, 300, 50), strict=True):
        expected, label = torchvisions[row]
        assert label == data.source.test_labels[row]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_fixed_views_are_the_same_crops_in_all_epochs_and_for_all_seeds(folder: Path) -> None:
    crops: dict[tuple[int, int], torch.Tensor] = {}
    seen = 0
    for seed in range(2):
        data = load(folder, fixed_views=2, seed=seed)
        assert data.view_count(epochs=100) == 2
        for epoch in range(3):
            for batch in batches(data.train_dataloader(), epoch):
                (images,), (numbers,) = batch.images, batch.view_numbers
                for key, image in zip(zip(batch.index.tolist(), numbers.tolist(), strict=True), images, strict=True):
                    seen += key in crops
                    assert torch.equal(crops.setdefault(key, image), image)
    assert len(crops) <= 2 * 42
    assert seen >= 6 * 42 - 2 * 42
    names = [load(folder, fixed_views=fixed, seed=seed).views_name for fixed in (None, 2) for seed in (0, 1)]
    assert len(set(names)) == 3  # the store of fixed views is shared by all seeds
