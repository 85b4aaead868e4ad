"""The frozen teacher, and its answers to training views."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.data.views import normalise
from src.models.checkpoints import weights_digest
from src.models.folding import fold_batch_norms
from src.models.network import Network, Output, Shapes, measure_shapes
from src.models.preactivations import forward_features
from src.models.winograd import use_winograd
from src.teachers.device_view_store import DeviceViewStore
from src.teachers.view_store import ViewStore

ANSWER_BATCH = 16
"""Views per forward pass on a CPU. It is fixed because a kernel's rounding can depend on the batch size."""


class Teacher:
    """A frozen network in evaluation mode, with its own normalisation, input size and classes.

    It is not an `nn.Module`, so the module that holds it never registers it. No optimiser, checkpoint, gradient bucket,
    train mode or weight average can reach it.

    `image_size` is in pixels (None: images keep their size). `class_index` [C] selects the logits of the data's classes
    (None: all of them, in their order). `precision` is float32 or bfloat16, independent of the student's (None: the
    same as the student's). `answer_dtype` float16 rounds the answers to views, by at most 2^-11 of each logit.
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
        self.normalisation = torch.tensor([self.mean, self.std])
        """Mean and standard deviation, [2, 3] on the device."""
        self.image_size = image_size
        self.select_classes(class_index)
        self.precision, self.answer_dtype = precision, answer_dtype
        self.memory_format = torch.contiguous_format
        # The number of layers that are folded, and that use Winograd's algorithm.
        self.folded = self.winograd = 0
        self.is_compiled = False
        self.answer_view: Callable[[Tensor], Tensor] = network
        self.forward_view: Callable[[Network, Tensor, bool], Output] = forward_features
        self.digest = self.digest_in_use = weights_digest(network)
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        """The number of parameters before layers are folded."""
        self.view_store: ViewStore | DeviceViewStore | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Return the teacher itself, so that copies of the module that holds it (weight averages) share it."""
        return self

    @property
    def key(self) -> str:
        """The cache key of the teacher's answers: a digest of everything that decides the answer to an image."""
        decides: tuple[Any, ...] = (self.digest, self.mean, self.std, self.image_size, self.class_index)
        if self.precision or self.folded:
            decides += (self.precision, self.folded)
        if self.winograd:
            decides += ("winograd", self.winograd)
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def select_classes(self, class_index: Sequence[int] | None) -> None:
        """Select the logits of the data's classes, in their order. None selects all logits."""
        self.class_index = list(class_index) if class_index is not None else None
        self.columns = None if class_index is None else torch.tensor(self.class_index, device=self.normalisation.device)

    def to(self, device: torch.device, memory_format: torch.memory_format) -> None:
        """Move the network to a device and a memory format."""
        self.network.to(device).to(memory_format=memory_format)
        self.memory_format = memory_format
        self.normalisation = self.normalisation.to(device)
        self.columns = None if self.columns is None else self.columns.to(device)

    def fold(self, image_shape: tuple[int, int, int]) -> None:
        """Fold batch norms into convolutions, for views of this shape [3, H, W]. Answers change by rounding only."""
        self.folded = fold_batch_norms(self.network, self._input_shape(image_shape))
        self.digest_in_use = weights_digest(self.network)

    def use_winograd(self) -> None:
        """Use Winograd's algorithm for the 3x3 convolutions that it fits. Answers change by rounding only.

        Raises `UserError` without a C++ compiler.
        """
        self.winograd = use_winograd(self.network, frozen=True)

    def finish_writing(self) -> None:
        """Wait until all new answers are in the view store's file."""
        if isinstance(self.view_store, DeviceViewStore):
            self.view_store.flush()

    def compile(self) -> None:
        """Answer training views by compiled kernels. Answers change by rounding only."""
        self.is_compiled = True
        self.answer_view = torch.compile(self.network, dynamic=False)
        self.forward_view = torch.compile(forward_features, dynamic=False)

    def check_unchanged(self) -> None:
        """Raise `UserError` if the weights have changed since they were loaded."""
        if weights_digest(self.network) != self.digest_in_use:
            raise UserError(
                "The method changed the teacher's weights, so nothing more is saved: correct the method, then train "
                "again with start_over=true."
            )

    def shapes(self, image_shape: tuple[int, int, int]) -> Shapes:
        """Return the shapes of logits and features for views of this shape [3, H, W]."""
        found = measure_shapes(self.network, self._input_shape(image_shape))
        return found if self.class_index is None else found._replace(logits=len(self.class_index))

    def classifier(self) -> nn.Linear:
        """Return a frozen copy of the last layer, which maps pooled features to the logits of the data's classes."""
        layer = copy.deepcopy(self.network.classifier_layer).train().requires_grad_(False)
        if self.class_index is not None:
            layer.out_features = len(self.class_index)
            layer.weight.data = layer.weight.data[self.class_index]
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[self.class_index]
        return layer

    @torch.no_grad()
    def __call__(self, images: Tensor, preactivations: bool = False) -> Output:
        """Compute logits and features of uint8 views [B, 3, H, W]."""
        with self._autocast(images.device):
            output = self.forward_view(self.network, self._inputs(images), preactivations)
        return output._replace(logits=self._selected(output.logits))

    def logits(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] of uint8 images [B, 3, H, W]."""
        return self._logits(self.network, images)

    def _logits(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.inference_mode(), self._autocast(images.device):
            logits = self._selected(network(self._inputs(images)))
        return logits.clone()  # a tensor from inference mode cannot take part in a loss

    def view_logits(self, images: Tensor, index: Tensor, view_numbers: Tensor) -> Tensor:
        """Return logits float32 [B, C] of uint8 views [B, 3, H, W], from the view store if one is set.

        `index` [B] holds the images' positions in the training data, `view_numbers` [B] the numbers of the views. On a
        CPU the result is the same to the last bit with and without the store: answers are always computed in batches
        of ANSWER_BATCH, and the last batch is padded. A GPU is slow on small batches, so it computes the whole batch
        if one of its answers is unknown. Its results with and without the store agree up to rounding.
        """
        if self.view_store is None:
            return self.compute_view_logits(images)
        if isinstance(self.view_store, DeviceViewStore):
            return self._device_view_logits(self.view_store, images, index, view_numbers)
        logits, unknown = self.view_store.read(index, view_numbers)
        logits, places = logits.to(images.device), unknown.nonzero()[:, 0].to(images.device)
        if len(places):
            is_cpu = images.device.type == "cpu"
            logits[places] = (
                self.compute_view_logits(images[places]) if is_cpu else self.compute_view_logits(images)[places]
            )
            self.view_store.write(index[places], view_numbers[places], logits[places])
        return logits

    def _device_view_logits(
        self, store: DeviceViewStore, images: Tensor, index: Tensor, view_numbers: Tensor
    ) -> Tensor:
        """Answer from device memory. While records are missing, compute each batch, and do not wait to look."""
        known, unknown = store.read(index, view_numbers)
        if store.is_complete:
            return known
        logits = torch.where(unknown[:, None], self.compute_view_logits(images), known)
        store.write(index, view_numbers, logits, unknown)
        return logits

    def compute_view_logits(self, images: Tensor) -> Tensor:
        """Compute logits float32 [B, C] of uint8 views [B, 3, H, W], rounded to `answer_dtype`."""
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % ANSWER_BATCH))
        batches = filled.split(ANSWER_BATCH if images.device.type == "cpu" else len(filled))
        logits = torch.cat([self._logits(self.answer_view, batch) for batch in batches])[: len(images)]
        return logits.to(self.answer_dtype).float()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _input_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return image_shape if self.image_size is None else (3, self.image_size, self.image_size)

    def _inputs(self, images: Tensor) -> Tensor:
        assert not self.network.training, "the teacher was put into train mode"
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return normalise(images, *self.normalisation).contiguous(memory_format=self.memory_format)

    def _selected(self, logits: Tensor) -> Tensor:
        return logits if self.columns is None else logits.index_select(1, self.columns)
