"""The interface of every network: logits, features of its stages, and its classifier layer."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.common.errors import UserError


class Output(NamedTuple):
    """Outputs of a network for a batch of B images."""

    logits: Tensor
    """[B, C], before softmax."""
    features: tuple[Tensor, ...]
    """The output of the stem and of each stage, each [B, channels, height, width]."""
    pooled: Tensor
    """[B, D], the input of the classifier."""
    preactivations: tuple[Tensor, ...] = ()
    """The features before their ReLU. Empty unless requested from `preactivations.forward_features`."""
    unpooled: Tensor | None = None
    """[B, D, height, width], the map that `Network.pool` reduces to `pooled`. None if no map has D channels."""


class Network(nn.Module):
    """An image classifier for normalised float images [B, 3, H, W].

    Calling the network returns logits. `forward_features` returns logits and features.
    """

    classifier_name = "fc"
    """The name of the last layer, as in the state dict. Families with another name override it."""

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, stage features and pooled features in one forward pass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward_features()")

    @staticmethod
    def pool(unpooled: Tensor) -> Tensor:
        """Average the last map [B, D, height, width] over its pixels to the classifier's input [B, D]."""
        return unpooled.mean((2, 3))

    @property
    def classifier_layer(self) -> nn.Linear:
        """The last layer, from pooled features to logits.

        Raises `UserError` if `classifier_name` names no layer, or one of another kind.
        """
        try:
            layer = self.get_submodule(self.classifier_name)
        except AttributeError as error:  # nn.Module would report that there is no attribute `classifier_layer`
            raise UserError(
                f"{type(self).__name__} has no layer {self.classifier_name!r}: set its class attribute classifier_name "
                "to the name of its last layer."
            ) from error
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"The layer {self.classifier_name!r} of {type(self).__name__} is a {type(layer).__name__}: the last "
                "layer must be an nn.Linear."
            )
        return layer

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] of normalised images [B, 3, H, W]."""
        return self.forward_features(images).logits


class Shapes(NamedTuple):
    """Sizes of a network's output, without the batch dimension."""

    logits: int
    features: tuple[tuple[int, ...], ...]
    pooled: int


@torch.no_grad()
def measure_shapes(network: Network, image_shape: tuple[int, int, int]) -> Shapes:
    """Measure the sizes of a network's output on one blank image of shape [3, H, W]. The network's state is unchanged.

    >>> from src.models.resnet import resnet20
    >>> measure_shapes(resnet20(num_classes=10), (3, 32, 32))
    Shapes(logits=10, features=((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)), pooled=64)
    """
    training = network.training
    parameter = next(network.parameters())
    output = network.eval().forward_features(
        torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    )
    network.train(training)
    return Shapes(output.logits.shape[1], tuple(tuple(f.shape[1:]) for f in output.features), output.pooled.shape[1])
