"""What every network of this project can be asked for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """All that a network says about a batch of B images."""

    logits: Tensor
    """[B, C], before softmax."""
    features: tuple[Tensor, ...]
    """The stem's output and each stage's, each [B, channels, height, width]."""
    pooled: Tensor
    """[B, D], the input of the classifier."""
    preactivations: tuple[Tensor, ...] = ()
    """The features before their ReLU; empty unless asked for, by `preactivations.forward_features`."""
    unpooled: Tensor | None = None
    """[B, D, height, width], the map that `Network.pool` makes `pooled` of; None where no map has that width."""


class Network(nn.Module):
    """An image classifier: `network(images)` is its logits, `forward_features` tells the features as well.

    Images are normalised float tensors [B, 3, H, W].
    """

    def forward_features(self, images: Tensor) -> Output:
        """Logits, stage features and pooled features of a batch, from one pass."""
        raise NotImplementedError

    @staticmethod
    def pool(unpooled: Tensor) -> Tensor:
        """From the last map [B, D, height, width] to the classifier's input [B, D]: the mean over all pixels."""
        return unpooled.mean((2, 3))

    @property
    def classifier_layer(self) -> nn.Linear:
        """The last layer, from the pooled features to the logits (its name in a checkpoint differs by family)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        return self.forward_features(images).logits


class Shapes(NamedTuple):
    """Sizes of what a network says, without the batch: asked of the network, never written in a config."""

    logits: int
    features: tuple[tuple[int, ...], ...]
    pooled: int


@torch.no_grad()
def shapes(network: Network, image_shape: tuple[int, int, int]) -> Shapes:
    """Ask a network for its sizes by showing it one blank image of shape [3, H, W]; no state of the network changes."""
    training = network.training
    parameter = next(network.parameters())
    output = network.eval().forward_features(
        torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    )
    network.train(training)
    return Shapes(output.logits.shape[1], tuple(tuple(f.shape[1:]) for f in output.features), output.pooled.shape[1])
