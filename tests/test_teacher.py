"""The teacher is frozen by construction: each clause of it."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn

from src.errors import UserError
from src.methods.dkd import DKD
from src.models.checkpoints import weights_digest
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output
from src.models.resnet import resnet8, resnet14
from src.models.wide_resnet import wrn_16_1
from src.serialization import Serial
from src.teacher import Answers, Teacher
from tests.tiny import CLASSES, MEAN, STD, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def dkd():
    return DKD(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1)


def test_training_leaves_the_teacher_as_it_was(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    before, digest = weights(teacher.network), teacher.digest
    distiller = tiny_distiller(data, dkd(), teacher=teacher, serialization=Serial(0.1))
    tiny_trainer().fit(distiller, datamodule=data)
    assert same(before, weights(teacher.network))  # the running statistics of batch norm among them
    assert weights_digest(teacher.network) == digest
    assert not any(module.training for module in teacher.network.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())


def test_the_teacher_is_in_no_module_optimiser_or_checkpoint(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller = tiny_distiller(data, dkd(), teacher=teacher)
    trainer = tiny_trainer(
        1,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="last")],
        default_root_dir=tmp_path,
    )
    trainer.fit(distiller, datamodule=data)
    theirs = {id(p) for p in teacher.network.parameters()}
    assert not theirs & {id(p) for p in distiller.parameters()}  # so it is in no gradient bucket either
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"student.{name}" for name in distiller.student.state_dict()}


def test_train_mode_never_reaches_the_teacher(tmp_path):
    teacher = tiny_teacher()
    distiller = tiny_distiller(tiny_data(tmp_path), dkd(), teacher=teacher)
    distiller.train()
    assert not teacher.network.training
    teacher.network.train()
    with pytest.raises(AssertionError, match="train mode"):
        teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_answers_carry_no_gradient_even_to_images_that_want_one():
    teacher = tiny_teacher()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert not teacher(images).logits.requires_grad
    assert not any(feature.requires_grad for feature in teacher(images).features)


def test_copies_and_weight_averages_share_the_teacher(tmp_path):
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller = tiny_distiller(data, dkd(), teacher=teacher)
    assert copy.deepcopy(distiller).teacher is teacher
    averaging = WeightAveraging()
    tiny_trainer(1, callbacks=[averaging]).fit(distiller, datamodule=data)
    averaged = averaging._average_model
    assert averaged is not None
    assert averaged.module.teacher is teacher
    assert not any("teacher" in name for name, _ in averaged.named_parameters())


def test_the_teacher_is_fed_by_its_own_normalisation():
    network = resnet8(CLASSES).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    teacher = Teacher(network, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = network((images / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(teacher(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_answers_survive_their_file_and_damage_means_asking_again(tmp_path):
    answers = Answers(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    file = tmp_path / "teachers" / "answers.npz"
    answers.save(file)
    loaded = Answers.load(file, 7, 3)
    assert loaded is not None
    assert torch.equal(loaded.logits, answers.logits)
    assert torch.equal(loaded.target, answers.target)
    assert answers.predictions(7).tolist() == [*answers.logits.argmax(1).tolist(), -1, -1]
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a file of arrays"):
        file.write_bytes(damaged)
        assert Answers.load(file, 7, 3) is None
    logits, target = answers.logits.numpy(), answers.target.numpy()
    for change in (
        {"logits": np.array([object()])},
        {"logits": logits[:, :2]},
        {"logits": logits.astype(np.float64)},
        {"logits": np.full((5, 3), np.nan, np.float32)},
        {"logits": logits[0]},
        {"target": target[:4]},
        {"target": target + 3},
        {"target": target - 1},
        {"target": target.astype(np.float32)},
    ):
        np.savez(file, **{"logits": logits, "target": target, **change})
        assert Answers.load(file, 7, 3) is None, change
    answers.save(file)
    assert Answers.load(file, 4, 3) is None, "there are not so many images"
    assert Answers.load(tmp_path / "none.npz", 7, 3) is None


def test_scores_of_answers_are_the_definition():
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [0, 4.0, 0]])
    assert Answers(logits, torch.tensor([0, 1, 0, 1])).scores()["accuracy"] == pytest.approx(0.75)


def rounded_alike(one, other, tolerance):
    return bool(((one - other).abs() <= tolerance * other.abs().max()).all())


@pytest.mark.parametrize(
    ("new_teacher", "folded"),
    [
        (resnet14, 1 + 6 * 2 + 2),  # stem, blocks, shortcuts
        (wrn_16_1, 6),  # each block's second: the others read sums, or the stem's output, which is a feature
        (MobileNetV2, 53),  # all
    ],
)
def test_folded_batch_norms_change_answers_by_rounding_alone(new_teacher, folded):
    plain, teacher = tiny_teacher(new_teacher), tiny_teacher(new_teacher)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    teacher.fold((3, 32, 32))
    assert teacher.folded == folded
    expected, said = plain(images), teacher(images)
    assert rounded_alike(said.logits, expected.logits, 1e-4)
    for one, other in zip(said.features, expected.features, strict=True):
        assert rounded_alike(one, other, 1e-4)
    assert rounded_alike(teacher.logits(images), expected.logits, 1e-4)
    assert teacher.digest == plain.digest
    assert teacher.key != plain.key
    teacher.check_unchanged()
    with torch.no_grad():
        next(teacher.network.parameters()).add_(1)
    with pytest.raises(UserError, match="weights changed"):
        teacher.check_unchanged()


def test_a_convolution_that_something_else_reads_too_is_not_folded():
    class Both(Network):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
            self.bn.running_mean += 1

        def forward_features(self, images):
            x = self.conv(images)
            pooled = (x + self.bn(x)).mean((2, 3))
            return Output(self.fc(pooled), (), pooled)

    with pytest.raises(UserError, match=r"teacher\.fold=true does not fit this network"):
        Teacher(Both(), MEAN, STD).fold((3, 16, 16))


def test_precision_is_the_teachers_own_whatever_the_student_computes_in():
    teachers = {precision: tiny_teacher() for precision in (None, "float32", "bfloat16")}
    for precision, teacher in teachers.items():
        teacher.precision = precision
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    alone = {precision: teacher(images).logits for precision, teacher in teachers.items()}
    assert torch.equal(alone[None], alone["float32"])
    assert alone["bfloat16"].dtype == torch.bfloat16
    assert rounded_alike(alone["bfloat16"].float(), alone["float32"], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {precision: teacher(images).logits for precision, teacher in teachers.items()}
    assert torch.equal(mixed[None], alone["bfloat16"])
    assert torch.equal(mixed["float32"], alone["float32"])
    assert torch.equal(mixed["bfloat16"], alone["bfloat16"])
    assert len({teacher.key for teacher in teachers.values()}) == 3


def test_answers_can_take_part_in_a_loss():
    logits = tiny_teacher().logits(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    student = torch.zeros_like(logits, requires_grad=True)
    (student * logits).sum().backward()
    assert torch.equal(student.grad, logits)


def test_normalisation_constants_are_the_students_in_this_data():
    assert tiny_teacher().mean == MEAN
    assert tiny_teacher().std == STD
