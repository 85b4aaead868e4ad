"""The same seed gives the same bits: in a second run, with other data workers, and after an interruption."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from src.data.image_data import Samples
from src.methods.aekt import AEKT
from src.methods.method import Method
from src.methods.vanilla import Vanilla
from src.runs.history import History, read_history
from src.training.serialization import Parallel, Serial, Serialization
from src.training.term_log import TermLog
from tests.helpers.tiny import kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights, without_clock


def aekt() -> AEKT:
    return AEKT(
        cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=2, gamma=0.4, weighting="ratio",
        max_weight=10.0, weight_temperature=4.0, confidence_term=True,
    )  # fmt: skip


def train(
    folder: Path, epochs: int, *, resume: Path | None = None, seed: int = 0, workers: int = 0
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train by AEKT. Returns the weights and the history."""
    data = tiny_data(folder.parent, seed=seed, workers=workers)
    distiller = tiny_distiller(data, aekt(), teacher=tiny_teacher(), serialization=Serial(0.1), seed=seed)
    checkpoint = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    folder.mkdir(exist_ok=True)
    history = History(folder)
    trainer = tiny_trainer(epochs, enable_checkpointing=True, callbacks=[TermLog(), history, checkpoint])
    trainer.fit(distiller, datamodule=data, ckpt_path=resume)
    return weights(distiller), read_history(folder)


def test_two_runs_of_one_seed_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    one, rows = train(tmp_path / "one", 2)
    other, other_rows = train(tmp_path / "other", 2)
    assert same(one, other)
    assert without_clock(rows) == without_clock(other_rows)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    assert not same(train(tmp_path / "one", 1)[0], train(tmp_path / "other", 1, seed=1)[0])


def test_data_workers_change_nothing(tmp_path: Path) -> None:
    assert same(train(tmp_path / "one", 2)[0], train(tmp_path / "other", 2, workers=2)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, workers: int) -> None:
    whole, rows = train(tmp_path / "whole", 4)
    train(tmp_path / "first", 2)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    resumed, resumed_rows = train(
        tmp_path / "second", 4, resume=tmp_path / "second" / "checkpoints" / "last.ckpt", workers=workers
    )
    assert same(whole, resumed)
    assert without_clock(rows) == without_clock(resumed_rows)


def test_all_methods_start_from_the_same_student_and_train_on_the_same_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data(tmp_path)
    students, seen = list[dict[str, Tensor]](), list[Tensor]()
    cases: list[tuple[Method, Serialization | None]] = [
        (Vanilla(), None),
        (kd(), Parallel(1.0)),
        (aekt(), Serial(0.1)),
    ]
    for method, layer in cases:
        distiller = tiny_distiller(data, method, teacher=tiny_teacher(), serialization=layer)
        students.append(weights(distiller.student))
        images = list[Tensor]()

        def remember(batch: Samples, _: int, images: list[Tensor] = images) -> None:
            images.append(batch.images[0].clone())

        monkeypatch.setattr(distiller, "on_train_batch_start", remember)
        tiny_trainer(1).fit(distiller, datamodule=data)
        seen.append(torch.cat(images))
    assert same(students[0], students[1])
    assert same(students[0], students[2])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
