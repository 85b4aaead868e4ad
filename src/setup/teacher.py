"""Find the teacher that a configuration describes, load it, and measure it before it teaches."""

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.common.devices import fits_in_memory
from src.common.errors import UserError
from src.config.names import class_name
from src.data.image_data import ImageData
from src.data.limits import evaluation_batches, scored_batches
from src.methods.method import Method
from src.models.checkpoints import (
    classifier_names,
    load_weights,
    read_facts,
    read_state_dict,
    refuse_without_classifier,
)
from src.models.network import Network
from src.models.program import load_program
from src.models.sources import pretrained
from src.runs.result import TeacherFacts
from src.setup.networks import make_network, stated_facts
from src.teachers import mdistiller
from src.teachers.answers import Answers, answers_file, view_store_file
from src.teachers.class_order import check_class_order, class_index
from src.teachers.device_view_store import DeviceViewStore, device_bytes
from src.teachers.teacher import Teacher
from src.teachers.view_store import ViewStore

log = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 1.0
"""Percentage points between measured and published accuracy. A larger difference gets a warning."""


class MeasuredTeacher(NamedTuple):
    """A teacher, the facts about it that a result holds, and its predictions."""

    teacher: Teacher
    facts: TeacherFacts
    predictions: Mapping[str, Tensor]
    """By split, the predicted class of each image, [N] int64, or -1 for images without an answer."""


def find_teacher(cfg: DictConfig) -> Path | None:
    """Find the teacher's file: `teacher.path`, else the file of `teacher.source`, else a file in the teacher store.

    The teacher store holds `<data>/<architecture>.pth` or the published layout
    `<data>/<architecture>_vanilla/ckpt_epoch_240.pth`. Returns None if a library has the weights (`teacher.source`), or
    if the teacher has to be trained. Raises `UserError` if `teacher.path` does not exist, or if there is no file and
    `teacher.train_if_missing` is false or `teacher.class_map` is given.
    """
    if cfg.teacher.path is not None:
        path = Path(cfg.teacher.path).expanduser()
        if not path.exists():
            raise UserError(f"teacher.path={path} does not exist: give a checkpoint of {cfg.model.teacher.name}.")
        return path
    places = teacher_places(cfg)
    if cfg.teacher.source == "mdistiller":
        if cfg.data.name != "cifar100":
            raise UserError(
                f"teacher.source=mdistiller has teachers for cifar100 only, not for {cfg.data.name}: give teacher.path."
            )
        return mdistiller.fetch(class_name(cfg.model.teacher), places[0].parent)
    if cfg.teacher.source is not None:
        return None
    found = next((place for place in places if place.is_file()), None)
    if found is None and not cfg.teacher.train_if_missing:
        looked = " and ".join(str(place) for place in places)
        raise UserError(
            f"There is no teacher {cfg.model.teacher.name} for {cfg.data.name} at {looked}: give its file with "
            "teacher.path=FILE, or set teacher.train_if_missing=true."
        )
    if found is None and cfg.teacher.class_map is not None:
        raise UserError(
            f"teacher.class_map={cfg.teacher.class_map} needs a teacher that exists, because a teacher that is trained "
            "here has the classes of the data: give teacher.path=FILE, or leave the class map out."
        )
    return found


def teacher_places(cfg: DictConfig) -> list[Path]:
    """List the files in which the teacher store may hold the teacher for this data."""
    store, architecture = Path(cfg.teacher.store).expanduser() / cfg.data.name, class_name(cfg.model.teacher)
    return [store / f"{architecture}.pth", store / f"{architecture}_vanilla" / "ckpt_epoch_240.pth"]


def load_teacher(cfg: DictConfig, data: ImageData, path: Path | None) -> Teacher:
    """Load the teacher from a file, or from its library if `path` is None.

    Its normalisation comes from `teacher.mean` and `teacher.std`. The first fallback is its file, its network's yaml or
    its library. The second fallback is the data. Raises `UserError` if the file cannot be loaded, if it was found by
    the name of the data but states that it was trained on other data, or if the teacher does not know the classes of
    the data.
    """
    class_map = Path(cfg.teacher.class_map).expanduser() if cfg.teacher.class_map is not None else None
    if path is not None and cfg.teacher.allow_program:
        return make_teacher(cfg, data, load_program(path), {"class_map": class_map})
    network: Network
    if cfg.teacher.source in (None, "mdistiller"):
        node = cfg.model.teacher
        facts = stated_facts(node, path)
        if facts.get("image_size") == data.image_shape[1]:
            del facts["image_size"]  # the images have that size
        network = make_network(node, "model.teacher", len(facts.get("class_names", data.class_names)))
    elif path is None:
        found = pretrained(cfg.teacher.source)
        network, facts = found.network, found._asdict()
    else:
        network, facts = _library_network_of(path, cfg.teacher.source, len(data.class_names))
    if path is not None:
        _check_stated_data(cfg, data, path, facts.get("data"))
        refuse_without_classifier(path, facts, "give another file")
        load_weights(network, path)
    return make_teacher(cfg, data, network, {**facts, "class_map": class_map})


def _library_network_of(path: Path, source: str, num_classes: int) -> tuple[Network, dict[str, Any]]:
    """Make a library's network for a file's weights, and collect its facts. Those of the file come first.

    The file may be fine-tuned: it has as many classes as it names, or `num_classes` if that many rows are in its
    classifier. Otherwise it has the library's.
    """
    stated = read_facts(path)
    found = pretrained(source, download=False)
    head = read_state_dict(path).get(classifier_names(found.network)[0])
    rows = len(stated.get("class_names", ())) or (num_classes if head is not None and len(head) == num_classes else 0)
    if rows and rows != found.network.classifier_layer.out_features:
        found = pretrained(source, rows, download=False)._replace(class_names=None)
    return found.network, found._asdict() | stated


def _check_stated_data(cfg: DictConfig, data: ImageData, path: Path, stated: str | None) -> None:
    """Raise `UserError` if a file that was found by the name of the data states the digest of other data."""
    if stated is None or cfg.teacher.path is not None or stated in (data.source.digest, data.labelled_digest):
        return
    raise UserError(
        f"{path} was trained on other data that is called {cfg.data.name} too, or at another image size: rename this "
        "data with data.name=NAME, or give teacher.path=FILE if this teacher is the right one."
    )


def make_teacher(cfg: DictConfig, data: ImageData, network: Network, facts: Mapping[str, Any]) -> Teacher:
    """Make a teacher from a network, by the options `teacher.*` and by `facts`.

    `facts` may hold mean, std, image_size, class_names and class_map. The options take precedence.
    """
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
        if not teacher.folded:
            log.warning("teacher.fold=true changes nothing: this teacher has no batch norm that could be folded.")
    if cfg.teacher.winograd:
        teacher.use_winograd()
    if cfg.compile:
        teacher.compile()
    outputs = teacher.shapes(data.image_shape).logits
    teacher.select_classes(class_index(facts.get("class_names"), outputs, data.class_names, facts.get("class_map")))
    return teacher


def make_untrained_teacher(cfg: DictConfig, data: ImageData) -> Teacher:
    """Make a teacher of the configured architecture with random weights, for trials that need only its sizes."""
    return make_teacher(cfg, data, make_network(cfg.model.teacher, "model.teacher", data.num_classes), {})


def measure_teacher(
    cfg: DictConfig, data: ImageData, method: Method, path: Path | None, trainer: L.Trainer, *, trained_here: bool
) -> MeasuredTeacher:
    """Load the teacher, measure it on the trainer's device and in its precision, and open its view store.

    The accuracy is printed beside the published one, because a wrong normalisation shows there. Raises `UserError` if
    the teacher was trained with another class order.
    """
    teacher = load_teacher(cfg, data, path)
    teacher.to(trainer.strategy.root_device, torch.channels_last if cfg.channels_last else torch.contiguous_format)
    splits: set[str] = {data.validates_on, "test"}
    scored = [split for split in splits if scored_batches(cfg, data, split)]
    answers = {split: evaluation_answers(cfg, data, teacher, split, trainer) for split in scored}
    facts = teacher_facts(cfg, teacher, str(path or cfg.teacher.source), answers["test"].metrics())
    is_complete = scored_batches(cfg, data, "test") == evaluation_batches(data, "test")
    _report_accuracy(facts, may_differ=trained_here or not is_complete)
    check_class_order(answers["test"], facts.name)
    if cfg.teacher.view_store:
        # The processes of several devices share their answers through the file.
        alone = trainer.strategy.root_device if trainer.world_size == 1 else None
        teacher.view_store = open_store(cfg, data, teacher, method, alone)
    predictions = {split: answer.predictions(data.split_size(split)) for split, answer in answers.items()}
    return MeasuredTeacher(teacher, facts, predictions)


def teacher_facts(cfg: DictConfig, teacher: Teacher, source: str, metrics: Mapping[str, float]) -> TeacherFacts:
    """Collect the facts about a teacher for a run's result."""
    published = (cfg.model.teacher.get("published_accuracy") or {}).get(cfg.data.name)
    return TeacherFacts(
        name=cfg.model.teacher.name,
        source=source,
        sha256=teacher.digest,
        key=teacher.key,
        mean=list(teacher.mean),
        std=list(teacher.std),
        image_size=teacher.image_size,
        class_index=teacher.class_index,
        published_accuracy=published,
        **metrics,
    )


def _report_accuracy(facts: TeacherFacts, may_differ: bool) -> None:
    measured, published = 100 * facts.accuracy, facts.published_accuracy
    beside = "" if published is None else f" (published: {published:.2f} %)"
    log.info("Teacher %s from %s: test accuracy %.2f %%%s.", facts.name, facts.source, measured, beside)
    if published is not None and not may_differ and abs(measured - published) > LARGEST_DIFFERENCE:
        log.warning(
            "The measured and the published accuracy differ by more than %g point: check the teacher's normalisation, "
            "teacher.mean=%s teacher.std=%s, and its class order.",
            LARGEST_DIFFERENCE,
            *(str(numbers).replace(" ", "") for numbers in (facts.mean, facts.std)),
        )


def evaluation_answers(cfg: DictConfig, data: ImageData, teacher: Teacher, split: str, trainer: L.Trainer) -> Answers:
    """Return the teacher's answers to an evaluation split. They are computed once for all runs in a `runs` folder."""
    file = answers_file(cfg, Path(cfg.runs).expanduser(), teacher.key, data, split)
    answers = Answers.load(file, data.split_size(split), data.num_classes)
    if answers is None:
        batches = itertools.islice(data.evaluation_loader(split), scored_batches(cfg, data, split))
        answers = Answers.compute(teacher, batches, trainer.precision_plugin.forward_context())
        answers.save(file)
    return answers


def open_store(
    cfg: DictConfig, data: ImageData, teacher: Teacher, method: Method, device: torch.device | None = None
) -> ViewStore | DeviceViewStore | None:
    """Open the teacher's view store. Returns None if the method needs features, because the store holds logits only.

    If the images lie in the memory of the device, the records that the run needs are copied there too, unless
    `data.device_memory` is auto and they do not fit. Raises `UserError` if the store could outgrow
    `teacher.view_store_gigabytes` or the disk.
    """
    if method.needs_features:
        log.info("method=%s needs the teacher's features, so it does not use the view store.", cfg.method.name)
        return None
    epochs = cfg.trainer.max_epochs
    store = ViewStore(
        view_store_file(cfg, teacher, data),
        len(data.source.train_labels),
        data.view_count(epochs),
        data.num_classes,
        dtype=teacher.answer_dtype,
        expected_answers=(data.fixed_views or epochs * data.views_per_image) * len(data.trained_index),
        gigabytes=cfg.teacher.view_store_gigabytes,
    )
    if device is None or not data.lies_on(device):
        return store
    records = data.view_records(epochs)
    fits = cfg.data.device_memory is True or fits_in_memory(device_bytes(store, len(records)), device)
    return DeviceViewStore(store, records, device) if fits else store
