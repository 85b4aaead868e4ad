"""Steps of every method with three pairs: what gradients reach, what changes, and what survives an interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.methods import (
    FAMILY,
    STEPS,
    Pair,
    made_for_steps,
    name_of_pair,
    some_samples,
    taught_by,
)
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_trainer, weights

with_each_pair = pytest.mark.parametrize(
    ("case", "pair"),
    [(case, pair) for case, steps in STEPS.items() for pair in steps.pairs],
    ids=[f"{case}-{name_of_pair(pair)}" for case, steps in STEPS.items() for pair in steps.pairs],
)


def distiller_of(case: str, pair: Pair, folder: Path) -> Any:
    """A distiller of a pair. Without a teacher where the method needs none."""
    made, (new_teacher, new_student) = made_for_steps(case), pair
    teacher = taught_by(new_teacher) if made.needs_teacher else None
    return tiny_distiller(tiny_data(folder), made, teacher=teacher, new_student=new_student)


@with_each_pair
def test_gradients_reach_what_each_stage_trains_and_are_finite(case: str, pair: Pair, tmp_path: Path):
    distiller, steps = distiller_of(case, pair, tmp_path), STEPS[case]
    main = distiller.method
    stages = zip((distiller.for_stage(stage) for stage in main.stages()), steps.first, strict=True)
    for part, trains in (*stages, (distiller, steps.trains)):
        main.zero_grad()
        distiller.student.zero_grad()
        terms = part.method.all_terms(*part.observe(some_samples()))
        assert terms.keys() == part.method.weights(0).keys()
        total: Any = sum(part.method.weights(0)[name] * term for name, term in terms.items())
        total.backward()
        parameters = [*distiller.student.named_parameters(prefix="student"), *main.named_parameters()]
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        assert {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().max() > 0} == trains
        reached = {name for name, p in main.named_parameters() if name.split(".")[0] in trains}
        assert reached <= gradients.keys()


@with_each_pair
def test_two_steps_train_the_student_and_what_the_method_adds(case: str, pair: Pair, tmp_path: Path):
    distiller, steps = distiller_of(case, pair, tmp_path), STEPS[case]
    made = distiller.method
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == steps.own
    before = weights(distiller)
    trainer = tiny_trainer(1, max_steps=2, limit_val_batches=1)
    trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert trainer.global_step == 2
    after = weights(distiller)
    assert all(torch.isfinite(x).all() for x in after.values())
    for name, value in made.state_dict().items():
        assert torch.equal(after[f"method.{name}"], value)
        changed = not torch.equal(before[f"method.{name}"], value)
        assert changed == (name.split(".")[0] not in steps.idle), name
    names = [f"student.{name}" for name, _ in distiller.student.named_parameters()]
    assert not all(torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("case", [case for case, steps in STEPS.items() if steps.own])
def test_an_interrupted_run_continues_to_the_same_bits(case: str, tmp_path: Path):
    """Methods with parameters of their own keep all that they learn in the checkpoint."""
    states = []
    for epochs, resumed in ((1, None), (2, str(tmp_path / "last.ckpt")), (2, None)):
        distiller = distiller_of(case, FAMILY, tmp_path)
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
        options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [checkpoint]} if epochs == 1 else {}
        trainer = tiny_trainer(epochs, limit_val_batches=0, **options)
        trainer.fit(distiller, datamodule=tiny_data(tmp_path), ckpt_path=resumed)
        states.append(weights(distiller))
    first, resumed_state, whole = states
    assert same(resumed_state, whole)
    assert not same(first, whole)
