"""Make the networks that a configuration describes, and load the student's initial weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, open_dict

from src.common.errors import UserError
from src.config.instantiate import instantiate_as
from src.config.names import teacher_is_program
from src.data.image_data import ImageData
from src.models.checkpoints import load_weights, read_facts
from src.models.network import Network
from src.models.sources import LIBRARIES, pretrained

OTHER_CLASSES = "add student.new_head=true to load all but the last layer, or give a file with the same classes"


class InitialStudent(NamedTuple):
    """A student before training, and the normalisation of its images."""

    network: Network
    mean: Sequence[float]
    std: Sequence[float]


def with_library_networks(cfg: DictConfig) -> DictConfig:
    """Return a copy in which `teacher.source`, `student.source` and a program replace the pair's networks."""
    cfg = copy.deepcopy(cfg)
    cfg.teacher.source = cfg.teacher.source  # resolves the default, which refers to the network that is replaced here
    if teacher_is_program(cfg) and cfg.model.get("teacher"):
        with open_dict(cfg.model.teacher):
            cfg.model.teacher.update(name=Path(cfg.teacher.path).stem, published_accuracy={})
    for role in ("teacher", "student"):
        source = cfg[role].source
        if source is not None and source != "mdistiller" and cfg.model.get(role) is not None:
            cfg.model[role] = _library_network(role, source, cfg.model[role])
    return cfg


def _library_network(role: str, source: str, node: DictConfig) -> dict[str, Any]:
    """Return the node of a library's network. Raises `UserError` if there is no such library."""
    library, _, name = source.partition("/")
    if library not in LIBRARIES or not name:
        known = "mdistiller, " + ", ".join(f"{library}/NAME" for library in LIBRARIES)
        raise UserError(
            f"{role}.source={source} is unknown: choose one of {known}, or give a checkpoint with {role}.path=FILE."
        )
    name = name.replace("/", "-")
    return {
        "name": name,
        "_target_": "src.models.sources.architecture",
        "source": source,
        "learning_rate": node.learning_rate,
        "published_accuracy": node.get("published_accuracy") or {} if name == node.name else {},
    }


def make_network(node: DictConfig, option: str, num_classes: int) -> Network:
    """Make the network of the node at `option`, with fresh weights."""
    return instantiate_as(Network, node, option, num_classes=num_classes)


def stated_facts(node: DictConfig, path: Path | None) -> dict[str, Any]:
    """Collect facts about a network's training from its file, else from its yaml, which describes published files."""
    published = {name: list(node[name]) for name in ("mean", "std") if node.get(name) is not None}
    return published | (read_facts(path) if path else {})


def _library_facts(source: str | None) -> dict[str, Any]:
    """Return the normalisation of a library's network."""
    if source is None:
        return {}
    found = pretrained(source, download=False)
    return {"mean": found.mean, "std": found.std}


def load_student(cfg: DictConfig, data: ImageData) -> InitialStudent:
    """Make the student, with fresh weights or with those of `student.path` or `student.source`.

    Raises `UserError` if the source has no student, or if the file does not fit the network.
    """
    node, path, source = cfg.model.student, cfg.student.path, cfg.student.source
    new_head = bool(cfg.student.get("new_head"))
    if new_head and path is None:
        raise UserError(
            "student.new_head=true replaces the last layer of a file: add student.path=FILE, or leave it out "
            "(student.source makes a new last layer by itself)."
        )
    fresh = not cfg.student.get("pretrained", True)
    if fresh and (path is not None or source is None):
        raise UserError(
            "student.pretrained=false takes a library's network with fresh weights: add student.source=torchvision/NAME"
            " or timm/NAME, and leave out student.path."
        )
    if source == "mdistiller":
        raise UserError(
            "student.source=mdistiller does not exist, because mdistiller has released teachers only: give a file with "
            "student.path=FILE."
        )
    if path is not None:
        file = Path(path).expanduser()
        network = make_network(node, "model.student", data.num_classes)
        is_trained = bool(cfg.get("checkpoint"))  # and otherwise initial weights
        advice = {} if is_trained else {"other_classes": OTHER_CLASSES}
        load_weights(network, file, new_head=new_head, **advice)
        facts = (_library_facts(source) if is_trained else {}) | stated_facts(node, file)
        return InitialStudent(network, facts.get("mean", data.mean), facts.get("std", data.std))
    if source is not None and not fresh:
        found = pretrained(source, data.num_classes)
        return InitialStudent(found.network, found.mean, found.std)
    return InitialStudent(make_network(node, "model.student", data.num_classes), data.mean, data.std)
