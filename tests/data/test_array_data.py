"""Images in memory: batches, normalisation and augmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.common.errors import UserError
from src.data.array_data import ArrayData, channel_statistics
from src.data.array_file import save_arrays
from src.data.batches import Share
from src.data.views import crop_and_flip, draw_views
from tests.helpers.arrays import arrays
from tests.helpers.batches import batches, indices_of

Make = Callable[..., ArrayData]


def test_a_batch_contains_the_images_of_its_indices(make_data: Make) -> None:
    data = make_data()
    data.load()
    seen = batches(data.train_dataloader())
    assert [len(batch.target) for batch in seen] == [16, 16, 16, 12]
    for batch in seen:
        (images,) = batch.images
        assert images.dtype == torch.uint8
        assert torch.equal(images, data.arrays.train_images[batch.index])
        assert torch.equal(batch.target, data.arrays.train_labels[batch.index])
    assert torch.equal(indices_of(seen).sort().values, torch.arange(60))
    assert data.image_shape == (3, 8, 6)
    assert data.num_classes == 3
    assert data.class_names == ("class 0", "class 1", "class 2")


def test_without_a_path_the_array_file_is_prepared(make_data: Make, tmp_path: Path) -> None:
    def prepare(root: Path) -> Path:
        save_arrays(root / "prepared.npz", **arrays(train=9))
        return root / "prepared.npz"

    data = make_data(path=None, prepare=prepare)
    data.load()
    assert len(data.train_index) == 9


def test_the_path_of_the_prepared_file_may_be_a_text(make_data: Make, tmp_path: Path) -> None:
    save_arrays(tmp_path / "prepared.npz", **arrays(train=9))
    data = make_data(path=None, prepare=lambda root: str(root / "prepared.npz"))
    data.load()
    assert len(data.train_index) == 9


@pytest.mark.parametrize(("returned", "kind"), [(None, "None"), ({"a": 1}, "a dict"), (3, "a int")])
def test_what_is_prepared_must_be_a_path(make_data: Make, returned: Any, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        make_data(path=None, prepare=lambda root: returned).load()
    assert str(caught.value) == (f"data.prepare of data=small returned {kind}: return the path of the array file.")


def unprepared(error: Exception) -> Callable[[Path], Path]:
    """A function that fails to prepare a file."""

    def prepare(root: Path) -> Path:
        raise error

    return prepare


def test_a_file_that_cannot_be_prepared_is_reported_with_file_and_line(make_data: Make) -> None:
    for error, reason in (
        (ValueError("no such size"), "ValueError: no such size"),
        (FileNotFoundError(2, "No such file or directory", "faces"), "FileNotFoundError: .*'faces'"),
    ):
        where = r"tests/data/test_array_data\.py, line \d+"
        with pytest.raises(
            UserError, match=rf"^data\.prepare of data=small fails \({reason} in {where}\): correct it, or"
        ):
            make_data(path=None, prepare=unprepared(error)).load()
    with pytest.raises(UserError, match=r"^Download it\.$"):
        make_data(path=None, prepare=unprepared(UserError("Download it."))).load()


def test_augmentation_makes_the_requested_views(make_data: Make) -> None:
    data = make_data()
    data.load()
    data.views_per_image = 2
    batch = batches(data.train_dataloader())[0]
    augmented = data.augment(batch, 7)
    assert data.view_count(epochs=3) == 5 * 5 * 2
    assert len(augmented.images) == len(augmented.view_numbers) == 2
    for view, (images, numbers) in enumerate(zip(augmented.images, augmented.view_numbers, strict=True)):
        assert torch.equal(numbers, draw_views(batch.index, seed=0, epoch=7, padding=2, flip=True, view=view))
        assert torch.equal(images, crop_and_flip(batch.images[0], numbers, padding=2))
    assert not torch.equal(*augmented.view_numbers)


def test_without_an_array_file_the_path_is_asked_for(make_data: Make) -> None:
    with pytest.raises(UserError, match=r"data=small needs data\.path=FILE\.npz \(see docs/data\.md"):
        make_data(path=None, prepare=None).load()


def test_mean_and_std_are_measured_unless_they_are_given(make_data: Make) -> None:
    contents = arrays()["train_images"].reshape(-1, 3) / 255
    data = make_data(mean=None, std=None)
    data.load()
    np.testing.assert_allclose(data.mean, contents.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(data.std, contents.std(axis=0), atol=1e-4)
    half = make_data(mean=None)
    half.load()
    assert half.mean == data.mean
    assert half.std == [0.25, 0.25, 0.25]


def test_a_channel_with_a_single_value_has_no_statistics() -> None:
    images = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8, generator=torch.manual_seed(0))
    images[:, 1] = 7
    with pytest.raises(UserError, match=r"single value: set data\.mean and data\.std"):
        channel_statistics(images)


def test_held_out_images_are_read_by_their_position_among_the_training_images(make_data: Make) -> None:
    data = make_data(val_size=12)
    data.load()
    reader = data.reader("held_out", data.val_index)
    samples = reader[Share(0, [3, 0])]
    rows = data.val_index[[3, 0]]
    assert torch.equal(samples.images[0], data.arrays.train_images[rows])
    assert torch.equal(samples.target, data.arrays.train_labels[rows])
    assert samples.index.tolist() == [3, 0]
    assert samples.view_numbers == ()


def test_the_name_of_the_views_tells_augmentations_apart(make_data: Make) -> None:
    assert len({make_data(padding=padding, flip=flip).views_name for padding in (2, 4) for flip in (True, False)}) == 4


def test_fixed_views_bound_the_number_of_different_views(make_data: Make) -> None:
    one, other = make_data(fixed_views=2, seed=0), make_data(fixed_views=2, seed=1)
    one.load()
    other.load()
    rows = torch.arange(60)
    epochs = [data.draw(rows, epoch, 0) for data in (one, other) for epoch in range(12)]
    assert {len(set(numbers.tolist())) for numbers in torch.stack(epochs).T} <= {1, 2}
    assert one.views_name == make_data().views_name  # the store is shared with runs of other views
    assert len(one.view_records(epochs=50)) <= 2 * 60
