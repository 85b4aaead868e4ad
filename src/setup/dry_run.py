"""Try a method once on random images, so that mistakes in it show at once and not after a teacher is trained."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from src.common.errors import UserError, describe_error
from src.config.names import method_name, needs_teacher, teacher_is_program
from src.data.image_data import ImageData, Samples
from src.methods.method import LogitMethod, weighted
from src.models.network import Network, Output
from src.setup.assemble import Parts, make_distiller
from src.setup.teacher import find_teacher, load_teacher, make_untrained_teacher
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller
from src.training.fitting import try_options

IMAGES = 16
"""The number of random images, if a batch has so many."""
PHOTOS = 4
"""The same for photos of more than 64 pixels, whose features take much memory."""


def dry_run(cfg: DictConfig, data: ImageData, parts: Parts) -> None:
    """Compute the terms of all stages of the method, on copies of the parts and with a teacher of random weights.

    Their gradients, the optimiser, the averaging and the logger are tried too. Raises `UserError` if one of these
    fails, if a network or a layer returns something else than it should, if the method's terms and weights do not fit
    each other, if a term is not a finite scalar or depends on a parameter that is not part of a module, if a callback
    waits for a metric that the run does not have, or if `keep_best` would keep a student that does not predict alone.
    """
    cfg = copy.deepcopy(cfg)
    cfg.compile = False
    try:
        parts = copy.deepcopy(parts)
        blank = torch.zeros(2, *data.image_shape)
        output = _check_student(parts.student.network, blank, data.num_classes)
        teacher = trial_teacher(cfg, data) if needs_teacher(cfg) else None
        distiller = make_distiller(cfg, data, parts, teacher)
        _check_monitors(cfg, distiller)
        if cfg.keep_best and not distiller.predicts_alone:
            raise UserError(
                f"keep_best=true keeps the student alone, but method={method_name(cfg)} predicts through parts of the "
                "method too: leave it out."
            )
        most = IMAGES if max(data.image_shape) <= 64 else PHOTOS
        images = random_views(data, min(most, max(2, cfg.schedule.batch_size)))
        _check_logits(distiller, blank, output)
        for stage in distiller.method.stages():
            _try_stage(cfg, distiller.for_stage(stage), images, stage.epochs)
        _try_stage(cfg, distiller, images, cfg.trainer.max_epochs)
        if cfg.schedule.batch_size == 1:
            _try_single_image(distiller, data)
    except UserError as error:
        if str(error).startswith("The method"):
            raise UserError(f"method={method_name(cfg)}: {error}") from error
        raise
    except Exception as error:
        raise UserError(f"method={method_name(cfg)} fails on random images: {describe_error(error)}.") from error


def trial_teacher(cfg: DictConfig, data: ImageData) -> Teacher:
    """Make a teacher of random weights. A program has no architecture that could be made again, so it is loaded."""
    if teacher_is_program(cfg):
        return load_teacher(cfg, data, find_teacher(cfg))
    teacher = make_untrained_teacher(cfg, data)
    weight = teacher.network.classifier_layer.weight
    if not weight.any():  # some networks of timm start so, but no trained teacher has such a layer
        nn.init.normal_(weight, std=0.01)
    return teacher


def random_views(data: ImageData, images: int = IMAGES) -> Samples:
    """Make a batch of random images with the labels of training images, in as many views as the method asks for.

    If there are images without labels, every other image is one of them.
    """
    generator = torch.Generator().manual_seed(0)
    labelled = _last(data.train_index, images - len(data.unlabelled_index[: images // 2]))
    index = torch.cat([labelled, _last(data.unlabelled_index, images - len(labelled))])
    shape = (len(index), *data.image_shape)
    views = tuple(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(data.views_per_image)
    )
    numbers = tuple(torch.zeros_like(index) for _ in views)
    samples = Samples(views, data.train_labels[index], index, numbers)
    if data.augmentation.mixing is None:
        return samples
    return samples._replace(other_target=samples.target, share=torch.ones(len(index)))


def _last(index: Tensor, count: int) -> Tensor:
    """Return the last positions: a memory bank that is too small has no room for them."""
    return index[max(0, len(index) - count) :]


def _check_student(student: Network, images: Tensor, classes: int) -> Output:
    """Return the student's output. Raise `UserError` if it is no `Output`, or has not one logit for each class."""
    output: object = student.forward_features(images)
    name = type(student).__name__
    if not isinstance(output, Output):
        raise UserError(f"forward_features of {name} returns {_kind(output)}: return an Output of src.models.network.")
    if output.logits.shape != (len(images), classes):
        raise UserError(
            f"{name} returns logits of shape {list(output.logits.shape)} for {len(images)} images of {classes} "
            "classes: give its last layer num_classes outputs."
        )
    return output


def _check_logits(distiller: Distiller, images: Tensor, output: Output) -> None:
    """Raise `UserError` if the serialization layer or the predictor does not return one logit for each class.

    `output` is that of the student for the images.
    """
    serialized: object = distiller.serialization(output.logits, output.pooled)
    predicted: object = distiller.method.predictor(distiller.student)(images)
    for name, logits in (("The serialization layer", serialized), ("The method's predictor", predicted)):
        if not isinstance(logits, Tensor) or logits.shape != output.logits.shape:
            raise UserError(f"{name} returns {_kind(logits)}: return logits of shape {list(output.logits.shape)}.")


def _try_stage(cfg: DictConfig, distiller: Distiller, images: Samples, epochs: int) -> None:
    """Try a stage of `epochs` epochs: its terms, their weights and gradients, and its options."""
    known = set(distiller.parameters())
    terms = _try_terms(distiller, images)
    unknown = next((parameter for parameter in _parameters_behind(terms) if parameter not in known), None)
    if unknown is not None:
        raise UserError(
            f"A term depends on a parameter of shape {list(unknown.shape)} that no module holds, so it would not be "
            "trained: make it in allocate(), and keep a list of modules in an nn.ModuleList."
        )
    try_options(cfg, distiller, terms)
    tried = {_kind_of_weights(distiller.method.weights(0))}
    for epoch in range(1, epochs):
        kind = _kind_of_weights(distiller.method.weights(epoch))
        if kind not in tried:
            _try_terms(distiller, images, epoch)
            tried.add(kind)


def _kind_of_weights(weights: Mapping[str, float]) -> tuple[frozenset[str], bool]:
    """Return what decides whether weights fit the terms: their names, and whether one of them is not 0."""
    return frozenset(weights), any(weights.values())


def _try_terms(distiller: Distiller, images: Samples, epoch: int = 0) -> dict[str, Tensor]:
    """Compute the weighted terms of the method, and those of the serialization layer."""
    method = distiller.method
    batch, logits = distiller.observe(images)
    batch = dataclasses.replace(batch, epoch=epoch)
    if isinstance(method, LogitMethod):
        _check_distillation(method.distillation(logits, batch))
    terms, penalties = method.all_terms(batch, logits), distiller.serialization.penalties()
    _check_terms("method", terms)
    _check_terms("serialization layer", penalties)
    if shared := terms.keys() & penalties.keys():
        raise UserError(f"The serialization layer and the method both have a term {shared.pop()!r}: rename one.")
    weights: object = method.weights(epoch)
    if not isinstance(weights, Mapping):
        raise UserError(f"The method's weights() returns {_kind(weights)}: return a dict of numbers by term.")
    summed = weighted(terms, weights)
    if not summed:
        raise UserError(f"The method's weights are all 0 in epoch {epoch}: raise the weight of at least one term.")
    if not any(term.requires_grad for term in summed.values()):
        raise UserError("The method's terms depend on nothing that is trained: compute them from the student's output.")
    summed |= penalties
    if bad := next((name for name, term in summed.items() if not term.isfinite()), None):
        raise UserError(
            f"The term {bad!r} is {float(summed[bad])} on random images: look for a division by 0 or an overflow."
        )
    return summed


def _check_distillation(terms: Mapping[str, Tensor]) -> None:
    """Raise `UserError` if the terms of a `LogitMethod` are no dict, or hold the one that is added for it."""
    _check_terms("method", terms)
    if "cross_entropy" in terms:
        raise UserError("The method's distillation returns cross_entropy, which is added for it: leave it out.")


def _check_terms(owner: str, terms: object) -> None:
    """Raise `UserError` unless `terms` are scalar tensors by name, and none has the name of their sum."""
    if not isinstance(terms, Mapping):
        raise UserError(f"The {owner}'s terms are {_kind(terms)}: return a dict of scalar tensors by name.")
    for name, term in terms.items():
        if name == "loss":
            raise UserError(f"The {owner}'s term 'loss' has the name of the sum of all terms: choose another name.")
        if not isinstance(term, Tensor) or term.ndim:
            advice = "return a scalar, such as the mean over the batch"
            raise UserError(f"The {owner}'s term {name!r} is {_kind(term)}: {advice}.")


def _kind(value: object) -> str:
    """Describe a value by its type, or a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _parameters_behind(terms: Mapping[str, Tensor]) -> Iterator[nn.Parameter]:
    """Find the parameters that the terms depend on, in the graph of autograd."""
    nodes: list[Any] = [term.grad_fn for term in terms.values() if term.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), nn.Parameter):
            yield variable
        nodes += [following for following, _ in node.next_functions if following is not None]


def _try_single_image(distiller: Distiller, data: ImageData) -> None:
    """Raise `UserError` if the networks cannot train on one image. Batch norm needs several values per channel."""
    try:
        _try_terms(distiller, random_views(data, images=1))
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"schedule.batch_size=1 is too small for these networks ({why}): choose 2 or more.") from error


def _check_monitors(cfg: DictConfig, distiller: Distiller) -> None:
    """Raise `UserError` if a callback of `trainer.callbacks` waits for a metric of an evaluation that is not logged."""
    split = distiller.settings.validates_on
    names = [*distiller.metrics, *(["agreement"] if distiller.teacher else [])]
    known = [f"{split}/{name}" for name in names] if cfg.trainer.get("limit_val_batches") != 0 else []
    for number, callback in enumerate(cfg.trainer.get("callbacks") or ()):
        monitor = callback.get("monitor")
        if monitor is None or not callback.get("strict", True) or monitor.startswith("train/"):
            continue
        if monitor not in [*known, "accuracy", "loss"]:
            choice = f"choose one of {', '.join(known)}" if known else "leave trainer.limit_val_batches=0 out"
            raise UserError(f"trainer.callbacks[{number}].monitor={monitor} is not a metric of this run: {choice}.")
