"""What conf/ composes to, and which of it is a run's identity."""

import copy
import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from src.assemble import Parts, make_optimizer, make_parts
from src.config import build, check_ranges
from src.data.image_data import ImageData
from src.errors import UserError
from src.loading import make_network, place_sources
from src.methods.aekt import AEKT
from src.run import identity, run_folder

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


CLASSES = {"cifar10": 10, "cifar100": 100, "glyphs": 62, "imagenet": 1000, "imagefolder": 7, "arrays": 5, "stream": 7}
METHODS, PAIRS, SCHEDULES = options("method"), options("model"), options("schedule")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
LAYERS = {"none": "Serialization", "serial": "Serial", "parallel": "Parallel"}


@functools.cache
def configure(*overrides: str, command: str = "train") -> DictConfig:
    """As Hydra composes it; shared by the tests, which leave it as it is."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def parts_of(cfg: DictConfig, classes: int | None = None) -> Parts:
    data: Any = SimpleNamespace(num_classes=classes or CLASSES.get(cfg.data.name, 7), mean=MEAN, std=STD)
    return make_parts(cfg, data)


def check_everything_builds(cfg: DictConfig) -> None:
    """All that is built before data is read."""
    classes = CLASSES.get(cfg.data.name, 7)
    check_ranges(cfg)
    parts = parts_of(cfg)
    teacher = make_network(cfg.model.teacher, "model.teacher", classes)
    assert parts.student.network.classifier_layer.out_features == teacher.classifier_layer.out_features == classes
    assert type(parts.method).__name__.lower() == cfg.method.name
    assert type(parts.serialization).__name__ in LAYERS.values()
    assert callable(hydra.utils.instantiate(cfg.schedule.scheduler))
    assert isinstance(hydra.utils.instantiate(cfg.data, batch_size=8, seed=0), ImageData)


def test_every_option_of_every_group_is_tried_here() -> None:
    assert set(options("data")) == set(CLASSES)
    assert set(options("serialization")) == set(LAYERS)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_builds_under_its_name(pair: str) -> None:
    cfg = configure("method=dkd", f"model={pair}")
    check_everything_builds(cfg)
    assert cfg.model.name == pair == f"{cfg.model.teacher.name}_to_{cfg.model.student.name}"


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_every_method_goes_with_every_pair(pair: str) -> None:
    for method in METHODS:  # the networks are built once a pair, above
        cfg = configure(f"method={method}", f"model={pair}")
        assert type(build(cfg.method, "method")).__name__.lower() == method
        assert cfg.model.name == pair


def distils_logits(method: str) -> bool:
    node: Any = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return hydra.utils.get_class(node._target_).distils_logits  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "schedule"), list(itertools.product(CLASSES, SCHEDULES)))
def test_everything_else_goes_with_everything(data: str, schedule: str) -> None:
    for method, layer in itertools.product(METHODS, LAYERS):
        if distils_logits(method) or layer == "none":
            chosen = (f"data={data}", f"schedule={schedule}", f"method={method}", f"serialization={layer}")
            check_everything_builds(configure(*chosen, "model=resnet20_to_resnet8"))


def test_the_published_pairs_are_there() -> None:
    published = """
        wrn40_2_to_wrn16_2 wrn40_2_to_wrn40_1 resnet56_to_resnet20 resnet110_to_resnet20 resnet110_to_resnet32
        resnet32x4_to_resnet8x4 vgg13_to_vgg8 vgg13_to_mobilenetv2 resnet50_to_mobilenetv2 resnet50_to_vgg8
        resnet32x4_to_shufflev1 resnet32x4_to_shufflev2 wrn40_2_to_shufflev1 resnet32x4_to_wrn16_2
        resnet32x4_to_wrn40_2 wrn40_2_to_resnet8x4 wrn40_2_to_mobilenetv2 resnet34_to_resnet18 resnet50_to_mobilenetv1
    """
    assert set(published.split()) <= set(PAIRS)


@pytest.mark.parametrize(("student", "rate"), [("mobilenetv2", 0.01), ("shufflev1", 0.01), ("vgg8", 0.05)])
def test_learning_rates_go_with_the_student(student: str, rate: float) -> None:
    assert configure(f"network@model.student={student}").schedule.learning_rate == rate


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
def test_every_method_builds_with_every_serialization_that_means_something(method: str, layer: str) -> None:
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
    assert parts_of(cfg).method.warmup_epochs == (0 if "imagenet" in schedule else 1)
    assert make_optimizer(cfg).keywords == {"momentum": 0.9, "weight_decay": 1e-4 if "imagenet" in schedule else 5e-4}
    assert cfg.trainer.max_epochs == 12


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("wrn40_2_to_wrn16_2", 6.0),
        ("resnet56_to_resnet20", 2.0),
        ("resnet20_to_resnet8", 2.0),
        ("slimnet600k_to_resnet8", 2.0),
        ("slimnet600k_to_resnet20", 2.0),
        ("vgg13_to_mobilenetv2", 6.0),
        ("resnet34_to_resnet18", 0.5),
    ],
)
@pytest.mark.parametrize("method", ["dkd", "aekt"])
def test_beta_goes_with_the_pair(method: str, pair: str, beta: float) -> None:
    built = build(configure(f"method={method}", f"model={pair}").method, "method")
    assert built.beta == beta


@pytest.mark.parametrize("method", ["dkd", "aekt"])
def test_beta_of_an_unlisted_pair_is_the_default(method: str) -> None:
    unlisted = configure(f"method={method}", "network@model.teacher=resnet110", "network@model.student=wrn16_1")
    assert unlisted.model.name == "resnet110_to_wrn16_1"
    assert unlisted.method.beta == 8.0
    assert configure(f"method={method}", "method.beta=3").method.beta == 3


def test_constants_of_a_pair_reach_a_method_that_is_added_to_another() -> None:
    cfg = configure("method=dkd", "method@also=kd", "model=resnet34_to_resnet18", "data=imagenet")
    assert (cfg.also.kd_weight, cfg.also.temperature) == (0.5, 1.0)
    assert type(parts_of(cfg).method).__name__ == "Combined"
    assert run_folder(cfg).parts[-2] == "dkd+kd"


def test_published_constants() -> None:
    kd = configure("method=kd").method
    assert (kd.cross_entropy_weight, kd.kd_weight, kd.temperature) == (0.1, 0.9, 4.0)
    for method in ("dkd", "aekt"):
        dkd = configure(f"method={method}").method
        assert (dkd.cross_entropy_weight, dkd.alpha, dkd.temperature) == (1.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("method", "pair", "constants"),
    [
        ("kd", "wrn40_2_to_wrn16_2", {"temperature": 2.0, "kd_weight": 9.0, "cross_entropy_weight": 0.1}),
        ("kd", "resnet110_to_resnet20", {"temperature": 4.0, "kd_weight": 12.0}),
        ("kd", "resnet50_to_mobilenetv2", {"temperature": 3.0, "kd_weight": 1.0}),
        ("kd", "resnet34_to_resnet18", {"temperature": 2.0, "kd_weight": 9.0, "cross_entropy_weight": 0.1}),
        ("dkd", "resnet56_to_resnet20", {"temperature": 3.0, "alpha": 18.0, "beta": 36.0}),
        ("aekt", "resnet32x4_to_resnet8x4", {"temperature": 2.0, "alpha": 9.0, "beta": 72.0, "gamma": 0.4}),
        ("aekt", "slimnet600k_to_resnet8", {"temperature": 2.0, "alpha": 9.0, "beta": 18.0}),
        ("ctkd", "wrn40_2_to_wrn16_2", {"kd_weight": 9.0}),
        ("mlkd", "wrn40_2_to_wrn16_2", {"kd_weight": 9.0}),
        ("nkd", "wrn40_2_to_wrn16_2", {"gamma": 3.5}),
    ],
)
def test_standardized_logits_have_constants_of_their_own(method: str, pair: str, constants: dict[str, float]) -> None:
    cfg = configure(f"method={method}", f"model={pair}", "standardize_logits=true")
    assert {name: cfg.method[name] for name in constants} == constants
    assert method == "nkd" or configure(f"method={method}", f"model={pair}").method != cfg.method
    assert run_folder(cfg).parts[-2] == f"{method}+standardized"


def test_standardized_logits_want_a_logit_term() -> None:
    with pytest.raises(UserError, match=r"method=at has no logit term: standardize_logits=true"):
        parts_of(configure("method=at", "standardize_logits=true"))


def test_dot_keeps_the_constants_of_the_schedule() -> None:
    cfg = configure("optimizer=dot", "method=kd", "averaging=ema")
    assert dict(cfg.schedule.optimizer) == {
        "_target_": "src.dot.DOT", "_partial_": True, "momentum": 0.9, "weight_decay": 5e-4, "delta": 0.075,
    }  # fmt: skip
    assert run_folder(cfg).parts[-2] == "kd+dot+averaged"
    with pytest.raises(UserError, match=r"schedule.optimizer does not fit src.dot.DOT: momentum 0.9 -\+ delta 0.2"):
        parts_of(configure("optimizer=dot", "schedule.optimizer.delta=0.2", "method=kd"))


@pytest.mark.parametrize(
    ("epochs", "milestones", "warmup"), [(240, [150, 180, 210], 20), (20, [12, 15, 18], 2), (120, [75, 90, 105], 10)]
)
def test_milestones_and_warmup_scale_with_the_epochs(epochs: int, milestones: list[int], warmup: int) -> None:
    cfg = configure(f"schedule.epochs={epochs}", "method=dkd")
    assert cfg.schedule.scheduler.milestones == milestones
    assert cfg.method.warmup_epochs == warmup
    assert cfg.trainer.max_epochs == epochs


def test_the_published_protocol_is_the_default() -> None:
    schedule = configure().schedule
    assert (schedule.epochs, schedule.batch_size, schedule.learning_rate) == (240, 64, 0.05)
    assert (schedule.scheduler.gamma, schedule.interval) == (0.1, "epoch")


def test_aekt_implies_serial_and_the_command_line_wins() -> None:
    def layer(*overrides: str) -> str:
        return configure(*overrides).serialization._target_.rsplit(".", 1)[-1]

    assert layer() == layer("method=aekt") == "Serial"
    for order in itertools.permutations(["method=aekt", "serialization=none"]):
        assert layer(*order) == "Serialization"
    assert layer("method=aekt", "serialization=parallel") == "Parallel"
    assert layer("method=dkd") == "Serialization"
    assert layer("method=dkd", "serialization=serial") == "Serial"


def test_the_teacher_is_trained_alone_whatever_teaches_the_student() -> None:
    cfg = configure("method=aekt", "serialization=serial")
    assert cfg.teacher.method.name == "vanilla"
    assert cfg.teacher.serialization._target_ == "src.serialization.Serialization"


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds_and_gives_way_to_the_command_line(experiment: str) -> None:
    cfg = configure(f"experiment={experiment}", "method=kd", "seed=3", "schedule.epochs=5")
    assert isinstance(parts_of(cfg).method, type(build(configure("method=kd").method, "method")))
    assert (cfg.seed, cfg.trainer.max_epochs) == (3, 5)


@pytest.mark.parametrize("trainer", [name for name in options("trainer") if name in {"auto", "cpu", "debug"}])
def test_trainers_that_every_machine_has(trainer: str) -> None:
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


def test_weights_start_from_the_seed_whatever_the_method() -> None:
    def first(*overrides: str) -> Any:
        return parts_of(configure(*overrides)).student.network.state_dict()["conv1.weight"]

    assert first("method=vanilla").equal(first("method=aekt"))
    assert not first("method=vanilla").equal(first("method=vanilla", "seed=1"))


def test_a_source_takes_the_place_of_the_network_and_keeps_its_learning_rate() -> None:
    cfg = copy.deepcopy(
        configure("model=resnet34_to_resnet18", "teacher.source=timm/resnet26t", "student.source=torchvision/resnet18")
    )
    place_sources(cfg)
    assert (cfg.model.teacher.name, cfg.model.student.name) == ("resnet26t", "resnet18")
    assert cfg.model.name == "resnet26t_to_resnet18"
    assert cfg.model.teacher.published_accuracy == {}
    assert cfg.model.student.published_accuracy == {"imagenet": 69.76}
    assert cfg.schedule.learning_rate == 0.2
    once = copy.deepcopy(cfg)
    place_sources(cfg)
    assert cfg == once


def test_a_program_gives_the_teacher_its_name() -> None:
    cfg = copy.deepcopy(configure())
    cfg.teacher.update(allow_program=True, path="somewhere/efficientnet_lite0.pt2")
    place_sources(cfg)
    assert cfg.model.name == "efficientnet_lite0_to_wrn16_2"
    assert cfg.model.teacher.published_accuracy == {}


@pytest.mark.parametrize("source", ["keras/resnet50", "torchvision", "timm/", "somewhere/teacher.pth"])
def test_an_unknown_source_is_refused(source: str) -> None:
    cfg = copy.deepcopy(configure())
    cfg.teacher.source = source
    with pytest.raises(UserError, match=f"^teacher.source={source} is not known, these are: mdistiller, torchvision/"):
        place_sources(cfg)


# A run's identity


def folder_of(*overrides: str) -> Path:
    """Of a run with these overrides; plain values do without Hydra, which is slow."""
    values = [override for override in overrides if "." in override.split("=")[0] and "@" not in override]
    cfg = copy.deepcopy(configure(*(override for override in overrides if override not in values)))
    for override in values:
        key, value = override.split("=")
        OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value, merge=False)
    return run_folder(cfg)


@pytest.mark.parametrize(
    "irrelevant",
    [
        "logger=none",
        "logger=csv",
        "trainer=cpu",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=true",
        "teacher.store=elsewhere",
        "teacher.train_if_missing=false",
        "teacher.view_store=true",
        "teacher.store_gigabytes=1",
        "teacher.allow_program=true",
        "data.workers=3",
        "data.root=elsewhere",
        "data.path=elsewhere/file.npz",
        "start_over=true",
        "gradients.every=7",
        "gradients.temperature=2",
        "model.teacher.published_accuracy={cifar100: 1.0}",
        "model.student.published_accuracy={}",
        "method.pairs={}",
        "method.standardized={}",
        "method.year=1999",
        "method.settings=guessed",
    ],
)
def test_what_cannot_change_a_result_is_no_identity(irrelevant: str) -> None:
    assert folder_of("method.beta=6", irrelevant) == folder_of("method.beta=6")


def test_the_folder_of_runs_is_no_identity() -> None:
    here, there = folder_of("runs=here"), folder_of("runs=there/below")
    assert here.relative_to("here") == there.relative_to("there/below")


@pytest.mark.parametrize(
    "relevant",
    [
        "seed=1",
        "method=dkd",
        "method=kd",
        "method=vanilla",
        "method@also=kd",
        "trainer=ddp_cpu",  # batch norm is local there
        "standardize_logits=true",
        "optimizer=dot",
        "averaging=ema",
        "method.gamma=0.41",
        "method.beta=6.1",
        "method.weighting=log_ratio",
        "serialization=none",
        "serialization=parallel",
        "serialization.lr_scale=0.2",
        "schedule=quick",
        "schedule.epochs=241",
        "schedule.batch_size=65",
        "schedule.learning_rate=0.051",
        "schedule.optimizer.momentum=0.8",
        "schedule.scheduler.gamma=0.2",
        "model=resnet56_to_resnet20",
        "network@model.student=wrn16_1",
        "network@model.teacher=resnet110",
        "data=cifar10",
        "data.train_size=1000",
        "data.val_size=1000",
        "data.split_seed=1",
        "data.mean=[0.5,0.5,0.5]",
        "data.padding=2",
        "data.flip=false",
        "teacher.seed=1",
        "teacher.path=somewhere/teacher.pth",
        "teacher.source=timm/resnet18",
        "teacher.image_size=64",
        "student.path=somewhere/student.pth",
        "student.source=timm/resnet18",
        "trainer=debug",
        "trainer.precision=bf16-mixed",
        "channels_last=false",
        "compile=true",
        "winograd=true",
        "teacher.winograd=true",
        "teacher.precision=bfloat16",
        "teacher.fold=true",
        "teacher.answer_dtype=float16",
    ],
)
def test_what_can_change_a_result_is_identity(relevant: str) -> None:
    assert folder_of(relevant) != folder_of()


def test_a_folder_says_what_it_holds() -> None:
    folder = folder_of("runs=here", "data=cifar10", "model=resnet20_to_resnet8", "method=aekt", "seed=7")
    assert folder.parts[:-1] == ("here", "cifar10", "resnet20_to_resnet8", "aekt")
    assert folder.name.startswith("serial-seed7-")


def test_a_network_alone_is_the_same_run_whatever_pair_it_was_named_through() -> None:
    through = [
        ["model=resnet56_to_resnet20"],
        ["model=slimnet600k_to_resnet20"],
        ["network@model.student=resnet20"],
        ["model=resnet56_to_resnet20", "teacher.path=somewhere.pth", "teacher.seed=4"],
    ]
    folders = {folder_of("method=vanilla", *overrides) for overrides in through}
    assert len(folders) == 1
    assert folders.pop().parent.parts[-3:] == ("cifar100", "resnet20", "vanilla")


def test_identity_is_plain_and_resolved() -> None:
    settings = identity(configure())
    assert settings["schedule"]["scheduler"]["milestones"] == [150, 180, 210]
    assert settings["method"]["beta"] == 6.0
    assert "${" not in str(settings)


# What a node builds


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.beta=abc", r"^method\.beta=abc does not fit: input should be a valid number"),
        ("+method.betta=2", r"^method\.betta=2 is no option of src\.methods\.aekt\.AEKT; it knows .*beta"),
        ("method.weighting=foo", r"^method\.weighting=foo does not fit: input should be 'ratio', 'log_ratio' or"),
        ("method.confidence_term=perhaps", r"^method\.confidence_term=perhaps does not fit"),
    ],
)
def test_options_are_checked_against_the_signature(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(configure("method=aekt", override).method, "method")


def test_a_subclass_knows_the_options_of_its_base() -> None:
    built = build(configure("method=aekt", "method.gamma=0.5", "method.temperature=2").method, "method")
    assert isinstance(built, AEKT)
    assert (built.gamma, built.temperature) == (0.5, 2.0)


@pytest.mark.parametrize(
    "option",
    [
        "schedule.epochs=0",
        "schedule.epochs=-1",
        "trainer.max_epochs=-1",
        "schedule.batch_size=0",
        "schedule.learning_rate=-0.1",
        "data.padding=-1",
        "data.workers=-1",
        "schedule.interval=never",
        "trainer.precision=64-true",
        "teacher.precision=float16",
        "teacher.answer_dtype=bfloat16",
        "data.mean=[0.5]",
        "teacher.std=[0.5]",
        "teacher.image_size=0",
    ],
)
def test_values_that_cannot_be_trained_with(option: str) -> None:
    key, value = option.split("=")
    cfg = copy.deepcopy(configure())
    OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)
    with pytest.raises(UserError, match=f"^{re.escape(option)} does not fit"):
        check_ranges(cfg)


def test_numbers_at_the_edge_of_what_can() -> None:
    cfg = copy.deepcopy(configure())
    for key, value in {"schedule.epochs": 1, "schedule.batch_size": 1, "data.padding": 0, "data.workers": 0}.items():
        OmegaConf.update(cfg, key, value)
    check_ranges(cfg)
