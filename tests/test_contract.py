"""What a method may ask for, shown by throw-away methods that use the far ends of the contract."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from src.errors import UserError
from src.methods.aekt import AEKT
from src.methods.combined import Combined
from src.methods.kd import KD
from src.methods.method import Method, Stage
from src.methods.vanilla import Vanilla
from src.serialization import Parallel, Serial
from tests.tiny import CLASSES, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


class MemoryBank(Method):
    """Keeps the student's last embedding of every training image, by index, and a learnable adapter of its own."""

    needs_features = True

    def build(self, networks):
        self.adapter = nn.Linear(networks.student_shapes.pooled, networks.teacher_shapes.pooled)
        self.register_buffer("bank", torch.zeros(networks.train_size, networks.teacher_shapes.pooled))
        self.register_buffer("seen", torch.zeros(networks.train_size, dtype=torch.int64))

    def weights(self, epoch):
        return {"cross_entropy": 1.0, "stay": 0.1 * epoch, "hint": 0.1}

    def terms(self, batch):
        embedding = self.adapter(batch.student.pooled)
        terms = {
            "cross_entropy": F.cross_entropy(batch.student.logits, batch.target),
            "stay": F.mse_loss(embedding, self.bank[batch.index]),
            "hint": F.mse_loss(embedding, batch.teacher.pooled),
        }
        with torch.no_grad():
            self.bank[batch.index] = embedding
            self.seen[batch.index] += 1
        return terms


class TeachersHead(Method):
    """Predicts through the teacher's classifier, as SimKD does."""

    needs_features = True

    def build(self, networks):
        self.projector = nn.Linear(networks.student_shapes.pooled, networks.teacher_shapes.pooled)
        self.head = networks.teacher_classifier()

    def weights(self, epoch):
        return {"match": 1.0}

    def terms(self, batch):
        return {"match": F.mse_loss(self.projector(batch.student.pooled), batch.teacher.pooled)}

    def predictor(self, student):
        return Through(student, self.projector, self.head)


class Through(nn.Module):
    def __init__(self, student, projector, head):
        super().__init__()
        self.student, self.projector, self.head = student, projector, head

    def forward(self, images):
        return self.head(self.projector(self.student.forward_features(images).pooled))


def test_a_memory_bank_is_indexed_by_image_and_survives_a_checkpoint(tmp_path):
    data = tiny_data(tmp_path)
    method = MemoryBank()
    distiller = tiny_distiller(data, method, teacher=tiny_teacher())
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    tiny_trainer(2, enable_checkpointing=True, callbacks=[checkpoint]).fit(distiller, datamodule=data)
    assert method.seen.tolist() == [2] * 44  # every image once an epoch
    assert method.bank.abs().sum(dim=1).min() > 0
    assert any(
        p is method.adapter.weight for group in distiller.trainer.optimizers[0].param_groups for p in group["params"]
    )
    loaded = tiny_distiller(data, MemoryBank(), teacher=tiny_teacher())
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(loaded.method.bank, method.bank)


def test_a_predictor_other_than_the_student_is_scored_and_not_trained_through_its_head(tmp_path):
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
    views = 2

    def terms(self, batch):
        first, second = batch.views
        self.differ = not torch.equal(first.images, second.images)
        return {"cross_entropy": F.cross_entropy(first.student.logits, batch.target) + 0 * second.student.logits.sum()}


def test_a_second_view_is_another_view_of_the_same_images(tmp_path):
    method = TwoViews()
    data = tiny_data(tmp_path, views=method.views)
    tiny_trainer(1).fit(tiny_distiller(data, method), datamodule=data)
    assert method.differ


class Peer(Vanilla):
    """Deep mutual learning's shape: a second student of the method's own."""

    def build(self, networks):
        self.peer = networks.new_student()

    def weights(self, epoch):
        return {"cross_entropy": 1.0, "peer": 1.0}

    def terms(self, batch):
        peer = self.peer(batch.views[0].images)
        return {**super().terms(batch), "peer": F.cross_entropy(peer, batch.target)}


def test_a_second_student_trains_and_is_saved(tmp_path):
    data, method = tiny_data(tmp_path), Peer()
    distiller = tiny_distiller(data, method)
    before = weights(method.peer)
    tiny_trainer(1).fit(distiller, datamodule=data)
    assert not same(before, weights(method.peer))
    assert "method.peer.fc.weight" in distiller.state_dict()


class OnlyFirstTerm(KD):
    """A say in how gradients are combined: drops the second term's."""

    def backward(self, loss, weighted_terms):
        weighted_terms["cross_entropy"].backward()


def test_a_method_combines_its_gradients(tmp_path):
    data = tiny_data(tmp_path)
    alone = tiny_distiller(data, Vanilla())
    tiny_trainer(1).fit(alone, datamodule=data)
    method = OnlyFirstTerm(cross_entropy_weight=1.0, kd_weight=5.0, temperature=4.0)
    dropped = tiny_distiller(data, method, teacher=tiny_teacher())
    tiny_trainer(1).fit(dropped, datamodule=data)
    assert same(weights(alone.student), weights(dropped.student))


class Recorder(Vanilla):
    """Notes what it is told of time."""

    def __init__(self):
        super().__init__()
        self.told = []

    def terms(self, batch):
        self.told.append((batch.epoch, batch.step))
        return super().terms(batch)


def test_epoch_and_step_count_from_zero(tmp_path):
    data, method = tiny_data(tmp_path), Recorder()
    tiny_trainer(2).fit(tiny_distiller(data, method), datamodule=data)
    assert method.told == [(step // 6, step) for step in range(12)]


class Infinite(Vanilla):
    def weights(self, epoch):
        return {"cross_entropy": 1.0, "unused": 0.0}

    def terms(self, batch):
        return {**super().terms(batch), "unused": torch.log(0 * batch.student.logits.sum())}


def test_a_term_of_weight_zero_spoils_nothing_and_is_not_logged(tmp_path):
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(1)
    trainer.fit(tiny_distiller(data, Infinite()), datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss_epoch"])
    assert "train/unused_epoch" not in trainer.callback_metrics


class Broken(Infinite):
    def weights(self, epoch):
        return {"cross_entropy": 1.0, "unused": 1.0}


def test_a_loss_that_is_not_finite_names_epoch_batch_and_term(tmp_path):
    data = tiny_data(tmp_path)
    with pytest.raises(UserError, match=r"not finite in epoch 0, batch 0 \(cross_entropy .*, unused -inf\)"):
        tiny_trainer(1).fit(tiny_distiller(data, Broken()), datamodule=data)


def test_what_is_logged_is_what_is_summed(tmp_path):
    data = tiny_data(tmp_path)
    method = AEKT(
        cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=2, gamma=0.4, weighting="ratio",
        max_weight=10.0, confidence_term=True,
    )  # fmt: skip
    trainer = tiny_trainer(1)
    trainer.fit(tiny_distiller(data, method, teacher=tiny_teacher(), serialization=Serial(0.1)), datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.endswith("_epoch")}
    total = logged.pop("train/loss_epoch")
    assert set(logged) == {f"train/{name}_epoch" for name in ("cross_entropy", "tckd", "nckd", "explicit_transfer")}
    assert sum(logged.values()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("serialization", [Serial(0.1), Parallel(1.0)])
def test_the_layer_learns_at_its_own_rate_and_takes_no_part_in_prediction(tmp_path, serialization):
    data = tiny_data(tmp_path)
    method = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)
    distiller = tiny_distiller(data, method, teacher=tiny_teacher(), serialization=serialization)
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


class WarmStart(Method):
    """The stage of a two-stage method: trains an adapter that the main stage holds."""

    needs_teacher = False
    needs_features = True

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def weights(self, epoch):
        return {"norm": 1.0}

    def terms(self, batch):
        return {"norm": self.adapter(batch.student.pooled.detach()).square().mean()}


class TwoStage(Vanilla):
    def build(self, networks):
        self.adapter = nn.Linear(networks.student_shapes.pooled, CLASSES)

    def stages(self):
        return (Stage("warm-start", WarmStart(self.adapter), epochs=2),)


def test_stages_share_their_modules_with_the_main_method(tmp_path):
    data, main = tiny_data(tmp_path), TwoStage()
    distiller = tiny_distiller(data, main)
    student, adapter = weights(distiller.student), main.adapter.weight.detach().clone()
    (stage,) = main.stages()
    distiller.method = stage.method
    tiny_trainer(stage.epochs).fit(distiller, datamodule=data)
    assert main.adapter.weight.norm() < adapter.norm()
    names = [name for name, _ in distiller.student.named_parameters()]
    assert all(torch.equal(student[name], weights(distiller.student)[name]) for name in names)


def test_combined_methods_add_their_distillation_terms_and_count_cross_entropy_once(tmp_path):
    def kd(weight: float) -> KD:
        return KD(cross_entropy_weight=weight, kd_weight=0.9, temperature=4.0)

    method = Combined(kd(0.1), MemoryBank())
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert (method.needs_teacher, method.needs_features, method.distils_logits) == (True, True, True)
    assert method.weights(2) == {"cross_entropy": 0.1, "kd": 0.9, "stay": 0.2, "hint": 0.1}
    assert Combined(kd(0.1), kd(0.7)).weights(0) == {"cross_entropy": 0.1, "kd": 0.9, "also_kd": 0.9}
    trainer = tiny_trainer(1)
    trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert method.also.seen.tolist() == [1] * 44
    assert {"train/kd_epoch", "train/hint_epoch", "train/cross_entropy_epoch"} <= trainer.callback_metrics.keys()


def test_the_first_of_two_methods_predicts(tmp_path):
    method = Combined(TeachersHead(), KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0))
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert isinstance(method.predictor(distiller.student), Through)
    with pytest.raises(UserError, match=r"method@also=teachershead changes gradients or prediction"):
        Combined(Vanilla(), TeachersHead())
