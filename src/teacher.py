"""The teacher: found, loaded, checked once, and frozen by construction."""

from __future__ import annotations

import copy
import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from src.data.views import normalise
from src.errors import UserError
from src.files import written_whole
from src.metrics import scores
from src.models.checkpoints import weights_digest
from src.models.network import Network, Output, Shapes, shapes

if TYPE_CHECKING:
    from src.data.image_data import ImageData, Samples


class Teacher:
    """A network that only answers.

    It is no `nn.Module`, so whatever holds it never registers it: no optimiser, checkpoint, gradient bucket, train
    mode or weight average can reach it. Its normalisation, its input size and its classes are its own, not the
    student's: `image_size` pixels (None: as they come), and `class_index` [C], which of its logits are the data's
    classes (None: all, in their order).
    """

    def __init__(
        self,
        network: Network,
        mean: Iterable[float],
        std: Iterable[float],
        image_size: int | None = None,
        class_index: Sequence[int] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size = image_size
        self.class_index = list(class_index) if class_index is not None else None
        self.digest = weights_digest(network)
        self.store: ViewStore | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Copies of what holds the teacher (weight averages) share it."""
        return self

    @property
    def key(self) -> str:
        """A digest of all that decides its answer to an image."""
        decides = (self.digest, self.mean, self.std, self.image_size, self.class_index)
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Move the network."""
        self.network.to(device).to(memory_format=memory_format)

    def shapes(self, image_shape: tuple[int, int, int]) -> Shapes:
        """Sizes of its answer to views of this shape [3, H, W]."""
        size = self.image_size
        found = shapes(self.network, image_shape if size is None else (3, size, size))
        return found if self.class_index is None else found._replace(logits=len(self.class_index))

    def classifier(self) -> nn.Linear:
        """A frozen copy of its last layer, from its pooled features to the data's classes."""
        layer = copy.deepcopy(self.network.classifier_layer).requires_grad_(False)
        if self.class_index is not None:
            layer.out_features = len(self.class_index)
            layer.weight.data = layer.weight.data[self.class_index]
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[self.class_index]
        return layer

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        """Answer uint8 views [B, 3, H, W]."""
        said = self.network.forward_features(self._inputs(images))
        return said._replace(logits=self._chosen(said.logits))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of uint8 views [B, 3, H, W]."""
        return self._chosen(self.network(self._inputs(images)))

    def _inputs(self, images: Tensor) -> Tensor:
        assert not self.network.training, "the teacher was put into train mode"
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return normalise(images, self.mean, self.std)

    def _chosen(self, logits: Tensor) -> Tensor:
        return logits if self.class_index is None else logits[:, self.class_index]

    def view_logits(self, images: Tensor, index: Tensor, views: Tensor) -> Tensor:
        """Logits [B, C] of uint8 views [B, 3, H, W], from the store where one is set, by image and view number."""
        if self.store is None:
            return self.logits(images)
        logits, unknown = self.store.read(index, views)
        if unknown.any():
            logits[unknown] = self.logits(images[unknown.to(images.device)]).float().cpu()
            self.store.write(index[unknown], views[unknown], logits[unknown])
        return logits.to(images.device)

    def answer_all(self, batches: Iterable[Samples], precision: AbstractContextManager[None]) -> Answers:
        """Ask the teacher about every image of an evaluation loader."""
        device = next(self.network.parameters()).device
        with precision:
            rows = [(self.logits(batch.images[0].to(device)).float().cpu(), batch.target) for batch in batches]
        return Answers(torch.cat([logits for logits, _ in rows]), torch.cat([target for _, target in rows]))


class ViewStore:
    """A teacher's logits by image and view, in one mapped file that grows as training asks: [images, views, C] float32.

    A row that holds a zero has not been answered: a new file is all zeros without using the disk, and a row that a kill
    has torn is asked again. Answers agree with the teacher's up to the order of summation in batches of another size.
    """

    def __init__(self, file: Path, images: int, views: int, num_classes: int) -> None:
        """Raises `UserError` where the disk could not hold all answers."""
        size = 4 * images * views * num_classes
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.stat().st_size != size:
            free = shutil.disk_usage(file.parent).free
            if free < size:
                raise UserError(
                    f"teacher.view_store needs {size:,} bytes at {file.parent} and {free:,} are free: set it to false."
                )
            with file.open("ab") as empty:
                empty.truncate(size)
        self.answers = np.memmap(file, np.float32, "r+", shape=(images, views, num_classes))

    def read(self, index: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C] on the CPU, and a mask [B] of those that are unknown."""
        logits = torch.from_numpy(self.answers[index.cpu().numpy(), views.cpu().numpy()])
        return logits, (logits == 0).any(dim=1)

    def write(self, index: Tensor, views: Tensor, logits: Tensor) -> None:
        """Keep logits [B, C]."""
        self.answers[index.cpu().numpy(), views.cpu().numpy()] = logits.numpy()


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
    def load(cls, file: Path) -> Answers | None:
        """Answers saved before; None where the file is missing or damaged, since asking again mends either."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                answers = cls(torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["target"]))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, EOFError):
            return None
        return answers if answers.logits.ndim == 2 and len(answers.logits) == len(answers.target) else None


def view_store_file(cfg: DictConfig, teacher: Teacher, data: ImageData) -> Path:
    """Where the view store of this teacher, data and precision is kept, below the folder of all runs."""
    return Path(cfg.runs).expanduser() / "teachers" / f"{_asked(cfg, teacher.key, data)}-{data.views_name}.views"


def answers_file(cfg: DictConfig, runs: Path, key: str, data: ImageData, split: str) -> Path:
    """Where the answers of the teacher with this key to a split's images are kept, below the folder of all runs."""
    part = "test" if split == "test" else f"val-{data.val_digest}"
    limit = cfg.trainer.get("limit_val_batches") or "all"
    return runs / "teachers" / f"{_asked(cfg, key, data)}-{part}-{limit}.npz"


def _asked(cfg: DictConfig, key: str, data: ImageData) -> str:
    """What decides a teacher's answers: itself, the images, the precision."""
    return f"{key[:16]}-{data.source.digest[:12]}-{cfg.trainer.precision}"
