"""Class attention: the maps of both classifiers against a second statement, and who owns the student's classifier."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.methods.catkd import class_activation_maps, class_attention_loss
from src.models.resnet import resnet8
from tests.helpers import feature_statements as stated
from tests.helpers.features import drawn
from tests.helpers.methods import assert_published_weights, configured
from tests.helpers.tiny import CLASSES, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


@pytest.mark.parametrize(("pair", "weight"), [("wrn40_2_to_wrn16_2", 12.0), ("wrn40_2_to_shufflev1", 80.0)])
def test_published_weights(pair: str, weight: float):
    assert_published_weights(configured("catkd", pair), cross_entropy=1.0, class_attention=weight)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (2, 4), (4, 2)])
def test_the_loss_is_the_stated_one_also_for_the_classifiers_weights(student: int, teacher: int, normalize: bool):
    ours, theirs = drawn((2, 2, student, student), 1), drawn((2, 3, teacher, teacher), 2)
    weight = drawn((5, 2), 3), drawn((5, 3), 4)

    def loss(ours: Tensor, ours_weight: Tensor) -> Tensor:
        maps = class_activation_maps(ours, ours_weight), class_activation_maps(theirs, weight[1])
        return class_attention_loss(*maps, resolution=2, normalize=normalize)

    lists = [ours.tolist()], [theirs.tolist()], (weight[0].tolist(), weight[1].tolist())
    assert loss(ours, weight[0]).item() == pytest.approx(stated.catkd(*lists, 2, normalize), rel=1e-12)
    assert torch.autograd.gradcheck(loss, (ours.requires_grad_(), weight[0].requires_grad_()))


def test_the_scale_of_a_map_matters_only_without_normalisation():
    ours, theirs = drawn((2, 5, 4, 4), 1), drawn((2, 5, 2, 2), 2)
    scales = torch.linspace(0.1, 9, 10, dtype=torch.float64).view(2, 5, 1, 1)
    normalized = partial(class_attention_loss, resolution=2, normalize=True)
    torch.testing.assert_close(normalized(scales * ours, theirs), normalized(ours, 1e30 * theirs))
    plain = partial(class_attention_loss, resolution=2, normalize=False)
    assert not torch.isclose(plain(2 * ours, theirs), plain(ours, theirs))


def test_a_logit_is_the_mean_of_its_class_activation_map():
    network = resnet8(CLASSES)
    output = network.forward_features(torch.randn(2, 3, 16, 16))
    assert output.unpooled is not None
    maps = class_activation_maps(output.unpooled, network.classifier_layer.weight)
    torch.testing.assert_close(maps.mean((2, 3)) + network.classifier_layer.bias, output.logits)


def test_the_students_classifier_is_taught_but_neither_owned_nor_saved_by_the_method(tmp_path: Path):
    method = configured("catkd", cross_entropy_weight=0.0)
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert {name.split(".")[0] for name in method.state_dict()} == {"teacher_classifier"}
    for whole in (distiller, copy.deepcopy(distiller)):
        before = weights(whole.student.classifier_layer)
        tiny_trainer(1, max_steps=2, limit_val_batches=0).fit(whole, datamodule=tiny_data(tmp_path))
        assert not torch.equal(before["weight"], whole.student.classifier_layer.weight)
