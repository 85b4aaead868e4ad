"""Networks of libraries, and torchvision's classifiers as such: their own code, their own names in the state dict."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.ops.misc import Permute

from src.errors import UserError
from src.models.network import Network, Output


class LibraryNetwork(Network):
    """A library's model as a `Network`.

    Both hold the very same parameters, buffers and children, so that names in the state dict are the library's.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, classifier: nn.Module | None) -> None:
        """Raises `UserError` where the classifier is no linear layer."""
        super().__init__()
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["model"] = model  # past nn.Module, which would list everything a second time
        if not isinstance(classifier, nn.Linear):
            raise UserError(
                f"{type(model).__name__} does not end in one linear layer, refused: choose another network."
            )
        self.classifier_name = next(name for name, module in self.named_modules() if module is classifier)

    @property
    def classifier_layer(self) -> nn.Linear:
        """The model's own."""
        layer = self.get_submodule(self.classifier_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def train(self, mode: bool = True) -> "LibraryNetwork":
        """The model follows, for what it does by itself, outside its children."""
        self.model.training = mode
        super().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C], by the model alone."""
        return self.model(images)


class TorchvisionNetwork(LibraryNetwork):
    """A classifier of torchvision that ends in a linear layer.

    Features: the last block's output of each resolution, the largest first. Of a ResNet these are the stem before
    max-pooling and the four stages, all after their ReLU, as in mdistiller; of a ViT the tokens of the patches.
    """

    def __init__(self, model: nn.Module) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        super().__init__(model, linear[-1] if linear else None)

    def forward_features(self, images: Tensor) -> Output:
        """Logits, features of each resolution, pooled features (the classifier's input)."""
        recorder, pooled = _Recorder(), []
        with ExitStack() as hooks:
            for block in _blocks(self.model):
                hooks.enter_context(block.register_forward_hook(recorder))
            hooks.enter_context(self.classifier_layer.register_forward_pre_hook(lambda _, x: pooled.append(x[0])))
            logits = self.model(images)
        features = tuple(recorder.features.values())
        return Output(logits, features, pooled[0], unpooled=last_map(features, pooled[0]))


def last_map(maps: Sequence[Tensor], pooled: Tensor) -> Tensor | None:
    """The last where it has the classifier's width; whether `pool` is all that happens to it, who needs it checks."""
    return maps[-1] if maps and maps[-1].ndim == 4 and maps[-1].shape[1] == pooled.shape[1] else None


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What the model is a sequence of; a subclass of Sequential is one block."""
    for child in model.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        else:
            yield child


class _Recorder:
    """A forward hook that keeps the last output of each resolution, as [B, channels, height, width]."""

    # Pooling and layer normalisation stand between stages and belong to none.
    BETWEEN = (nn.LayerNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout)

    def __init__(self) -> None:
        self.features: dict[tuple[int, int], Tensor] = {}
        self.channels_last = False

    def __call__(self, block: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(block, Permute):
            self.channels_last = list(block.dims) == [0, 2, 3, 1]
            return
        if isinstance(block, self.BETWEEN):
            return
        if output.ndim == 3:  # ViT: tokens of the patches behind a class token
            height, width = list(self.features)[-1]
            output = output[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
        elif output.ndim == 4 and self.channels_last:  # Swin
            output = output.permute(0, 3, 1, 2)
        if output.ndim == 4:
            self.features[output.shape[2], output.shape[3]] = output


def resnet18(num_classes: int = 1000) -> TorchvisionNetwork:
    """11,689,512 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet18(num_classes=num_classes))


def resnet34(num_classes: int = 1000) -> TorchvisionNetwork:
    """21,797,672 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet34(num_classes=num_classes))


def resnet50(num_classes: int = 1000) -> TorchvisionNetwork:
    """25,557,032 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet50(num_classes=num_classes))
