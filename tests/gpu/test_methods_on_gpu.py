"""Every method on the GPU: its losses and gradients, two steps of training, and no wait of the host in a step."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_rows import Waits
from src.data.image_data import Samples
from src.methods import crd
from src.training.distiller import Distiller
from src.training.serialization import Serial
from src.training.term_log import TermLog
from tests.helpers.gpu import ACCELERATOR, CPU, DEVICE, REHEARSAL, move, relative_error
from tests.helpers.methods import FAMILY, STEPS, Pair, made_for_steps, method_of, name_of_pair
from tests.helpers.tiny import tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize("case", STEPS)
every_pair = pytest.mark.parametrize(
    ("case", "pair"),
    [(case, pair) for case, steps in STEPS.items() for pair in steps.pairs],
    ids=[f"{case}-{name_of_pair(pair)}" for case, steps in STEPS.items() for pair in steps.pairs],
)
WAITING = {"kdsvd"}
"""Methods that wait for the device in every step: torch's decompositions of matrices do."""

DOUBLE, TERM, GRADIENT, UPDATE = 1e-5, 2e-3, 1e-2, 1e-2
"""Largest relative errors, of norms, in float64 and in float32.

Two algorithms for convolutions on a CPU differ by up to 3e-6 in float64, in which images and the teacher's answers
still have the precision of float32. In float32 they differ by up to 1e-4 in a term, where a divergence of nearly equal
logits cancels. They usually differ by 5e-6 in gradients, but rounding can move an activation across a ReLU's kink. One
such activation changes the gradient by 1e-3. Therefore float64 finds mistakes, and float32 is only checked roughly.
"""


@pytest.fixture(autouse=True)
def negatives_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw CRD's negatives on the CPU, because the generators of the devices differ."""
    original: Callable[..., Tensor] = crd.draw_negatives

    def draw(labels: Tensor, target: Tensor, count: int, **options: Any) -> Tensor:
        return original(labels.cpu(), target.cpu(), count, **options).to(target.device)

    if not REHEARSAL:
        monkeypatch.setattr(crd, "draw_negatives", draw)


def distiller_of(case: str, folder: Path, pair: Pair = FAMILY) -> Distiller:
    """Make a distiller. Its weights are the same in every call."""
    made, (new_teacher, new_student) = made_for_steps(case), pair
    teacher = tiny_teacher(new_teacher) if made.needs_teacher else None
    layer = Serial(0.1) if made.distils_logits else None
    return tiny_distiller(tiny_data(folder), made, teacher=teacher, serialization=layer, new_student=new_student)


def parts_of(distiller: Distiller) -> list[Distiller]:
    """List the modules of the method's stages and of the main stage."""
    return [*(distiller.for_stage(stage) for stage in distiller.method.stages()), distiller]


def samples_on(device: torch.device, folder: Path) -> Samples:
    """Read and augment the first batch of training."""
    data = tiny_data(folder)
    batch = data.augment(next(iter(data.train_dataloader())), 0)
    images, numbers = (tuple(x.to(device) for x in views) for views in (batch.images, batch.view_numbers))
    return Samples(images, batch.target.to(device), batch.index.to(device), numbers)


def losses_and_gradients(
    case: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the terms, and the gradient of all parameters as one vector, of each stage."""
    distiller = move(distiller_of(case, folder), device, dtype)
    samples = samples_on(device, folder)
    terms: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for number, part in enumerate(parts_of(distiller)):
        distiller.zero_grad()
        torch.manual_seed(0)
        found, weight = part.method.all_terms(*part.observe(samples)), part.method.weights(0)
        total: Any = sum(weight[name] * term for name, term in found.items())
        total.backward()
        terms |= {f"stage {number}, {name}": term.detach() for name, term in found.items()}
        reached = [p.grad.flatten() for p in distiller.parameters() if p.grad is not None]
        gradients[f"stage {number}"] = torch.cat(reached)
    return terms, gradients


@every_case
def test_losses_and_gradients_agree_with_the_cpu(case: str, tmp_path: Path) -> None:
    exact = losses_and_gradients(case, tmp_path, CPU, torch.float64)
    for dtype, bounds in ((torch.float64, (DOUBLE, DOUBLE)), (torch.float32, (TERM, GRADIENT))):
        measured = losses_and_gradients(case, tmp_path, DEVICE, dtype)
        for found, expected, bound in zip(measured, exact, bounds, strict=True):
            assert found.keys() == expected.keys()
            errors = {name: relative_error(found[name], expected[name]) for name in found}
            assert max(errors.values()) < bound, (dtype, errors)


def updates(case: str, folder: Path, accelerator: str) -> dict[str, Tensor]:
    """Train two steps of each stage through Lightning. Returns the change of all weights of each part, as a vector."""
    distiller = distiller_of(case, folder)
    before = weights(distiller)
    for part in parts_of(distiller):
        trainer = tiny_trainer(1, max_steps=2, limit_val_batches=1, accelerator=accelerator, callbacks=[TermLog()])
        trainer.fit(part, datamodule=tiny_data(folder))
        assert trainer.global_step == 2
    after = {name: value.cpu() for name, value in weights(distiller).items()}
    assert all(value.isfinite().all() for value in after.values())
    changes: dict[str, list[Tensor]] = {}
    for name, value in after.items():
        change = value.double() if before[name].isnan().any() else value.double() - before[name].double()
        changes.setdefault(name.split(".")[0], []).append(change.flatten())
    return {part: torch.cat(vectors) for part, vectors in changes.items()}


@every_case
def test_two_steps_agree_with_the_cpu(case: str, tmp_path: Path) -> None:
    found, expected = updates(case, tmp_path, ACCELERATOR), updates(case, tmp_path, "cpu")
    assert found.keys() == expected.keys()
    errors = {part: relative_error(found[part], expected[part]) for part in found}
    assert max(errors.values()) < UPDATE, errors


@every_pair
def test_every_pair_trains_without_waits_of_the_host(case: str, pair: Pair, tmp_path: Path) -> None:
    """A step raises an error if an operator has no deterministic algorithm. It does not wait for the device."""
    distiller = distiller_of(case, tmp_path, pair)
    for part in parts_of(distiller):
        before = weights(part)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            counter = Waits(1, 3, seen)
            options = {"max_steps": 5, "limit_val_batches": 0, "log_every_n_steps": 100, "accelerator": ACCELERATOR}
            callbacks = [TermLog(), *([] if REHEARSAL else [counter])]
            try:
                tiny_trainer(1, callbacks=callbacks, **options).fit(part, datamodule=tiny_data(tmp_path))
            finally:
                counter.stop()
        after = {name: value.cpu() for name, value in weights(part).items()}
        assert all(value.isfinite().all() for value in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert method_of(case) in WAITING or not counter.places()
