"""The methods that train a stage before the main one (FSP, AB, FT): what each stage trains, how long, and resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from src.methods.ab import AB
from src.methods.combined import Combined
from src.methods.fsp import FSP
from src.methods.ft import FT
from src.methods.method import Batch, Method
from src.models.checkpoints import read_state_dict, save_weights
from src.models.resnet import resnet20
from src.training.fitting import fit
from tests.helpers.commands import run
from tests.helpers.methods import STEPS, TWO_STAGES, configured, made_for_steps, method_of, networks_of, taught_by
from tests.helpers.tiny import kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer

FIRST = {"fsp": {"flow": 1.0}, "ab": {"boundary": 3e-3}, "ft": {"reconstruction": 1.0}}
"""The weights of the first stage."""
LEARNING_RATES = {"fsp": 1.0, "ab": 1.0, "ft": 0.2}
"""The learning rate of the first stage, relative to the main one's."""
MAIN: dict[str, type[Method]] = {"fsp": FSP, "ab": AB, "ft": FT}

two_stages = pytest.mark.parametrize("method", sorted({method_of(case) for case in TWO_STAGES}))


def test_the_tables_of_this_file_have_every_method_with_two_stages():
    methods = {method_of(case) for case in TWO_STAGES}
    for table in (FIRST, LEARNING_RATES, MAIN):
        assert set(table) == methods, "enter the method in tests/methods/test_every_two_stage_method.py"


@two_stages
def test_the_first_stage_lasts_an_eighth_of_the_main_one_and_at_least_an_epoch(method: str):
    for epochs, wanted in ((240, 30), (16, 2), (2, 1)):
        made = configured(method, epochs=epochs)
        made.allocate(networks_of(resnet20))
        (stage,) = made.stages()
        assert stage.epochs == wanted
        assert stage.method.weights(0) == FIRST[method]


@pytest.mark.parametrize("case", TWO_STAGES)
def test_each_stage_trains_its_own_part_and_the_main_one_continues_from_the_first(case: str, tmp_path: Path):
    data, made = tiny_data(tmp_path), made_for_steps(case, cross_entropy_weight=1.0)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    (stage,), steps = made.stages(), STEPS[case]
    parameters = [*distiller.student.named_parameters(prefix="student"), *made.named_parameters()]
    for part, wanted in ((distiller.for_stage(stage), steps.first[0]), (distiller, steps.trains)):
        before = {name: p.detach().clone() for name, p in parameters}
        trainer = tiny_trainer(1, max_steps=2, limit_val_batches=0)
        trainer.fit(part, datamodule=data)
        changed = {name for name, p in parameters if not torch.equal(before[name], p)}
        assert {name.split(".")[0] for name in changed} == wanted
        assert ("student.fc.weight" in changed) == (part is distiller)
        scale = 1.0 if part is distiller else LEARNING_RATES[method_of(case)]
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * scale)
    assert {name.split(".")[0] for name, _ in parameters} == steps.first[0] | steps.trains


@pytest.mark.parametrize("method", ["ab", "fsp"])
@pytest.mark.parametrize("also", [False, True])
def test_a_main_stage_that_does_not_read_its_teacher_does_not_ask_it(method: str, also: bool, tmp_path: Path):
    made: Method = configured(method)
    if also:
        made = Combined(made, kd())
    data, teacher = tiny_data(tmp_path), tiny_teacher(resnet20)
    distiller = tiny_distiller(data, made, teacher=teacher)
    with patch.object(teacher, "view_logits", wraps=teacher.view_logits) as asked:
        tiny_trainer(1, max_steps=1, limit_val_batches=0).fit(distiller, datamodule=data)
    assert asked.called == also


@two_stages
def test_a_stage_has_its_own_learning_rate(method: str, tmp_path: Path):
    made, data = configured(method), tiny_data(tmp_path)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    trainer = {"strategy": "auto", "max_epochs": 9}
    cfg = OmegaConf.create(
        {"trainer": trainer, "averaging": None, "gradients": {"every": 0}, "logger": None, "keep_best": False}
    )
    rates: list[tuple[bool, float]] = []

    def note(_: Any, part: Any, *__: Any, **___: Any) -> None:
        rates.append((part.method is made, part.recipe.learning_rate))

    with patch("src.training.fitting._fit_stage", note):
        fit(cfg, distiller, data, tmp_path)
    assert rates == [(False, pytest.approx(0.05 * LEARNING_RATES[method])), (True, 0.05)]


class Killed(BaseException):
    """Ends a run as a signal would."""


def failing(terms: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """Fail in the second epoch."""

    def second_epoch(self: Any, batch: Batch) -> Any:
        if batch.epoch == 1:
            raise Killed
        return terms(self, batch)

    return second_epoch


@pytest.mark.slow
@two_stages
def test_a_run_continues_where_it_was_killed_in_either_stage(method: str, tmp_path: Path, array_file: Path):
    teacher = tmp_path / "teacher.pth"
    torch.manual_seed(1)
    save_weights(resnet20(10), teacher)

    def train(folder: str) -> str:
        return run(
            "train", "data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", f"method={method}",
            "trainer=debug", "start_over=false", "trainer.max_epochs=2", "schedule=quick", "schedule.epochs=2",
            "method.initial_epochs=2", "schedule.batch_size=8", "logger=none", f"teacher.path={teacher}",
            f"runs={tmp_path / folder}",
        ).err  # fmt: skip

    def student(folder: str) -> dict[str, Tensor]:
        (file,) = (tmp_path / folder).glob("*/*/*/*/student.pth")
        return dict(read_state_dict(file))

    assert train("whole") == ""
    made = configured(method)
    made.allocate(networks_of(resnet20))
    for part in (type(made.stages()[0].method), MAIN[method]):
        with patch.object(part, "terms", failing(part.terms)):
            assert "Killed" in train("killed")
        assert list((tmp_path / "killed").glob("*/*/*/*/stages/*/checkpoints/last.ckpt"))
    assert train("killed") == ""
    assert same(student("whole"), student("killed"))
