"""Views have the same bits on the GPU as on the CPU, and a second run finds all of its answers in the view store."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from src.data.views import crop_and_flip, draw_views, epoch_order, view_count
from src.runs.history import read_history
from src.teachers.view_store import ViewStore
from tests.helpers.batches import Recorder
from tests.helpers.commands import run
from tests.helpers.gpu import ACCELERATOR, DEVICE, SMALL
from tests.helpers.interruption import write_sources
from tests.helpers.tiny import tiny_data, tiny_trainer

pytestmark = pytest.mark.gpu
IMAGES, PADDING = 500, 4
IMAGES_TRAINED = 3 * 44
"""Of the three epochs of a run on the tiny data."""


@pytest.mark.parametrize("epoch", [0, 239])
def test_order_and_views_have_the_same_bits_as_on_the_cpu(epoch: int) -> None:
    order = epoch_order(3, epoch, IMAGES, device=DEVICE)
    assert order.device == DEVICE
    assert torch.equal(order.cpu(), epoch_order(3, epoch, IMAGES))
    blocks = torch.arange(IMAGES) // 7
    assert torch.equal(
        epoch_order(3, epoch, IMAGES, blocks.to(DEVICE), DEVICE).cpu(), epoch_order(3, epoch, IMAGES, blocks)
    )
    images = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    index, everything = torch.arange(IMAGES), torch.arange(IMAGES) % view_count(PADDING, flip=True)
    drawn = [draw_views(x, seed=3, epoch=epoch, padding=PADDING, flip=True, view=1) for x in (index.to(DEVICE), index)]
    assert torch.equal(drawn[0].cpu(), drawn[1])
    for numbers in (drawn[1], everything):
        views = crop_and_flip(images.to(DEVICE), numbers.to(DEVICE), PADDING)
        assert torch.equal(views.cpu(), crop_and_flip(images, numbers, PADDING))


def batches_of(folder: Path, accelerator: str, device_memory: bool) -> Recorder:
    """Record the batches of two epochs as a module gets them."""
    data = tiny_data(folder)
    data.device_memory = device_memory
    recorder = Recorder(data)
    tiny_trainer(2, accelerator=accelerator).fit(recorder, datamodule=data)
    return recorder


@pytest.mark.parametrize("device_memory", [True, False])
def test_every_batch_has_the_same_bits_as_on_the_cpu(tmp_path: Path, device_memory: bool) -> None:
    found, expected = batches_of(tmp_path, ACCELERATOR, device_memory), batches_of(tmp_path, "cpu", False)
    assert len(found.trained) == len(expected.trained) == 12
    for (epoch, index, images), (other_epoch, other_index, other_images) in zip(
        found.trained, expected.trained, strict=True
    ):
        assert (images.device, epoch) == (DEVICE, other_epoch)
        assert torch.equal(index.cpu(), other_index)
        assert torch.equal(images.cpu(), other_images)
    for images, other_images in zip(found.validated, expected.validated, strict=True):
        assert torch.equal(images.cpu(), other_images)


@pytest.fixture
def written() -> Iterator[list[int]]:
    """Count the answers of each batch that is written to a view store."""
    counts: list[int] = []
    original = ViewStore.write

    def write(self: ViewStore, index: Tensor, *arguments: Tensor) -> None:
        counts.append(len(index))
        original(self, index, *arguments)

    with patch.object(ViewStore, "write", write):
        yield counts


@pytest.mark.parametrize("device_memory", ["true", "false"])
def test_a_second_run_reads_all_answers_from_the_view_store(
    tmp_path: Path, device_memory: str, written: list[int]
) -> None:
    common = (*SMALL, *write_sources(tmp_path), f"data.device_memory={device_memory}", "checkpoint_minutes=10")
    losses, counts = {}, {}
    for name, store in (("computed", "false"), ("first", "true"), ("second", "true")):
        written.clear()
        # The second run trains another method on the same views.
        method = "method=dkd" if name == "second" else "method=kd"
        runs = tmp_path / ("stored" if store == "true" else "computed")
        ran = run("train", *common, f"teacher.view_store={store}", method, f"runs={runs}")
        assert ran.code == 0, ran.err
        (file,) = runs.rglob(f"{method.removeprefix('method=')}/*/metrics.csv")
        losses[name], counts[name] = read_history(file.parent), sum(written)
    assert counts["first"] > IMAGES_TRAINED / 2  # some views are drawn again
    assert counts["computed"] == counts["second"] == 0
    for one, other in zip(losses["first"], losses["computed"], strict=True):
        assert one["train/kd"] == pytest.approx(other["train/kd"], rel=1e-3)
