"""State dicts of networks that look trained."""

import torch
from torch import Tensor

from src.models.network import Network

State = dict[str, Tensor]


def trained(network: Network) -> Network:
    """Run a batch in training mode, so that the statistics of batch norms differ from a fresh network's."""
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 32, 32))
    return network.eval()


def prefixed(prefix: str, state: State) -> State:
    """Put a prefix before each name."""
    return {prefix + name: value for name, value in state.items()}
