"""Every network of `conf/network` on the GPU, forward and backward under the deterministic mode."""

from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from src.models.network import Network
from src.models.preactivations import forward_features
from tests.helpers.configure import CONF, options
from tests.helpers.gpu import CPU, DEVICE, relative_error

pytestmark = pytest.mark.gpu
CLASSES, BATCH = 10, 4


def outputs_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute all outputs in training mode, and the gradient of their mean square, each as one vector."""
    torch.manual_seed(0)
    config: Any = OmegaConf.load(CONF / "network" / f"{name}.yaml")
    network: Network = hydra.utils.get_method(config._target_)(CLASSES)
    network.train().to(device, dtype).to(memory_format=torch.channels_last)
    size = 64 if name.startswith("imagenet/") else 32
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    output = forward_features(network, images.contiguous(memory_format=torch.channels_last), True)
    values = [output.logits, output.pooled, *output.features, *output.preactivations]
    torch.stack([value.square().mean() for value in values]).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat([value.detach().flatten() for value in values]), torch.cat(gradients)


@pytest.mark.parametrize("name", options("network"))
def test_a_network_computes_the_same_as_on_the_cpu(name: str) -> None:
    """In float32, rounding moves activations across the kinks of ReLU, which changes gradients by up to 2e-2.

    Outputs differ by up to 2e-5 on one CPU.
    """
    for dtype, bounds in ((torch.float64, (1e-7, 1e-7)), (torch.float32, (5e-4, 0.2))):
        found, expected = (outputs_and_gradients(name, device, dtype) for device in (DEVICE, CPU))
        errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (dtype, errors)
