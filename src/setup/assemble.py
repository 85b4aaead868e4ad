"""Make the data, the method, the student and the LightningModule that a configuration describes."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from src.common.errors import UserError
from src.config.instantiate import (
    bind_keys,
    check_required,
    find_target,
    instantiate,
    instantiate_as,
    options_of,
    report_misfit,
)
from src.config.names import method_name
from src.config.validation import validate
from src.data.augmentation import Augmentation
from src.data.image_data import ImageData
from src.data.views import PEER_STREAM, random_bits
from src.methods.combined import Combined
from src.methods.method import Method, Networks
from src.models.network import Network
from src.models.winograd import use_winograd
from src.setup.networks import InitialStudent, load_student, make_network, with_library_networks
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller, Recipe, Settings
from src.training.serialization import NoSerialization, Serialization


class Parts(NamedTuple):
    """The student, the method, the serialization layer and the recipe.

    They are made before the teacher is looked for, so that bad options are reported early.
    """

    student: InitialStudent
    method: Method
    serialization: Serialization
    recipe: Recipe


def prepare(cfg: DictConfig) -> DictConfig:
    """Validate a configuration, and return a copy in which a library's networks replace those of the pair."""
    validate(cfg)
    return with_library_networks(cfg)


def make_method(cfg: DictConfig) -> Method:
    """Make the method, or the combination of two. `make_distiller` allocates its parameters later."""
    torch.manual_seed(cfg.seed)
    method = instantiate_as(Method, cfg.method, "method")
    return Combined(method, instantiate_as(Method, cfg.also, "also")) if cfg.also else method


def make_data(cfg: DictConfig, views_per_image: int = 1, reads_unlabelled: bool = True) -> ImageData:
    """Make the data module and load it. The arguments come from the method: `views_per_image` and `distils`."""
    prepare = {"prepare": make_prepare(cfg.data)} if cfg.data.get("prepare") else {}
    # A partial, because Hydra would convert the augmentation, which is a dataclass.
    make: Callable[..., ImageData] = hydra.utils.instantiate(cfg.data, _partial_=True, **dict.fromkeys(prepare))
    data = make(
        **prepare,
        batch_size=cfg.schedule.batch_size,
        seed=cfg.seed,
        views_per_image=views_per_image,
        reads_unlabelled=reads_unlabelled,
        augmentation=make_augmentation(cfg),
    )
    data.load()
    return data


def make_prepare(node: DictConfig) -> Callable[[Path], Any]:
    """Make a partial of the function `prepare` of a data node, which takes the folder.

    Raises `UserError` if there is no such function, if its options are invalid, or if it cannot be called so.
    """
    option = "data.prepare"
    prepare = bind_keys(node.prepare, option)
    try:
        inspect.signature(prepare).bind(Path(node.root))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{option}._target_={node.prepare._target_} cannot be called with the folder data.root ({error}): let it "
            "take the folder as its first argument, and set all others in data.prepare."
        ) from None
    return prepare


def make_data_for(cfg: DictConfig, method: Method) -> ImageData:
    """Make the data module that a method trains on, and load it."""
    return make_data(cfg, method.views_per_image, method.distils)


def make_augmentation(cfg: DictConfig) -> Augmentation:
    """Make the augmentation of training images.

    Raises `UserError` if an option of its policy or mixing is invalid, or if there is no policy to which
    `policy_from_view` could apply.
    """
    options = cfg.augmentation
    if options.policy_from_view and not options.policy:
        raise UserError(
            f"augmentation.policy_from_view={options.policy_from_view} needs a policy: choose "
            "augmentation=weak_and_strong, or leave it out."
        )
    return Augmentation(
        crop_and_flip=options.crop_and_flip,
        policy=instantiate(options.policy, "augmentation.policy") if options.policy else None,
        policy_from_view=options.policy_from_view,
        mixing=instantiate(options.mixing, "augmentation.mixing") if options.mixing else None,
    )


def make_parts(cfg: DictConfig, data: ImageData, method: Method, *, for_training: bool = False) -> Parts:
    """Make the student, the serialization layer and the recipe. The student's initial weights depend on the seed alone.

    `winograd=true` changes the student only if `for_training` is set. Raises `UserError` if a serialization layer or
    standardization is configured and the method has no logit term on which it could act.
    """
    recipe = make_recipe(cfg)
    torch.manual_seed(cfg.seed)
    student = load_student(cfg, data)
    serialization = instantiate_as(Serialization, cfg.serialization, "serialization")
    if not isinstance(serialization, NoSerialization) and not method.distils_logits:
        raise UserError(
            f"method={cfg.method.name} has no logit term on which a serialization layer could act: add "
            "serialization=none."
        )
    if serialization.needs_teacher and not method.needs_teacher:
        raise UserError(
            f"serialization.start=teacher does not fit method={cfg.method.name}, which has no teacher: choose "
            "serialization.start=identity."
        )
    if cfg.standardize_logits and not method.distils_logits:
        raise UserError(
            f"method={cfg.method.name} has no logit term on which standardize_logits=true could act: set it to false."
        )
    if for_training and cfg.standardize_logits and not method.can_be_standardized:
        raise UserError(
            "standardize_logits=true does not reach all logits that this method compares (those of a peer, or a fixed "
            "target): set it to false."
        )
    if for_training and isinstance(method, Combined):
        method.check()
    if for_training and cfg.winograd:
        use_winograd(student.network, frozen=False)
    return Parts(student, method, serialization, recipe)


def check_training_images(cfg: DictConfig, data: ImageData, method: Method) -> None:
    """Raise `UserError` if the method cannot train on views like those of the data, or without labels."""
    name, augmentation = method_name(cfg), data.augmentation
    if (method.needs_labels or method.needs_unmixed) and augmentation.mixing is not None:
        raise UserError(
            f"method={name} needs the label of each image, but augmentation={cfg.augmentation.name} mixes the labels: "
            "choose another augmentation."
        )
    if augmentation.policy_from_view >= method.views_per_image:
        raise UserError(
            f"augmentation.policy_from_view={augmentation.policy_from_view} leaves all views of method={name} without "
            f"the policy, because it has {method.views_per_image}: choose augmentation=randaugment, or a method with "
            "more views."
        )
    if method.needs_labels and len(data.unlabelled_index):
        raise UserError(
            f"method={name} needs the label of each image, but {len(data.unlabelled_index):,} training images have "
            "none: choose another method, or set data.unlabelled_share=0 to leave them out."
        )
    if not len(data.train_index) and not (method.needs_teacher and method.reads_teacher):
        raise UserError(
            f"method={name} learns from labels in its main stage, but no training image has one: choose a method whose "
            "main stage reads the teacher, such as kd."
        )


def make_recipe(cfg: DictConfig) -> Recipe:
    """Make the optimiser and the scheduler, both as partials."""
    return Recipe(
        learning_rate=cfg.schedule.learning_rate,
        make_optimizer=make_optimizer(cfg),
        make_scheduler=make_scheduler(cfg),
        interval=cfg.schedule.interval,
    )


def make_optimizer(cfg: DictConfig) -> Callable[..., Optimizer]:
    """Make a partial of the optimiser in the group `optimizer`, or else of the schedule's optimiser.

    The partial takes the parameters. Raises `UserError` if its options are invalid, or if it does not support the
    precision.
    """
    option = "optimizer" if cfg.optimizer else "schedule.optimizer"
    node = cfg.optimizer or cfg.schedule.optimizer
    check_required(find_target(node, option), {*node, "params", "lr"}, option)
    partial: Callable[..., Optimizer] = hydra.utils.instantiate(node, _partial_=True)
    with report_misfit(node, option):
        trial = partial([torch.zeros(1)], lr=cfg.schedule.learning_rate)
    if cfg.trainer.precision in getattr(trial, "unsupported_precisions", ()):
        raise UserError(
            f"{node._target_} does not support trainer.precision={cfg.trainer.precision}: use bf16-mixed or 32-true."
        )
    return partial


def make_scheduler(cfg: DictConfig) -> Callable[..., LRScheduler]:
    """Make a partial of the scheduler, which takes the optimiser, and `total_steps` if it steps every batch.

    Raises `UserError` if its options do not fit it, or if it does not fit the optimiser.
    """
    node, option, steps = cfg.schedule.scheduler, "schedule.scheduler", cfg.schedule.interval == "step"
    target = find_target(node, option)
    total = {"total_steps": 1000 * cfg.schedule.epochs} if steps else {}
    check_required(target, {*node, *total, "optimizer"}, option)
    partial: Callable[..., LRScheduler] = hydra.utils.instantiate(node, _partial_=True)
    if steps and "total_steps" not in (options_of(target) or {"total_steps"}):
        partial = functools.partial(_without_total_steps, partial)
    optimizer = make_optimizer(cfg)([{"params": [torch.zeros(1)], "lr": cfg.schedule.learning_rate}])
    with report_misfit(node, option):
        scheduler = partial(optimizer, **total)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(f"{option}._target_={node._target_} waits for a metric, which it does not get: choose another.")
    return partial


def _without_total_steps(make: Callable[..., LRScheduler], optimizer: Optimizer, total_steps: int) -> LRScheduler:
    return make(optimizer)


def make_distiller(
    cfg: DictConfig,
    data: ImageData,
    parts: Parts,
    teacher: Teacher | None,
    teacher_predictions: Mapping[str, Tensor] | None = None,
) -> Distiller:
    """Make the LightningModule, and allocate the parameters of the method and the serialization layer.

    Raises `UserError` if the method needs features and the teacher has none.
    """
    (student, mean, std), method, serialization, recipe = parts
    if teacher and method.needs_features and not teacher.shapes(data.image_shape).features:
        raise UserError(
            f"method={cfg.method.name} needs features, but the teacher {cfg.model.teacher.name} has none: choose a "
            "method on logits, or another teacher."
        )
    torch.manual_seed(cfg.seed)
    peer_numbers = itertools.count()
    serialization.allocate(student, teacher)
    method.allocate(
        Networks(
            student=student,
            teacher=teacher,
            image_shape=data.image_shape,
            train_labels=data.trained_labels,
            new_student=lambda: make_peer(cfg, data.num_classes, next(peer_numbers)),
        )
    )
    return Distiller(
        student=student,
        method=method,
        serialization=serialization,
        teacher=teacher,
        recipe=recipe,
        settings=make_settings(cfg, data, mean, std),
        teacher_predictions=teacher_predictions or {},
    )


def make_peer(cfg: DictConfig, num_classes: int, number: int) -> Network:
    """Make another student, with initial weights that depend on the seed and the peer's number.

    The weights differ from the student's. The random numbers for the method's other parameters stay the same.
    """
    with torch.random.fork_rng(devices=[]):
        bits = int(random_bits(cfg.seed, 0, torch.tensor(number), PEER_STREAM))
        torch.manual_seed(bits % 2**32)  # torch's CPU generator ignores the higher bits
        return make_network(cfg.model.student, "model.student", num_classes)


def make_settings(cfg: DictConfig, data: ImageData, mean: Any, std: Any) -> Settings:
    """Collect the settings of the LightningModule. `mean` and `std` are the student's normalisation."""
    return Settings(
        num_classes=data.num_classes,
        mean=tuple(mean),
        std=tuple(std),
        validates_on=data.validates_on,
        seed=cfg.seed,
        channels_last=cfg.channels_last,
        label_smoothing=cfg.label_smoothing,
        labelled_share=data.labelled_share,
        class_weights=balanced_weights(data.trained_labels, data.num_classes) if cfg.class_weights else None,
        standardize_logits=cfg.standardize_logits,
        compiled=cfg.compile,
    )


def balanced_weights(labels: Tensor, num_classes: int) -> tuple[float, ...]:
    """Compute the weight N / (C n_c) of each class c with n_c of N images, and 0 for a class without images.

    `labels` are the classes of the training images, or -1 for images that are left out. If all classes have images, all
    have the same total weight, and the mean weight of an image is 1.

    >>> balanced_weights(torch.tensor([0, 0, 0, 1, -1]), 2)
    (0.6666666666666666, 2.0)
    """
    counts = labels[labels >= 0].bincount(minlength=num_classes)
    weights = counts.sum() / (num_classes * counts.double())
    return tuple(torch.where(counts > 0, weights, 0.0).tolist())
