"""The LightningModule: a student, its frozen teacher, the serialization between them, and the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from src.data.image_data import Samples
from src.data.views import normalise
from src.errors import UserError
from src.methods.method import Batch, Method, Prediction, View
from src.metrics import scores
from src.models.network import Network
from src.serialization import Serialization
from src.teacher import Teacher

Split = Literal["val", "test"]


class Distiller(L.LightningModule):
    """Trains `student` by the weighted terms of `method`.

    `optimizer` and `scheduler` are partials of torch's classes; `interval` says whether the scheduler steps every
    `epoch` or every `step` (then it is told `total_steps`). `validates_on` names the split behind the validation
    loader; `teacher_predictions` are the teacher's classes [N] of each split's images, for the agreement.
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
        self.scores = scores(num_classes)
        self.agreement = MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)
        self.weighted_terms: Mapping[str, Tensor] = {}

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
        steps = {"total_steps": int(self.trainer.estimated_stepping_batches)} if self.interval == "step" else {}
        scheduler = self.scheduler_partial(optimizer, **steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_train_batch_start(self, batch: Samples, batch_idx: int) -> None:
        """Whatever a method draws depends on the step alone, so that a resumed run draws the same."""
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) % 2**63)

    def training_step(self, batch: Samples, batch_idx: int) -> Tensor:
        """The sum of the method's weighted terms; what is logged is what is summed."""
        seen = Batch(
            views=tuple(
                self._view(images, batch.index, view) for images, view in zip(batch.images, batch.views, strict=True)
            ),
            target=batch.target,
            index=batch.index,
            epoch=self.current_epoch,
            step=self.global_step,
        )
        terms, weights = self.method.terms(seen), self.method.weights(self.current_epoch)
        self.weighted_terms = {name: weights[name] * term for name, term in terms.items() if weights[name] != 0}
        loss = torch.stack(list(self.weighted_terms.values())).sum()
        self._check(loss, batch_idx)
        logged = {f"train/{name}": term.detach() for name, term in {**self.weighted_terms, "loss": loss}.items()}
        self.log_dict(logged, on_step=True, on_epoch=True, batch_size=len(batch.target), sync_dist=True)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch.target))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The method may combine the gradients of its terms in its own way."""
        self.method.backward(loss, self.weighted_terms)

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

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images, self.mean, self.std).to(memory_format=self.memory_format)

    def _view(self, images: Tensor, index: Tensor, view: Tensor) -> View:
        inputs = self._normalised(images)
        said = self.student.forward_features(inputs)
        features = self.method.needs_features
        student = Prediction(
            logits=said.logits,
            distillation_logits=self.serialization(said.logits, said.pooled),
            features=said.features if features else (),
            pooled=said.pooled if features else None,
        )
        if self.teacher is None:
            return View(inputs, student, None)
        if not features:
            logits = self.teacher.view_logits(images, index, view)
            return View(inputs, student, Prediction(logits, logits, (), None))
        answer = self.teacher(images)
        return View(inputs, student, Prediction(answer.logits, answer.logits, answer.features, answer.pooled))

    def _check(self, loss: Tensor, batch_idx: int) -> None:
        if torch.isfinite(loss):
            return
        values = ", ".join(f"{name} {float(term.detach()):.4g}" for name, term in self.weighted_terms.items())
        raise UserError(
            f"The loss is not finite in epoch {self.current_epoch}, batch {batch_idx} ({values}): the last "
            "checkpoint is kept; try a lower schedule.learning_rate, a lower weight of the term that grew, or "
            "trainer.precision=32-true."
        )

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
