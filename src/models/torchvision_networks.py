"""Networks of libraries, and torchvision's classifiers. They keep their own code and names in the state dict."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.ops.misc import Permute

from src.common.errors import UserError
from src.models.network import Network, Output


class LibraryNetwork(Network):
    """A library's model as a `Network`.

    The network and the model share their dicts of parameters, buffers and children. Names in the state dict are
    therefore the library's.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, classifier: nn.Module | None) -> None:
        """Wrap a model. Raises `UserError` if the classifier is not a linear layer."""
        super().__init__()
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["model"] = model  # not registered, because nn.Module would list everything twice
        if not isinstance(classifier, nn.Linear):
            raise UserError(f"{type(model).__name__} does not end in one linear layer: choose another network.")
        self.classifier_name = next(name for name, module in self.named_modules() if module is classifier)

    def train(self, mode: bool = True) -> "LibraryNetwork":
        """Set the mode of network and model. The model's own code, outside its children, may read the mode too."""
        self.model.training = mode
        super().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] by the model's own forward pass."""
        logits: Tensor = self.model(images)
        return logits


class TorchvisionNetwork(LibraryNetwork):
    """A classifier of torchvision that ends in a linear layer.

    The features are the output of the last block of each resolution, the largest first. For a ResNet these are the stem
    before max-pooling and the four stages, all after their ReLU, as in mdistiller. For a ViT they are the tokens of the
    patches.
    """

    def __init__(self, model: nn.Module) -> None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        super().__init__(model, linear[-1] if linear else None)

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of each resolution, and pooled features (the classifier's input)."""
        recorder, pooled = _Recorder(), []
        with ExitStack() as hooks:
            for block in _blocks(self.model):
                hooks.enter_context(block.register_forward_hook(recorder))
            hooks.enter_context(self.classifier_layer.register_forward_pre_hook(lambda _, x: pooled.append(x[0])))
            logits = self.model(images)
        features = tuple(recorder.features.values())
        return Output(logits, features, pooled[0], unpooled=last_map(features, pooled[0]))


def last_map(maps: Sequence[Tensor], pooled: Tensor) -> Tensor | None:
    """Return the last of the maps if its width is the classifier's, else None.

    Callers must check that only pooling follows it.
    """
    return maps[-1] if maps and maps[-1].ndim == 4 and maps[-1].shape[1] == pooled.shape[1] else None


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules that the model runs in sequence. A subclass of Sequential counts as one block."""
    for child in model.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        else:
            yield child


class _Recorder:
    """A forward hook that keeps the last output of each resolution, as [B, channels, height, width]."""

    # Layers between stages, which do not belong to a stage.
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
        if output.ndim == 3:  # ViT: a class token, then the tokens of the patches
            height, width = list(self.features)[-1]
            output = output[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
        elif output.ndim == 4 and self.channels_last:  # Swin
            output = output.permute(0, 3, 1, 2)
        if output.ndim == 4:
            self.features[output.shape[2], output.shape[3]] = output


def resnet18(num_classes: int = 1000) -> TorchvisionNetwork:
    """Make a resnet18: 11,689,512 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet18(num_classes=num_classes))


def resnet34(num_classes: int = 1000) -> TorchvisionNetwork:
    """Make a resnet34: 21,797,672 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet34(num_classes=num_classes))


def resnet50(num_classes: int = 1000) -> TorchvisionNetwork:
    """Make a resnet50: 25,557,032 parameters for 1000 classes."""
    return TorchvisionNetwork(torchvision.models.resnet50(num_classes=num_classes))
