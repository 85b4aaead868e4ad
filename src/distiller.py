"""The LightningModule: a student, its frozen teacher, the serialization between them, and the method."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from src.data.image_data import Samples
from src.data.views import normalise
from src.dot import DOT
from src.errors import UserError
from src.methods.method import Batch, Method, Prediction, View
from src.metrics import scores
from src.models.network import Network
from src.models.preactivations import forward_features
from src.serialization import Serialization
from src.standardization import standardized
from src.teacher import Teacher

Split = Literal["val", "test"]
ADVICE = (
    "the last checkpoint is kept; try a lower schedule.learning_rate, a lower weight of the term that grew, or "
    "trainer.precision=32-true."
)


class Distiller(L.LightningModule):
    """Trains `student` by the weighted terms of `method`.

    `optimizer` and `scheduler` are partials of torch's classes; `interval` says whether the scheduler steps every
    `epoch` or every `step` (then it is told `total_steps`). `validates_on` names the split behind the validation
    loader; `teacher_predictions` are the teacher's classes [N] of each split's images, for the agreement;
    `standardize_logits` applies to what distillation compares, on both sides; `compiled` training runs the student
    through torch.compile (which works on a function: the student itself and its checkpoints stay as they are).
    """

    def __init__(
        self,
        *,
        student: Network,
        method: Method,
        serialization: Serialization,
        teacher: Teacher | None,
        teacher_predictions: Mapping[str, Tensor],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        learning_rate: float,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        interval: Literal["epoch", "step"],
        validates_on: Split,
        seed: int,
        channels_last: bool,
        standardize_logits: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.serialization = serialization
        self.teacher = teacher
        self.teacher_predictions = teacher_predictions
        self.mean, self.std = tuple(mean), tuple(std)
        self.learning_rate = learning_rate
        self.optimizer_partial, self.scheduler_partial, self.interval = optimizer, scheduler, interval
        self.validates_on: Split = validates_on
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.for_distillation: Callable[[Tensor], Tensor] = standardized if standardize_logits else nn.Identity()
        self.forward_student = torch.compile(forward_features, dynamic=False) if compiled else forward_features
        self.scores = scores(num_classes)
        self.agreement = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
        self.weighted_terms: Mapping[str, Tensor] = {}
        self.batch: Batch | None = None

    def setup(self, stage: str) -> None:
        """Bring both networks to the memory format, the teacher to the device too."""
        self.student.to(memory_format=self.memory_format)
        if self.teacher is not None:
            self.teacher.to(self.trainer.strategy.root_device, self.memory_format)

    def configure_optimizers(self) -> Any:
        """One group for the student and what the method trains beside it, one for the serialization layer."""
        trained = [p for module in (self.student, self.method) for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "lr": self.learning_rate}]
        layer = list(self.serialization.parameters())
        if layer:
            groups.append({"params": layer, "lr": self.learning_rate * self.serialization.lr_scale})
            if self.serialization.weight_decay is not None:
                groups[1]["weight_decay"] = self.serialization.weight_decay
        optimizer = self.optimizer_partial(groups)
        if isinstance(optimizer, DOT) and self.trainer.precision == "16-mixed":
            raise UserError("optimizer=dot needs gradients in their own scale: use trainer.precision=bf16-mixed.")
        steps = {"total_steps": int(self.trainer.estimated_stepping_batches)} if self.interval == "step" else {}
        scheduler = self.scheduler_partial(optimizer, **steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_train_batch_start(self, batch: Samples, batch_idx: int) -> None:
        """Whatever a method draws depends on the step alone, so that a resumed run draws the same."""
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) % 2**63)

    def see(self, batch: Samples) -> Batch:
        """What both networks say about the views of a training batch."""
        return Batch(
            views=tuple(
                self._view(images, batch.index, view) for images, view in zip(batch.images, batch.views, strict=True)
            ),
            target=batch.target,
            index=batch.index,
            epoch=self.current_epoch,
            step=self.global_step,
        )

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The sum of the method's weighted terms; what is logged is what is summed."""
        seen = self.see(batch)
        self.batch = seen  # for callbacks that look at the gradients, until the backward pass
        with self._timed("terms"):
            terms, weights = self.method.terms(seen), self.method.weights(self.current_epoch)
        self.weighted_terms = {name: weights[name] * term for name, term in terms.items() if weights[name] != 0}
        loss = torch.stack(list(self.weighted_terms.values())).sum()
        self._check(loss, batch_idx)
        logged = {f"train/{name}": term.detach() for name, term in {**self.weighted_terms, "loss": loss}.items()}
        self.log_dict(logged, on_step=True, on_epoch=True, batch_size=len(batch.target), sync_dist=True)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch.target))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The method may combine the gradients of its terms in its own way; DOT needs cross-entropy's by itself."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, DOT):
            optimizer.keep_task_gradients(self.weighted_terms, self.trainer.strategy.reduce)
        self.method.backward(loss, self.weighted_terms)
        self.batch = None  # features are not kept into the next step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise `UserError` before anything is written where training spoiled a weight or changed the teacher."""
        trained = itertools.chain(self.named_parameters(), self.student.named_buffers(prefix="student"))
        bad = next((name for name, value in trained if not torch.isfinite(value).all()), None)
        if bad is not None:
            raise UserError(f"{bad} is not finite in epoch {self.current_epoch}: {ADVICE}")
        if self.teacher is not None:
            self.teacher.check_unchanged()

    def predict_logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of uint8 images, by what predicts at inference: neither teacher nor serialization take part."""
        return self.method.predictor(self.student)(self._normalised(images)).float()

    def validation_step(self, batch: Samples, batch_idx: int) -> None:
        """Score the predictor on the validation loader."""
        self._score(batch, self.validates_on)

    def test_step(self, batch: Samples, batch_idx: int) -> None:
        """Score the predictor on the test set."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation loader under the name of its split."""
        self._log_scores(self.validates_on)

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test set."""
        self._log_scores("test")

    def _timed(self, part: str) -> AbstractContextManager[None]:
        trainer: Any = self._trainer
        return trainer.profiler.profile(part) if trainer else nullcontext()

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images, self.mean, self.std).to(memory_format=self.memory_format)

    def _view(self, images: Tensor, index: Tensor, view: Tensor) -> View:
        inputs = self._normalised(images)
        features, before = self.method.needs_features, self.method.needs_preactivations
        with self._timed("student"):
            said = (forward_features if before else self.forward_student)(self.student, inputs, before)
        student = Prediction(
            logits=said.logits,
            distillation_logits=self.for_distillation(self.serialization(said.logits, said.pooled)),
            features=said.features if features else (),
            pooled=said.pooled if features else None,
            preactivations=said.preactivations,
            unpooled=said.unpooled if features else None,
        )
        if self.teacher is None or not self.method.reads_teacher:
            return View(inputs, student, None)
        if not features:
            with self._timed("teacher"):
                logits = self.teacher.view_logits(images, index, view)
            return View(inputs, student, Prediction(logits, self.for_distillation(logits), (), None))
        with self._timed("teacher"):
            said = self.teacher(images, before)
        logits = self.for_distillation(said.logits)
        return View(
            inputs,
            student,
            Prediction(said.logits, logits, said.features, said.pooled, said.preactivations, said.unpooled),
        )

    def _check(self, loss: Tensor, batch_idx: int) -> None:
        if torch.isfinite(loss):
            return
        values = ", ".join(f"{name} {float(term.detach()):.4g}" for name, term in self.weighted_terms.items())
        raise UserError(f"The loss is not finite in epoch {self.current_epoch}, batch {batch_idx} ({values}): {ADVICE}")

    def _score(self, batch: Samples, split: Split) -> None:
        logits = self.predict_logits(batch.images[0])
        self.scores.update(logits, batch.target)
        if split in self.teacher_predictions:
            self.agreement.update(logits, self.teacher_predictions[split].to(logits.device)[batch.index])

    def _log_scores(self, split: Split) -> None:
        values = {f"{split}/{name}": value for name, value in self.scores.compute().items()}
        if split in self.teacher_predictions:
            values[f"{split}/agreement"] = self.agreement.compute()
        self.scores.reset()
        self.agreement.reset()
        self.log_dict(values, sync_dist=True)
        self.log("accuracy", values[f"{split}/accuracy"], prog_bar=True, logger=False, sync_dist=True)
