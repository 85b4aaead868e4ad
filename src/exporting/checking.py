"""Compare an exported file with the student, on the same images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.common.errors import UserError
from src.common.files import atomic_write
from src.data.batches import Share
from src.data.image_data import ImageData
from src.exporting.forms import BATCH, PRECISIONS, Classifier, Form, Predictor, load_form, write_form

LIMITS = {"float32": (1e-4, 0.999), "float16": (0.02, 0.98), "bfloat16": (0.15, 0.9), "int8": (0.5, 0.8)}
"""By precision: the largest allowed difference, as a fraction of the student's largest logit, and the smallest allowed
fraction of images with the same top-1 class. A file outside these limits is broken, not just rounded."""


class Check(NamedTuple):
    """How an exported file compares with the student in torch, in float32, on the same N images."""

    images: int
    difference: float
    """The largest absolute difference between two logits."""
    largest: float
    """The student's largest absolute logit."""
    same: int
    """The number of images with the same top-1 class."""
    student_accuracy: float
    accuracy: float
    """The exported file's accuracy."""

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.2g} (logits up to {self.largest:.3g}), same top-1 on "
            f"{self.same:,} of {self.images:,} images; accuracy on them {100 * self.accuracy:.2f} %, student "
            f"{100 * self.student_accuracy:.2f} %"
        )


def predict_in_batches(predictor: Predictor, images: Tensor) -> Tensor:
    """Compute logits [N, C] of images [N, 3, H, W]. The last batch is smaller, which tests the dynamic batch size."""
    with torch.no_grad():
        return torch.cat([predictor(batch) for batch in images.split(BATCH)])


def compare(student_logits: Tensor, exported_logits: Tensor, target: Tensor) -> Check:
    """Compare the logits [N, C] of the student and of its export, for images with targets [N]."""
    student, exported = student_logits.argmax(dim=1), exported_logits.argmax(dim=1)
    return Check(
        images=len(target),
        difference=float((student_logits - exported_logits).abs().max()),
        largest=float(student_logits.abs().max()),
        same=int((student == exported).sum()),
        student_accuracy=accuracy(student_logits, target),
        accuracy=accuracy(exported_logits, target),
    )


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Compute the top-1 accuracy as a fraction of 1."""
    return float((logits.argmax(dim=1) == target).double().mean())


def refuse_mismatch(check: Check, form: Form) -> None:
    """Raise `UserError` if an export differs by more than rounding can explain."""
    difference, same = LIMITS[form.precision]
    # Comparisons with NaN are false: a file that computes NaN is refused too.
    if not (check.difference <= difference * check.largest and check.same >= same * check.images):
        raise UserError(
            f"The {form} file does not compute the student's logits and is not kept ({check}): choose another format "
            "or precision."
        )


def export_checked(
    network: Classifier,
    file: Path,
    form: Form,
    example: Tensor,
    metadata: Mapping[str, Any],
    images: Tensor,
    student_logits: Tensor,
) -> Tensor:
    """Write a file atomically, load it in its runtime, and return its logits [N, C] for `images`.

    `student_logits` [N, C] are the student's logits for the same images. `write_form` explains `example`. Raises
    `UserError` if the logits disagree. In this case no file is left.
    """
    cast = Classifier(network.network, network.mean, network.std, PRECISIONS[form.precision])
    place = "outside" if form.format == "safetensors" else "inside"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial:
        write_form(cast, partial, form, example, {**metadata, "normalisation": place})
        exported = predict_in_batches(load_form(partial, form, cast), images)
        refuse_mismatch(compare(student_logits, exported, student_logits.argmax(dim=1)), form)
    return exported


def spread_out(count: int, wanted: int) -> Tensor:
    """Choose `wanted` evenly spaced positions out of 0 .. count - 1, or all if there are fewer.

    The first positions are not a fair sample, because images may be sorted by class.

    >>> spread_out(10, 3)
    tensor([0, 3, 6])
    """
    return (torch.arange(min(wanted, count)) * count) // min(wanted, count)


def sample_test_images(data: ImageData, wanted: int) -> tuple[Tensor, Tensor]:
    """Choose test images uint8 [N, 3, H, W] as evaluation sees them, and their classes [N]."""
    positions = spread_out(data.split_size("test"), wanted)
    batches = [data.test_images(rows.tolist()).contiguous() for rows in positions.split(BATCH)]
    return torch.cat(batches), data.source.test_labels[positions]


def sample_training_images(data: ImageData, wanted: int) -> Tensor:
    """Choose training images uint8 [N, 3, H, W] as evaluation would see them."""
    index = data.trained_index[spread_out(len(data.trained_index), wanted)]
    batches = torch.arange(len(index)).split(BATCH)
    reader = data.reader("held_out", index)
    return torch.cat([reader[Share(0, rows.tolist())].images[0].contiguous() for rows in batches])
