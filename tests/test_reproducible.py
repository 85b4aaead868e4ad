"""The same seed gives the same bits: again, with other data workers, after an interruption."""

import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from src.methods.aekt import AEKT
from src.methods.kd import KD
from src.methods.vanilla import Vanilla
from src.run import History, read_history
from src.serialization import Parallel, Serial
from tests.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def aekt():
    return AEKT(
        cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=2, gamma=0.4, weighting="ratio",
        max_weight=10.0, confidence_term=True,
    )  # fmt: skip


def train(folder, epochs, *, resume=None, seed=0, workers=0, method=None, stop_after=None):
    data = tiny_data(folder.parent, seed=seed, workers=workers)
    distiller = tiny_distiller(data, method or aekt(), teacher=tiny_teacher(), serialization=Serial(0.1), seed=seed)
    checkpoint = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    folder.mkdir(exist_ok=True)
    history = History(folder)
    trainer = tiny_trainer(epochs, enable_checkpointing=True, callbacks=[history, checkpoint])
    trainer.fit(distiller, datamodule=data, ckpt_path=resume)
    return weights(distiller), read_history(folder)


def without_clock(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_two_runs_of_one_seed_are_the_same_to_the_last_bit(tmp_path):
    one, rows = train(tmp_path / "one", 2)
    other, other_rows = train(tmp_path / "other", 2)
    assert same(one, other)
    assert without_clock(rows) == without_clock(other_rows)


def test_each_row_has_the_learning_rate_that_its_epoch_was_trained_with(tmp_path):
    rows = train(tmp_path / "one", 3)[1]  # a milestone after the second epoch
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05, 0.05, 0.005])


def test_another_seed_is_another_run(tmp_path):
    assert not same(train(tmp_path / "one", 1)[0], train(tmp_path / "other", 1, seed=1)[0])


def test_data_workers_change_nothing(tmp_path):
    assert same(train(tmp_path / "one", 2)[0], train(tmp_path / "other", 2, workers=2)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_as_the_one_that_was_never_stopped(tmp_path, workers):
    whole, rows = train(tmp_path / "whole", 4)
    train(tmp_path / "first", 2)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    resumed, resumed_rows = train(
        tmp_path / "second", 4, resume=tmp_path / "second" / "checkpoints" / "last.ckpt", workers=workers
    )
    assert same(whole, resumed)
    assert without_clock(rows) == without_clock(resumed_rows)


def test_methods_start_from_the_same_student_and_see_the_same_views(tmp_path):
    data = tiny_data(tmp_path)
    students, seen = [], []
    kd = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)
    for method, layer in ((Vanilla(), None), (kd, Parallel(1.0)), (aekt(), Serial(0.1))):
        distiller = tiny_distiller(data, method, teacher=tiny_teacher(), serialization=layer)
        students.append(weights(distiller.student))
        images = []
        distiller.on_train_batch_start = lambda batch, _, images=images: images.append(batch.images[0].clone())
        tiny_trainer(1).fit(distiller, datamodule=data)
        seen.append(torch.cat(images))
    assert same(students[0], students[1])
    assert same(students[0], students[2])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
