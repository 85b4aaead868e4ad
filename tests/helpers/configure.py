"""Compose configurations without a command, and build their parts."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from src.config.validation import validate
from src.data.image_data import ImageData
from src.methods.method import LogitMethod
from src.setup.assemble import Parts, make_method, make_parts
from src.setup.networks import make_network

CONF = Path(__file__).parents[2] / "conf"


def options(group: str) -> list[str]:
    """List the options of a group of `conf/`."""
    folder = CONF / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


CLASSES = {"cifar10": 10, "cifar100": 100, "glyphs": 62, "imagenet": 1000, "imagefolder": 7, "arrays": 5, "stream": 7}


METHODS, PAIRS, SCHEDULES = options("method"), options("model"), options("schedule")


MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


LAYERS = {"none": "NoSerialization", "serial": "Serial", "parallel": "Parallel"}


@functools.cache
def configure(*overrides: str, command: str = "train") -> DictConfig:
    """Compose a command's configuration. Tests share the result, so they must copy it before they change it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def changed(cfg: DictConfig, **values: Any) -> DictConfig:
    """Return a copy of a configuration with other values. A dot in an option's name is written as two underscores."""
    cfg = copy.deepcopy(cfg)
    for option, value in values.items():
        OmegaConf.update(cfg, option.replace("__", "."), value, merge=False)
    return cfg


def without(cfg: DictConfig, *options: str) -> DictConfig:
    """Return a copy of a configuration that lacks some options."""
    cfg = copy.deepcopy(cfg)
    for option in options:
        node, _, key = option.rpartition(".")
        with open_dict(cfg):
            del OmegaConf.select(cfg, node)[key]
    return cfg


def parts_of(cfg: DictConfig, classes: int | None = None) -> Parts:
    """Make the parts of a configuration without reading data."""
    data: Any = SimpleNamespace(num_classes=classes or CLASSES.get(cfg.data.name, 7), mean=MEAN, std=STD)
    return make_parts(cfg, data, make_method(cfg))


def check_everything_builds(cfg: DictConfig) -> None:
    """Build all parts that need no data, and check that they are the configured ones."""
    classes = CLASSES.get(cfg.data.name, 7)
    validate(cfg)
    parts = parts_of(cfg)
    teacher = make_network(cfg.model.teacher, "model.teacher", classes)
    assert parts.student.network.classifier_layer.out_features == teacher.classifier_layer.out_features == classes
    assert type(parts.method).__name__.lower() == cfg.method.name
    assert type(parts.serialization).__name__ in LAYERS.values()
    assert callable(hydra.utils.instantiate(cfg.schedule.scheduler))
    assert isinstance(hydra.utils.instantiate(cfg.data, batch_size=8, seed=0), ImageData)


def distils_logits(method: str) -> bool:
    """Return whether a method of `conf/method` is a `LogitMethod`."""
    node: Any = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return issubclass(hydra.utils.get_class(node._target_), LogitMethod)
