"""The teacher: found, loaded, checked once, and frozen by construction."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from src.data.views import normalise
from src.errors import UserError
from src.files import believable_members, written_whole
from src.metrics import scores
from src.models.checkpoints import weights_digest
from src.models.folding import fold_batch_norms
from src.models.network import Network, Output, Shapes, shapes
from src.models.preactivations import forward_features
from src.models.winograd import use_winograd
from src.view_store import ViewStore

if TYPE_CHECKING:
    from src.data.image_data import ImageData, Samples

ASKED_AT_ONCE = 16
"""Views: how a kernel rounds can depend on the batch's size."""


class Teacher:
    """A network that only answers.

    It is no `nn.Module`, so whatever holds it never registers it: no optimiser, checkpoint, gradient bucket, train
    mode or weight average can reach it. Its normalisation, its input size and its classes are its own, not the
    student's: `image_size` pixels (None: as they come), and `class_index` [C], which of its logits are the data's
    classes (None: all, in their order). `precision` float32 or bfloat16 is what it computes in, whatever the student
    does (None: in what the student does); `answer_dtype` float16 rounds its answers to views, by at most 2^-11 of each.
    """

    def __init__(
        self,
        network: Network,
        mean: Iterable[float],
        std: Iterable[float],
        image_size: int | None = None,
        class_index: Sequence[int] | None = None,
        precision: str | None = None,
        answer_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size = image_size
        self.class_index = list(class_index) if class_index is not None else None
        self.precision, self.answer_dtype = precision, answer_dtype
        self.memory_format = torch.contiguous_format
        self.folded = self.winograd = 0
        self.digest = self.digest_in_use = weights_digest(network)
        self.store: ViewStore | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Copies of what holds the teacher (weight averages) share it."""
        return self

    @property
    def key(self) -> str:
        """A digest of all that decides its answer to an image."""
        decides: tuple[Any, ...] = (self.digest, self.mean, self.std, self.image_size, self.class_index)
        if self.precision or self.folded:
            decides += (self.precision, self.folded)
        if self.winograd:
            decides += ("winograd", self.winograd)
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Move the network."""
        self.network.to(device).to(memory_format=memory_format)
        self.memory_format = memory_format

    def fold(self, image_shape: tuple[int, int, int]) -> None:
        """Fold its batch norms into its convolutions, for views of this shape [3, H, W]: answers change by rounding."""
        self.folded = fold_batch_norms(self.network, self._seen(image_shape))
        self.digest_in_use = weights_digest(self.network)

    def use_winograd(self) -> None:
        """Compute the convolutions that it fits by Winograd's algorithm: answers change by rounding.

        Raises `UserError` where there is no compiler.
        """
        self.winograd = use_winograd(self.network, frozen=True)

    def check_unchanged(self) -> None:
        """Raise `UserError` where its weights are no longer those it was loaded with."""
        if weights_digest(self.network) != self.digest_in_use:
            raise UserError(
                "The teacher's weights changed during training, which no method may do: nothing more is saved; "
                "mend the method, then start_over=true."
            )

    def shapes(self, image_shape: tuple[int, int, int]) -> Shapes:
        """Sizes of its answer to views of this shape [3, H, W]."""
        found = shapes(self.network, self._seen(image_shape))
        return found if self.class_index is None else found._replace(logits=len(self.class_index))

    def classifier(self) -> nn.Linear:
        """A frozen copy of its last layer, from its pooled features to the data's classes."""
        layer = copy.deepcopy(self.network.classifier_layer).train().requires_grad_(False)
        if self.class_index is not None:
            layer.out_features = len(self.class_index)
            layer.weight.data = layer.weight.data[self.class_index]
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[self.class_index]
        return layer

    @torch.no_grad()
    def __call__(self, images: Tensor, preactivations: bool = False) -> Output:
        """Answer uint8 views [B, 3, H, W]."""
        with self._computing(images.device):
            said = forward_features(self.network, self._inputs(images), preactivations)
        return said._replace(logits=self._chosen(said.logits))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of uint8 views [B, 3, H, W]."""
        with torch.inference_mode(), self._computing(images.device):
            logits = self._chosen(self.network(self._inputs(images)))
        return logits.clone()  # what is made in inference mode could not take part in a loss

    def _computing(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _seen(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape if self.image_size is None else (3, self.image_size, self.image_size)

    def _inputs(self, images: Tensor) -> Tensor:
        assert not self.network.training, "the teacher was put into train mode"
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return normalise(images, self.mean, self.std).contiguous(memory_format=self.memory_format)

    def _chosen(self, logits: Tensor) -> Tensor:
        return logits if self.class_index is None else logits[:, self.class_index]

    def view_logits(self, images: Tensor, index: Tensor, views: Tensor) -> Tensor:
        """Logits float32 [B, C] of uint8 views [B, 3, H, W], from the store where one is set, by image and view number.

        With the store and without it the same, to the last bit on a CPU: there views are asked in batches of
        ASKED_AT_ONCE, the last one filled up. A GPU, slow on small batches, is asked a multiple of that in one batch:
        answers then agree to the rounding of the precision that they are computed in.
        """
        if self.store is None:
            return self._asked(images)
        logits, unknown = self.store.read(index, views)
        if unknown.any():
            logits[unknown] = self._asked(images[unknown.to(images.device)]).cpu()
            self.store.write(index[unknown], views[unknown], logits[unknown])
        return logits.to(images.device)

    def _asked(self, images: Tensor) -> Tensor:
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % ASKED_AT_ONCE))
        batches = filled.split(ASKED_AT_ONCE if images.device.type == "cpu" else len(filled))
        logits = torch.cat([self.logits(batch) for batch in batches])[: len(images)]
        return logits.to(self.answer_dtype).float()

    def answer_all(self, batches: Iterable[Samples], precision: AbstractContextManager[None]) -> Answers:
        """Ask the teacher about every image of an evaluation loader."""
        device = next(self.network.parameters()).device
        with precision:
            rows = [(self.logits(batch.images[0].to(device)).float().cpu(), batch.target) for batch in batches]
        return Answers(torch.cat([logits for logits, _ in rows]), torch.cat([target for _, target in rows]))


class Answers(NamedTuple):
    """A teacher's logits [N, C] for the first N images of a split, and their targets [N]."""

    logits: Tensor
    target: Tensor

    def scores(self) -> dict[str, float]:
        """The metrics of every evaluation."""
        metric = scores(self.logits.shape[1])
        metric.update(self.logits, self.target)
        return {name: float(value) for name, value in metric.compute().items()}

    def predictions(self, size: int) -> Tensor:
        """The predicted class of each image of a split of `size` images, [size] int64, -1 where it was not asked."""
        predicted = torch.full((size,), -1)
        predicted[: len(self.logits)] = self.logits.argmax(dim=1)
        return predicted

    def save(self, file: Path) -> None:
        """Write the answers as a whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial:
            np.savez(partial, logits=self.logits.numpy(), target=self.target.numpy())

    @classmethod
    def load(cls, file: Path, size: int, num_classes: int) -> Answers | None:
        """Answers saved before for a split of `size` images; None where the file is missing, damaged or something else,
        since asking again mends it.
        """
        if not file.is_file():
            return None
        try:
            believable_members(file)
            with np.load(file, allow_pickle=False) as arrays:
                answers = cls(torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["target"]))
            return answers if answers._fit(size, num_classes) else None
        except Exception:  # damage makes zipfile, zlib and numpy raise nearly anything
            return None

    def _fit(self, size: int, num_classes: int) -> bool:
        logits, target = self
        same = logits.ndim == 2 and logits.shape == (len(target), num_classes) and target.ndim == 1
        typed = (logits.dtype, target.dtype) == (torch.float32, torch.int64) and len(target) <= size
        return same and typed and bool(logits.isfinite().all() and (target >= 0).all() and (target < num_classes).all())


def view_store_file(cfg: DictConfig, teacher: Teacher, data: ImageData) -> Path:
    """Where the view store of this teacher, data and precision is kept, below the folder of all runs."""
    layout = "channels_last" if cfg.channels_last else "contiguous"
    name = f"{_asked(cfg, teacher.key, data)}-{layout}-{cfg.teacher.answer_dtype}-{data.views_name}.views"
    return Path(cfg.runs).expanduser() / "teachers" / name


def answers_file(cfg: DictConfig, runs: Path, key: str, data: ImageData, split: str) -> Path:
    """Where the answers of the teacher with this key to a split's images are kept, below the folder of all runs."""
    part = "test" if split == "test" else f"val-{data.val_digest}"
    limit = cfg.trainer.get("limit_val_batches") or "all"
    return runs / "teachers" / f"{_asked(cfg, key, data)}-{part}-{limit}.npz"


def _asked(cfg: DictConfig, key: str, data: ImageData) -> str:
    """What decides a teacher's answers: itself, the images, the precision."""
    return f"{key[:16]}-{data.source.digest[:12]}-{cfg.trainer.precision}"
