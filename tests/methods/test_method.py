"""The contract of a method: what it may ask for, shown by throw-away methods, and the sentences for its mistakes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from src.common.errors import UserError
from src.methods.kd import KD
from src.methods.method import (
    Batch,
    DistillationLogits,
    LogitMethod,
    Method,
    Networks,
    Stage,
    cross_entropy,
    log_softmax,
    warm_up,
    weighted,
)
from src.methods.vanilla import Vanilla
from src.training.serialization import Parallel, Serial, Serialization
from tests.helpers.losses import log_softmax as stated_log_softmax
from tests.helpers.losses import observed, three_logits
from tests.helpers.methods import configured, networks_of, some_samples
from tests.helpers.throwaway import MemoryBank, OwnGradients, TeachersHead
from tests.helpers.tiny import CLASSES, kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

# What a method may ask for


def test_a_memory_bank_is_indexed_by_image_and_survives_a_checkpoint(tmp_path: Path):
    data = tiny_data(tmp_path)
    method = MemoryBank()
    distiller = tiny_distiller(data, method, teacher=tiny_teacher())
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    tiny_trainer(2, enable_checkpointing=True, callbacks=[checkpoint]).fit(distiller, datamodule=data)
    assert method.seen.tolist() == [2] * 44  # every image once an epoch
    assert method.bank.abs().sum(dim=1).min() > 0
    groups = distiller.trainer.optimizers[0].param_groups
    assert any(p is method.adapter.weight for group in groups for p in group["params"])
    other = MemoryBank()
    loaded = tiny_distiller(data, other, teacher=tiny_teacher())
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other.bank, method.bank)


def test_a_predictor_other_than_the_student_is_scored_and_its_head_is_not_trained(tmp_path: Path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    method = TeachersHead()
    distiller = tiny_distiller(data, method, teacher=teacher)
    head = weights(method.head)
    trainer = tiny_trainer(2)
    trainer.fit(distiller, datamodule=data)
    assert same(head, weights(method.head))
    assert same(head, weights(teacher.network.classifier_layer))
    images = data.arrays.test_images
    with torch.no_grad():
        through = method.predictor(distiller.student.eval())(distiller._normalised(images))
    accuracy = (through.argmax(1) == data.arrays.test_labels).float().mean()
    assert float(trainer.callback_metrics["test/accuracy"]) == pytest.approx(float(accuracy))
    assert torch.equal(distiller.eval().predict_logits(images), through)


class TwoViews(Vanilla):
    views_per_image = 2

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        self.differ = not torch.equal(first.images, second.images)
        return {"cross_entropy": cross_entropy(batch) + 0 * second.student.logits.sum()}


def test_a_second_view_is_another_view_of_the_same_images(tmp_path: Path):
    method = TwoViews()
    data = tiny_data(tmp_path, views=method.views_per_image)
    tiny_trainer(1).fit(tiny_distiller(data, method), datamodule=data)
    assert method.differ


class Peer(Vanilla):
    """Trains a second student, as deep mutual learning does."""

    def allocate(self, networks: Networks) -> None:
        self.peer = networks.new_student()

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "peer": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        peer = self.peer(batch.views[0].images)
        return {**super().terms(batch), "peer": nn.functional.cross_entropy(peer, batch.target)}


def test_a_second_student_trains_and_is_saved(tmp_path: Path):
    data, method = tiny_data(tmp_path), Peer()
    distiller = tiny_distiller(data, method)
    before = weights(method.peer)
    tiny_trainer(1).fit(distiller, datamodule=data)
    assert not same(before, weights(method.peer))
    assert "method.peer.fc.weight" in distiller.state_dict()


def test_a_method_combines_its_gradients(tmp_path: Path):
    data = tiny_data(tmp_path)
    alone = tiny_distiller(data, Vanilla())
    tiny_trainer(1).fit(alone, datamodule=data)
    dropped = tiny_distiller(data, OwnGradients(), teacher=tiny_teacher())
    tiny_trainer(1).fit(dropped, datamodule=data)
    assert same(weights(alone.student), weights(dropped.student))


class Recorder(Vanilla):
    """Notes the epoch and step of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        self.told.append((batch.epoch, batch.step))
        return super().terms(batch)


def test_epoch_and_step_count_from_zero(tmp_path: Path):
    data, method = tiny_data(tmp_path), Recorder()
    tiny_trainer(2).fit(tiny_distiller(data, method), datamodule=data)
    assert method.told == [(step // 6, step) for step in range(12)]


class WarmStart(Method):
    """The stage of a two-stage method. It trains an adapter that the main stage holds."""

    needs_teacher = False
    needs_features = True

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def weights(self, epoch: int) -> dict[str, float]:
        return {"norm": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"norm": self.adapter(batch.student.pooled.detach()).square().mean()}


class TwoStage(Vanilla):
    def allocate(self, networks: Networks) -> None:
        self.adapter = nn.Linear(networks.student_shapes.pooled, CLASSES)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("warm-start", WarmStart(self.adapter), epochs=2),)


def test_stages_share_their_modules_with_the_main_method(tmp_path: Path):
    data, main = tiny_data(tmp_path), TwoStage()
    distiller = tiny_distiller(data, main)
    student, adapter = weights(distiller.student), main.adapter.weight.detach().clone()
    (stage,) = main.stages()
    part = distiller.for_stage(stage)
    tiny_trainer(stage.epochs).fit(part, datamodule=data)
    assert part.student is distiller.student
    assert main.adapter.weight.norm() < adapter.norm()
    names = [name for name, _ in distiller.student.named_parameters()]
    assert all(torch.equal(student[name], weights(distiller.student)[name]) for name in names)


# Terms and weights


class Infinite(Vanilla):
    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "unused": 0.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {**super().terms(batch), "unused": torch.log(0 * batch.student.logits.sum())}


def test_a_term_of_weight_zero_spoils_nothing_and_is_not_logged(tmp_path: Path):
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(1)
    trainer.fit(tiny_distiller(data, Infinite()), datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss_epoch"])
    assert "train/unused_epoch" not in trainer.callback_metrics


class Broken(Infinite):
    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "unused": 1.0}


def test_a_loss_that_is_not_finite_names_epoch_batch_and_term(tmp_path: Path):
    data = tiny_data(tmp_path)
    with pytest.raises(UserError, match=r"not finite in epoch 0, batch 0 \(cross_entropy .*, unused -inf\)"):
        tiny_trainer(1).fit(tiny_distiller(data, Broken()), datamodule=data)


def test_the_logged_terms_are_the_summed_terms(tmp_path: Path):
    data = tiny_data(tmp_path)
    method = configured("aekt", warmup_epochs=2)
    trainer = tiny_trainer(1)
    trainer.fit(tiny_distiller(data, method, teacher=tiny_teacher(), serialization=Serial(0.1)), datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.endswith("_epoch")}
    total = logged.pop("train/loss_epoch")
    assert set(logged) == {f"train/{name}_epoch" for name in ("cross_entropy", "tckd", "nckd", "explicit_transfer")}
    assert sum(logged.values()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("serialization", [Serial(0.1), Parallel(1.0)])
def test_the_layer_learns_at_its_own_rate_and_takes_no_part_in_prediction(tmp_path: Path, serialization: Serialization):
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, kd(), teacher=tiny_teacher(), serialization=serialization)
    before = weights(serialization)
    trainer = tiny_trainer(1)
    trainer.fit(distiller, datamodule=data)
    assert not same(before, weights(serialization))
    student, layer = trainer.optimizers[0].param_groups
    assert layer["lr"] == pytest.approx(student["lr"] * serialization.lr_scale)
    assert layer["weight_decay"] == (0.0 if isinstance(serialization, Serial) else student["weight_decay"])
    images = data.arrays.test_images
    predicted = distiller.eval().predict_logits(images)
    for parameter in serialization.parameters():
        parameter.data.fill_(float("nan"))
    assert torch.equal(distiller.predict_logits(images), predicted)


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [(0, 20, 0.05), (9, 20, 0.5), (18, 20, 0.95), (19, 20, 1), (20, 20, 1), (239, 20, 1), (0, 0, 1), (0, 1, 1)],
)
def test_warm_up_is_linear_and_ends_at_one(epoch: int, epochs: int, factor: float):
    assert warm_up(epoch, epochs) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_log_softmax_is_the_stated_one_with_one_temperature_or_one_for_each_row(temperature: float):
    _, logits, _, _ = three_logits()
    wanted = torch.tensor([stated_log_softmax(row, temperature) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_softmax(logits, temperature), wanted)
    rows = torch.full((len(logits), 1), temperature, dtype=torch.float64)
    torch.testing.assert_close(log_softmax(logits, rows), wanted)


# Mistakes


class Mistaken(Vanilla):
    """Computes and weighs terms of the given names."""

    def __init__(self, terms: set[str], weights: set[str]) -> None:
        super().__init__()
        self.term_names, self.weight_names = terms, weights

    def weights(self, epoch: int) -> dict[str, float]:
        return dict.fromkeys(sorted(self.weight_names), 1.0)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(sorted(self.term_names), cross_entropy(batch))


def fit_one_step(method: Method, folder: Path, **options: Any) -> None:
    data = tiny_data(folder)
    distiller = tiny_distiller(data, method, **options)
    tiny_trainer(1, max_steps=1, limit_val_batches=0).fit(distiller, datamodule=data)


def test_a_term_that_weights_lacks_is_named(tmp_path: Path):
    message = r"^The method computes the term 'hint', but its weights\(\) lacks it: add its weight there\.$"
    with pytest.raises(UserError, match=message):
        fit_one_step(Mistaken({"cross_entropy", "hint"}, {"cross_entropy"}), tmp_path)


def test_a_weight_without_a_term_is_named(tmp_path: Path):
    message = r"^The method's weights\(\) has 'hint', but no term has this name: remove it or compute the term\.$"
    with pytest.raises(UserError, match=message):
        fit_one_step(Mistaken({"cross_entropy"}, {"cross_entropy", "hint"}), tmp_path)


def test_a_name_on_one_side_is_a_mistake_also_at_weight_zero():
    with pytest.raises(UserError, match="'hint'"):
        weighted({"hint": torch.tensor(1.0)}, {"typo": 0.0})
    assert weighted({"hint": torch.tensor(torch.inf)}, {"hint": 0.0}) == {}


class Reader(Vanilla):
    """Reads a part of an output without asking for it."""

    needs_teacher = True

    def __init__(self, whose: str, part: str, features: bool) -> None:
        super().__init__()
        self.whose, self.part, self.needs_features = whose, part, features

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        getattr(getattr(batch, self.whose), self.part)
        return super().terms(batch)


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(
    ("part", "features", "message"),
    [
        ("features", False, "features without asking for them: set needs_features = True in its class"),
        ("pooled", False, "pooled features without asking for them: set needs_features = True in its class"),
        ("unpooled", False, "the last feature maps without asking for them: set needs_features = True in its class"),
        ("preactivations", False, "preactivations .*: set needs_features = True and needs_preactivations = True in"),
        ("preactivations", True, "preactivations without asking for them: set needs_preactivations = True in its"),
    ],
)
def test_an_output_that_is_read_without_a_request_is_named(
    whose: str, part: str, features: bool, message: str, tmp_path: Path
):
    with pytest.raises(UserError, match=f"^The method reads {message}"):
        fit_one_step(Reader(whose, part, features), tmp_path, teacher=tiny_teacher())


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("preactivations", [False, True])
def test_a_method_can_read_what_it_asks_for(features: bool, preactivations: bool, tmp_path: Path):
    method = Vanilla()
    method.needs_features, method.needs_preactivations = features, features and preactivations
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    batch, _ = distiller.observe(some_samples())
    for output in (batch.student, batch.teacher):
        assert output.logits.shape == (4, CLASSES)
        if features:
            assert len(output.features) == 4
            assert output.unpooled is not None
            assert output.pooled.shape == output.unpooled.mean((2, 3)).shape
        if features and preactivations:
            assert len(output.preactivations) == 4


class TeacherReader(Vanilla):
    """Reads the teacher's output, though its class says that it needs no teacher."""

    needs_teacher = False

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": batch.teacher.logits.sum()}


class TeacherLogitReader(KD):
    """Distils the teacher's logits, though its class says that it needs no teacher."""

    needs_teacher = False


class TeacherForgetter(KD):
    """Distils the teacher's logits, though its class says that the main stage does not read the teacher."""

    reads_teacher = False


NO_TEACHER = "^The method reads the teacher, but its class sets needs_teacher or reads_teacher to False: set it to True"


def test_a_method_that_reads_a_teacher_without_needing_one_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=NO_TEACHER):
        fit_one_step(TeacherReader(), tmp_path)
    options = {"cross_entropy_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    with pytest.raises(UserError, match=NO_TEACHER):
        fit_one_step(TeacherLogitReader(**options), tmp_path)
    with pytest.raises(UserError, match=NO_TEACHER):
        fit_one_step(TeacherForgetter(**options), tmp_path, teacher=tiny_teacher())


def test_a_method_that_allocates_from_a_teacher_without_needing_one_is_told():
    networks = networks_of()
    alone = Networks(networks.student, None, networks.image_shape, networks.train_labels, networks.new_student)
    for read in (lambda: alone.teacher_shapes, lambda: alone.teacher_classifier(), lambda: alone.required_teacher):
        with pytest.raises(UserError, match=NO_TEACHER):
            read()


# Which methods distil logits


class OnFeatures(Method):
    """A subclass of `Method` that sets no flag."""


class OnLogits(LogitMethod):
    """A subclass of `LogitMethod` that sets no flag."""

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "match": 1.0}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> Mapping[str, Tensor]:
        return {"match": (logits.student - logits.teacher).square().mean()}


def test_the_base_class_decides_whether_logits_are_distilled():
    assert not OnFeatures().distils_logits
    assert OnLogits().distils_logits


def test_a_method_on_logits_has_cross_entropy_without_computing_it():
    own, distilled, teacher, target = three_logits()
    terms = OnLogits().all_terms(*observed(distilled, teacher, target, own=own))
    assert list(terms) == ["cross_entropy", "match"]  # in this order, which keeps the memory of a step low
    assert terms["cross_entropy"] == nn.functional.cross_entropy(own, target)
    assert terms["match"] == (distilled - teacher).square().mean()


def test_a_method_must_define_its_weights_and_terms():
    batch, logits = observed(*three_logits()[1:])
    with pytest.raises(NotImplementedError):
        OnFeatures().weights(0)
    with pytest.raises(NotImplementedError):
        OnFeatures().all_terms(batch, logits)
