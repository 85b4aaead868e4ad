"""The teacher: found, loaded, checked once, and frozen by construction."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.data.views import normalise
from src.errors import UserError
from src.files import written_whole
from src.metrics import scores
from src.models.checkpoints import weights_digest
from src.models.network import Network, Output

if TYPE_CHECKING:
    from src.data.image_data import ImageData, Samples


class Teacher:
    """A network that only answers.

    It is no `nn.Module`, so whatever holds it never registers it: no optimiser, checkpoint, gradient bucket, train
    mode or weight average can reach it. Its normalisation is its own, not the student's.
    """

    def __init__(self, network: Network, mean: Iterable[float], std: Iterable[float]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.digest = weights_digest(network)
        self.store: ViewStore | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Copies of what holds the teacher (weight averages) share it."""
        return self

    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Move the network."""
        self.network.to(device).to(memory_format=memory_format)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        """Answer uint8 views [B, 3, H, W]."""
        assert not self.network.training, "the teacher was put into train mode"
        return self.network.forward_features(normalise(images, self.mean, self.std))

    def view_logits(self, images: Tensor, index: Tensor, views: Tensor) -> Tensor:
        """Logits [B, C] of uint8 views [B, 3, H, W], from the store where one is set, by image and view number."""
        if self.store is None:
            return self(images).logits
        logits, unknown = self.store.read(index, views)
        if unknown.any():
            logits[unknown] = self(images[unknown.to(images.device)]).logits.float().cpu()
            self.store.write(index[unknown], views[unknown], logits[unknown])
        return logits.to(images.device)

    def answer_all(self, batches: Iterable[Samples], precision: AbstractContextManager[None]) -> Answers:
        """Ask the teacher about every image of an evaluation loader."""
        device = next(self.network.parameters()).device
        with precision:
            rows = [(self(batch.images[0].to(device)).logits.float().cpu(), batch.target) for batch in batches]
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


def find_teacher(cfg: DictConfig) -> Path | None:
    """The checkpoint that the configuration means: `teacher.path`, else one in the local store, else None.

    The store holds `<data>/<architecture>.pth` or the published layout `<architecture>_vanilla/ckpt_epoch_240.pth`.
    Raises `UserError` where `teacher.path` names nothing, or where none is found and none may be trained.
    """
    if cfg.teacher.path is not None:
        path = Path(cfg.teacher.path).expanduser()
        if not path.is_file():
            raise UserError(f"teacher.path={path} is no file: give a checkpoint of {cfg.model.teacher.name}.")
        return path
    places = teacher_places(cfg)
    found = next((place for place in places if place.is_file()), None)
    if found is None and not cfg.teacher.train_if_missing:
        looked = " and ".join(str(place) for place in places)
        raise UserError(
            f"No teacher {cfg.model.teacher.name} for {cfg.data.name}: looked for {looked}; give teacher.path."
        )
    return found


def teacher_places(cfg: DictConfig) -> list[Path]:
    """Where the local store may hold the teacher of this data."""
    architecture = cfg.model.teacher._target_.rsplit(".", 1)[-1]
    store = Path(cfg.teacher.store).expanduser() / cfg.data.name
    return [store / f"{architecture}.pth", store / f"{architecture}_vanilla" / "ckpt_epoch_240.pth"]


def view_store_file(cfg: DictConfig, digest: str, data: ImageData) -> Path:
    """Where the view store of this teacher, data and precision is kept, below the folder of all runs."""
    augmentation = f"{cfg.data.padding}-{cfg.data.flip}"
    return Path(cfg.runs).expanduser() / "teachers" / f"{_asked(cfg, digest, data)}-{augmentation}.views"


def answers_file(cfg: DictConfig, runs: Path, digest: str, data: ImageData, split: str) -> Path:
    """Where the answers of the teacher with this digest to a split's images are kept, below the folder of all runs."""
    part = "test" if split == "test" else f"val-{data.val_digest}"
    limit = cfg.trainer.get("limit_val_batches") or "all"
    return runs / "teachers" / f"{_asked(cfg, digest, data)}-{part}-{limit}.npz"


def _asked(cfg: DictConfig, digest: str, data: ImageData) -> str:
    """What decides a teacher's answers: its weights, the images, their normalisation, the precision."""
    normalisation = hashlib.sha256(repr((list(cfg.data.mean), list(cfg.data.std))).encode()).hexdigest()
    return f"{digest[:12]}-{data.arrays.digest[:12]}-{normalisation[:8]}-{cfg.trainer.precision}"
