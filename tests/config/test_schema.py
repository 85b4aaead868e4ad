"""The schemas: what Hydra composes from them, and the two marks of their options."""

import dataclasses
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from src.config.schema import (
    COMMAND_SCHEMAS,
    DATA_SCHEMAS,
    ArrayDataOptions,
    DataOptions,
    ExportOptions,
    FolderDataOptions,
    GradientOptions,
    MeasureOptions,
    MethodOptions,
    NetworkOptions,
    StreamDataOptions,
    StudentOptions,
    TeacherOptions,
    TrainerOptions,
    TrainOptions,
    data_schema,
    marked,
    one_of,
)
from tests.helpers.configure import CLASSES, CONF, changed, configure, options


@pytest.mark.parametrize(
    ("command", "schema"),
    COMMAND_SCHEMAS.items(),
)
def test_every_command_composes_its_schema(command: str, schema: type) -> None:
    cfg = configure(command=command)
    assert OmegaConf.get_type(cfg) is schema
    assert set(cfg) == {option.name for option in dataclasses.fields(schema)}


def test_typed_groups_are_typed_within_a_configuration() -> None:
    cfg = configure()
    typed = {"teacher": TeacherOptions, "student": StudentOptions, "gradients": GradientOptions}
    assert {name: OmegaConf.get_type(cfg[name]) for name in typed} == typed


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", "abc"), ("schedule.epochs", 1.5), ("teacher.fold", "perhaps"), ("data.val_size", "many")],
)
def test_a_value_of_another_type_is_refused_when_hydra_composes(option: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        changed(configure(), **{option.replace(".", "__"): value})
    with pytest.raises(HydraException):
        configure(f"{option}={value}")


@pytest.mark.parametrize("option", ["nonsense", "teacher.nonsense", "schedule.nonsense", "data.nonsense", "student.x"])
def test_an_unknown_option_is_refused_when_hydra_composes(option: str) -> None:
    with pytest.raises((ConfigKeyError, OmegaConfBaseException)):
        changed(configure(), **{option.replace(".", "__"): 1})
    with pytest.raises(HydraException):
        configure(f"{option}=1")


# Marks


def test_marks_name_the_options_that_were_declared_with_them() -> None:
    assert marked(TrainOptions, "student_only") == [
        "also", "augmentation", "optimizer", "student", "averaging", "standardize_logits", "label_smoothing",
        "keep_best",
    ]  # fmt: skip
    assert marked(TeacherOptions, "no_effect") == [
        "allow_program", "store", "train_if_missing", "view_store", "view_store_gigabytes",
    ]  # fmt: skip
    assert marked(NetworkOptions, "no_effect") == ["published_accuracy", "family"]
    assert marked(MethodOptions, "no_effect") == ["year", "uses", "settings", "pairs", "standardized"]
    assert marked(StudentOptions, "no_effect") == marked(TrainerOptions, "student_only") == []


@pytest.mark.parametrize("schema", DATA_SCHEMAS)
def test_data_inherits_the_marks_of_the_common_options(schema: type) -> None:
    assert {"root", "workers"} <= set(marked(schema, "no_effect"))
    assert not {"name", "train_size", "val_size", "split_seed", "flip"} & set(marked(schema, "no_effect"))


def test_an_option_has_only_known_marks() -> None:
    schemas = [
        *DATA_SCHEMAS,
        MeasureOptions,
        ExportOptions,
        TeacherOptions,
        TrainerOptions,
        NetworkOptions,
        MethodOptions,
    ]
    marks = {mark for schema in schemas for option in dataclasses.fields(schema) for mark in option.metadata}
    assert marks == {"no_effect", "by_content", "student_only", "added"}


# Data


@pytest.mark.parametrize("data", CLASSES)
def test_every_data_of_conf_has_a_schema_of_its_own(data: str) -> None:
    cfg = configure(f"data={data}")
    assert OmegaConf.get_type(cfg.data) is data_schema(cfg.data._target_) in DATA_SCHEMAS


def test_data_of_another_class_has_the_common_options() -> None:
    assert data_schema("mine.Data") is DataOptions
    assert data_schema("src.data.array_data.ArrayData") is ArrayDataOptions
    assert data_schema("src.data.folder_data.FolderData") is FolderDataOptions
    assert data_schema("src.data.stream_data.StreamData") is StreamDataOptions


# Files of conf/


@pytest.mark.parametrize("network", options("network"))
def test_a_file_of_a_network_has_every_required_key(network: str) -> None:
    keys = set(OmegaConf.load(CONF / "network" / f"{network}.yaml"))
    assert {"_target_", "name", "learning_rate"} <= keys


def test_a_choice_is_one_of_the_listed_values() -> None:
    check: Any = one_of("epoch", "step").func
    assert check("step") == "step"
    with pytest.raises(ValueError, match="choose one of epoch, step"):
        check("never")
