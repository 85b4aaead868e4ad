"""Student and teacher with their weights, from wherever the configuration says, and what each has to be fed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from src.config import build
from src.data.image_data import ImageData
from src.data.imagenet import WNIDS
from src.errors import UserError
from src.models import mdistiller
from src.models.checkpoints import load_weights, read_facts
from src.models.network import Network
from src.models.program import load_program
from src.models.sources import LIBRARIES, pretrained
from src.teacher import Answers, Teacher


class Student(NamedTuple):
    """A student, and the normalisation of its images."""

    network: Network
    mean: Sequence[float]
    std: Sequence[float]


def place_sources(cfg: DictConfig) -> None:
    """Let `teacher.source` and `student.source`, or a program, take the place of the pair's networks, by name."""
    cfg.teacher.source = cfg.teacher.source  # its default refers to the network that is replaced
    if cfg.teacher.allow_program and cfg.teacher.path and cfg.model.get("teacher"):
        cfg.model.teacher.update(name=Path(cfg.teacher.path).stem, published_accuracy={})
    for role in ("teacher", "student"):
        source = cfg[role].source
        if source is None or cfg.model.get(role) is None or source == "mdistiller":
            continue
        library, _, name = source.partition("/")
        if library not in LIBRARIES or not name:
            known = "mdistiller, " + ", ".join(f"{library}/NAME" for library in LIBRARIES)
            raise UserError(f"{role}.source={source} is not known, these are: {known}; a file goes to {role}.path.")
        node = cfg.model[role]
        name = name.replace("/", "-")
        published = node.published_accuracy if name == node.name else {}
        cfg.model[role] = {
            "name": name,
            "_target_": "src.models.sources.architecture",
            "source": source,
            "learning_rate": node.learning_rate,
            "published_accuracy": published,
        }


def make_network(node: DictConfig, group: str, num_classes: int) -> Network:
    """A network with fresh weights."""
    return build(node, group, num_classes=num_classes)


def load_student(cfg: DictConfig, data: ImageData) -> Student:
    """The student with fresh weights, or those of `student.path` or `student.source`."""
    node, path, source = cfg.model.student, cfg.student.path, cfg.student.source
    if source == "mdistiller":
        raise UserError("student.source=mdistiller: that release holds teachers alone; give student.path.")
    if path is not None:
        network = make_network(node, "model.student", data.num_classes)
        load_weights(network, Path(path).expanduser())
        facts = _facts(node, Path(path).expanduser())
        return Student(network, facts.get("mean", data.mean), facts.get("std", data.std))
    if source is not None:
        found = pretrained(source, data.num_classes)
        return Student(found.network, found.mean, found.std)
    return Student(make_network(node, "model.student", data.num_classes), data.mean, data.std)


def find_teacher(cfg: DictConfig) -> Path | None:
    """The file that the configuration means: `teacher.path`, else one of `teacher.source`, else one in the local store.

    None where there is no file: a library has the weights (`teacher.source`), or the teacher is still to be trained.
    The store holds `<data>/<architecture>.pth` or the published layout `<architecture>_vanilla/ckpt_epoch_240.pth`.
    Raises `UserError` where `teacher.path` names nothing, or where none is found and none may be trained.
    """
    if cfg.teacher.path is not None:
        path = Path(cfg.teacher.path).expanduser()
        if not path.is_file():
            raise UserError(f"teacher.path={path} is no file: give a checkpoint of {cfg.model.teacher.name}.")
        return path
    places = teacher_places(cfg)
    if cfg.teacher.source == "mdistiller":
        if cfg.data.name != "cifar100":
            raise UserError(f"teacher.source=mdistiller has teachers for cifar100, not for {cfg.data.name}.")
        return mdistiller.fetch(_architecture(cfg), places[0].parent)
    if cfg.teacher.source is not None:
        return None
    found = next((place for place in places if place.is_file()), None)
    if found is None and not cfg.teacher.train_if_missing:
        looked = " and ".join(str(place) for place in places)
        raise UserError(
            f"No teacher {cfg.model.teacher.name} for {cfg.data.name}: looked for {looked}; give teacher.path."
        )
    return found


def teacher_places(cfg: DictConfig) -> list[Path]:
    """Where the local store may hold the teacher of this data."""
    store = Path(cfg.teacher.store).expanduser() / cfg.data.name
    return [store / f"{_architecture(cfg)}.pth", store / f"{_architecture(cfg)}_vanilla" / "ckpt_epoch_240.pth"]


def _architecture(cfg: DictConfig) -> str:
    return cfg.model.teacher._target_.rsplit(".", 1)[-1]


def load_teacher(cfg: DictConfig, data: ImageData, path: Path | None) -> Teacher:
    """The teacher with the weights of a file, or of its library; fed as it was trained, asked for the data's classes.

    Its normalisation is that of `teacher.mean` and `teacher.std`, else what its file, its network or its library say,
    else the data's. Raises `UserError` where its classes are not the data's.
    """
    facts: dict[str, Any] = {}
    network: Network
    if path is not None and cfg.teacher.allow_program:
        return frozen(cfg, data, load_program(path), facts)
    if cfg.teacher.source in (None, "mdistiller"):
        node = cfg.model.teacher
        facts = _facts(node, path)
        network = make_network(node, "model.teacher", len(facts.get("class_names", data.class_names)))
    else:
        found = pretrained(cfg.teacher.source, download=path is None)
        network, facts = found.network, found._asdict()
    if path is not None:
        load_weights(network, path)
    return frozen(cfg, data, network, facts)


def _facts(node: DictConfig, path: Path | None) -> dict[str, Any]:
    """How a network was trained: what its file says, else what the yaml says of its published files."""
    published = {name: list(node[name]) for name in ("mean", "std") if name in node}
    return published | (read_facts(path) if path else {})


def frozen(cfg: DictConfig, data: ImageData, network: Network, facts: dict[str, Any]) -> Teacher:
    """A teacher of this network, by what the configuration and `facts` (mean, std, image_size, class_names) say."""
    mean, std = (cfg.teacher[name] or facts.get(name) or getattr(data, name) for name in ("mean", "std"))
    teacher = Teacher(
        network,
        mean,
        std,
        cfg.teacher.image_size or facts.get("image_size"),
        precision=cfg.teacher.precision,
        answer_dtype=getattr(torch, cfg.teacher.answer_dtype),
    )
    if cfg.teacher.fold:
        teacher.fold(data.image_shape)
    if cfg.teacher.winograd:
        teacher.use_winograd()
    outputs = teacher.shapes(data.image_shape).logits
    teacher.class_index = class_index(facts.get("class_names"), outputs, data.class_names)
    return teacher


def class_index(names: Sequence[str] | None, outputs: int, wanted: Sequence[str]) -> list[int] | None:
    """Which of a teacher's logits are the data's classes, by name; None where they are all, in the same order.

    1,000 logits without names are ImageNet's where the data's classes are wnids. Raises `UserError` where the counts
    differ and names do not help.
    """
    if names is None and outputs == len(WNIDS) and set(wanted) <= set(WNIDS):
        names = WNIDS
    if names is not None and set(wanted) <= set(names):
        found = [list(names).index(name) for name in wanted]
        return None if found == list(range(outputs)) else found
    if outputs != len(wanted):
        example = f" ({', '.join(names[:2])}, ...)" if names else ""
        raise UserError(
            f"The teacher knows {outputs} classes{example} and the data has {len(wanted)} ({', '.join(wanted[:2])}, "
            "...): give a teacher of the same classes, or name the data's classes as the teacher's (ImageNet: wnids)."
        )
    return None


def check_class_order(answers: Answers, name: str) -> None:
    """Raise `UserError` where the teacher is right only after its classes are renamed.

    The renaming is found on one half of the images and judged on the other, so that a weak teacher is not suspected.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that few commands need

    classes = answers.logits.shape[1]
    shuffled = torch.randperm(len(answers.target), generator=torch.Generator().manual_seed(0))
    predicted, target = answers.logits.argmax(dim=1)[shuffled], answers.target[shuffled]
    half = len(target) // 2
    counts = torch.bincount(target[:half] * classes + predicted[:half], minlength=classes**2).view(classes, classes)
    renamed = torch.as_tensor(np.asarray(linear_sum_assignment(counts.T.numpy(), maximize=True)[1]))
    right, right_renamed = predicted[half:] == target[half:], renamed[predicted[half:]] == target[half:]
    plain, better = (float(answered.double().mean()) for answered in (right, right_renamed))
    # Images that both get right or wrong say nothing; of the others, chance gives either half: four deviations.
    chance = 4 * float((right != right_renamed).sum()) ** 0.5 / len(right)
    if better > plain + 0.1 + chance:
        raise UserError(
            f"The teacher {name} gets {100 * plain:.0f} % of the images right, and {100 * better:.0f} % once its "
            "classes are put into another order: it was trained on classes in another order than the data's."
        )
