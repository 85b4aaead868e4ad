"""The contract of a method: what it may ask for, and what it gives back.

A method is a function from what student and teacher said to named loss terms. A new one is one file in this folder
(the paper's equation as a pure function on tensors, and under it a small subclass of `Method`) and one yaml in
`conf/method/`. It may ask for

- logits of student and teacher before and after the serialization layer, targets, sample indices, epoch and step:
  always there, in `Batch`;
- stage features, pooled features and the map those are made of, of both networks: `needs_features = True`; the stage
  features before their ReLU too: `needs_preactivations = True`;
- more than one augmented view of each image: `views = 2`;
- parameters and buffers of its own (adapters, a learnable temperature, a memory bank): made in `build`, where the
  sizes of both networks, the number of training images, the teacher's classifier and further students can be had; they
  join the optimiser, the checkpoint and the device by being there;
- stages that run before the main one: `stages`;
- a say in how the gradients of its terms are combined: `backward`;
- a predictor other than the bare student: `predictor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.models.network import Network, Shapes, shapes

if TYPE_CHECKING:
    from src.teacher import Teacher


class Prediction(NamedTuple):
    """What one network said about one view of a batch of B images with C classes."""

    logits: Tensor
    """[B, C]: the network's own, which cross-entropy sees and inference uses."""
    distillation_logits: Tensor
    """[B, C]: what distillation compares: the student's after its serialization (`logits` itself where that is off, and
    for a teacher), both standardized under `standardize_logits`."""
    features: tuple[Tensor, ...]
    """The stem's output and each stage's [B, channels, height, width]; empty unless the method `needs_features`."""
    pooled: Tensor | None
    """[B, D], the input of the classifier; None unless the method `needs_features`."""
    preactivations: tuple[Tensor, ...] = ()
    """`features` before their ReLU, of the same shapes; empty unless the method `needs_preactivations`."""
    unpooled: Tensor | None = None
    """[B, D, height, width], the map that `pooled` is made of; None where there is none or no `needs_features`."""


class View(NamedTuple):
    """One augmented view of the batch and what both networks said about it."""

    images: Tensor
    """[B, 3, H, W], normalised for the student."""
    student: Prediction
    teacher: Prediction | None
    """None where the method has no teacher or does not read it; never carries gradients."""


@dataclass(frozen=True)
class Batch:
    """All that a method sees of one training step."""

    views: tuple[View, ...]
    target: Tensor
    """[B] int64, the labelled class."""
    index: Tensor
    """[B] int64, the position of each image in the training data, from 0 to `Networks.train_size` - 1."""
    epoch: int
    """From 0."""
    step: int
    """Optimiser steps done before this one."""

    @property
    def student(self) -> Prediction:
        """What the student said about the first view."""
        return self.views[0].student

    @property
    def teacher(self) -> Prediction:
        """What the teacher said about the first view."""
        teacher = self.views[0].teacher
        assert teacher is not None, "a method that reads the teacher leaves needs_teacher at True"
        return teacher


@dataclass(frozen=True)
class Networks:
    """What a method can ask about the networks and the data when it makes its own parts."""

    student: Network
    teacher: Teacher | None
    image_shape: tuple[int, int, int]
    train_labels: Tensor
    """[N] int64, the class of each image of the training data, -1 where it is left out or held out."""
    new_student: Callable[[], Network]
    """Makes one more student with fresh weights, for methods that train several."""

    @property
    def train_size(self) -> int:
        """Number of images of the training data."""
        return len(self.train_labels)

    @cached_property
    def student_shapes(self) -> Shapes:
        """Sizes of the student's logits and features."""
        return shapes(self.student, self.image_shape)

    @cached_property
    def teacher_shapes(self) -> Shapes:
        """Sizes of the teacher's logits and features."""
        assert self.teacher is not None
        return self.teacher.shapes(self.image_shape)

    def teacher_classifier(self) -> nn.Linear:
        """A frozen copy of the teacher's last layer, the method's to keep (and saved with it)."""
        assert self.teacher is not None
        return self.teacher.classifier()


class Stage(NamedTuple):
    """Training that comes before the main one, with the same data and its own terms."""

    name: str
    method: Method
    """Its terms decide what is trained; modules that it shares with the main method carry over."""
    epochs: int
    learning_rate_scale: float = 1.0
    """Of the main stage's learning rate."""


class Method(nn.Module):
    """Base of all methods: a subclass defines `weights` and `terms`, the rest has the defaults of a logit method."""

    needs_teacher = True
    reads_teacher = True
    """False where the stages alone do: in the main one the teacher is then not asked."""
    distils_logits = False
    """Whether a term reads `distillation_logits`: only then does serialization mean anything."""
    needs_features = False
    needs_preactivations = False
    """Beside the features: what their ReLUs were given (`src/models/preactivations.py` says what of which network)."""
    views = 1

    def build(self, networks: Networks) -> None:
        """Make the method's own parameters and buffers, in sizes asked of the networks."""

    def stages(self) -> tuple[Stage, ...]:
        """What has to be trained before the main stage."""
        return ()

    def weights(self, epoch: int) -> Mapping[str, float]:
        """The weight of each term in this epoch (from 0): the one place where weights and warm-ups live."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> Mapping[str, Tensor]:
        """The loss terms by name, unweighted scalars; the loss is the sum of weight times term.

        A term of weight 0 is left out of the sum, so that neither its value nor its gradient can spoil it.
        """
        raise NotImplementedError

    def backward(self, loss: Tensor, weighted_terms: Mapping[str, Tensor]) -> None:
        """Leave gradients in the parameters. `loss` is the sum of the terms (scaled under float16)."""
        loss.backward()

    def predictor(self, student: Network) -> nn.Module:
        """The module that maps normalised images [B, 3, H, W] to logits [B, C] at inference."""
        return student


def warm_up(epoch: int, epochs: float) -> float:
    """Linear warm-up of a weight, min((epoch + 1) / epochs, 1), `epoch` from 0: the first of 20 epochs weighs 0.05."""
    return 1.0 if epochs <= 0 else min((epoch + 1) / epochs, 1.0)


def at_least_float32(logits: Tensor) -> Tensor:
    """Losses are computed in float32 whatever precision the network runs in; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(batch: Batch) -> Tensor:
    """CE of the labels, on the student's own logits."""
    return F.cross_entropy(at_least_float32(batch.student.logits), batch.target)


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(logits / T) of each row, [B, C]; the peak is taken off first, so that the division rounds gaps.

    `temperature` is one number, or one for each row: [B, 1].
    """
    logits = at_least_float32(logits)
    return F.log_softmax((logits - logits.amax(dim=1, keepdim=True).detach()) / temperature, dim=1)
