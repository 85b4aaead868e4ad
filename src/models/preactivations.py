"""Features before their ReLU, for any network: the inputs of its ReLUs are recorded during the forward pass.

The code of the networks needs no change. There is no cost unless preactivations are requested.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from src.models.network import Network, Output


def forward_features(network: Network, images: Tensor, preactivations: bool) -> Output:
    """Call `network.forward_features`. With `preactivations`, add the tensor before the ReLU of each of the features.

    - If the features are the output of a ReLU, this is the ReLU's input (ResNets, VGG, SlimNet, MobileNetV1,
      ShuffleNetV1).
    - If the features are a sum that batch norm and ReLU read next, this is the output of that batch norm (wide
      ResNets). RepDistiller and mdistiller use the same tensor. The batch norm does not run a second time.
    - Otherwise it is the features themselves: no ReLU follows (MobileNetV2), or only parts of them went through a ReLU
      before a shuffle (ShuffleNetV2).
    """
    if not preactivations:
        return network.forward_features(images)
    recorder = _Recorder()
    with recorder, recorder.of_synchronised_norms(network):
        output = network.forward_features(images)
    return output._replace(preactivations=tuple(recorder.preactivation(features) for features in output.features))


RELUS = (F.relu, torch.relu, Tensor.relu)
IN_PLACE_RELUS = (torch.relu_, Tensor.relu_)


class _Recorder(TorchFunctionMode):
    """Records the input of each ReLU by its output, and the output of each batch norm by its input."""

    def __init__(self) -> None:
        super().__init__()
        # The keys are weak, so tensors that the network releases are not kept alive.
        self.before_relu = WeakTensorKeyDictionary()
        self.after_norm = WeakTensorKeyDictionary()

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (*RELUS, *IN_PLACE_RELUS):
            before = args[0] if args else kwargs["input"]
            if function in IN_PLACE_RELUS:
                before = before.clone()
                output = function(*args, **(kwargs or {}))
            else:
                output = F.relu(before)  # never in place, which would overwrite the recorded input
            self.before_relu[output] = before
            return output
        output = function(*args, **(kwargs or {}))
        if function is F.batch_norm:
            self.after_norm[args[0]] = output
        return output

    @contextmanager
    def of_synchronised_norms(self, network: nn.Module) -> Iterator[None]:
        """Record the output of batch norms that several devices synchronise. They do not call `F.batch_norm`."""

        def record(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.after_norm[inputs[0]] = output

        norms = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
        handles = [norm.register_forward_hook(record) for norm in norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def preactivation(self, features: Tensor) -> Tensor:
        if features in self.before_relu:
            before: Tensor = self.before_relu[features]
            return before
        after: Tensor = self.after_norm.get(features, features)
        return after
