import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from src.data.folder_data import RATIO, FolderData
from src.data.image_data import Samples
from src.data.photos import Photo
from src.data.views import FIRST_VIEW, random_bits, resized_crop_boxes
from src.errors import UserError
from tests.data.photo_folders import load, write_folder
from tests.data.test_image_data import as_rank, batches, fit, joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 training and 15 test photos of 3 classes; nothing is to be changed in it."""
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def by_index(parts: list[Samples], view: int = 0) -> dict[int, Tensor]:
    """The view of each image of an epoch."""
    return {int(i): image for part in parts for i, image in zip(part.index, part.images[view], strict=True)}


def assert_equal(a: dict[int, Tensor], b: dict[int, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i], b[i]) for i in a)


def test_classes_and_photos_are_found_in_order(own_folder: Path) -> None:
    (own_folder / "train/ant/notes.txt").write_text("no photo")
    (own_folder / "train/ant/._a.jpg").write_text("left behind by a Mac")
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


def test_test_is_taken_before_val_where_it_has_classes(own_folder: Path) -> None:
    (own_folder / "test").mkdir()
    (own_folder / "test/unlabelled.jpg").write_bytes(b"")
    assert len(load(own_folder).source.test_labels) == 15
    for name in ("ant", "bee", "cat"):
        (own_folder / "test" / name).mkdir()
        shutil.copy(own_folder / "val" / name / "a.jpg", own_folder / "test" / name)
    assert load(own_folder).source.test_labels.tolist() == [0, 1, 2]


def test_a_view_is_a_crop_of_its_photo_by_its_own_bits(folder: Path) -> None:
    data = load(folder)
    data.views = 2
    for batch in batches(data.train_dataloader(), epoch=3):
        rows = batch.index.tolist()
        assert torch.equal(batch.target, data.source.train_labels[batch.index])
        photos = [Photo(encoded, "x").decode(1)[0] for encoded in data.photos["train"].read(rows)]
        heights, widths = (torch.tensor([getattr(photo, side) for photo in photos]) for side in ("height", "width"))
        for view in range(2):
            bits = random_bits(0, 3, batch.index, FIRST_VIEW + view)
            assert (batch.views[view] == 3 * 2 + view).all()
            boxes, mirrored = resized_crop_boxes(bits, heights, widths, (0.08, 1.0), RATIO)
            assert batch.images[view].dtype == torch.uint8
            for place, photo in enumerate(photos):
                left, top, width, height = boxes[place].tolist()
                crop = tv.resized_crop(photo, top, left, height, width, [16, 16])
                expected = tv.pil_to_tensor(tv.horizontal_flip(crop) if mirrored[place] else crop)
                difference = (batch.images[view][place].int() - expected.int()).abs().float().mean()
                assert difference <= (4 if min(width, height) >= 32 else 0)  # a larger JPEG is reduced


def test_views_differ_but_do_not_depend_on_how_many_there_are(folder: Path) -> None:
    one, two = load(folder), load(folder)
    two.views = 2
    epochs = [batches(data.train_dataloader(), 1) for data in (one, two)]
    assert_equal(by_index(epochs[0]), by_index(epochs[1]))
    assert not torch.equal(epochs[1][0].images[0], epochs[1][0].images[1])
    assert not torch.equal(epochs[0][0].images[0], by_index(batches(one.train_dataloader(), 2))[0])


def test_without_flip_nothing_is_mirrored(folder: Path) -> None:
    flipped, plain = (by_index(batches(load(folder, flip=flip).train_dataloader())) for flip in (True, False))
    mirrored = [i for i in plain if not torch.equal(plain[i], flipped[i])]
    assert 10 <= len(mirrored) <= 32
    assert all(torch.equal(plain[i], flipped[i].flip(2)) for i in mirrored)


@pytest.mark.parametrize("val_size", [0, 6])
def test_workers_change_nothing(folder: Path, val_size: int) -> None:
    seen = []
    for workers in (0, 2):
        data = load(folder, workers=workers, val_size=val_size)
        train = data.train_dataloader()
        seen.append([*batches(train, 0), *batches(train, 1), *data.val_dataloader()])
    for alone, helped in zip(*seen, strict=True):
        assert torch.equal(alone.images[0], helped.images[0])
        assert torch.equal(alone.target, helped.target)
        assert torch.equal(alone.index, helped.index)
        assert all(map(torch.equal, alone.views, helped.views))


def test_devices_share_the_batches_of_one_process(folder: Path) -> None:
    alone = batches(load(folder).train_dataloader(), 2)
    shares = [batches(as_rank(load(folder), rank, 2).train_dataloader(), 2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(joined(parts).sort().values, whole.index.sort().values)
    assert_equal(by_index(shares[0]) | by_index(shares[1]), by_index(alone))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_trainer_sees_the_views_of_its_epoch(folder: Path, tmp_path: Path, workers: int) -> None:
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
def test_evaluation_sees_the_centre_of_each_photo(folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderData, "evaluation_batch_size", 4)
    data = load(folder, val_size=6)
    rows = data.val_index.tolist() if split == "val" else list(range(15))
    seen = list(data.evaluation_loader(split))
    assert max(len(batch.index) for batch in seen) <= 4
    assert torch.equal(joined(seen), torch.arange(len(rows)))
    labels = data.source.train_labels[data.val_index] if split == "val" else data.source.test_labels
    assert torch.equal(torch.cat([batch.target for batch in seen]), labels)
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])
    for image, encoded in zip(torch.cat([b.images[0] for b in seen]), data.photos[split].read(rows), strict=True):
        photo, _ = Photo(encoded, "x").decode(1)
        assert (image.int() - transform(photo).int()).abs().float().mean() <= (4 if min(photo.size) >= 40 else 0)


def test_held_out_photos_are_not_trained_on(folder: Path) -> None:
    data = load(folder, val_size=6, train_size=30)
    trained = joined(batches(data.train_dataloader()))
    assert torch.equal(trained.sort().values, data.train_index)
    assert not set(trained.tolist()) & set(data.val_index.tolist())


def test_the_digest_tells_photos_and_pictures_apart(folder: Path, own_folder: Path) -> None:
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


def _flat(root: Path) -> None:
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


def _dangling(root: Path) -> None:
    (root / "train/ant/lost.jpg").symlink_to(root / "nowhere.jpg")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_train, r"no class folders in \S+/train: data\.root=\S+ .* train/<class>/\.\.\. and val/<class>"),
        (_without_val, r"no class folders in \S+/val"),
        (_flat, r"no class folders in \S+/val"),
        (_empty_class, r"no photos in \S+/train/dog \(\.bmp"),
        (_class_only_in_train, r"/train has classes that \S+/val has not \(bee\)"),
        (_classes_only_in_val, r"/val has classes that \S+/train has not \(dog, elk, fox and 2 more\)"),
        (_dangling, r"/train/ant/lost\.jpg cannot be read \(No such file"),
    ],
)
def test_folders_that_do_not_fit(own_folder: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(own_folder)
    with pytest.raises(UserError, match=says):
        load(own_folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": 21}, "data.image_size=21"),
        ({"scale": (0.0, 1.0)}, "data.scale="),
        ({"scale": (0.5, 0.2)}, "data.scale="),
        ({"scale": (0.5, 1.5)}, "data.scale="),
        ({"val_size": 2}, "data.val_size=2"),
    ],
)
def test_sizes_that_do_not_fit(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(folder, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"not a photo", None])
def test_a_broken_photo_is_named_in_one_sentence(own_folder: Path, workers: int, content: bytes | None) -> None:
    data = load(own_folder, workers=workers)
    broken = own_folder / "train/bee/c.jpeg"
    if content is None:
        broken.unlink()
    else:
        broken.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(data.train_dataloader())
    assert str(caught.value).startswith(f"{broken} cannot be read")
    assert str(caught.value).endswith("mend or remove it.")
    assert "\n" not in str(caught.value)


def test_real_photos(real_data: Path) -> None:
    root = real_data / "imagenette"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    data = load(root, image_size=224, resize=256, batch_size=32)
    assert (data.num_classes, len(data.train_index), data.split_size("test")) == (10, 1000, 300)
    batch = batches(data.train_dataloader())[0]
    assert batch.images[0].shape == (32, 3, 224, 224)
    assert batch.images[0].float().std() > 30

    torchvisions = datasets.ImageFolder(str(root / "val"), v2.Compose([v2.Resize(256), v2.CenterCrop(224)]))
    pictures = data.test_images(range(0, 300, 50))
    for picture, row in zip(pictures, range(0, 300, 50), strict=True):
        expected, label = torchvisions[row]
        assert label == data.source.test_labels[row]
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(expected))
