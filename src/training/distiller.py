"""The LightningModule: a student, its frozen teacher, the serialization layer between them, and the method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.common.errors import UserError
from src.common.metrics import Agreement, evaluation_metrics
from src.data.image_data import Samples
from src.data.views import normalise
from src.methods.method import Batch, DistillationLogits, Labels, LogitPair, Method, Stage, View, logits_only, weighted
from src.models.network import Network, Output
from src.models.preactivations import forward_features
from src.teachers.teacher import Teacher
from src.training.acceleration import SideStream, compiled_terms, make_fused, mean_over_devices
from src.training.dot import DOT
from src.training.serialization import Serialization
from src.training.standardization import standardize
from src.training.term_log import ADVICE, TermLog

EvaluationSplit = Literal["val", "test"]


class Recipe(NamedTuple):
    """The learning rate, the optimiser and the scheduler of a module."""

    learning_rate: float
    make_optimizer: Callable[..., Optimizer]
    """Makes the optimiser from the parameter groups."""
    make_scheduler: Callable[..., Any]
    """Makes the scheduler from the optimiser, and from `total_steps` if it steps every batch."""
    interval: Literal["epoch", "step"]
    """When the scheduler steps."""


@dataclass(frozen=True)
class Settings:
    """Further settings of a module's training and evaluation."""

    num_classes: int
    mean: tuple[float, ...]
    """The student's normalisation."""
    std: tuple[float, ...]
    validates_on: EvaluationSplit
    """The split that the validation loader reads."""
    seed: int
    channels_last: bool = True
    label_smoothing: float = 0.0
    """As in `Batch`."""
    class_weights: tuple[float, ...] | None = None
    """As in `Batch`."""
    labelled_share: float = 1.0
    """As in `Labels`."""
    standardize_logits: bool = False
    """Standardize the logits of student and teacher before distillation compares them."""
    compiled: bool = False
    """Compile the student and the terms of a method on logits. The module and its checkpoints stay the same."""


class Distiller(L.LightningModule):
    """Train `student` with the weighted terms of `method`.

    In each training step Lightning calls the data's `on_after_batch_transfer`, which augments the images, and then
    `on_train_batch_start`, `training_step` and `backward` of this module. `configure_optimizers` is called once.

    `teacher_predictions` maps a split to the classes [N] that the teacher predicts, or -1 for images without a
    prediction. The agreement is computed from them.
    """

    def __init__(
        self,
        *,
        student: Network,
        method: Method,
        serialization: Serialization,
        teacher: Teacher | None,
        recipe: Recipe,
        settings: Settings,
        teacher_predictions: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.serialization = serialization
        self.teacher = teacher
        self.recipe = recipe
        self.settings = settings
        self.teacher_predictions = teacher_predictions
        self.normalisation = torch.tensor([settings.mean, settings.std])  # no buffer: averaging would round it anew
        self.class_weights = None if settings.class_weights is None else torch.tensor(settings.class_weights)
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.adjust_logits: Callable[[Tensor], Tensor] = standardize if settings.standardize_logits else nn.Identity()
        self.forward_student = torch.compile(forward_features, dynamic=False) if settings.compiled else forward_features
        self.all_terms = compiled_terms(method) if settings.compiled else method.all_terms
        self.teacher_stream = SideStream(torch.device("cpu"))
        self.metrics = evaluation_metrics(settings.num_classes)
        self.agreement = Agreement()
        self.weighted_terms: Mapping[str, Tensor] = {}
        self.last_batch: tuple[Batch, DistillationLogits] | None = None

    def for_stage(self, stage: Stage) -> Distiller:
        """Make a module that trains the same student with the terms of a stage, at the stage's learning rate."""
        learning_rate = stage.learning_rate_scale * self.recipe.learning_rate
        return Distiller(
            student=self.student,
            method=stage.method,
            serialization=self.serialization,
            teacher=self.teacher,
            recipe=self.recipe._replace(learning_rate=learning_rate),
            settings=self.settings,
            teacher_predictions=self.teacher_predictions,
        )

    def setup(self, stage: str) -> None:
        """Convert both networks to the memory format, and move the teacher to the device."""
        self.student.to(memory_format=self.memory_format)
        device = self.trainer.strategy.root_device
        self.teacher_stream = SideStream(device)
        self.normalisation = self.normalisation.to(device)
        self.class_weights = None if self.class_weights is None else self.class_weights.to(device)
        if self.teacher is not None:
            self.teacher.to(device, self.memory_format)
        self.teacher_predictions = {split: each.to(device) for split, each in self.teacher_predictions.items()}

    def configure_callbacks(self) -> list[L.Callback]:
        """Add a `TermLog`, which logs the loss, unless the trainer has one."""
        has_log = any(isinstance(callback, TermLog) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has_log else [TermLog()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one parameter group for student and method, and one for the serialization layer if it is trained."""
        learning_rate = self.recipe.learning_rate
        trained = [p for module in (self.student, self.method) for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "lr": learning_rate}]
        layer = list(self.serialization.parameters())
        if layer:
            groups.append({"params": layer, "lr": learning_rate * self.serialization.lr_scale})
            if self.serialization.weight_decay is not None:
                groups[1]["weight_decay"] = self.serialization.weight_decay
        return groups

    def configure_optimizers(self) -> Any:
        """Make the optimiser and the scheduler."""
        _, make_optimizer, make_scheduler, interval = self.recipe
        optimizer = make_fused(make_optimizer, self.parameter_groups(), self.trainer)
        steps = {"total_steps": int(self.trainer.estimated_stepping_batches)} if interval == "step" else {}
        scheduler = make_scheduler(optimizer, **steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def on_train_batch_start(self, batch: Samples, batch_idx: int) -> None:
        """Seed torch by the batch, so that a resumed run draws the same random numbers."""
        accumulated = self.trainer.accumulate_grad_batches
        number = self.global_step * accumulated + batch_idx % accumulated
        torch.manual_seed((self.settings.seed * 1_000_003 + number) % 2**63)

    def observe(self, samples: Samples) -> tuple[Batch, DistillationLogits]:
        """Run both networks on the views of a training batch."""
        pairs = zip(samples.images, samples.view_numbers, strict=True)
        observed = [self._observe_view(images, samples.index, numbers) for images, numbers in pairs]
        views = tuple(view for view, _ in observed)
        target, labels = _targets(samples, views, self.settings.labelled_share)
        batch = Batch(
            views,
            target,
            samples.index,
            self.current_epoch,
            self.global_step,
            self.settings.label_smoothing,
            self.class_weights,
            labels,
        )
        return batch, DistillationLogits(tuple(logits for _, logits in observed))

    def training_step(self, samples: Samples, batch_idx: int) -> Tensor:
        """Return the loss, which is the sum of the method's weighted terms."""
        batch, logits = self.observe(samples)
        self.last_batch = batch, logits  # for callbacks; freed in `backward`
        with self._timed("terms"):
            terms, weights = self.all_terms(batch, logits), self.method.weights(self.current_epoch)
        self.weighted_terms = {**weighted(terms, weights), **self.serialization.penalties()}
        return torch.stack(list(self.weighted_terms.values())).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Let the method combine the gradients of its terms. DOT first computes the gradient of cross-entropy alone."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, DOT):
            optimizer.keep_task_gradients(self.weighted_terms, mean_over_devices)
        self.method.backward(loss, self.weighted_terms)
        self.last_batch = None  # frees the features before the next step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `UserError` before anything is written if a weight is not finite or the teacher has changed."""
        trained = itertools.chain(self.named_parameters(), self.student.named_buffers(prefix="student"))
        names, values = zip(*trained, strict=True)
        finite = torch.stack([value.isfinite().all() for value in values]).tolist()
        if not all(finite):
            bad = names[finite.index(False)]
            raise UserError(f"{bad} is not finite in epoch {self.current_epoch}: {ADVICE}.")
        if self.teacher is not None:
            self.teacher.check_unchanged()
            self.teacher.finish_writing()

    @property
    def predicts_alone(self) -> bool:
        """Whether the student predicts without parts of the method."""
        return self.method.predictor(self.student) is self.student

    def predict_logits(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] of uint8 images [B, 3, H, W] as at inference, without the serialization layer."""
        logits: Tensor = self.method.predictor(self.student)(self._normalised(images))
        return logits.float()

    def validation_step(self, batch: Samples, batch_idx: int) -> None:
        """Score the predictor on a batch of the validation loader."""
        self._score(batch, self.settings.validates_on)

    def test_step(self, batch: Samples, batch_idx: int) -> None:
        """Score the predictor on a batch of the test set."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation loader's split."""
        self._log_metrics(self.settings.validates_on)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics("test")

    def _timed(self, part: str) -> AbstractContextManager[None]:
        trainer: Any = self._trainer
        return trainer.profiler.profile(part) if trainer else nullcontext()

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = self.normalisation.to(images.device)
        return normalise(images, mean, std).to(memory_format=self.memory_format)

    def _observe_view(self, images: Tensor, index: Tensor, view_numbers: Tensor) -> tuple[View, LogitPair]:
        with self._timed("teacher"), self.teacher_stream.beside():
            teacher = self._observe_teacher(images, index, view_numbers)
        inputs = self._normalised(images)
        preactivations = self.method.needs_preactivations
        with self._timed("student"):
            output = (forward_features if preactivations else self.forward_student)(
                self.student, inputs, preactivations
            )
        student = self.method.restrict(output)
        student_logits = self.adjust_logits(self.serialization(output.logits, output.pooled))
        self.teacher_stream.join()
        teacher_logits = None if teacher is None else self.adjust_logits(teacher.logits)
        return View(inputs, student, teacher), LogitPair(student_logits, teacher_logits)

    def _observe_teacher(self, images: Tensor, index: Tensor, view_numbers: Tensor) -> Output | None:
        if self.teacher is None or not self.method.reads_teacher:
            return None
        if self.method.needs_features:
            return self.method.restrict(self.teacher(images, self.method.needs_preactivations))
        return logits_only(self.teacher.view_logits(images, index, view_numbers))

    def _score(self, batch: Samples, split: EvaluationSplit) -> None:
        logits = self.predict_logits(batch.images[0])
        self.metrics.update(logits, batch.target)
        if split in self.teacher_predictions:
            answer = self.teacher_predictions[split].index_select(0, batch.index)
            self.agreement.update(logits, answer)

    def _log_metrics(self, split: EvaluationSplit) -> None:
        values = {f"{split}/{name}": value for name, value in self.metrics.compute().items()}
        if split in self.teacher_predictions:
            values[f"{split}/agreement"] = self.agreement.compute()
        self.metrics.reset()
        self.agreement.reset()
        self.log_dict(values)
        self.log("accuracy", values[f"{split}/accuracy"], prog_bar=True, logger=False)


def _targets(samples: Samples, views: tuple[View, ...], labelled_share: float) -> tuple[Tensor, Labels | None]:
    """Return the target class of distillation, and the labels of cross-entropy if they differ from it."""
    is_mixed = samples.other_target is not None
    if not is_mixed and labelled_share == 1:
        return samples.target, None
    labels = Labels(samples.target, samples.other_target, samples.share, labelled_share)
    teacher = views[0].teacher
    if teacher is None:
        return samples.target, labels
    predicted = teacher.logits.argmax(dim=1)
    return predicted if is_mixed else torch.where(samples.target < 0, predicted, samples.target), labels
