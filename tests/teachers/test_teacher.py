"""The teacher is frozen, is fed in its own way, and its answers depend on nothing but its cache key."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.checkpoints import weights_digest
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output
from src.models.resnet import resnet8, resnet14
from src.models.wide_resnet import wrn_16_1
from src.teachers.teacher import ANSWER_BATCH, Teacher
from src.training.serialization import Serial
from tests.helpers.tiny import (
    CLASSES,
    MEAN,
    STD,
    dkd,
    same,
    tiny_data,
    tiny_distiller,
    tiny_teacher,
    tiny_trainer,
    weights,
)


def views(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# Frozen


def test_training_does_not_change_the_teacher(tmp_path: Path) -> None:
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    before, digest = weights(teacher.network), teacher.digest
    distiller = tiny_distiller(data, dkd(), teacher=teacher, serialization=Serial(0.1))
    tiny_trainer().fit(distiller, datamodule=data)
    assert same(before, weights(teacher.network))  # including the running statistics of batch norm
    assert weights_digest(teacher.network) == digest
    assert not any(module.training for module in teacher.network.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())


def test_the_teacher_is_in_no_module_optimiser_or_checkpoint(tmp_path: Path) -> None:
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
    assert not theirs & {id(p) for p in distiller.parameters()}  # and hence in no gradient bucket
    assert not theirs & {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"student.{name}" for name in distiller.student.state_dict()}


def test_train_mode_never_reaches_the_teacher(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    distiller = tiny_distiller(tiny_data(tmp_path), dkd(), teacher=teacher)
    distiller.train()
    assert not teacher.network.training
    teacher.network.train()
    with pytest.raises(AssertionError, match="train mode"):
        teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_answers_have_no_gradient() -> None:
    teacher, images = tiny_teacher(), views(2)
    assert not teacher(images).logits.requires_grad
    assert not any(feature.requires_grad for feature in teacher(images).features)


def test_answers_can_take_part_in_a_loss() -> None:
    logits = tiny_teacher().logits(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    student = torch.zeros_like(logits, requires_grad=True)
    (student * logits).sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad, logits)


def test_copies_and_weight_averages_share_the_teacher(tmp_path: Path) -> None:
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller = tiny_distiller(data, dkd(), teacher=teacher)
    assert copy.deepcopy(distiller).teacher is teacher
    averaging = WeightAveraging()
    tiny_trainer(1, callbacks=[averaging]).fit(distiller, datamodule=data)
    averaged: Any = averaging._average_model
    assert averaged.module.teacher is teacher
    assert not any("teacher" in name for name, _ in averaged.named_parameters())


def test_changed_weights_and_statistics_are_found() -> None:
    for change in ("classifier_layer.bias", "running_var"):
        teacher = tiny_teacher()
        teacher.check_unchanged()
        with torch.no_grad():
            if change == "running_var":
                next(m for m in teacher.network.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(1.01)  # type: ignore[union-attr]
            else:
                teacher.network.classifier_layer.bias[0] += 1e-3
        with pytest.raises(UserError, match=r"The method changed the teacher's weights, .* with start_over=true\."):
            teacher.check_unchanged()


# Inputs and classes


def test_the_teacher_has_its_own_normalisation() -> None:
    network = resnet8(CLASSES).eval()
    images = views(2)
    teacher = Teacher(network, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = network((images / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(teacher(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_images_are_resized_to_the_teachers_input_size() -> None:
    teacher, plain = Teacher(tiny_teacher().network, MEAN, STD, image_size=32), tiny_teacher()
    grey = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    torch.testing.assert_close(teacher.logits(grey), plain.logits(torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)))
    images = views(2, size=32)
    assert torch.equal(teacher.logits(images), plain.logits(images)), "images of this size are not resized"
    assert teacher.shapes((3, 16, 16)) == plain.shapes((3, 32, 32))


def test_only_the_logits_of_the_datas_classes_are_given() -> None:
    whole, images = tiny_teacher(), views(3)
    teacher = Teacher(tiny_teacher().network, MEAN, STD, class_index=[2, 0])
    expected = whole.logits(images)[:, [2, 0]]
    assert torch.equal(teacher.logits(images), expected)
    assert torch.equal(teacher(images).logits, whole(images).logits[:, [2, 0]])
    assert teacher.shapes((3, 16, 16)).logits == 2
    layer = teacher.classifier()
    assert layer.out_features == 2
    torch.testing.assert_close(layer(whole(images).pooled), expected, atol=1e-5, rtol=1e-5)


def test_the_classifier_is_a_frozen_copy() -> None:
    teacher = tiny_teacher()
    layer = teacher.classifier()
    assert same(weights(layer), weights(teacher.network.classifier_layer))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.weight.zero_()
    teacher.check_unchanged()


# Answers to views


def test_view_logits_match_the_network_in_any_batch_size() -> None:
    teacher, images = tiny_teacher(), views(ANSWER_BATCH + 5)
    index = numbers = torch.arange(len(images))
    found = teacher.view_logits(images, index, numbers)
    torch.testing.assert_close(found, teacher(images).logits, atol=1e-5, rtol=1e-5)
    alone = torch.cat([teacher.view_logits(images[i : i + 1], index[i : i + 1], numbers[i : i + 1]) for i in index])
    assert torch.equal(found, alone)


def test_float16_rounds_the_answers_to_views_by_at_most_its_precision() -> None:
    exact, rounding, images = tiny_teacher(), tiny_teacher(), views(5)
    rounding.answer_dtype = torch.float16
    logits, rounded = (teacher.compute_view_logits(images) for teacher in (exact, rounding))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, logits.half().float())
    assert ((rounded - logits).abs() <= logits.abs() / 2048).all()


# Faster networks with the same answers


def differ_by_rounding(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance * other.abs().max()).all())


@pytest.mark.parametrize(
    ("new_teacher", "folded"),
    [
        (resnet14, 1 + 6 * 2 + 2),  # stem, blocks, shortcuts
        (wrn_16_1, 6),  # the second of each block: the others read sums, or the stem's output, which is a feature
        (MobileNetV2, 53),  # all
    ],
)
def test_folded_batch_norms_change_answers_by_rounding_only(new_teacher, folded) -> None:
    plain, teacher = tiny_teacher(new_teacher), tiny_teacher(new_teacher)
    images = views(4, size=32)
    teacher.fold((3, 32, 32))
    assert teacher.folded == folded
    expected, found = plain(images), teacher(images)
    assert differ_by_rounding(found.logits, expected.logits, 1e-4)
    for one, other in zip(found.features, expected.features, strict=True):
        assert differ_by_rounding(one, other, 1e-4)
    assert differ_by_rounding(teacher.logits(images), expected.logits, 1e-4)
    assert teacher.digest == plain.digest
    assert teacher.key != plain.key
    teacher.check_unchanged()
    with torch.no_grad():
        next(teacher.network.parameters()).add_(1)
    with pytest.raises(UserError, match="changed the teacher's weights"):
        teacher.check_unchanged()


def test_a_convolution_with_another_reader_is_not_folded() -> None:
    class Both(Network):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
            assert self.bn.running_mean is not None
            self.bn.running_mean += 1

        def forward_features(self, images: Tensor) -> Output:
            x = self.conv(images)
            pooled = (x + self.bn(x)).mean((2, 3))
            return Output(self.fc(pooled), (), pooled)

    with pytest.raises(UserError, match=r"teacher\.fold=true does not fit this network"):
        Teacher(Both(), MEAN, STD).fold((3, 16, 16))


def test_the_teachers_precision_does_not_depend_on_the_students() -> None:
    teachers = {precision: tiny_teacher() for precision in (None, "float32", "bfloat16")}
    for precision, teacher in teachers.items():
        teacher.precision = precision
    images = views(4)
    alone = {precision: teacher(images).logits for precision, teacher in teachers.items()}
    assert torch.equal(alone[None], alone["float32"])
    assert alone["bfloat16"].dtype == torch.bfloat16
    assert differ_by_rounding(alone["bfloat16"].float(), alone["float32"], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = {precision: teacher(images).logits for precision, teacher in teachers.items()}
    assert torch.equal(mixed[None], alone["bfloat16"])
    assert torch.equal(mixed["float32"], alone["float32"])
    assert torch.equal(mixed["bfloat16"], alone["bfloat16"])


# The cache key


def test_the_cache_key_holds_everything_that_decides_an_answer() -> None:
    network = tiny_teacher().network
    options = [{}, {"image_size": 32}, {"class_index": [1, 0]}, {"precision": "float32"}, {"precision": "bfloat16"}]
    keys = [Teacher(network, MEAN, STD, **option).key for option in options]  # type: ignore[arg-type]
    keys += [Teacher(network, MEAN, (0.3, 0.3, 0.3)).key, Teacher(network, (0.4, 0.4, 0.4), STD).key]
    winograd = Teacher(network, MEAN, STD)
    winograd.winograd = 1
    other = tiny_teacher().network
    with torch.no_grad():
        next(other.parameters())[0] += 1e-4
    keys += [winograd.key, Teacher(other, MEAN, STD).key]
    assert len(set(keys)) == len(keys)
    assert Teacher(network, list(MEAN), list(STD)).key == keys[0]
    assert tiny_teacher().key == keys[0]


def test_the_teacher_of_the_tiny_data_has_the_normalisation_of_its_student() -> None:
    assert (tiny_teacher().mean, tiny_teacher().std) == (MEAN, STD)
