"""Views with a policy or with mixing: functions of (seed, epoch, index), for arrays and for photos."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.data.array_data import ArrayData
from src.data.augmentation import Augmentation
from src.data.batches import Share
from src.data.folder_data import FolderData
from src.data.image_data import ImageData, Samples
from src.data.mixing import CutMix, MixUp
from src.data.policies import RandAugment, TrivialAugment
from src.data.view_reader import PARTNER
from src.data.views import FIRST_VIEW, crop_and_flip, further_bits, random_bits, uniform, view_count
from tests.helpers.batches import as_rank, batches, fit
from tests.helpers.photo_folders import load

Make = Callable[..., ArrayData]
AUGMENTATIONS = {
    "none": Augmentation(crop_and_flip=False),
    "trivial": Augmentation(policy=TrivialAugment()),
    "randaugment": Augmentation(policy=RandAugment()),
    "mixup": Augmentation(mixing=MixUp(alpha=1.0)),
    "cutmix": Augmentation(mixing=CutMix(alpha=1.0)),
    "all": Augmentation(policy=TrivialAugment(), policy_from_view=1, mixing=CutMix(alpha=1.0)),
}
augmented = pytest.mark.parametrize("name", AUGMENTATIONS)


@pytest.fixture(params=["arrays", "photos"])
def make(request: pytest.FixtureRequest, make_data: Make, folder: Path) -> Callable[..., ImageData]:
    """A function that makes loaded data of either kind."""

    def arrays(**options: Any) -> ArrayData:
        data = make_data(val_size=12, **options)
        data.load()
        return data

    def photos(**options: Any) -> FolderData:
        return load(folder, **{"batch_size": 16, **options})

    return arrays if request.param == "arrays" else photos


def views(data: ImageData, epoch: int) -> dict[int, tuple[Any, ...]]:
    """Everything about the views of an epoch, by the image's position."""
    found = {}
    for read in batches(data.train_dataloader(), epoch):
        batch: Any = data.augment(read, epoch)
        for row, position in enumerate(batch.index.tolist()):
            labels = [batch.target, *([] if batch.other_target is None else [batch.other_target, batch.share])]
            columns = [*batch.images, *batch.view_numbers, *labels]
            found[position] = tuple(column[row].clone() for column in columns)
    return found


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@augmented
def test_views_are_the_same_for_any_number_of_devices_and_batches(make: Callable[..., ImageData], name: str) -> None:
    options = {"augmentation": AUGMENTATIONS[name], "views_per_image": 2}
    whole = views(make(**options), epoch=3)
    parts: dict[int, tuple[Any, ...]] = {}
    for rank in range(2):
        data: Any = make(**options)
        parts.update(views(as_rank(data, rank, 2), epoch=3))
    small = views(make(**options, batch_size=6), epoch=3)
    assert len(parts) >= len(whole) - 1 > 20
    assert all(same(view, whole[position]) for position, view in parts.items())
    assert all(same(view, whole[position]) for position, view in small.items())


@augmented
def test_seed_and_epoch_make_other_views(make: Callable[..., ImageData], name: str) -> None:
    augmentation = AUGMENTATIONS[name]
    first = views(make(augmentation=augmentation), epoch=0)
    for seed, epoch in ((0, 1), (1, 0)):
        others = views(make(augmentation=augmentation, seed=seed), epoch)
        differ = sum(not torch.equal(others[position][0], view[0]) for position, view in first.items())
        assert differ == 0 if name == "none" else differ > 0.7 * len(first)


@augmented
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_training_sees_the_same_views(make_data: Make, tmp_path: Path, name: str, workers: int) -> None:
    def fresh() -> ArrayData:
        data = make_data(workers=workers, augmentation=AUGMENTATIONS[name])
        data.load()
        return data

    first = fit(fresh(), tmp_path / "checkpoints", 1)
    resumed = fit(fresh(), tmp_path / "checkpoints", 2)
    data = fresh()
    loader = data.train_dataloader()
    expected = [(epoch, data.augment(batch, epoch)) for epoch in range(2) for batch in batches(loader, epoch)]
    seen = first.trained + resumed.trained
    assert [epoch for epoch, _, _ in seen] == [epoch for epoch, _ in expected]
    for (_, index, images), (_, batch) in zip(seen, expected, strict=True):
        assert torch.equal(index, batch.index)
        assert torch.equal(images, batch.images[0])


def test_a_mixed_view_is_made_of_two_views_of_training_images(make_data: Make) -> None:
    data = make_data(val_size=12, train_size=40, wrong_labels=0.3, augmentation=AUGMENTATIONS["mixup"])
    data.load()
    batch: Any = batches(data.train_dataloader(), 2)[-1]
    bits = random_bits(0, 2, batch.index, FIRST_VIEW)
    other = data.train_index[(uniform(bits, PARTNER) * 40).long()]
    crops = view_count(2, flip=True)
    one = crop_and_flip(data.arrays.train_images[batch.index], bits % crops, 2)
    partner = crop_and_flip(data.arrays.train_images[other], further_bits(bits, PARTNER) % crops, 2)
    mixed, share = MixUp(alpha=1.0)(one, partner, bits)
    assert torch.equal(batch.images[0], mixed)
    assert torch.equal(batch.share, share)
    assert torch.equal(batch.target, data.train_labels[batch.index])
    assert torch.equal(batch.other_target, data.train_labels[other])


def test_partners_are_training_images_and_all_of_them(make: Callable[..., ImageData]) -> None:
    data = make(train_size=20, augmentation=AUGMENTATIONS["mixup"])
    labels = torch.full_like(data.source.train_labels, -7)
    labels[data.train_index] = data.train_index
    reader: Any = data.reader("train")
    reader.labels = labels  # so that a label names an image
    positions = data.train_index.tolist()
    partners = {int(label) for epoch in range(30) for label in reader[Share(epoch, positions)].other_target}
    assert partners == set(data.train_index.tolist())


def test_a_policy_may_leave_the_first_view_alone(make: Callable[..., ImageData]) -> None:
    plain, strong = (
        views(make(views_per_image=2, augmentation=augmentation), epoch=1)
        for augmentation in (
            Augmentation(policy=RandAugment(strength=30), policy_from_view=2),
            Augmentation(policy=RandAugment(strength=30), policy_from_view=1),
        )
    )
    assert all(torch.equal(strong[position][0], view[0]) for position, view in plain.items())
    changed = sum(not torch.equal(strong[position][1], view[1]) for position, view in plain.items())
    assert changed > 0.7 * len(plain)


def test_without_augmentation_a_view_is_the_image_of_evaluation(make: Callable[..., ImageData]) -> None:
    data = make(augmentation=AUGMENTATIONS["none"])
    assert data.view_count(epochs=100) == 1
    positions = data.train_index[:9]
    held_out = data.reader("held_out", positions)[Share(0, list(range(9)))]
    seen = views(data, epoch=5)
    for position, image in zip(positions.tolist(), held_out.images[0], strict=True):
        assert torch.equal(seen[position][0], image)
        assert seen[position][1] == 0


@augmented
def test_a_view_store_is_shared_only_where_the_views_are(make: Callable[..., ImageData], name: str) -> None:
    def key(**options: Any) -> str:
        return make(augmentation=AUGMENTATIONS[name], **options).views_name

    assert key() == key()
    assert key() != make().views_name
    if name != "none":
        assert key(seed=1) != key()
        assert key(seed=1, fixed_views=3) == key(fixed_views=3) != key()
    if AUGMENTATIONS[name].mixing is not None:
        assert key(train_size=20) != key()  # the partners are others


@pytest.mark.parametrize("name", ["trivial", "cutmix"])
def test_fixed_views_are_the_same_in_all_epochs_and_for_all_seeds(make: Callable[..., ImageData], name: str) -> None:
    found: dict[tuple[int, int], torch.Tensor] = {}
    for seed in range(2):
        data = make(augmentation=AUGMENTATIONS[name], fixed_views=2, seed=seed)
        assert data.view_count(epochs=9) == 2
        for epoch in range(3):
            for position, (image, number, *_) in views(data, epoch).items():
                assert torch.equal(found.setdefault((position, int(number)), image), image)
    assert len(found) > 1.8 * len(data.train_index)


def test_records_of_a_view_store_are_those_that_are_read(make_data: Make) -> None:
    data = make_data(val_size=12, augmentation=AUGMENTATIONS["cutmix"])
    data.load()
    read = {
        int(number) * len(data.source.train_labels) + position
        for epoch in range(3)
        for position, (_, number, *_) in views(data, epoch).items()
    }
    assert read <= set(data.view_records(3).tolist())
    assert len(data.view_records(3)) == 3 * len(data.train_index)


def test_samples_without_mixing_have_no_second_label(make: Callable[..., ImageData]) -> None:
    batch: Samples = next(iter(make(augmentation=AUGMENTATIONS["trivial"]).train_dataloader()))
    assert batch.other_target is batch.share is None
