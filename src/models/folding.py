"""Batch norms of a network that only answers, folded into the convolutions before them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.errors import UserError
from src.models.network import Network

TOLERANCE = 1e-9
"""Of a folded network in float64, over the largest of what it says."""


@torch.no_grad()
def fold_batch_norms(network: Network, image_shape: tuple[int, int, int]) -> int:
    """Fold each batch norm that reads nothing but a convolution's output into that convolution; how many.

    Which ones do is seen while the network looks at noise of shape [3, H, W]; convolutions whose output is one of the
    features stay. That nothing else reads those outputs is proven by what the folded network says in float64. Raises
    `UserError` where that differs.
    """
    parameter = next(network.parameters())
    image = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    pairs = _pairs(network, image)
    exact = copy.deepcopy(network).double()
    expected = exact.forward_features(image.double())
    for changed in (exact, network):
        for convolution, norm in pairs.items():
            before: list[Any] = [changed.get_submodule(name) for name in (convolution, norm)]
            fused: nn.Module = fuse_conv_bn_eval(*before)
            changed.set_submodule(convolution, fused.requires_grad_(False))
            changed.set_submodule(norm, nn.Identity())
    said = exact.forward_features(image.double())
    for one, other in zip((said.logits, *said.features), (expected.logits, *expected.features), strict=True):
        if not (one - other).abs().max() <= TOLERANCE * other.abs().max():
            raise UserError("teacher.fold=true does not fit this network: set it to false.")
    return len(pairs)


def _pairs(network: Network, image: Tensor) -> dict[str, str]:
    """The batch norm that reads the output of a convolution, by name, of modules that are used once."""
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}

    def note_output(name: str) -> Any:
        return lambda module, args, output: outputs.setdefault(name, []).append(output)

    def note_input(name: str) -> Any:
        return lambda module, args: inputs.setdefault(name, []).append(args[0])

    hooks = []
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(note_output(name)))
        elif type(module) is nn.BatchNorm2d:
            hooks.append(module.register_forward_pre_hook(note_input(name)))
    features = network.forward_features(image).features
    for hook in hooks:
        hook.remove()
    made_by = {id(seen[0]): name for name, seen in outputs.items() if len(seen) == 1}
    for feature in features:
        made_by.pop(id(feature), None)
    return {made_by[id(seen[0])]: name for name, seen in inputs.items() if len(seen) == 1 and id(seen[0]) in made_by}
