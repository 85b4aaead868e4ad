"""Images in the memory of a device: the same batches and views as from the memory of the host, bit for bit."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from src.common.errors import UserError
from src.config.validation import validate
from src.data import array_data
from src.data.array_data import ArrayData
from src.data.augmentation import Augmentation
from src.data.image_data import Samples
from src.data.mixing import CutMix
from src.data.policies import TrivialAugment
from tests.helpers.batches import as_rank, batches, fit
from tests.helpers.configure import configure
from tests.helpers.tiny import tiny_data

Make = Callable[..., ArrayData]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def loaded(make_data: Make, device_memory: Any, rank: int = 0, world_size: int = 1, **options: Any) -> ArrayData:
    """Load data that a trainer on a CPU reads."""
    data = make_data(device_memory=device_memory, val_size=12, **options)
    data.load()
    trainer: Any = as_rank(data, rank, world_size).trainer
    trainer.strategy.root_device = CPU
    return data


def assert_same(one: list[Samples], other: list[Samples]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for left, right in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
            if left is right is None:
                continue
            assert (left.dtype, left.stride()) == (right.dtype, right.stride())
            assert torch.equal(left, right)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(mixing=CutMix())], ids=["standard", "cutmix"])
def test_batches_and_views_are_those_of_the_hosts_memory(
    make_data: Make, rank: int, world_size: int, augmentation: Augmentation
) -> None:
    options = {"seed": 5, "augmentation": augmentation}
    host, device = (loaded(make_data, memory, rank, world_size, **options) for memory in (False, True))
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for epoch in (0, 3):
            one, other = (batches(getattr(data, loader)(), epoch) for data in (host, device))
            assert_same(one, other)
            if loader == "train_dataloader":
                views = [
                    [data.augment(batch, epoch) for batch in seen] for data, seen in ((host, one), (device, other))
                ]
                assert_same(*views)


def test_a_run_is_the_same_and_resumes_within_the_memory_of_a_device(tmp_path: Path) -> None:
    seen = []
    for memory in (False, True):
        data = tiny_data(tmp_path)
        data.device_memory = memory
        folder = tmp_path / str(memory)
        first, second = fit(data, folder, 1), fit(data, folder, 2)
        seen.append([*first.trained, *second.trained])
    for one, other in itertools.zip_longest(*seen):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])


def test_the_images_are_copied_once(make_data: Make) -> None:
    data = loaded(make_data, True)
    readers: list[Any] = [data.device_reader(split, None, CPU) for split in ("train", "held_out", "train")]
    assert readers[0].images is readers[1].images is readers[2].images
    assert data.train_dataloader().num_workers == 0
    assert not data.train_dataloader().pin_memory


@pytest.mark.parametrize(
    ("memory", "device", "free", "lies"),
    [
        ("auto", CPU, 10**9, False),
        ("auto", CUDA, 10**9, True),
        ("auto", CUDA, 10_000, False),
        (True, CPU, 0, True),
        (True, CUDA, 0, True),
        (False, CUDA, 10**9, False),
    ],
)
def test_auto_takes_a_gpu_with_room(
    make_data: Make, monkeypatch: pytest.MonkeyPatch, memory: Any, device: torch.device, free: int, lies: bool
) -> None:
    """72 images of 3 x 8 x 6 bytes with labels take 10,944 bytes, which fit into 21,888 free ones."""
    monkeypatch.setattr(array_data, "fits_in_memory", lambda size, device: device == CUDA and 2 * size <= free)
    assert make_loaded(make_data, memory).lies_on(device) is lies


def make_loaded(make_data: Make, memory: Any) -> ArrayData:
    data = make_data(device_memory=memory)
    data.load()
    return data


def test_without_a_trainer_the_images_stay_with_the_host(make_data: Make) -> None:
    data = make_loaded(make_data, True)
    assert data.evaluation_loader("test").batch_sampler.device is None  # type: ignore[union-attr]
    data.trainer = Mock()
    data.trainer.strategy.root_device = CPU
    data.trainer.global_rank, data.trainer.world_size = 0, 1
    assert data.test_dataloader().batch_sampler.device == CPU  # type: ignore[union-attr]
    assert data.evaluation_loader("test").batch_sampler.device is None, "only the trainer reads from the device"  # type: ignore[union-attr]
    assert isinstance(data.test_images([0, 1]), torch.Tensor)


def test_the_records_of_a_run_are_those_that_its_batches_read(make_data: Make) -> None:
    data = loaded(make_data, True, views_per_image=2)
    read = set()
    for epoch in range(3):
        for batch in batches(data.train_dataloader(), epoch):
            augmented = data.augment(batch, epoch)
            for numbers in augmented.view_numbers:
                read |= set((numbers * 60 + batch.index).tolist())
    records = data.view_records(3).tolist()
    assert len(records) == len(set(records))
    assert set(records) == read


def test_other_values_are_refused() -> None:
    cfg = configure("data=cifar100")
    for memory in ("auto", True, False):
        cfg.data.device_memory = memory
        validate(cfg)
    cfg.data.device_memory = "gpu"
    with pytest.raises(UserError, match=r"data.device_memory=gpu does not fit: choose one of auto, true, false"):
        validate(cfg)


def test_a_policy_needs_the_cpu(make_data: Make) -> None:
    data = loaded(make_data, "auto", augmentation=Augmentation(policy=TrivialAugment()))
    data.device_arrays[CPU] = {}  # as if the images were there already
    assert not data.lies_on(CPU)
    message = "data.device_memory=true does not fit this augmentation, because its random operations run on the CPU: "
    with pytest.raises(UserError, match=message):
        loaded(make_data, True, augmentation=Augmentation(policy=TrivialAugment()))
