"""Limits of batches are read as Lightning reads them."""

from pathlib import Path

import pytest
import torch

from src.common.errors import UserError
from src.data.limits import check_limits, final_batches, limited, scored_batches, validated_batches
from src.methods.vanilla import Vanilla
from tests.helpers.batches import as_rank
from tests.helpers.configure import changed, configure
from tests.helpers.tiny import tiny_data, tiny_distiller, tiny_trainer

BATCH = 5
"""Images in a batch of an evaluation. The 17 test images are 4 batches."""


@pytest.mark.parametrize("limit", [0, 1, 3, 9, 0.5, 0.75, 1.0, 2.0, None])
def test_a_limit_is_read_as_lightning_reads_it(tmp_path: Path, limit: float | None) -> None:
    data = tiny_data(tmp_path)
    data.evaluation_batch_size = BATCH
    trainer = tiny_trainer(1, limit_train_batches=1, limit_val_batches=limit)
    trainer.fit(tiny_distiller(data, Vanilla()), datamodule=data)
    assert limited(limit, 4) == sum(trainer.num_val_batches)


@pytest.mark.parametrize(
    ("val", "test", "val_size", "expected"),
    [
        (None, None, 0, {"val": 0, "test": 4}),
        (0, None, 0, {"val": 0, "test": 4}),
        (0.5, 1, 0, {"val": 0, "test": 2}),
        (1, 0.5, 0, {"val": 0, "test": 2}),
        (0.5, None, 8, {"val": 1, "test": 4}),
        (0, 3, 8, {"val": 0, "test": 3}),
    ],
)
def test_the_teacher_answers_what_the_run_scores(
    tmp_path: Path, val: float | None, test: float | None, val_size: int, expected: dict[str, int]
) -> None:
    data = tiny_data(tmp_path)
    data.val_size, data.evaluation_batch_size = val_size, BATCH
    data.load()
    cfg = changed(configure(), trainer__limit_val_batches=val, trainer__limit_test_batches=test)
    assert {split: scored_batches(cfg, data, split) for split in expected} == expected
    assert final_batches(cfg, data) == limited(test, 4)
    assert validated_batches(cfg, data) == limited(val, 2 if val_size else 4)


@pytest.mark.parametrize(
    ("option", "batches"), [("limit_train_batches", 6), ("limit_val_batches", 4), ("limit_test_batches", 4)]
)
def test_a_fraction_of_less_than_one_batch_is_refused(tmp_path: Path, option: str, batches: int) -> None:
    data = tiny_data(tmp_path)
    data.evaluation_batch_size = BATCH
    check_limits(configure(), data)
    check_limits(changed(configure(), **{f"trainer__{option}": 0.5}), data)
    with pytest.raises(
        UserError, match=rf"^trainer\.{option}=0\.1 is less than one batch, because there are only {batches}"
    ):
        check_limits(changed(configure(), **{f"trainer__{option}": 0.1}), data)


def test_a_merged_rest_is_no_batch_of_its_own(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    data.batch_size = len(data.train_index) // 2
    data.train_index = data.train_index[: 2 * data.batch_size]
    data.batch_size -= 1
    assert len(data.train_dataloader()) == 3
    data.train_index = data.train_index[:-1]
    assert len(data.train_dataloader()) == 2
    with pytest.raises(UserError, match=r"limit_train_batches=0\.4 is less than one batch, because there are only 2"):
        check_limits(changed(configure(), trainer__limit_train_batches=0.4), data)


@pytest.mark.parametrize(("images", "devices", "batches"), [(65, 1, 1), (65, 2, 1), (66, 1, 2), (66, 2, 1), (67, 2, 1)])
def test_the_batches_of_several_devices_are_counted(tmp_path: Path, images: int, devices: int, batches: int) -> None:
    """Images beyond a multiple of the devices are dropped, and one image per device joins the batch before."""
    data = tiny_data(tmp_path, batch_size=64)
    data.train_index = torch.arange(images)
    assert len(as_rank(data, 0, devices).train_dataloader()) == batches
    cfg = changed(configure(), trainer__limit_train_batches=0.5)
    if batches > 1:
        check_limits(cfg, data, devices)
    else:
        with pytest.raises(UserError, match=r"limit_train_batches=0\.5 is less than one batch, .* only 1:"):
            check_limits(cfg, data, devices)
