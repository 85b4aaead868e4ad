"""The array file: its format, its digest, and files that are damaged, hostile or do not follow the format."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.common import files
from src.common.errors import UserError
from src.data.array_file import load_arrays, save_arrays
from tests.helpers.arrays import arrays

WITH_SUPERCLASSES = {
    **arrays(),
    "train_superclass_labels": np.array([1, 0, 1], dtype=np.uint8)[arrays()["train_labels"]],
    "superclass_names": np.array(["odd", "even"]),
}


def test_saved_arrays_are_loaded(tmp_path: Path) -> None:
    saved = WITH_SUPERCLASSES
    save_arrays(tmp_path / "new folder" / "a.npz", **saved)
    loaded = load_arrays(tmp_path / "new folder" / "a.npz")
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(loaded.train_images.permute(0, 2, 3, 1).numpy(), saved["train_images"])
    np.testing.assert_array_equal(loaded.test_images.permute(0, 2, 3, 1).numpy(), saved["test_images"])
    np.testing.assert_array_equal(loaded.train_labels.numpy(), saved["train_labels"])
    np.testing.assert_array_equal(loaded.test_labels.numpy(), saved["test_labels"])
    assert loaded.class_names == ("class 0", "class 1", "class 2")
    assert loaded.superclass_names == ("odd", "even")
    assert loaded.superclass_of == (1, 0, 1)


def test_class_names_default_to_numbers(tmp_path: Path) -> None:
    contents = arrays()
    del contents["class_names"]
    save_arrays(tmp_path / "a.npz", **contents)
    loaded = load_arrays(tmp_path / "a.npz")
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.superclass_names is None
    assert loaded.superclass_of is None


def test_the_digest_depends_on_the_content_only(tmp_path: Path) -> None:
    contents = arrays()
    save_arrays(tmp_path / "a.npz", **contents)
    np.savez_compressed(tmp_path / "b.npz", allow_pickle=False, **dict(reversed(contents.items())))
    contents["train_images"] = contents["train_images"].copy()
    contents["train_images"][3, 0, 0, 0] ^= 1
    save_arrays(tmp_path / "c.npz", **contents)
    a, b, c = (load_arrays(tmp_path / f"{name}.npz").digest for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": None}, "train_images"),
        ({"test_labels": None}, "test_labels"),
        ({"train_images": np.zeros((60, 8, 6, 3), np.float32)}, "uint8"),
        ({"train_images": np.zeros((60, 8), np.uint8)}, r"\[60, 8\]"),
        ({"val_images": np.zeros((5, 8, 6, 3), np.uint8)}, "has no array val_labels"),
        ({"val_labels": np.zeros(5, np.uint8)}, "has no array val_images"),
        ({"val_images": np.zeros((5, 9, 6, 3), np.uint8), "val_labels": np.zeros(5, int)}, r"val_images \[9, 6\]"),
        ({"val_images": np.zeros((5, 8, 6, 3), np.uint8), "val_labels": np.full(5, 3)}, "val_labels range from 3"),
        ({"test_images": np.zeros((23, 8, 6, 4), np.uint8)}, r"\[23, 8, 6, 4\]"),
        ({"test_images": np.zeros((23, 8, 7, 3), np.uint8)}, "size"),
        ({"train_labels": np.zeros(59, np.int64)}, "60 train_images and 59 train_labels"),
        ({"train_images": np.zeros((0, 8, 6, 3), np.uint8), "train_labels": np.zeros(0, int)}, "0 train_images"),
        ({"train_labels": np.arange(60) % 3 - 1}, "-1"),
        ({"test_labels": np.arange(23) % 4}, "range from 0 to 3, but the 3 classes"),
        ({"train_labels": np.arange(60) % 3 / 1.0}, "one class per image"),
        ({"train_labels": np.eye(3, dtype=int)[np.arange(60) % 3]}, "one class per image"),
        ({"test_labels": np.full((23, 3), 1 / 3)}, "one class per image"),
        ({"class_names": np.array(["alone"])}, "at least 2"),
        ({"class_names": np.array([0, 1, 2])}, "strings"),
        ({"class_names": None, "train_labels": np.full(60, 10**6)}, "range from 1000000"),
        ({"train_labels": np.ones(60, int)}, "all train_labels are 1: add training images of another class"),
        (
            {"class_names": None, "train_labels": np.zeros(60, int), "test_labels": np.zeros(23, int)},
            "all train_labels are 0: add training images of another class",
        ),
        ({"train_superclass_labels": np.zeros(60, int), "superclass_names": np.array([1.5])}, "superclass"),
        ({"train_superclass_labels": np.zeros(59, int), "superclass_names": np.array(["a"])}, "superclass"),
        ({"train_superclass_labels": np.ones(60, int), "superclass_names": np.array(["a"])}, "superclass"),
        ({"train_superclass_labels": np.zeros(60), "superclass_names": np.array(["a"])}, "superclass"),
        ({"train_superclass_labels": np.arange(60) // 30, "superclass_names": np.array(["a", "b"])}, "several"),
    ],
)
def test_arrays_that_do_not_follow_the_format_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    contents = {key: value for key, value in {**arrays(), **change}.items() if value is not None}
    save_arrays(tmp_path / "a.npz", **contents)
    with pytest.raises(UserError, match=message) as caught:
        load_arrays(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load_arrays(tmp_path / "none.npz")
    with pytest.raises(UserError, match="is not a file"):
        load_arrays(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", allow_pickle=True, **{**arrays(), "class_names": np.array(["a", "b", 3], dtype=object)}
    )
    with pytest.raises(UserError, match="pickled"):
        load_arrays(tmp_path / "a.npz")


def test_a_file_that_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"a single NumPy array \(\.npy\): save all arrays in one file"):
        load_arrays(tmp_path / "a.npy")


def test_a_member_that_is_not_an_array_is_refused(tmp_path: Path) -> None:
    save_arrays(tmp_path / "a.npz", **{key: value for key, value in arrays().items() if key != "class_names"})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("class_names", "one two three")
    with pytest.raises(UserError, match="class_names is not a NumPy array"):
        load_arrays(tmp_path / "a.npz")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.none() | st.integers(0, 4000),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    compressed=st.booleans(),
)
def test_damaged_files_are_refused_or_loaded_correctly(
    tmp_path: Path, cut: int | None, flips: list[tuple[int, int]], compressed: bool
) -> None:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(
        buffer, allow_pickle=False, **arrays(train=6, test=3, size=(2, 2))
    )
    content = bytearray(buffer.getvalue()[:cut])
    for position, mask in flips:
        if content:
            content[position % len(content)] ^= mask
    (tmp_path / "a.npz").write_bytes(content)
    try:
        loaded = load_arrays(tmp_path / "a.npz")
    except UserError:
        return
    # some bytes of a zip file have no effect, such as dates and attributes; the loaded content must then be correct
    np.testing.assert_array_equal(loaded.train_labels.numpy(), arrays(train=6)["train_labels"])


def test_an_implausible_size_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_arrays(tmp_path / "a.npz", **arrays())
    monkeypatch.setattr(files, "LARGEST_ARCHIVE", 10_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the archive was read"))
    with pytest.raises(UserError, match="claims"):
        load_arrays(tmp_path / "a.npz")


def test_a_zip_bomb_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("train_images.npy", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(2**20))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the archive was read"))
    with pytest.raises(UserError, match="claims"):
        load_arrays(tmp_path / "a.npz")


def test_highly_compressed_labels_are_not_a_zip_bomb(tmp_path: Path) -> None:
    contents = arrays(train=30_000, size=(2, 2))
    contents["train_labels"] = np.repeat(np.arange(3), 10_000)
    np.savez_compressed(tmp_path / "a.npz", allow_pickle=False, **contents)
    assert max(m.file_size / m.compress_size for m in zipfile.ZipFile(tmp_path / "a.npz").infolist()) > 200
    assert len(load_arrays(tmp_path / "a.npz").train_labels) == 30_000


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_arrays(tmp_path / "a.npz", **arrays())
    before = load_arrays(tmp_path / "a.npz").digest

    def fill_disk(file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fill_disk)
    with pytest.raises(UserError, match="No space left"):
        save_arrays(tmp_path / "a.npz", **arrays(train=9))
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert load_arrays(tmp_path / "a.npz").digest == before


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        save_arrays(tmp_path / "file" / "a.npz", **arrays())


# Unambiguous variants are accepted


def test_a_validation_split_is_read(tmp_path: Path) -> None:
    val = arrays(test=7, size=(8, 6))
    saved = {**arrays(), "val_images": val["test_images"], "val_labels": val["test_labels"], "extra": np.zeros(2)}
    save_arrays(tmp_path / "a.npz", **saved)
    loaded = load_arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.images("val").permute(0, 2, 3, 1).numpy(), saved["val_images"])
    np.testing.assert_array_equal(loaded.labels("val").numpy(), saved["val_labels"])
    assert loaded.notes == (f"Arrays of {tmp_path / 'a.npz'} that are left unread: extra.",)
    save_arrays(tmp_path / "b.npz", **WITH_SUPERCLASSES, test_superclass_labels=np.zeros(23, int))
    assert load_arrays(tmp_path / "b.npz").notes == ()


@pytest.mark.parametrize("shape", ["NHW", "NHW1", "N1HW"])
def test_grey_images_become_rgb(tmp_path: Path, shape: str) -> None:
    contents = arrays()
    grey = contents["train_images"][..., 0]
    contents["train_images"] = {"NHW": grey, "NHW1": grey[..., None], "N1HW": grey[:, None]}[shape]
    save_arrays(tmp_path / "a.npz", **contents)
    loaded = load_arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.train_images.numpy(), np.stack([grey] * 3, axis=1))
    assert loaded.notes[-1] == "train_images are grey, and become RGB."


def test_channels_may_come_first(tmp_path: Path) -> None:
    contents = arrays()
    rgb = contents["test_images"]
    save_arrays(tmp_path / "a.npz", **{**contents, "test_images": np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))})
    loaded = load_arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.test_images.permute(0, 2, 3, 1).numpy(), rgb)
    assert loaded.notes == ("test_images have their channels first, and are transposed.",)


def test_labels_of_one_column_are_squeezed(tmp_path: Path) -> None:
    contents = arrays()
    contents |= {"train_superclass_labels": contents["train_labels"] // 2, "superclass_names": np.array(["a", "b"])}
    labels = ("train_labels", "test_labels", "train_superclass_labels")
    save_arrays(tmp_path / "a.npz", **{**contents, **{name: contents[name][:, None] for name in labels}})
    loaded = load_arrays(tmp_path / "a.npz")
    assert loaded.superclass_of == (0, 0, 1)
    assert "train_superclass_labels have the shape [N, 1], and are read as [N]." in loaded.notes
    np.testing.assert_array_equal(loaded.train_labels.numpy(), contents["train_labels"])
    np.testing.assert_array_equal(loaded.test_labels.numpy(), contents["test_labels"])
    assert "train_labels have the shape [N, 1], and are read as [N]." in loaded.notes


@pytest.mark.parametrize("names", [("cat", "dog", "elk"), None])
def test_labels_from_1_are_shifted(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    contents = arrays()
    del contents["class_names"]
    usual = {**contents, **({"class_names": np.array(names)} if names else {})}
    from_1 = {name: usual[name] + 1 for name in ("train_labels", "test_labels")}
    save_arrays(tmp_path / "a.npz", **{**usual, **from_1})
    loaded = load_arrays(tmp_path / "a.npz")
    assert loaded.train_labels.tolist() == contents["train_labels"].tolist()
    assert loaded.test_labels.tolist() == contents["test_labels"].tolist()
    assert loaded.class_names == (names or ("1", "2", "3"))
    assert loaded.notes == (f"The labels of {tmp_path / 'a.npz'} run from 1 to 3, and are shifted to 0 to 2.",)


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ([1, 2, 3], ["background", "cat", "dog", "elk"]),  # class 0 has a name
        ([1, 3], None),  # class 2 is missing, so that class 0 may be too
        ([0, 1, 2, 3], None),
    ],
)
def test_labels_are_not_shifted_if_class_0_could_exist(
    tmp_path: Path, train: list[int], names: list[str] | None
) -> None:
    labels = {"train_labels": np.resize(train, 60), "test_labels": np.resize(train, 23)}
    contents = {**arrays(), **labels, **({"class_names": np.array(names)} if names else {})}
    if names is None:
        del contents["class_names"]
    save_arrays(tmp_path / "a.npz", **contents)
    loaded = load_arrays(tmp_path / "a.npz")
    assert loaded.train_labels.tolist() == labels["train_labels"].tolist()
    assert loaded.class_names == tuple(names or map(str, range(max(train) + 1)))
    assert not any("are shifted" in note for note in loaded.notes)


def test_classes_without_a_training_image_are_named(tmp_path: Path) -> None:
    contents = arrays()
    del contents["class_names"]
    labels = {name: 5 * contents[name] for name in ("train_labels", "test_labels")}
    save_arrays(tmp_path / "a.npz", **{**contents, **labels})
    loaded = load_arrays(tmp_path / "a.npz")
    assert len(loaded.class_names) == 11
    assert loaded.notes == (f"Classes of {tmp_path / 'a.npz'} without a training image: 8 (1, 2, 3 and 5 more).",)
