"""`conf/` composes to published constants, every option of every group builds, and the command line wins."""

import itertools
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.config.instantiate import instantiate
from src.setup.assemble import make_optimizer
from src.setup.networks import make_network
from tests.helpers.configure import (
    CLASSES,
    CONF,
    LAYERS,
    METHODS,
    PAIRS,
    SCHEDULES,
    check_everything_builds,
    configure,
    distils_logits,
    options,
    parts_of,
)


def test_every_option_of_every_group_is_tried_here() -> None:
    assert set(options("data")) == set(CLASSES)
    assert set(options("serialization")) == set(LAYERS)


# Everything builds


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_builds_under_its_name(pair: str) -> None:
    cfg = configure("method=dkd", f"model={pair}")
    check_everything_builds(cfg)
    assert cfg.model.name == pair == f"{cfg.model.teacher.name}_to_{cfg.model.student.name}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_combines_with_every_pair(pair: str) -> None:
    for method in METHODS:  # the test above builds the networks of each pair
        cfg = configure(f"method={method}", f"model={pair}")
        assert type(instantiate(cfg.method, "method")).__name__.lower() == method
        assert cfg.model.name == pair


@pytest.mark.slow
@pytest.mark.parametrize(("data", "schedule"), list(itertools.product(CLASSES, SCHEDULES)))
def test_every_data_schedule_method_and_serialization_combine(data: str, schedule: str) -> None:
    for method, layer in itertools.product(METHODS, LAYERS):
        if distils_logits(method) or layer == "none":
            chosen = (f"data={data}", f"schedule={schedule}", f"method={method}", f"serialization={layer}")
            check_everything_builds(configure(*chosen, "model=resnet20_to_resnet8"))


def test_the_published_pairs_exist() -> None:
    published = """
        wrn40_2_to_wrn16_2 wrn40_2_to_wrn40_1 resnet56_to_resnet20 resnet110_to_resnet20 resnet110_to_resnet32
        resnet32x4_to_resnet8x4 vgg13_to_vgg8 vgg13_to_mobilenetv2 resnet50_to_mobilenetv2 resnet50_to_vgg8
        resnet32x4_to_shufflev1 resnet32x4_to_shufflev2 wrn40_2_to_shufflev1 resnet32x4_to_wrn16_2
        resnet32x4_to_wrn40_2 wrn40_2_to_resnet8x4 wrn40_2_to_mobilenetv2 resnet34_to_resnet18 resnet50_to_mobilenetv1
    """
    assert set(published.split()) <= set(PAIRS)


@pytest.mark.parametrize("data", CLASSES)
def test_every_data_builds(data: str) -> None:
    check_everything_builds(configure(f"data={data}"))


@pytest.mark.parametrize("network", options("network"))
@pytest.mark.parametrize("classes", [10, 100])
def test_every_network_builds_under_its_name(network: str, classes: int) -> None:
    node: Any = OmegaConf.load(CONF / "network" / f"{network}.yaml")
    assert node.name == network.rsplit("/", 1)[-1]
    assert node._target_.rsplit(".", 1)[-1].replace("_", "").lower() == node.name.replace("_", "")
    assert make_network(node, "network", classes).classifier_layer.out_features == classes
    assert all(50 < accuracy < 100 for accuracy in node.published_accuracy.values())


@pytest.mark.parametrize(("method", "layer"), list(itertools.product(METHODS, LAYERS)))
def test_every_method_builds_with_every_serialization_that_can_act_on_it(method: str, layer: str) -> None:
    cfg = configure(f"method={method}", f"serialization={layer}")
    if not distils_logits(method) and layer != "none":
        with pytest.raises(UserError, match=rf"method={method} has no logit term .* add serialization=none"):
            parts_of(cfg)
        return
    parts = parts_of(cfg)
    assert type(parts.serialization).__name__ == LAYERS[layer]
    assert type(parts.method).__name__.lower() == method


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_builds(schedule: str) -> None:
    cfg = configure(f"schedule={schedule}", "schedule.epochs=12")
    check_everything_builds(cfg)
    photos = "imagenet" in schedule or "photos" in schedule
    assert parts_of(cfg).method.warmup_epochs == (0 if photos else 1)
    made: Any = make_optimizer(cfg)
    sgd = {"momentum": 0.9, "weight_decay": 1e-4 if photos else 5e-4}
    assert made.keywords == ({"weight_decay": 0.05} if schedule == "few_photos" else sgd)
    assert cfg.trainer.max_epochs == 12


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds_and_the_command_line_overrides_it(experiment: str) -> None:
    cfg = configure(f"experiment={experiment}", "method=kd", "seed=3", "schedule.epochs=5")
    assert isinstance(parts_of(cfg).method, type(instantiate(configure("method=kd").method, "method")))
    assert (cfg.seed, cfg.trainer.max_epochs) == (3, 5)


@pytest.mark.parametrize("trainer", [name for name in options("trainer") if name in {"auto", "cpu", "debug"}])
def test_trainers_for_any_machine_build(trainer: str) -> None:
    made = hydra.utils.instantiate(configure(f"trainer={trainer}").trainer, accelerator="cpu", logger=False)
    assert made.max_epochs == (1 if trainer == "debug" else 240)


def test_evaluate_differs_from_train_in_its_own_keys_only() -> None:
    evaluate = OmegaConf.to_container(configure(command="evaluate"))
    train = OmegaConf.to_container(configure("method=vanilla", "logger=none"))
    assert isinstance(evaluate, dict)
    assert (evaluate.pop("run"), evaluate.pop("checkpoint")) == (None, None)
    assert evaluate == train


def test_report_composes() -> None:
    assert configure("runs=here", command="report").runs == "here"


# Published settings


def test_the_published_protocol_of_cifar100_is_the_default() -> None:
    schedule = configure().schedule
    assert (schedule.epochs, schedule.batch_size, schedule.learning_rate) == (240, 64, 0.05)
    assert (schedule.scheduler.gamma, schedule.interval) == (0.1, "epoch")


def test_the_published_protocol_of_imagenet() -> None:
    chosen = ("data=imagenet", "model=resnet50_to_mobilenetv1", "schedule=imagenet100")
    cfg = configure(*chosen, "method=dkd")
    assert (cfg.schedule.epochs, cfg.schedule.batch_size, cfg.schedule.learning_rate) == (100, 512, 0.2)
    assert cfg.schedule.scheduler.milestones == [30, 60, 90]
    assert cfg.schedule.optimizer.weight_decay == 1e-4
    assert (cfg.data.image_size, cfg.data.resize, cfg.data.scale) == (224, 256, [0.08, 1.0])
    assert (cfg.method.beta, cfg.method.temperature, cfg.method.warmup_epochs) == (2.0, 1.0, 1)
    assert cfg.teacher.source == "torchvision/resnet50"
    kd = configure(*chosen, "method=kd").method
    assert (kd.cross_entropy_weight, kd.kd_weight, kd.temperature) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize(("student", "rate"), [("mobilenetv2", 0.01), ("shufflev1", 0.01), ("vgg8", 0.05)])
def test_the_learning_rate_is_the_students(student: str, rate: float) -> None:
    assert configure(f"network@model.student={student}").schedule.learning_rate == rate


def test_published_constants_of_methods() -> None:
    kd = configure("method=kd").method
    assert (kd.cross_entropy_weight, kd.kd_weight, kd.temperature) == (0.1, 0.9, 4.0)
    for method in ("dkd", "aekt"):
        dkd = configure(f"method={method}").method
        assert (dkd.cross_entropy_weight, dkd.alpha, dkd.temperature) == (1.0, 1.0, 4.0)


# How groups act on each other


def test_aekt_selects_the_serial_layer_and_the_command_line_overrides_it() -> None:
    def layer(*overrides: str) -> str:
        return configure(*overrides).serialization._target_.rsplit(".", 1)[-1]

    assert layer() == layer("method=aekt") == "Serial"
    for order in itertools.permutations(["method=aekt", "serialization=none"]):
        assert layer(*order) == "NoSerialization"
    assert layer("method=aekt", "serialization=parallel") == "Parallel"
    assert layer("method=dkd") == "NoSerialization"
    assert layer("method=dkd", "serialization=serial") == "Serial"


def test_the_teacher_is_trained_alone_whatever_method_trains_the_student() -> None:
    cfg = configure("method=aekt", "serialization=serial")
    assert cfg.teacher.method.name == "vanilla"
    assert cfg.teacher.serialization._target_ == "src.training.serialization.NoSerialization"


def test_dot_keeps_the_constants_of_the_schedule() -> None:
    cfg = configure("optimizer=dot", "method=kd", "schedule.optimizer.weight_decay=1e-4")
    assert dict(cfg.optimizer) == {
        "_target_": "src.training.dot.DOT", "_partial_": True, "momentum": 0.9, "weight_decay": 1e-4, "delta": 0.075,
    }  # fmt: skip
    assert cfg.schedule.optimizer == {**configure().schedule.optimizer, "weight_decay": 1e-4}


def test_debug_and_profile_start_over_and_other_trainers_resume() -> None:
    assert {name for name in options("trainer") if configure(f"trainer={name}").start_over} == {"debug", "profile"}
