"""Names of the parts of a configured run, and whether the run needs a teacher."""

from typing import Any

import hydra
from omegaconf import DictConfig


def teacher_is_program(cfg: DictConfig) -> bool:
    """Return whether the teacher of a training is a program: a file that contains its code."""
    return bool(cfg.teacher.allow_program and cfg.teacher.path)


def needs_teacher(cfg: DictConfig) -> bool:
    """Return whether the configured method, or the one added by `method@also`, learns from a teacher."""
    methods: list[Any] = [hydra.utils.get_class(node._target_) for node in (cfg.method, cfg.also) if node]
    return any(method.needs_teacher for method in methods)


def method_name(cfg: DictConfig) -> str:
    """Join the names of the methods and of the switches that change how they train: `dkd+kd`, `kd+dot+averaged`."""
    methods = [node.name for node in (cfg.method, cfg.also) if node]
    standardized = ["standardized"] if cfg.standardize_logits else []
    optimizer = [class_name(cfg.optimizer).lower()] if cfg.optimizer else []
    averaged = ["averaged"] if cfg.averaging else []
    return "+".join([*methods, *standardized, *optimizer, *averaged])


def serialization_name(cfg: DictConfig) -> str:
    """Return the name of the serialization layer: `none`, `serial` or `parallel`."""
    layer = class_name(cfg.serialization)
    return "none" if layer == "NoSerialization" else layer.lower()


def class_name(node: DictConfig) -> str:
    """Return the last part of a node's `_target_`."""
    return str(node._target_).rpartition(".")[2]
