"""The contract of a distillation method: its inputs and its outputs.

A method turns the outputs of student and teacher into named loss terms. A new method is one file in this folder and
one file in `conf/method/`. The file here holds the paper's equation as a pure function on tensors, and below it a
small subclass of one of two base classes:

- `LogitMethod`, for a loss on logits. It defines `distillation`, which gets the logits of student and teacher.
- `Method`, for everything else. It defines `terms`, which gets the whole `Batch`.

A subclass of either also defines `weights`. The training loop calls `all_terms`, which returns the terms of `terms`,
or cross-entropy and the terms of `distillation`. `weighted` multiplies them by their weights.

A method may also ask for

- features of both networks: `needs_features = True`, and `needs_preactivations = True` for features before their ReLU;
- several augmented views of each image: `views_per_image = 2`;
- the labelled class of each image, and not the teacher's prediction for mixed images and images without a label:
  `needs_labels = True`. A method without any distillation sets `distils = False`;
- parameters and buffers of its own, such as adapters or a memory bank: it makes them in `allocate`, which knows the
  sizes of both networks. They join the optimiser, the checkpoints and the device because they are part of the method;
- stages that are trained before the main one: `stages`;
- its own way to combine the gradients of its terms: `backward`;
- a predictor other than the bare student: `predictor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.models.network import Network, Output, Shapes, measure_shapes

if TYPE_CHECKING:
    from src.teachers.teacher import Teacher


class WithoutFeatures(Output):
    """The output that a method gets if it does not ask for features: reading them raises `UserError`."""

    @property
    def features(self) -> Any:
        """Raise `UserError`."""
        raise _not_requested("features", "needs_features")

    @property
    def pooled(self) -> Any:
        """Raise `UserError`."""
        raise _not_requested("pooled features", "needs_features")

    @property
    def unpooled(self) -> Any:
        """Raise `UserError`."""
        raise _not_requested("the last feature maps", "needs_features")

    @property
    def preactivations(self) -> Any:
        """Raise `UserError`."""
        raise _not_requested("preactivations", "needs_features = True and needs_preactivations")


class WithoutPreactivations(Output):
    """The output that a method gets if it asks for features alone: reading preactivations raises `UserError`."""

    @property
    def preactivations(self) -> Any:
        """Raise `UserError`."""
        raise _not_requested("preactivations", "needs_preactivations")


def logits_only(logits: Tensor) -> WithoutFeatures:
    """Wrap the logits [B, C] of a network whose features were not requested."""
    return WithoutFeatures(logits, (), logits)


def _not_requested(read: str, flag: str) -> UserError:
    return UserError(f"The method reads {read} without asking for them: set {flag} = True in its class.")


class View(NamedTuple):
    """One augmented view of a batch, and the outputs of both networks for it."""

    images: Tensor
    """[B, 3, H, W], normalised for the student."""
    student: Output
    teacher: Output | None
    """Without gradients. None if the method has no teacher, or does not read it in this stage."""


class LogitPair(NamedTuple):
    """The logits that distillation compares in one view, each [B, C]."""

    student: Tensor
    """After the serialization layer and after standardization, if they are on."""
    teacher: Tensor | None
    """After standardization, if it is on. None without a teacher."""


@dataclass(frozen=True)
class DistillationLogits:
    """The logits that distillation compares, by view."""

    views: tuple[LogitPair, ...]

    @property
    def student(self) -> Tensor:
        """The student's logits [B, C] for the first view."""
        return self.views[0].student

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits [B, C] for the first view. Raises `UserError` without a teacher."""
        return self.of_view(0)[1]

    def of_view(self, view: int) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's logits [B, C]. Raises `UserError` without a teacher."""
        student, teacher = self.views[view]
        if teacher is None:
            raise _no_teacher()
        return student, teacher


def _no_teacher() -> UserError:
    return UserError(
        "The method reads the teacher, but its class sets needs_teacher or reads_teacher to False: set it to True."
    )


class Labels(NamedTuple):
    """The labels for cross-entropy, if some images have no label or if images are mixed."""

    target: Tensor
    """[B] int64, or -1 for images without a label."""
    other_target: Tensor | None = None
    """[B] int64, the classes of the images that the first view is mixed with, if it is mixed."""
    share: Tensor | None = None
    """[B], the share of `target` in the label of a mixed image. The rest belongs to `other_target`."""
    labelled_share: float = 1.0
    """The share of images with a label in each global batch."""


@dataclass(frozen=True)
class Batch:
    """The input of a method in one training step. The logits for distillation are passed separately."""

    views: tuple[View, ...]
    target: Tensor
    """[B] int64, the class that distillation takes for the target: the labelled class, or the teacher's predicted class
    for images without a label and for mixed images. Without a teacher, it is -1 for images without a label."""
    index: Tensor
    """[B] int64, the position of each image in the training data, from 0 to `Networks.train_size` - 1."""
    epoch: int
    """From 0."""
    step: int
    """The number of optimiser steps before this one."""
    label_smoothing: float = 0.0
    """The share of each label that cross-entropy spreads over all classes."""
    class_weights: Tensor | None = None
    """[C], the weight of an image of each class in cross-entropy. None: 1."""
    labels: Labels | None = None
    """The labels for cross-entropy. None: `target`."""

    @property
    def student(self) -> Output:
        """The student's output for the first view."""
        return self.views[0].student

    @property
    def teacher(self) -> Output:
        """The teacher's output for the first view. Raises `UserError` without a teacher."""
        if self.views[0].teacher is None:
            raise _no_teacher()
        return self.views[0].teacher


@dataclass(frozen=True)
class Networks:
    """The networks and data that a method may read when it allocates its own parameters."""

    student: Network
    teacher: Teacher | None
    image_shape: tuple[int, int, int]
    train_labels: Tensor
    """[N] int64, the class of each image of the training data, or -1 if the image is left out or held out."""
    new_student: Callable[[], Network]
    """Makes another student with fresh weights, for methods that train several."""

    @property
    def train_size(self) -> int:
        """The number of images of the training data."""
        return len(self.train_labels)

    @cached_property
    def student_shapes(self) -> Shapes:
        """Sizes of the student's logits and features."""
        return measure_shapes(self.student, self.image_shape)

    @cached_property
    def teacher_shapes(self) -> Shapes:
        """Sizes of the teacher's logits and features."""
        return self.required_teacher.shapes(self.image_shape)

    @property
    def required_teacher(self) -> Teacher:
        """The teacher. Raises `UserError` without one."""
        if self.teacher is None:
            raise _no_teacher()
        return self.teacher

    def teacher_classifier(self) -> nn.Linear:
        """Copy the teacher's last layer, frozen. The copy belongs to the method and is saved with it."""
        return self.required_teacher.classifier()


class Stage(NamedTuple):
    """Training before the main stage, on the same data, with its own terms."""

    name: str
    method: Method
    """Its terms decide what is trained. Modules that it shares with the main method carry over."""
    epochs: int
    learning_rate_scale: float = 1.0
    """Multiplies the main stage's learning rate."""


class Method(nn.Module):
    """The base of all methods. A subclass defines `weights` and `terms`."""

    needs_teacher = True
    needs_labels = False
    """True if a term other than cross-entropy is only right for the labelled class of an unmixed image. The other terms
    take the class that the teacher predicts where there is no such label."""
    needs_unmixed = False
    """True if a term takes the label of the first view for all views. Views are mixed independently."""
    distils = True
    """False if all terms are cross-entropy, so that images without a label cannot take part."""
    reads_teacher = True
    """False if only the stages before the main one read the teacher. The main stage then does not run it."""
    needs_features = False
    needs_preactivations = False
    """Requires `needs_features`. `src/models/preactivations.py` defines them for each family of networks."""
    views_per_image = 1
    can_be_standardized = True
    """False if a term compares the student's logits with others than the teacher's. `standardize_logits` leaves those
    as they are."""

    @property
    def distils_logits(self) -> bool:
        """True if a term compares logits for distillation, so that a serialization layer can act on it."""
        return False

    def allocate(self, networks: Networks) -> None:
        """Make the method's own parameters and buffers, in sizes that fit the networks."""

    def stages(self) -> tuple[Stage, ...]:
        """List the stages that are trained before the main one."""
        return ()

    def weights(self, epoch: int) -> Mapping[str, float]:
        """Return the weight of each term in this epoch (from 0). Warm-ups live here and nowhere else."""
        raise NotImplementedError(f"{type(self).__name__} defines no weights()")

    def terms(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the loss terms by name, as unweighted scalars."""
        raise NotImplementedError(f"{type(self).__name__} defines no terms()")

    def all_terms(self, batch: Batch, logits: DistillationLogits) -> Mapping[str, Tensor]:
        """Compute all terms. The training loop calls this method. A subclass defines `terms` instead."""
        return self.terms(batch)

    def restrict(self, output: Output) -> Output:
        """Limit a network's output to what the class asks for: reading anything else raises `UserError`."""
        if not self.needs_features:
            return logits_only(output.logits)
        return output if self.needs_preactivations else WithoutPreactivations(*output)

    def backward(self, loss: Tensor, weighted_terms: Mapping[str, Tensor]) -> None:
        """Compute the gradients of all parameters. `loss` is the sum of the terms, scaled under float16."""
        loss.backward()

    def predictor(self, student: Network) -> nn.Module:
        """Return the module that maps normalised images [B, 3, H, W] to logits [B, C] at inference."""
        return student


class LogitMethod(Method):
    """The base of methods that distil logits: cross-entropy on the labels, and the terms of `distillation`.

    Only these methods read the logits for distillation, so only they combine with a serialization layer and with
    standardized logits. The term `cross_entropy` is always there. `weights` gives its weight.
    """

    can_be_compiled = True
    """Whether `compile=true` may compile `distillation`. Set it to False if a number that it reads changes often, or if
    one of its terms does not depend on the logits."""

    @property
    def distils_logits(self) -> bool:
        """Always true."""
        return True

    def distillation(self, logits: DistillationLogits, batch: Batch) -> Mapping[str, Tensor]:
        """Return the distillation terms by name, as unweighted scalars, from the logits [B, C] of both networks."""
        raise NotImplementedError(f"{type(self).__name__} defines no distillation()")

    def all_terms(self, batch: Batch, logits: DistillationLogits) -> Mapping[str, Tensor]:
        """Compute cross-entropy on the student's own logits, and the distillation terms."""
        # Cross-entropy comes first, so that its gradient comes last: the tensors that distillation keeps for its
        # backward pass have been freed by then.
        return {"cross_entropy": self.label_loss(batch), **self.distillation(logits, batch)}

    def label_loss(self, batch: Batch) -> Tensor:
        """Return the term `cross_entropy`: that of the labels on the student's own logits for the first view."""
        return cross_entropy(batch)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Multiply each term by its weight.

    A term of weight 0 is left out, because 0 times infinity would be NaN. Raises `UserError` for a term without a
    weight and for a weight without a term.

    >>> weighted({"kd": torch.tensor(3.0)}, {"kd": 0.5})
    {'kd': tensor(1.5000)}
    """
    if without_weight := [name for name in terms if name not in weights]:
        raise UserError(
            f"The method computes the term {without_weight[0]!r}, but its weights() lacks it: add its weight there."
        )
    if without_term := [name for name in weights if name not in terms]:
        raise UserError(
            f"The method's weights() has {without_term[0]!r}, but no term has this name: remove it or compute the term."
        )
    return {name: weights[name] * term for name, term in terms.items() if weights[name] != 0}


def warm_up(epoch: int, epochs: float) -> float:
    """Warm a weight up linearly: min((epoch + 1) / epochs, 1), with `epoch` from 0.

    >>> warm_up(0, 20)
    0.05
    """
    return 1.0 if epochs <= 0 else min((epoch + 1) / epochs, 1.0)


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert to float32, so that losses do not depend on the networks' precision. float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(batch: Batch, logits: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy of the labels on `logits` [B, C], by default the student's own.

    Smoothing s replaces each label by (1 - s) onehot(t) + s / C. Class weights multiply each image's loss. The label of
    a mixed image is the mean of two labels, weighted by their shares. The result is the mean over the images with a
    label: over all devices if some images have none, because the devices may have different numbers of them.
    """
    logits = at_least_float32(batch.student.logits if logits is None else logits)
    labels = batch.labels
    if labels is None:
        if batch.class_weights is None:
            return F.cross_entropy(logits, batch.target, label_smoothing=batch.label_smoothing)
        return _cross_entropies(batch, logits, batch.target).mean()
    losses = _cross_entropies(batch, logits, labels.target)
    if labels.other_target is not None and labels.share is not None:
        others = _cross_entropies(batch, logits, labels.other_target)
        losses = labels.share * losses + (1 - labels.share) * others
    return losses.mean() / (labels.labelled_share or 1.0)


def _cross_entropies(batch: Batch, logits: Tensor, target: Tensor) -> Tensor:
    """Compute the weighted cross-entropy of each image, [B]. It is 0 for images without a label."""
    losses = F.cross_entropy(logits, target, reduction="none", ignore_index=-1, label_smoothing=batch.label_smoothing)
    if batch.class_weights is None:
        return losses
    return batch.class_weights.index_select(0, target.clamp(min=0)) * losses


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute log softmax(logits / T) of each row, [B, C].

    `temperature` is one number, or one for each row: [B, 1]. The largest logit is subtracted before the division,
    which then rounds differences instead of large numbers.
    """
    logits = at_least_float32(logits)
    return F.log_softmax((logits - logits.amax(dim=1, keepdim=True).detach()) / temperature, dim=1)
