"""Whole runs on the GPU: the same bits again and after an interruption, mixed precision, NaN, and export."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from src.exporting.forms import Classifier
from src.methods.kd import KD
from src.models.checkpoints import read_state_dict
from src.models.resnet import resnet8
from src.runs.history import read_history
from src.training.distiller import Distiller
from tests.helpers.commands import Ran, run
from tests.helpers.gpu import ACCELERATOR, DEVICE, SMALL, relative_error
from tests.helpers.interruption import Place, differences, write_sources
from tests.helpers.tiny import CLASSES

pytestmark = pytest.mark.gpu
STEPS_PER_EPOCH = 6
"""44 images in batches of 8."""
CASES = {
    "aekt": ("method=aekt",),
    "aekt-16-mixed": ("method=aekt", "trainer.precision=16-mixed"),
    "crd": ("method=crd", "method.negatives=8"),
    "ft": ("method=ft", "method.initial_epochs=1"),
}
"""A serialization layer, the state of a gradient scaler, random draws with a memory, and two stages."""


class Runs:
    """Training commands with one tiny data set and one teacher. Finished runs are kept for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = write_sources(folder)
        self.whole = functools.cache(self._whole)

    def train(self, place: Place, *arguments: str) -> Ran:
        """Run the command in a place, on the device of these tests."""
        return run("train", *SMALL, *self.sources, f"runs={place.runs}", *arguments)

    def _whole(self, case: str) -> Place:
        """Train a run of `CASES` without an interruption."""
        place = Place(self.folder / case)
        ran = self.train(place, *CASES[case])
        assert ran.code == 0, ran.err
        return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def folder_of(place: Place) -> Path:
    """Return the folder of the only finished run."""
    (file,) = place.runs.rglob("result.json")
    return file.parent


@pytest.mark.parametrize("case", ["aekt", "crd"])
def test_two_runs_of_one_command_have_the_same_bits(runs: Runs, case: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "again")
    assert runs.train(place, *CASES[case]).code == 0
    assert differences(runs.whole(case).left(), place.left()) == []


class Killed(BaseException):
    """Ends a run as a signal would."""


def killed_at(step: int) -> Callable[..., Any]:
    """Make a training step that ends the process's run at its step number `step`."""
    original, calls = Distiller.training_step, iter(range(step))

    def training_step(self: Distiller, *arguments: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return original(self, *arguments)

    return training_step


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_continues_to_the_same_bits(runs: Runs, case: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "interrupted")
    for step in (STEPS_PER_EPOCH + 2, STEPS_PER_EPOCH):  # within the second epoch, and after it or in the next stage
        with patch.object(Distiller, "training_step", killed_at(step)):
            assert "Killed" in runs.train(place, *CASES[case]).err
    assert runs.train(place, *CASES[case]).code == 0
    assert differences(runs.whole(case).left(), place.left()) == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_loss_falls_in_every_precision(runs: Runs, precision: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "mixed")
    options = ("method=kd", f"trainer.precision={precision}", "schedule.epochs=6", "checkpoint_minutes=10")
    ran = runs.train(place, *options)
    assert ran.code == 0, ran.err
    losses = [row["train/loss"] for row in read_history(folder_of(place))]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    trained = read_state_dict(folder_of(place) / "student.pth")
    assert all(value.isfinite().all() for value in trained.values())


@pytest.mark.parametrize("options", [("checkpoint_minutes=0",), ("checkpoint_minutes=10", "gradients.every=0")])
def test_a_nan_ends_the_run_and_reaches_no_checkpoint(runs: Runs, options: tuple[str, ...], tmp_path: Path) -> None:
    """It is found by the next checkpoint: after the batch or, with the second options, at the end of the epoch."""
    original = KD.distillation

    def distillation(self: KD, logits: Any, batch: Any) -> dict[str, torch.Tensor]:
        terms = dict(original(self, logits, batch))
        factor = float("nan") if batch.step >= STEPS_PER_EPOCH + 2 else 1.0
        return {name: factor * term for name, term in terms.items()}

    place = Place(tmp_path / "nan")
    with patch.object(KD, "distillation", distillation):
        ran = runs.train(place, "method=kd", "check_loss_every_n_steps=50", *options)
    assert ran.code == 1
    assert "The loss is not finite in epoch 1, batch 2 (cross_entropy " in ran.err
    assert "kd nan" in ran.err
    checkpoints = list(place.runs.rglob("*.ckpt"))
    assert checkpoints
    for file in checkpoints:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())
    assert not list(place.runs.rglob("student.pth"))


def test_a_run_is_exported(runs: Runs, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = folder_of(runs.whole("aekt"))
    data, _ = runs.sources
    ran = run("export", f"run={folder}", data, "images=17", f"out={tmp_path}", f"trainer={ACCELERATOR}")
    assert ran.code == 0, ran.err
    with np.load(data.removeprefix("data.path=")) as arrays:
        images = np.ascontiguousarray(arrays["test_images"].transpose(0, 3, 1, 2))
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    stored = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    student = resnet8(CLASSES)
    student.load_state_dict(read_state_dict(folder / "student.pth"))
    classifier = Classifier(student, stored["mean"], stored["std"]).to(DEVICE)
    (logits,) = session.run(None, {"images": images})
    expected = classifier(torch.from_numpy(images).to(DEVICE))
    assert relative_error(torch.from_numpy(logits), expected) < 1e-3
