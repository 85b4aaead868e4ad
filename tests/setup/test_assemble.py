"""Data, method, student and LightningModule are made from a configuration, which stays as it is."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.methods.combined import Combined
from src.methods.kd import KD
from src.setup.assemble import (
    Parts,
    balanced_weights,
    check_training_images,
    make_data,
    make_data_for,
    make_distiller,
    make_method,
    make_optimizer,
    make_parts,
    make_peer,
    prepare,
)
from src.setup.teacher import make_untrained_teacher
from src.training.dot import DOT
from tests.helpers.configure import CLASSES, changed, configure, parts_of
from tests.helpers.tiny import same, weights, write_arrays


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """A small pair on tiny arrays."""
    composed = configure("model=resnet20_to_resnet8", "data=arrays", "method=kd", "schedule.batch_size=8")
    return changed(composed, data__path=str(write_arrays(tmp_path / "tiny.npz")))


def assembled(cfg: DictConfig, seed: int = 0) -> tuple[Any, Parts]:
    cfg = changed(cfg, seed=seed)
    data = make_data(cfg)
    return data, make_parts(cfg, data, make_method(cfg))


# The configuration


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=aekt",),
        ("model=resnet34_to_resnet18", "teacher.source=timm/resnet26t", "student.source=torchvision/resnet18"),
        ("teacher.path=somewhere/net.pt2", "teacher.allow_program=true"),
    ],
)
def test_preparing_a_configuration_leaves_it_as_it_is(overrides: tuple[str, ...]) -> None:
    cfg = configure(*overrides)
    before = OmegaConf.to_yaml(cfg)
    prepared = prepare(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    assert prepared is not cfg
    assert OmegaConf.get_type(prepared) is OmegaConf.get_type(cfg)
    assert prepare(prepared) == prepared


def test_preparing_validates() -> None:
    with pytest.raises(UserError, match=r"^schedule\.epochs=0 does not fit"):
        prepare(changed(configure(), schedule__epochs=0))


def test_making_the_data_leaves_the_configuration_as_it_is(cfg: DictConfig) -> None:
    before, resolved = OmegaConf.to_yaml(cfg), OmegaConf.to_container(cfg, resolve=True)
    data = make_data(cfg, views_per_image=2)
    assert (OmegaConf.to_yaml(cfg), OmegaConf.to_container(cfg, resolve=True)) == (before, resolved)
    assert (data.views_per_image, data.batch_size, data.seed, data.num_classes) == (2, 8, 0, 4)


def stripes(root: Path, size: int = 3) -> str:
    """A function that makes an array file."""
    return str(write_arrays(root / f"{size}.npz"))


def needs_size(root: Path, size: int) -> Path:
    return root


def takes_nothing() -> Path:
    return Path()


def prepared_by(cfg: DictConfig, name: str, folder: Path, **keys: Any) -> Any:
    """Make data whose array file a function of this module makes."""
    node = {"_target_": f"{__name__}.{name}", **keys}
    return make_data(changed(cfg, data__path=None, data__root=str(folder), data__prepare=node))


def test_a_function_prepares_the_array_file(cfg: DictConfig, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"_partial_": True}, {"_partial_": True, "size": 5}]
    for number, keys in enumerate(options):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert prepared_by(cfg, "stripes", folder, **keys).num_classes == 4
        assert (folder / f"{keys.get('size', 3)}.npz").is_file()


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("stripes", {"size": "big"}, r"data\.prepare\.size=big does not fit: input should be a valid integer, "),
        ("stripes", {"sise": 3}, r"data\.prepare\.sise=3 is not an option of .*\.stripes: its options are root, size"),
        ("stripez", {}, r"data\.prepare\._target_=.*\.stripez cannot be imported \(.*test_assemble has no stripez\): "),
        ("needs_size", {}, r".*\.needs_size cannot be called with the folder data\.root \(missing .*'size'\): let it"),
        ("takes_nothing", {}, r".*\.takes_nothing cannot be called with the folder data\.root \(too many .*\): let it"),
        ("stripes", {"root": "x"}, r".*\.stripes cannot be called with the folder data\.root \(.*\): let it take the"),
    ],
)
def test_a_function_that_cannot_prepare_the_file_is_refused(
    cfg: DictConfig, tmp_path: Path, name: str, keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        prepared_by(cfg, name, tmp_path, _partial_=True, **keys)


# Method and parts


def test_two_methods_are_combined() -> None:
    alone, both = make_method(configure("method=kd")), make_method(configure("method=dkd", "method@also=kd"))
    assert type(alone) is KD
    assert type(both) is Combined


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def first(*overrides: str) -> Any:
        return parts_of(configure(*overrides)).student.network.state_dict()["conv1.weight"]

    assert first("method=vanilla").equal(first("method=aekt"))
    assert not first("method=vanilla").equal(first("method=vanilla", "seed=1"))


@pytest.mark.parametrize("augmentation", ["mixup", "cutmix"])
@pytest.mark.parametrize("method", [("crd",), ("tfkd",), ("mlkd", "+method.views=2"), ("kd", "method@also=crd")])
def test_a_method_that_needs_labels_refuses_mixed_images(
    tmp_path: Path, augmentation: str, method: tuple[str, ...]
) -> None:
    overrides = (f"method={method[0]}", *method[1:], f"augmentation={augmentation}", "model=resnet20_to_resnet8")
    cfg = changed(configure(*overrides, "data=arrays"), data__path=str(write_arrays(tmp_path / "tiny.npz")))
    made = make_method(cfg)
    name = "kd+crd" if "method@also=crd" in method else method[0]
    sentence = (
        f"method={name} needs the label of each image, but augmentation={augmentation} mixes the labels: choose "
        "another augmentation."
    )
    with pytest.raises(UserError) as caught:
        check_training_images(cfg, make_data(cfg, made.views_per_image), made)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("method=kd", "augmentation=weak_and_strong"),
            "augmentation.policy_from_view=1 leaves all views of method=kd without the policy, because it has 1: "
            "choose augmentation=randaugment, or a method with more views.",
        ),
        (
            ("method=kd", "augmentation.policy_from_view=1"),
            "augmentation.policy_from_view=1 needs a policy: choose augmentation=weak_and_strong, or leave it out.",
        ),
        *(
            (
                (f"method={method}", "data.train_size=0", "data.unlabelled=rest"),
                f"method={method} learns from labels in its main stage, but no training image has one: choose a method "
                "whose main stage reads the teacher, such as kd.",
            )
            for method in ("dml", "ab", "fsp")
        ),
    ],
)
def test_training_images_that_do_not_fit_the_method_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    cfg = configure(*overrides, "model=resnet20_to_resnet8", "data=arrays")
    cfg = changed(cfg, data__path=str(write_arrays(tmp_path / "tiny.npz")))
    made = make_method(cfg)
    with pytest.raises(UserError) as caught:
        check_training_images(cfg, make_data_for(cfg, made), made)
    assert str(caught.value) == sentence


def test_two_views_with_a_strong_one_fit_images_without_labels(tmp_path: Path) -> None:
    options = ("method=mlkd", "+method.views=2", "augmentation=weak_and_strong", "data.train_size=12")
    cfg = configure(*options, "data.unlabelled=rest", "model=resnet20_to_resnet8", "data=arrays")
    cfg = changed(cfg, data__path=str(write_arrays(tmp_path / "tiny.npz")))
    made = make_method(cfg)
    data = make_data_for(cfg, made)
    assert data.views_per_image == 2
    check_training_images(cfg, data, made)


@pytest.mark.parametrize("method", ["crd", "tfkd"])
def test_a_method_that_needs_labels_refuses_images_without(tmp_path: Path, method: str) -> None:
    options = ("model=resnet20_to_resnet8", "data=arrays", "data.train_size=12", "data.unlabelled=rest")
    cfg = changed(configure(f"method={method}", *options), data__path=str(write_arrays(tmp_path / "tiny.npz")))
    made = make_method(cfg)
    data = make_data(cfg)
    sentence = (
        f"method={method} needs the label of each image, but {len(data.unlabelled_index)} training images have none: "
        "choose another method, or set data.unlabelled_share=0 to leave them out."
    )
    with pytest.raises(UserError) as caught:
        check_training_images(cfg, data, made)
    assert str(caught.value) == sentence


def test_standardized_logits_require_a_logit_term() -> None:
    with pytest.raises(
        UserError, match=r"method=at has no logit term on which standardize_logits=true could act: set it to false"
    ):
        parts_of(configure("method=at", "standardize_logits=true"))


@pytest.mark.parametrize("layer", ["serial", "parallel"])
def test_a_serialization_layer_requires_a_logit_term(layer: str) -> None:
    with pytest.raises(
        UserError, match=r"method=vanilla has no logit term on which a serialization layer could act: add serial.*=none"
    ):
        parts_of(configure("method=vanilla", f"serialization={layer}"))


def test_a_layer_that_starts_from_the_teacher_requires_one() -> None:
    with pytest.raises(
        UserError, match=r"serialization\.start=teacher does not fit method=tfkd, which has no teacher: choose serial.*"
    ):
        parts_of(configure("method=tfkd", "serialization=serial", "serialization.start=teacher"))


# Optimiser


def test_the_optimizer_is_the_schedules_by_default() -> None:
    cfg = configure("method=kd")
    optimizer = make_optimizer(cfg)([torch.zeros(1)], lr=0.1)
    assert type(optimizer) is torch.optim.SGD
    assert {name: optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
    }  # fmt: skip


def test_dot_replaces_the_schedules_optimizer_and_takes_its_constants() -> None:
    cfg = configure("optimizer=dot", "method=kd", "schedule.optimizer.weight_decay=1e-4")
    optimizer = make_optimizer(cfg)([torch.zeros(1)], lr=0.1)
    assert type(optimizer) is DOT
    assert {name: optimizer.defaults[name] for name in ("momentum", "weight_decay", "delta")} == {
        "momentum": 0.9, "weight_decay": 1e-4, "delta": 0.075,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("optimizer=dot", "optimizer.delta=0.2"),
            r"The options of optimizer do not fit src.*DOT: momentum 0.9 minus and plus de",
        ),
        (
            ("+schedule.optimizer.nonsense=1",),
            r"The options of schedule\.optimizer do not fit torch\.optim\.SGD: .*non",
        ),
        (
            ("schedule.optimizer.momentum=-1",),
            r"The options of schedule\.optimizer do not fit torch\.optim\.SGD: Inval",
        ),
        (
            ("optimizer=dot", "trainer.precision=16-mixed"),
            r"DOT does not support trainer\.precision=16-mixed: use bf16",
        ),
    ],
)
def test_options_of_an_optimizer_that_do_not_fit_are_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parts_of(configure(*overrides, "method=kd"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("schedule=quick", "schedule.scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR"),
            "schedule.scheduler.T_max is missing: set it with +schedule.scheduler.T_max=VALUE.",
        ),
        (
            ("schedule=quick", "schedule.interval=epoch"),
            "schedule.scheduler.total_steps is missing: set it with +schedule.scheduler.total_steps=VALUE.",
        ),
        (
            ("schedule.scheduler.gamma=abc", "+schedule.scheduler.nonsense=1"),
            "The options of schedule.scheduler do not fit torch.optim.lr_scheduler.MultiStepLR: MultiStepLR.__init__() "
            "got an unexpected keyword argument 'nonsense'.",
        ),
        (
            ("schedule=quick", "schedule.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"),
            "schedule.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau waits for a metric, which it does "
            "not get: choose another.",
        ),
        (
            ("schedule=quick", "schedule.scheduler._target_=torch.optim.lr_scheduler.Nothing"),
            "schedule.scheduler._target_=torch.optim.lr_scheduler.Nothing cannot be imported",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parts_of(configure(*overrides, "method=kd"))
    assert str(caught.value).startswith(sentence)


def test_a_scheduler_that_steps_every_batch_gets_the_number_of_steps_only_if_it_takes_it() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    cosine = "++schedule.scheduler={_target_:torch.optim.lr_scheduler.CosineAnnealingLR,T_max:7}"
    for scheduler, steps in ((cosine, None), ("schedule=quick", 50)):
        recipe = parts_of(configure("method=kd", "schedule=quick", scheduler, "schedule.interval=step")).recipe
        made = recipe.make_scheduler(optimizer, total_steps=50)
        assert getattr(made, "total_steps", None) == steps


# The LightningModule


def test_the_module_is_made_of_the_parts_and_the_settings(cfg: DictConfig) -> None:
    cfg = changed(cfg, standardize_logits=True, channels_last=False, data__mean=[0.1, 0.2, 0.3])
    data, parts = assembled(cfg, seed=3)
    teacher = make_untrained_teacher(cfg, data)
    distiller = make_distiller(changed(cfg, seed=3), data, parts, teacher, {"test": torch.zeros(17)})
    assert (distiller.student, distiller.teacher) == (parts.student.network, teacher)
    assert distiller.recipe is parts.recipe
    settings = distiller.settings
    assert (settings.num_classes, settings.seed, settings.validates_on) == (4, 3, "test")
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), tuple(data.std))
    assert (settings.standardize_logits, settings.channels_last, settings.compiled) == (True, False, False)
    assert set(distiller.teacher_predictions) == {"test"}
    assert (settings.label_smoothing, settings.class_weights) == (0.0, None)


def test_cross_entropy_gets_its_options(cfg: DictConfig) -> None:
    cfg = changed(cfg, label_smoothing=0.1, class_weights="balanced")
    data, parts = assembled(cfg)
    settings = make_distiller(cfg, data, parts, make_untrained_teacher(cfg, data)).settings
    counts = data.trained_labels.bincount()
    assert settings.label_smoothing == 0.1
    assert settings.class_weights == pytest.approx((counts.sum() / (len(counts) * counts)).tolist())


@pytest.mark.parametrize(("labels", "weights"), [([0, 0, 0, 1], (2 / 3, 2.0)), ([0, 1, -1, -1], (1.0, 1.0))])
def test_balanced_classes_have_the_same_total_weight(labels: list[int], weights: tuple[float, ...]) -> None:
    assert balanced_weights(torch.tensor(labels), 2) == pytest.approx(weights)


def test_a_class_without_images_has_no_weight() -> None:
    assert balanced_weights(torch.tensor([0, 0, 2, 2]), 3) == pytest.approx((2 / 3, 0.0, 2 / 3))


def test_parameters_of_a_method_depend_on_the_seed_alone(cfg: DictConfig) -> None:
    cfg = changed(cfg, method=configure("method=dml").method)
    one, again, other = (make_distiller(changed(cfg, seed=seed), *assembled(cfg, seed), None) for seed in (0, 0, 1))
    assert same(weights(one), weights(again))
    assert not same(weights(one.method), weights(other.method))


def test_logits_of_a_peer_cannot_be_standardized(cfg: DictConfig) -> None:
    composed = configure("method=dml")
    cfg = changed(cfg, method=composed.method, serialization=composed.serialization, standardize_logits=True)
    data, method = make_data(cfg), make_method(cfg)
    with pytest.raises(UserError, match=r"^standardize_logits=true does not reach all logits"):
        make_parts(cfg, data, method, for_training=True)
    make_parts(cfg, data, method)  # an earlier run can be opened


def test_a_second_student_does_not_get_the_first_ones_weights(cfg: DictConfig) -> None:
    cfg = changed(cfg, method=configure("method=dml").method)
    distiller: Any = make_distiller(cfg, *assembled(cfg), None)
    assert not same(weights(distiller.method.peer), weights(distiller.student))
    again: Any = make_distiller(cfg, *assembled(cfg), None)
    assert same(weights(distiller.method.peer), weights(again.method.peer))


def test_peers_differ_by_seed_and_number_and_leave_other_random_numbers_alone(cfg: DictConfig) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, second = (make_peer(cfg, 4, number) for number in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    other_seed = make_peer(changed(cfg, seed=1), 4, 0)
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(second))
    assert not same(weights(first), weights(other_seed))


def test_a_method_on_features_refuses_a_teacher_that_has_none(cfg: DictConfig) -> None:
    cfg = changed(cfg, method=configure("method=at").method)
    data, parts = assembled(cfg)
    teacher: Any = copy.copy(make_untrained_teacher(cfg, data))
    shapes = teacher.shapes(data.image_shape)
    teacher.shapes = lambda image_shape: shapes._replace(features=())
    with pytest.raises(UserError, match="method=at needs features, but the teacher resnet20 has none: choose a method"):
        make_distiller(cfg, data, parts, teacher)


def test_winograd_changes_the_student_for_training_only(cfg: DictConfig) -> None:
    def convolutions(for_training: bool) -> set[str]:
        data = make_data(cfg)
        parts = make_parts(changed(cfg, winograd=True), data, make_method(cfg), for_training=for_training)
        return {type(module).__name__ for module in parts.student.network.modules() if "Conv" in type(module).__name__}

    assert convolutions(False) == {"Conv2d"}
    assert convolutions(True) != {"Conv2d"}


def test_classes_of_the_data_are_the_outputs_of_the_student() -> None:
    for data, classes in CLASSES.items():
        cfg = configure(f"data={data}", "model=resnet20_to_resnet8", "method=kd")
        assert parts_of(cfg).student.network.classifier_layer.out_features == classes
