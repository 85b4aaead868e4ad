"""Features before their ReLU, of any network: what its ReLUs were given is noted while it runs.

The networks' code stays as it is, and only who asks pays for it.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from src.models.network import Network, Output


def forward_features(network: Network, images: Tensor, preactivations: bool) -> Output:
    """`network.forward_features`, and where asked beside each of the features the tensor that its ReLU was given.

    Where the features are a ReLU's output, that is its input (ResNets, VGG, SlimNet, MobileNetV1, ShuffleNetV1); where
    they are sums that batch norm and ReLU read next, the batch norm's output (wide ResNets), as in RepDistiller and
    mdistiller, without running it twice. Features that are linear (MobileNetV2) are their own, and so are those that
    only parts of went through a ReLU of their own (ShuffleNetV2, shuffled) or that no ReLU made.
    """
    if not preactivations:
        return network.forward_features(images)
    notes = _Notes()
    with notes:
        said = network.forward_features(images)
    return said._replace(preactivations=tuple(notes.preactivation(features) for features in said.features))


class _Notes(TorchFunctionMode):
    """While it is on, each ReLU's input by its output, and each batch norm's output by its input."""

    def __init__(self) -> None:
        super().__init__()
        # Weak: what the network itself lets go is not kept.
        self.before_relu = WeakTensorKeyDictionary()
        self.after_norm = WeakTensorKeyDictionary()

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.relu:
            output = F.relu(args[0])  # in place it would overwrite what is to be noted
            self.before_relu[output] = args[0]
            return output
        output = function(*args, **(kwargs or {}))
        if function is F.batch_norm:
            self.after_norm[args[0]] = output
        return output

    def preactivation(self, features: Tensor) -> Tensor:
        if features in self.before_relu:
            return self.before_relu[features]
        return self.after_norm.get(features, features)
