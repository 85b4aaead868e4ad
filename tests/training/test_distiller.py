"""The module runs both networks, sums the method's terms, and evaluates the predictor as at inference."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from src.common.errors import UserError
from src.common.metrics import evaluation_metrics
from src.data.array_data import ArrayData
from src.data.image_data import Samples
from src.methods.fitnet import FitNet
from src.methods.method import Batch, DistillationLogits, LogitMethod
from src.methods.vanilla import Vanilla
from src.training.distiller import Distiller
from src.training.serialization import Parallel, Serial, Serialization
from tests.helpers.tiny import (
    MEAN,
    STD,
    kd,
    same,
    tiny_data,
    tiny_distiller,
    tiny_teacher,
    tiny_trainer,
    weights,
)


@pytest.fixture
def data(tmp_path: Path) -> ArrayData:
    return tiny_data(tmp_path)


def fitnet() -> FitNet:
    return FitNet(cross_entropy_weight=1.0, hint_weight=1.0, hint_layer=1)


def first_batch(data: ArrayData) -> Samples:
    """The first eight training images, without augmentation."""
    index = torch.arange(8)
    labels = data.source.train_labels[index]
    return Samples((data.arrays.train_images[index],), labels, index, (torch.zeros_like(index),))


def trained(data: ArrayData, distiller: Distiller, epochs: int = 1, **options: Any) -> Any:
    """Train, and return the trainer."""
    trainer = tiny_trainer(epochs, **options)
    trainer.fit(distiller, datamodule=data)
    return trainer


# What a method gets


def test_a_batch_holds_the_outputs_of_both_networks(data: ArrayData) -> None:
    teacher = tiny_teacher()
    distiller, samples = tiny_distiller(data, fitnet(), teacher=teacher), first_batch(data)
    batch, logits = distiller.observe(samples)
    inputs = (samples.images[0] / 255 - MEAN[0]) / STD[0]
    torch.testing.assert_close(batch.views[0].images, inputs)
    assert batch.views[0].images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.student.logits, distiller.student(batch.views[0].images))
    torch.testing.assert_close(batch.teacher.logits, teacher(samples.images[0]).logits)
    assert len(batch.student.features) == len(batch.teacher.features) > 1
    assert torch.equal(batch.target, samples.target)
    assert torch.equal(batch.index, samples.index)
    assert (batch.epoch, batch.step) == (0, 0)
    assert logits.student is batch.student.logits
    assert logits.teacher is batch.teacher.logits


@pytest.mark.parametrize("layer", [Serial(0.1), Parallel(1.0)], ids=["serial", "parallel"])
def test_only_the_logits_for_distillation_pass_the_serialization_layer(data: ArrayData, layer: Serialization) -> None:
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher(), serialization=layer)
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    batch, logits = distiller.observe(first_batch(data))
    torch.testing.assert_close(batch.student.logits, distiller.student(batch.views[0].images))
    torch.testing.assert_close(logits.student, 2 * batch.student.logits)


class LaterWithoutTeacher(Vanilla):
    """A method whose main stage does not read its teacher."""

    needs_teacher = True
    reads_teacher = False


def test_the_teacher_answers_only_if_the_method_reads_it(data: ArrayData, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher()
    monkeypatch.setattr(teacher, "logits", lambda _: pytest.fail("the teacher was asked"))
    batch, logits = tiny_distiller(data, LaterWithoutTeacher(), teacher=teacher).observe(first_batch(data))
    assert batch.views[0].teacher is None
    assert logits.views[0].teacher is None


def test_each_view_has_its_own_outputs(data: ArrayData) -> None:
    distiller, samples = tiny_distiller(data, kd(), teacher=tiny_teacher()), first_batch(data)
    images, index = samples.images[0], samples.index
    two = samples._replace(
        images=(images, images.flip(3)), view_numbers=(torch.zeros_like(index), torch.ones_like(index))
    )
    batch, logits = distiller.observe(two)
    assert len(batch.views) == len(logits.views) == 2
    assert not torch.equal(logits.views[0].student, logits.views[1].student)
    assert torch.equal(batch.views[1].images, batch.views[0].images.flip(3))


def test_the_target_of_mixed_views_is_the_class_that_the_teacher_predicts(data: ArrayData) -> None:
    samples = first_batch(data)
    mixed = samples._replace(other_target=samples.target.flip(0), share=torch.linspace(0, 1, 8))
    teacher = tiny_teacher()
    batch, _ = tiny_distiller(data, kd(), teacher=teacher).observe(mixed)
    predicted = teacher.logits(samples.images[0]).argmax(dim=1)
    assert not torch.equal(predicted, samples.target)
    assert torch.equal(batch.target, predicted)
    labels: Any = batch.labels
    assert torch.equal(labels.target, samples.target)
    assert torch.equal(labels.other_target, samples.target.flip(0))
    assert torch.equal(labels.share, torch.linspace(0, 1, 8))
    alone, _ = tiny_distiller(data, Vanilla()).observe(mixed)
    assert torch.equal(alone.target, samples.target)
    plain, _ = tiny_distiller(data, kd(), teacher=teacher).observe(samples)
    assert torch.equal(plain.target, samples.target)
    assert plain.labels is None


def test_the_target_of_an_image_without_a_label_is_the_class_that_the_teacher_predicts(tmp_path: Path) -> None:
    data = tiny_data(tmp_path, train_size=12, unlabelled="rest")
    samples = first_batch(data)
    samples = samples._replace(target=torch.where(torch.arange(8) % 2 == 0, samples.target, -1))
    teacher = tiny_teacher()
    batch, _ = tiny_distiller(data, kd(), teacher=teacher).observe(samples)
    predicted = teacher.logits(samples.images[0]).argmax(dim=1)
    assert torch.equal(batch.target, torch.where(samples.target >= 0, samples.target, predicted))
    labels: Any = batch.labels
    assert torch.equal(labels.target, samples.target)
    assert labels.labelled_share == data.labelled_share < 1
    alone, _ = tiny_distiller(data, Vanilla()).observe(samples)
    assert torch.equal(alone.target, samples.target)


# Training


class GrowingPull(LogitMethod):
    """Cross-entropy, and a distillation term whose weight grows with the epoch."""

    needs_teacher = False

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 0.5, "pull": 0.25 * epoch}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        return {"pull": logits.student.square().mean()}


def test_the_loss_is_the_sum_of_the_weighted_terms_of_the_epoch(data: ArrayData) -> None:
    distiller = tiny_distiller(data, GrowingPull())
    found: list[tuple[dict[str, Tensor], Tensor]] = []

    class Remember(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            found.append((dict(pl_module.weighted_terms), loss))

    trained(data, distiller, 2, callbacks=[Remember()], limit_val_batches=0)
    assert [set(terms) for terms, _ in found] == [{"cross_entropy"}] * 6 + [{"cross_entropy", "pull"}] * 6
    for terms, loss in found:
        torch.testing.assert_close(loss, torch.stack(list(terms.values())).sum())


def test_features_are_freed_after_the_backward_pass(data: ArrayData) -> None:
    distiller = tiny_distiller(data, fitnet(), teacher=tiny_teacher())
    kept: list[bool] = []

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            kept.append(pl_module.last_batch is not None)

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            kept.append(pl_module.last_batch is not None)

    trained(data, distiller, callbacks=[Look()], limit_val_batches=0)
    assert kept == [True, False] * 6


class Draws(Vanilla):
    """Note a random number at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []

    def terms(self, batch: Batch) -> Any:
        self.numbers.append(float(torch.rand(1)))
        return super().terms(batch)


def test_random_numbers_of_a_method_follow_from_seed_and_step(data: ArrayData) -> None:
    numbers: list[list[float]] = []
    for seed, disturbance in ((0, 0), (0, 7), (1, 0)):
        method = Draws()
        distiller = tiny_distiller(data, method, seed=seed)
        torch.manual_seed(disturbance)
        trained(data, distiller, limit_val_batches=0)
        numbers.append(method.numbers)
    first, disturbed, other_seed = numbers
    assert first == disturbed
    assert len({*first, *other_seed}) == 12


def test_each_batch_of_an_accumulated_step_draws_its_own_random_numbers(data: ArrayData) -> None:
    method = Draws()
    trained(data, tiny_distiller(data, method), limit_val_batches=0, accumulate_grad_batches=2)
    assert len(set(method.numbers)) == 6


def test_a_large_seed_does_not_overflow(data: ArrayData) -> None:
    trained(data, tiny_distiller(data, Vanilla(), seed=2**62), limit_val_batches=0)


def test_frozen_parameters_of_a_method_are_not_optimised(data: ArrayData) -> None:
    class Frozen(Vanilla):
        def allocate(self, networks: Any) -> None:
            self.head = nn.Linear(2, 2).requires_grad_(False)

    method = Frozen()
    distiller = tiny_distiller(data, method)
    before = weights(method)
    trainer = trained(data, distiller, limit_val_batches=0)
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in distiller.student.parameters()}
    assert same(weights(method), before)


def test_a_scheduler_that_steps_every_batch_gets_the_number_of_steps(data: ArrayData) -> None:
    distiller, given = tiny_distiller(data, Vanilla()), list[int]()

    def make(optimizer: Any, total_steps: int) -> Any:
        given.append(total_steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    distiller.recipe = distiller.recipe._replace(make_scheduler=make, interval="step")
    trainer = trained(data, distiller, 2, limit_val_batches=0)
    assert given == [12]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 13)


# Damage is never saved (see also test_distiller_refusals.py)


def saved(data: ArrayData, distiller: Distiller, folder: Path, **options: Any) -> None:
    """Train two epochs, and save a checkpoint after each."""
    checkpoint = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trained(data, distiller, 2, enable_checkpointing=True, callbacks=[checkpoint], **options)


@pytest.mark.parametrize("name", ["student.fc.weight", "student.bn1.running_mean", "serialization.layer.bias"])
def test_weights_and_statistics_that_are_not_finite_are_not_saved(data: ArrayData, tmp_path: Path, name: str) -> None:
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher(), serialization=Serial(0.1))
    saved(data, distiller, tmp_path, limit_val_batches=0)
    before = (tmp_path / "last.ckpt").read_bytes()
    dict(distiller.state_dict())[name].view(-1)[0] = float("inf")
    with pytest.raises(UserError, match=rf"{name} is not finite in epoch \d: .* The last checkpoint is kept"):
        distiller.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_nothing_is_saved_after_the_teacher_has_changed(data: ArrayData, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    distiller = tiny_distiller(data, kd(), teacher=teacher)
    saved(data, distiller, tmp_path, limit_val_batches=0)
    with torch.no_grad():
        cast(Tensor, teacher.network.classifier_layer.bias)[0] += 1e-3
    with pytest.raises(UserError, match="The method changed the teacher's weights, so nothing more is saved"):
        distiller.trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert not (tmp_path / "other.ckpt").exists()


# Evaluation


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_epoch_is_evaluated_on_the_split_of_the_validation_loader(data: ArrayData, split: Any) -> None:
    if split == "val":
        data.val_size = 8
        data.load()
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher())
    distiller.settings = replace(distiller.settings, validates_on=split)
    predictions = torch.arange(44) % 3
    distiller.teacher_predictions = {split: predictions}
    trainer = trained(data, distiller, 2)
    expected, agreed, images = evaluation_metrics(4), 0, 0
    distiller.eval()
    for batch in data.evaluation_loader(split):
        with torch.no_grad():
            logits = distiller.predict_logits(batch.images[0])
        expected.update(logits, batch.target)
        agreed += int((logits.argmax(1) == predictions[batch.index]).sum())
        images += len(batch.target)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(f"{split}/")}
    assert metrics.pop(f"{split}/agreement") == pytest.approx(agreed / images)
    assert metrics == pytest.approx({f"{split}/{name}": float(value) for name, value in expected.compute().items()})


def test_images_without_an_answer_of_the_teacher_do_not_count_for_the_agreement(data: ArrayData) -> None:
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher())
    first = tiny_trainer(1).test(distiller, datamodule=data, verbose=False)[0]["test/agreement"]
    distiller.teacher_predictions = {"test": torch.full((17,), -1)}
    distiller.teacher_predictions["test"][:4] = 0
    some = tiny_trainer(1).test(distiller, datamodule=data, verbose=False)[0]["test/agreement"]
    predicted = distiller.eval().predict_logits(data.arrays.test_images).argmax(1)
    assert first == pytest.approx(float((predicted == 0).float().mean()))
    assert some == pytest.approx(float((predicted[:4] == 0).float().mean()))


def test_a_run_without_a_teacher_has_no_agreement(data: ArrayData) -> None:
    tested = tiny_trainer(1).test(tiny_distiller(data, Vanilla()), datamodule=data, verbose=False)[0]
    assert not [name for name in tested if "agreement" in name]


def test_predictions_are_the_students_own_logits_in_float32(data: ArrayData) -> None:
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher(), serialization=Serial(0.1)).eval()
    images = data.arrays.test_images
    expected = distiller.student((images / 255 - MEAN[0]) / STD[0])
    torch.testing.assert_close(distiller.predict_logits(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller.predict_logits(images).dtype == torch.float32
