"""Validate a composed configuration before any work starts."""

import math
from dataclasses import MISSING, fields
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.config.instantiate import reason
from src.config.schema import MethodOptions, NetworkOptions, TrainerOptions, data_schema

UNTYPED_NODES: dict[str, tuple[Any, str]] = {
    "trainer": (TrainerOptions, "conf/trainer"),
    "model.student": (NetworkOptions, "conf/network"),
    "model.teacher": (NetworkOptions, "conf/network"),
    "method": (MethodOptions, "conf/method"),
    "also": (MethodOptions, "conf/method"),
    "teacher.method": (MethodOptions, "conf/method"),
}
"""Nodes that Hydra composes without a schema, with the schema that validates them and the folder of their files."""
TARGETS = {
    "data": "conf/data",
    "serialization": "conf/serialization",
    "schedule.optimizer": "conf/schedule",
    "schedule.scheduler": "conf/schedule",
    "trainer": "conf/trainer",
}
"""Nodes of every training that name a class or a function to call, with the folder of their files."""
OPTIONAL_TARGETS = {
    "teacher.serialization": "conf/serialization",
    "optimizer": "conf/optimizer",
    "averaging": "conf/averaging",
    "logger": "conf/logger",
    "augmentation.policy": "conf/augmentation",
    "augmentation.mixing": "conf/augmentation",
}
"""The same, of nodes that may be switched off."""
BROKEN_TRAINERS = {
    ("use_distributed_sampler", True): "would divide the images among the devices a second time",
    ("enable_checkpointing", False): "would leave a run without its student",
    ("barebones", True): "would leave a run without its checkpoints and metrics",
}
"""Arguments of Lightning's Trainer with which no run works, and what they would do."""


def validate(cfg: DictConfig) -> None:
    """Raise `UserError` if an option has an invalid value, if a key is missing, or if two options contradict."""
    for option, folder in {**TARGETS, **OPTIONAL_TARGETS}.items():
        if option in TARGETS or OmegaConf.select(cfg, option):
            _check_key(cfg, option, "_target_", folder)
    for option, (schema, folder) in UNTYPED_NODES.items():  # early: other options refer to the keys of these nodes
        _check_required_keys(cfg, option, schema, folder)
    _check_key(cfg, "data", "name", TARGETS["data"])
    _validate_node(cfg, "", OmegaConf.get_type(cfg))
    _validate_node(cfg, "data", data_schema(cfg.data._target_))
    for option, (schema, _) in UNTYPED_NODES.items():
        _validate_node(cfg, option, schema)
    _check_numbers(OmegaConf.to_container(cfg, resolve=True), "")
    _check_winograd(cfg)


def check_training(cfg: DictConfig) -> None:
    """Raise `UserError` if options contradict each other, or if one breaks every run.

    Runs that were trained with such options can still be opened. A trial of one epoch that is cut short, such as that
    of trainer=debug, may have fewer epochs than its schedule.
    """
    trained, scheduled = cfg.trainer.max_epochs, cfg.schedule.epochs
    is_trial = trained == 1 and cfg.trainer.get("limit_train_batches") is not None
    if trained != scheduled and not is_trial:
        raise UserError(
            f"trainer.max_epochs={trained} differs from the schedule of {scheduled} epochs: set "
            f"schedule.epochs={trained} instead, so that the learning rate and the warm-ups follow too."
        )
    for (option, value), consequence in BROKEN_TRAINERS.items():
        if cfg.trainer.get(option) is value:
            raise UserError(f"trainer.{option}={str(value).lower()} {consequence}: leave it out.")
    if cfg.teacher.view_store and cfg.data.get("fixed_views") and cfg.augmentation.policy_from_view:
        raise UserError(
            f"teacher.view_store=true has one answer for each fixed view, but augmentation={cfg.augmentation.name} "
            "makes two versions of it, with and without the policy: leave data.fixed_views or teacher.view_store out."
        )


def _check_required_keys(cfg: DictConfig, option: str, schema: Any, folder: str) -> None:
    if OmegaConf.select(cfg, option) is None:
        return
    for key in fields(schema):
        if key.default is MISSING and key.default_factory is MISSING:
            _check_key(cfg, option, key.name, folder)


def _check_key(cfg: DictConfig, option: str, key: str, folder: str) -> None:
    """Raise `UserError` if a node lacks a key, or if there is no such node."""
    node = OmegaConf.select(cfg, option)
    if not isinstance(node, DictConfig) or key not in node:
        raise UserError(f"{option}.{key} is missing: add the key {key!r} to the file in {folder}.")


def _validate_node(cfg: DictConfig, option: str, schema: Any) -> None:
    """Validate a node, if there is one, by the annotations of its schema."""
    node = OmegaConf.select(cfg, option) if option else cfg
    if node is None:
        return
    try:
        pydantic.TypeAdapter(schema).validate_python(OmegaConf.to_container(node, resolve=True))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(filter(None, [option, *map(str, first["loc"])]))
        raise UserError(f"{name}={first['input']} does not fit: {reason(first['msg'])}.") from None


def _check_numbers(value: Any, option: str) -> None:
    """Raise `UserError` if a value at any depth is nan, which passes most limits and makes every loss nan."""
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{option}=nan is not a number: give one.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        _check_numbers(below, f"{option}[{key}]" if isinstance(value, list) else f"{option}.{key}".lstrip("."))


def _check_winograd(cfg: DictConfig) -> None:
    if cfg.winograd and cfg.compile:
        raise UserError("winograd=true and compile=true exclude each other: set one of them to false.")
    precisions = {"winograd": cfg.trainer.precision, "teacher.winograd": cfg.teacher.precision or cfg.trainer.precision}
    for option, precision in precisions.items():
        if OmegaConf.select(cfg, option) and precision not in ("32-true", "float32"):
            raise UserError(f"{option}=true computes in float32, but the precision is {precision}: set it to false.")
