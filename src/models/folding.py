"""Folding of batch norms into the convolutions before them, for a network that is only evaluated."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.common.errors import UserError
from src.models.network import Network

TOLERANCE = 1e-9
"""Maximum error of a folded network in float64, relative to the largest value of each output."""


@torch.no_grad()
def fold_batch_norms(network: Network, image_shape: tuple[int, int, int]) -> int:
    """Fold each batch norm that reads the output of a convolution into that convolution. Returns their number.

    A forward pass on noise of shape [3, H, W] shows which batch norm reads which convolution. A convolution is not
    folded if its output is one of the features. Nothing else may read the output of a folded convolution. A copy in
    float64 is folded to check this. Raises `UserError` if its logits or features change.

    >>> from src.models.resnet import resnet8
    >>> fold_batch_norms(resnet8(num_classes=10).eval(), (3, 32, 32))
    9
    """
    parameter = next(network.parameters())
    image = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    pairs = _find_pairs(network, image)
    exact = copy.deepcopy(network).double()
    expected = exact.forward_features(image.double())
    for changed in (exact, network):
        for convolution, norm in pairs.items():
            before: list[Any] = [changed.get_submodule(name) for name in (convolution, norm)]
            fused: nn.Module = fuse_conv_bn_eval(*before)
            changed.set_submodule(convolution, fused.requires_grad_(False))
            changed.set_submodule(norm, nn.Identity())
    found = exact.forward_features(image.double())
    for one, other in zip((found.logits, *found.features), (expected.logits, *expected.features), strict=True):
        if not (one - other).abs().max() <= TOLERANCE * other.abs().max():
            raise UserError(
                "teacher.fold=true does not fit this network, because more than one layer reads the output of a "
                "convolution: set it to false."
            )
    return len(pairs)


def _find_pairs(network: Network, image: Tensor) -> dict[str, str]:
    """Map the name of each convolution to the name of the batch norm that reads its output.

    Modules that run more than once are left out.
    """
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
