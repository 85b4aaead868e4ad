"""A configuration is validated before any work: limits, required keys, and options that contradict each other."""

import copy
import re
from typing import Any, get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from src.common.errors import UserError
from src.config import schema
from src.config.validation import OPTIONAL_TARGETS, TARGETS, UNTYPED_NODES, check_training, validate
from tests.helpers.configure import changed, configure, without

INVALID: dict[tuple[str, ...], list[tuple[str, Any, str]]] = {
    (): [
        ("checkpoint_minutes", -1.0, "greater than or equal to 0"),
        ("check_loss_every_n_steps", 0, "greater than 0"),
        ("schedule.epochs", 0, "greater than 0"),
        ("schedule.epochs", -1, "greater than 0"),
        ("schedule.batch_size", 0, "greater than 0"),
        ("schedule.learning_rate", -0.1, "greater than 0"),
        ("schedule.learning_rate", 0.0, "greater than 0"),
        ("schedule.interval", "never", "choose one of epoch, step"),
        ("schedule.distillation_warmup", -1.0, "greater than or equal to 0"),
        ("trainer.max_epochs", -1, "greater than 0"),
        ("trainer.precision", "64-true", "choose one of 32-true, bf16-mixed, 16-mixed"),
        ("trainer.limit_train_batches", 0, "greater than 0"),
        ("trainer.limit_train_batches", 1.5, "give a number of batches, or a fraction of all batches between 0 and 1"),
        ("trainer.limit_val_batches", -1, "greater than or equal to 0"),
        ("trainer.limit_val_batches", 2.5, "give a number of batches, or a fraction of all batches between 0 and 1"),
        ("trainer.limit_test_batches", 0, "greater than 0"),
        ("trainer.max_steps", 0, "give a positive number of steps"),
        ("trainer.max_time", "5 hours", "give a time as HH:MM:SS"),
        ("trainer.max_time", 5, "give a time as HH:MM:SS"),
        ("trainer.fast_dev_run", True, "use trainer=debug"),
        ("trainer.callbacks", [{"_target_": "lightning.pytorch.callbacks.Timer"}], "use trainer.max_time"),
        ("trainer.callbacks", [{"monitor": "loss"}], "give a list of classes, each as {_target_: NAME}"),
        ("trainer.callbacks", "EarlyStopping", "give a list of classes"),
        ("trainer.strategy", {"static_graph": True}, "give its name, or its class as {_target_: NAME}"),
        ("data.prepare", "glyphs", "give a function as {_target_: NAME, _partial_: true}"),
        ("data.prepare", {"_partial_": True}, "give a function as"),
        ("data.name", "a/b", "the name of a folder"),
        ("data.name", "..", "the name of a folder"),
        ("method.name", "a/b", "the name of a folder"),
        ("model.student.name", "a\\b", "the name of a folder"),
        ("model.teacher.name", "", "the name of a folder"),
        ("teacher.precision", "float64", "choose one of float32, bfloat16"),
        ("teacher.precision", "float16", "choose one of float32, bfloat16"),
        ("teacher.answer_dtype", "bfloat16", "choose one of float32, float16"),
        ("teacher.mean", [0.5, 0.5], "give one number for each of the 3 channels"),
        ("teacher.std", [0.5], "give one number for each of the 3 channels"),
        ("teacher.image_size", 0, "greater than 0"),
        ("teacher.view_store_gigabytes", -1.0, "greater than or equal to 0"),
        ("gradients.every", -1, "greater than or equal to 0"),
        ("data.train_size", -1, "greater than or equal to 0"),
        ("data.val_size", -1, "greater than or equal to 0"),
        ("data.workers", -1, "greater than or equal to 0"),
        ("data.mean", [0.5], "give one number for each of the 3 channels"),
        ("data.std", [], "give one number for each of the 3 channels"),
        ("data.padding", -1, "greater than or equal to 0"),
        ("data.train_size", 1.5, "give a whole number of images, or a share below 1"),
        ("data.val_size", 1.0, "give a whole number of images, or a share below 1"),
        ("label_smoothing", 1.0, "less than 1"),
        ("label_smoothing", -0.1, "greater than or equal to 0"),
        ("class_weights", "even", "choose one of balanced"),
        ("data.fixed_views", 0, "greater than 0"),
        ("data.unlabelled_share", 1.0, "less than 1"),
        ("data.unlabelled_share", -0.1, "greater than or equal to 0"),
        ("augmentation.name", "a/b", "the name of a folder"),
        ("augmentation.policy_from_view", -1, "greater than or equal to 0"),
        ("data.wrong_labels", 1.0, "less than 1"),
        ("data.wrong_labels", -0.1, "greater than or equal to 0"),
        ("data.device_memory", "gpu", "choose one of auto, true, false"),
        ("model.teacher.learning_rate", 0, "greater than 0"),
        ("model.teacher.mean", [0.5], "give one number for each of the 3 channels"),
        ("model.student.std", [0.5], "give one number for each of the 3 channels"),
        ("method.year", "long ago", "a valid integer"),
    ],
    ("data=imagefolder",): [
        ("data.train_size", -1, "greater than or equal to 0"),
        ("data.val_size", -1, "greater than or equal to 0"),
        ("data.workers", -1, "greater than or equal to 0"),
        ("data.mean", [0.5], "give one number for each of the 3 channels"),
        ("data.std", [0.5], "give one number for each of the 3 channels"),
        ("data.image_size", 0, "greater than 0"),
        ("data.resize", 0, "greater than 0"),
    ],
    ("data=stream",): [("data.cache_gigabytes", -1.0, "greater than or equal to 0"), ("data.resize", 0, "greater")],
    ("command=export",): [
        ("images", 0, "greater than 0"),
        ("calibration_images", 0, "greater than 0"),
        ("finetune_epochs", -1, "greater than or equal to 0"),
    ],
    ("command=measure",): [
        ("images", 0, "greater than 0"),
        ("calibration_images", 0, "greater than 0"),
        ("rounds", 0, "greater than 0"),
        ("threads", 0, "greater than 0"),
    ],
}
"""By overrides: options with a value beyond their limit, and a part of the reason."""
CASES = [(overrides, *case) for overrides, cases in INVALID.items() for case in cases]


def compose(overrides: tuple[str, ...]) -> DictConfig:
    commands = [override.partition("=")[2] for override in overrides if override.startswith("command=")]
    return configure(*(o for o in overrides if not o.startswith("command=")), command=[*commands, "train"][0])


def with_value(cfg: DictConfig, option: str, value: Any) -> DictConfig:
    with open_dict(cfg):
        return changed(cfg, **{option.replace(".", "__"): value})


@pytest.mark.parametrize(("overrides", "option", "value", "reason"), CASES)
def test_a_value_beyond_a_limit_is_refused(overrides: tuple[str, ...], option: str, value: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(with_value(copy.deepcopy(compose(overrides)), option, value))
    sentence = str(caught.value)
    assert re.fullmatch(rf"{re.escape(option)}={re.escape(str(value))} does not fit: [^.]*{reason}[^.]*\.", sentence)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        (schema.TrainOptions, ""),
        (schema.ScheduleOptions, "schedule."),
        (schema.TrainerOptions, "trainer."),
        (schema.TeacherOptions, "teacher."),
        (schema.StudentOptions, "student."),
        (schema.GradientOptions, "gradients."),
        (schema.ArrayDataOptions, "data."),
        (schema.FolderDataOptions, "data."),
        (schema.StreamDataOptions, "data."),
        (schema.NetworkOptions, "model."),
        (schema.ExportOptions, ""),
        (schema.MeasureOptions, ""),
    ],
)
def test_every_option_with_a_limit_is_tried_above(options: type, prefix: str) -> None:
    hints = get_type_hints(options, include_extras=True)
    limited = {f"{prefix}{name}" for name, kind in hints.items() if "Annotated" in str(kind)}
    tried = {
        option.replace("model.student.", "model.").replace("model.teacher.", "model.") for _, option, _, _ in CASES
    }
    assert limited <= tried


def test_the_smallest_values_that_can_be_trained_with_are_accepted() -> None:
    smallest = {
        "schedule__epochs": 1, "schedule__batch_size": 1, "data__padding": 0, "data__workers": 0, "data__val_size": 0,
        "checkpoint_minutes": 0, "gradients__every": 0, "teacher__image_size": 1, "teacher__view_store_gigabytes": 0,
        "schedule__distillation_warmup": 0, "data__mean": [0, 0, 0], "teacher__mean": None, "data__train_size": None,
    }  # fmt: skip
    validate(changed(configure(), **smallest))


@pytest.mark.parametrize("limit", [0, 1, 7, 0.5, 1.0, 2.0, None])
def test_validation_may_be_limited_as_lightning_allows(limit: float | None) -> None:
    validate(changed(configure(), trainer__limit_val_batches=limit))
    if limit != 0:
        validate(changed(configure(), trainer__limit_train_batches=limit, trainer__limit_test_batches=limit))


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (("schedule.epochs=20",), False),
        (("trainer.max_epochs=20",), True),
        (("schedule.epochs=20", "trainer.max_epochs=40"), True),
        (("schedule.epochs=20", "trainer.max_epochs=20"), False),
        (("trainer=debug",), False),
        (("trainer=profile", "schedule.epochs=3"), False),
        (("trainer=debug", "schedule.epochs=2", "trainer.max_epochs=2"), False),
        (("trainer=debug", "trainer.max_epochs=20"), True),
        (("trainer.max_epochs=1",), True),
    ],
)
def test_one_option_states_the_number_of_epochs(overrides: tuple[str, ...], is_refused: bool) -> None:
    cfg = configure(*overrides)
    if not is_refused:
        check_training(cfg)
        return
    with pytest.raises(UserError) as caught:
        check_training(cfg)
    trained, scheduled = cfg.trainer.max_epochs, cfg.schedule.epochs
    assert str(caught.value) == (
        f"trainer.max_epochs={trained} differs from the schedule of {scheduled} epochs: set schedule.epochs={trained} "
        "instead, so that the learning rate and the warm-ups follow too."
    )


@pytest.mark.parametrize(
    "override",
    ["trainer.use_distributed_sampler=true", "+trainer.enable_checkpointing=false", "+trainer.barebones=true"],
)
def test_an_argument_of_the_trainer_that_breaks_every_run_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(override.removeprefix('+'))} would .*: leave it out\.$"):
        check_training(configure(override))


def test_a_nodes_own_file_is_named_if_it_lacks_a_key() -> None:
    required = {
        "model.student": ["_target_", "name", "learning_rate"],
        "model.teacher": ["_target_", "name", "learning_rate"],
        "method": ["_target_", "name"],
        "also": ["_target_", "name"],
        "teacher.method": ["_target_", "name"],
        "trainer": ["max_epochs", "precision"],
    }
    assert required.keys() == UNTYPED_NODES.keys()
    for option, keys in required.items():
        for key in keys:
            with pytest.raises(UserError) as caught:
                validate(without(configure("method@also=kd"), f"{option}.{key}"))
            folder = UNTYPED_NODES[option][1]
            assert str(caught.value) == f"{option}.{key} is missing: add the key {key!r} to the file in {folder}."


@pytest.mark.parametrize("option", [*TARGETS, *OPTIONAL_TARGETS])
def test_the_file_of_a_node_that_calls_nothing_is_named(option: str) -> None:
    folder = {**TARGETS, **OPTIONAL_TARGETS}[option]
    for value in ({"name": "x"}, "x", None):
        cfg = with_value(configure("method=kd"), option, value)
        if value is None and option in OPTIONAL_TARGETS:
            validate(cfg)
            continue
        with pytest.raises(UserError) as caught:
            validate(cfg)
        assert str(caught.value) == f"{option}._target_ is missing: add the key '_target_' to the file in {folder}."


def test_data_without_a_name_are_refused() -> None:
    without_schema = changed(configure(), data={"_target_": "a.B"})
    for cfg in (without_schema, changed(configure(), data__name="???")):
        with pytest.raises(UserError, match=r"^data\.name is missing: add the key 'name' to the file in conf/data\.$"):
            validate(cfg)


def test_descriptive_keys_may_be_missing() -> None:
    cfg = configure("method@also=kd", "model=resnet20_to_resnet8")
    methods = [f"{node}.{key}" for node in ("method", "also", "teacher.method") for key in ("year", "uses", "settings")]
    networks = [f"model.{role}.published_accuracy" for role in ("student", "teacher")]
    validate(without(cfg, *methods, *networks))


def test_nodes_that_are_switched_off_are_not_validated() -> None:
    cfg = copy.deepcopy(configure("method=vanilla"))
    cfg.model.update(teacher=None, name=cfg.model.student.name)  # as for a teacher that is trained first
    assert cfg.also is cfg.optimizer is cfg.averaging is None
    validate(cfg)


def test_validation_leaves_the_configuration_as_it_is() -> None:
    before = OmegaConf.to_yaml(configure())
    validate(configure())
    assert OmegaConf.to_yaml(configure()) == before


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"winograd": True, "compile": True}, "winograd=true and compile=true exclude each other"),
        (
            {"winograd": True, "trainer__precision": "bf16-mixed"},
            "winograd=true computes in float32, but the precision is bf16-mixed: set it to false",
        ),
        (
            {"teacher__winograd": True, "trainer__precision": "16-mixed"},
            "teacher.winograd=true computes in float32, but the precision is 16-mixed",
        ),
        (
            {"teacher__winograd": True, "teacher__precision": "bfloat16"},
            "teacher.winograd=true computes in float32, but the precision is bfloat16",
        ),
        ({"winograd": True, "teacher__precision": "bfloat16"}, None),
        ({"teacher__winograd": True, "teacher__precision": "float32", "trainer__precision": "bf16-mixed"}, None),
        ({"winograd": True, "teacher__winograd": True, "compile": False}, None),
    ],
)
def test_winograd_is_for_float32_without_compilation(values: dict[str, Any], sentence: str | None) -> None:
    cfg = changed(configure(), **values)
    if sentence is None:
        validate(cfg)
        return
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        validate(cfg)


@pytest.mark.parametrize("option", ["method.beta", "schedule.optimizer.momentum", "data.std[1]"])
def test_a_value_that_is_not_a_number_is_refused(option: str) -> None:
    given = "data.std=[0.2,nan,0.2]" if option == "data.std[1]" else f"{option}=nan"
    with pytest.raises(UserError, match=rf"^{re.escape(option)}=nan is not a number: give one\.$"):
        validate(configure("method=dkd", given))


def test_fixed_views_of_two_kinds_have_no_view_store() -> None:
    both = ("method=kd", "model=resnet20_to_resnet8", "data.fixed_views=4", "teacher.view_store=true")
    check_training(configure(*both))
    check_training(configure(*both[:-1], "augmentation=weak_and_strong"))
    with pytest.raises(UserError, match=r"but augmentation=weak_and_strong makes two versions of it, with and without"):
        check_training(configure(*both, "augmentation=weak_and_strong"))
