"""DOT follows its equations, which are written out by hand here, and with delta = 0 it is torch's SGD."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.methods.fitnet import FitNet
from src.methods.kd import KD
from src.methods.method import Batch, DistillationLogits, Method
from src.methods.vanilla import Vanilla
from src.training.dot import DOT
from src.training.serialization import Serial
from tests.helpers.commands import run
from tests.helpers.configure import configure
from tests.helpers.tiny import kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

RATE, MOMENTUM, DELTA, DECAY = 0.1, 0.9, 0.075, 0.01


def no_reduction(gradients: list[Tensor]) -> list[Tensor]:
    return gradients


def test_updates_match_the_equations() -> None:
    """Three steps of two scalars: w has gradients of both losses, a only of distillation."""
    both, adapter = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1.0, 2.0))
    optimizer = DOT([both, adapter], RATE, momentum=MOMENTUM, delta=DELTA, weight_decay=DECAY)
    w, a, v_task, v_kd, v = 1.0, 2.0, 0.0, 0.0, 0.0
    for _ in range(3):
        task, distillation = both.square(), (both * adapter - 3).square()
        optimizer.zero_grad()
        optimizer.keep_task_gradients({"cross_entropy": task, "kd": distillation}, no_reduction)
        (task + distillation).backward()
        optimizer.step()
        g_task, g_kd, g_adapter = 2 * w, 2 * (w * a - 3) * a, 2 * (w * a - 3) * w
        v_task = (MOMENTUM - DELTA) * v_task + g_task + DECAY * w
        v_kd = (MOMENTUM + DELTA) * v_kd + g_kd
        v = MOMENTUM * v + g_adapter + DECAY * a
        w, a = w - RATE * (v_task + v_kd), a - RATE * v
        assert both.item() == pytest.approx(w, rel=1e-12)
        assert adapter.item() == pytest.approx(a, rel=1e-12)


def trained(tmp_path: Path, method: Method, optimizer, *, steps: int = -1, **options) -> dict[str, Tensor]:
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, method, teacher=tiny_teacher(), optimizer=optimizer, **options)
    tiny_trainer(2, max_steps=steps, limit_val_batches=0).fit(distiller, datamodule=data)
    return weights(distiller)


def without_delta(*args, **options) -> DOT:
    return DOT(*args, delta=0.0, **options)


@pytest.mark.parametrize(
    "new_method", [kd, lambda: FitNet(cross_entropy_weight=1.0, hint_weight=10.0, hint_layer=1)], ids=["kd", "fitnet"]
)
def test_without_delta_it_is_sgd(new_method: Callable[[], Method], tmp_path: Path) -> None:
    sgd, dot = (
        trained(
            tmp_path, new_method(), optimizer, steps=3,  # more steps would multiply the rounding
            serialization=Serial(0.1) if new_method is kd else None,
        )
        for optimizer in (torch.optim.SGD, without_delta)
    )  # fmt: skip
    for name, value in sgd.items():
        torch.testing.assert_close(dot[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_delta_has_an_effect_only_with_distillation(tmp_path: Path) -> None:
    assert not same(trained(tmp_path, kd(), DOT), trained(tmp_path, kd(), without_delta))
    assert same(trained(tmp_path, Vanilla(), DOT), trained(tmp_path, Vanilla(), without_delta))


class WithoutCrossEntropy(KD):
    """A method whose loss is distillation alone."""

    def weights(self, epoch: int) -> dict[str, float]:
        return {"kd": 1.0}

    def all_terms(self, batch: Batch, logits: DistillationLogits) -> Mapping[str, Tensor]:
        return self.distillation(logits, batch)


def test_a_method_without_cross_entropy_is_refused(tmp_path: Path) -> None:
    method = WithoutCrossEntropy(cross_entropy_weight=0.0, kd_weight=0.9, temperature=4.0)
    with pytest.raises(
        UserError, match=r"optimizer=dot needs the term cross_entropy, but .* has only kd: .* optimizer=null\."
    ):
        trained(tmp_path, method, DOT)


@pytest.mark.parametrize("option", ["gradient_clip_val=1.0", "accumulate_grad_batches=2"])
def test_options_that_change_one_gradient_alone_are_refused(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(UserError, match=rf"^optimizer=dot does not support trainer\.{name}: leave it out\."):
        DOT.check_trainer(configure("optimizer=dot", f"+trainer.{option}").trainer)
    DOT.check_trainer(configure("+trainer.gradient_clip_val=0", "+trainer.accumulate_grad_batches=1").trainer)


def test_a_missing_teacher_is_trained_without_dot(tmp_path: Path, array_file: Path) -> None:
    small = ("data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug", "logger=none")
    places = (f"runs={tmp_path / 'runs'}", f"teacher.store={tmp_path / 'teachers'}", "schedule.batch_size=8")
    ran = run("train", *small, *places, "method=kd", "optimizer=dot")
    assert (ran.code, ran.err) == (0, ""), ran.err
    assert [file.parts[-3] for file in (tmp_path / "runs").glob("*/resnet20/*/*/result.json")] == ["vanilla"]


@pytest.mark.parametrize("options", [{"delta": 0.2}, {"delta": -0.1}, {"momentum": 0.05}])
def test_momenta_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        DOT([nn.Parameter(torch.zeros(1))], RATE, **options)


def test_momenta_survive_a_checkpoint(tmp_path: Path) -> None:
    """One epoch, a checkpoint and another epoch give the same bits as two epochs."""
    data, file = tiny_data(tmp_path), tmp_path / "half.ckpt"
    for resumed in (None, file):
        distiller = tiny_distiller(data, kd(), teacher=tiny_teacher(), optimizer=DOT)
        trainer = tiny_trainer(2 if resumed else 1, limit_val_batches=0)
        trainer.fit(distiller, datamodule=data, ckpt_path=resumed)
        trainer.save_checkpoint(file)
    assert same(weights(distiller), trained(tmp_path, kd(), DOT))
