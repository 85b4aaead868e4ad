"""Conversion of the CIFAR archives."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets import utils

from src.common.errors import UserError
from src.data.array_file import load_arrays
from src.data.cifar import SUPERCLASS_OF, SUPERCLASSES, cifar10, cifar100


def no_network(*_: Any, **__: Any) -> None:
    raise OSError("Network is unreachable")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils.urllib.request, "urlopen", no_network)


def unpack_miniature(root: Path, monkeypatch: pytest.MonkeyPatch, source: Any, classes: int) -> dict[str, np.ndarray]:
    """Write an unpacked archive in torchvision's layout, with two training images and one test image per class."""
    folder = root / source.base_folder
    folder.mkdir()
    label_key, names_key = ("fine_labels", "fine_label_names") if classes == 100 else ("labels", "label_names")

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    rng = np.random.default_rng(0)
    written: dict[str, np.ndarray] = {}
    for split, count in (("train", 2 * classes), ("test", classes)):
        planes = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = rng.permutation(np.arange(count) % classes)
        files = [write(split, {"data": planes.reshape(count, -1), label_key: labels.tolist()})]
        monkeypatch.setattr(source, f"{split}_list", files)
        written |= {f"{split}_planes": planes, f"{split}_labels": labels}
    name, md5 = write("names", {names_key: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(source, "meta", {"filename": name, "key": names_key, "md5": md5})
    return written


@pytest.mark.parametrize(
    ("prepare", "source", "classes"), [(cifar10, datasets.CIFAR10, 10), (cifar100, datasets.CIFAR100, 100)]
)
def test_the_archive_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Any, source: Any, classes: int
) -> None:
    written = unpack_miniature(tmp_path, monkeypatch, source, classes)
    file = prepare(tmp_path)
    assert file == tmp_path / f"cifar{classes}.npz"
    loaded = load_arrays(file)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(loaded, f"{split}_images").numpy(), written[f"{split}_planes"])
        np.testing.assert_array_equal(getattr(loaded, f"{split}_labels").numpy(), written[f"{split}_labels"])
    assert loaded.class_names == tuple(f"class {i}" for i in range(classes))
    if classes == 100:
        assert loaded.superclass_names == SUPERCLASSES
        assert loaded.superclass_of == tuple(SUPERCLASS_OF)
    else:
        assert loaded.superclass_of is None

    monkeypatch.setattr(datasets, source.__name__, no_network)
    assert prepare(tmp_path) == file


def test_an_archive_with_a_wrong_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack_miniature(tmp_path, monkeypatch, datasets.CIFAR10, 10)
    with (tmp_path / "cifar-10-batches-py" / "train").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="CIFAR10"):
        cifar10(tmp_path)
    assert not (tmp_path / "cifar10.npz").exists()


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        cifar100(tmp_path)
    for part in (str(tmp_path / "cifar100.npz"), "Network is unreachable", "data.path", "data.root"):
        assert part in str(caught.value)


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.root"):
        cifar100(tmp_path / "file")


def test_every_superclass_has_five_classes() -> None:
    np.testing.assert_array_equal(np.bincount(SUPERCLASS_OF), np.full(len(SUPERCLASSES), 5))


def test_the_real_cifar100_is_complete(real_data: Path) -> None:
    loaded = load_arrays(cifar100(real_data))
    assert loaded.train_images.shape == (50_000, 3, 32, 32)
    assert loaded.test_images.shape == (10_000, 3, 32, 32)
    assert (loaded.train_labels.bincount() == 500).all()
    assert (loaded.test_labels.bincount() == 100).all()
    means = torch.stack([loaded.train_images[:, channel].double().mean() / 255 for channel in range(3)])
    torch.testing.assert_close(means, torch.tensor([0.5071, 0.4865, 0.4409]).double(), atol=1e-4, rtol=0)
    assert loaded.superclass_of == tuple(SUPERCLASS_OF)
    assert loaded.superclass_names == SUPERCLASSES
