"""Quantisation-aware fine-tuning: the student trains on for a few epochs while its numbers are rounded as in int8."""

import dataclasses
import functools
import logging
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from src.common.errors import UserError
from src.config.names import serialization_name
from src.data.views import normalise
from src.exporting import on_device
from src.exporting.checking import accuracy, predict_in_batches
from src.exporting.forms import BATCH, Classifier, Form, make_classifier, quantised
from src.setup.reopen import Opened
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller
from src.training.fitting import make_trainer
from src.training.serialization import Parallel
from src.training.term_log import TermLog

log = logging.getLogger(__name__)

LEARNING_RATE_SCALE = 0.01
"""The first learning rate, relative to the run's. The weights are trained already and need to move by fractions of a
rounding step only: a larger rate would leave the minimum that the run has found."""


def check_finetuning(form: Form, opened: Opened) -> None:
    """Raise `UserError` if this form or this run cannot be fine-tuned. The graph of the student has no features."""
    if form != ("executorch", "int8"):
        raise UserError("finetune_epochs is for int8 files of ExecuTorch: add format=executorch precision=int8.")
    method, layer = opened.distiller.method, serialization_name(opened.cfg)
    if method.needs_features or method.stages() or isinstance(opened.distiller.serialization, Parallel):
        raise UserError(
            f"finetune_epochs does not fit method={opened.cfg.method.name} with serialization={layer}, because it "
            "reads features or trains in stages: set finetune_epochs=0."
        )


def finetune(opened: Opened, teacher: Teacher | None, epochs: int, example: Tensor) -> Classifier:
    """Train a copy of the student with the method's own terms, and return it in int8 for ExecuTorch.

    The epochs follow those of the run: their views are new, and warm-ups of the method are over. The learning rate
    falls along a cosine. `example` are training images uint8 [N, 3, H, W].
    """
    run_cfg, trained, data = opened
    settings = dataclasses.replace(trained.settings, compiled=False, channels_last=False)
    student = on_device.prepare(trained.student, normalise(example[:BATCH], settings.mean, settings.std), is_qat=True)
    recipe = trained.recipe._replace(
        learning_rate=LEARNING_RATE_SCALE * trained.recipe.learning_rate,
        make_scheduler=functools.partial(CosineAnnealingLR, T_max=epochs),
        interval="epoch",
    )
    distiller = Distiller(
        student=student,
        method=trained.method,
        serialization=trained.serialization,
        teacher=teacher,
        recipe=recipe,
        settings=settings,
        teacher_predictions={},
    )
    first = run_cfg.schedule.epochs
    trainer = make_trainer(
        run_cfg, max_epochs=first + epochs, max_steps=-1, accelerator="cpu", precision="32-true", callbacks=[TermLog()],
        logger=False, limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False,
    )  # fmt: skip
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.processed = progress.completed = first
    trainer.fit(distiller, datamodule=data)
    return Classifier(on_device.convert(student), settings.mean, settings.std)


def finetuned_classifier(
    opened: Opened, teacher: Teacher | None, epochs: int, example: Tensor, images: Tensor, target: Tensor
) -> Classifier:
    """Fine-tune, and log the accuracy in int8 before and after on test images [N, 3, H, W] with classes [N]."""
    if opened.distiller.method.needs_teacher and teacher is None:
        raise UserError(f"method={opened.cfg.method.name} needs its teacher: add teacher.path=FILE.")
    float_network = make_classifier(opened.distiller)
    networks = {"float32": float_network, "int8": quantised(float_network, example)}
    tuned = finetune(opened, teacher, epochs, example)
    networks[f"int8 after {epochs} epochs of fine-tuning"] = tuned
    found = {name: accuracy(predict_in_batches(network, images), target) for name, network in networks.items()}
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items())
    log.info("Top-1 on %s test images: %s.", f"{len(target):,}", shown)
    return tuned
