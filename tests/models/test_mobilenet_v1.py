"""The sizes, names and features of MobileNetV1."""

import torch
from torch import nn

from src.models.mobilenet_v1 import mobilenet_v1
from src.models.network import measure_shapes


def test_sizes_and_names_are_the_published_ones():
    network = mobilenet_v1()
    names = list(network.state_dict())
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_231_976
    assert len(names) == 164
    assert names[:3] == ["model.0.0.weight", "model.0.1.weight", "model.0.1.bias"]
    assert names[-5:] == [f"model.13.4.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")] + [
        "fc.weight",
        "fc.bias",
    ]
    assert network.state_dict()["model.12.0.weight"].shape == (512, 1, 3, 3)
    assert network.classifier_layer is network.fc


def test_features_are_the_last_outputs_of_each_resolution():
    sizes = measure_shapes(mobilenet_v1(10), (3, 224, 224))
    assert sizes.logits == 10
    assert sizes.pooled == 1024
    assert sizes.features == ((64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7))
    assert measure_shapes(mobilenet_v1(10), (3, 96, 64)).features[-1] == (1024, 3, 2)


@torch.no_grad()
def test_logits_equal_those_of_the_published_sequence_of_layers():
    torch.manual_seed(0)
    network = mobilenet_v1(10).eval()
    images = torch.randn(2, 3, 224, 224)
    sequence = nn.Sequential(*network.model, nn.AvgPool2d(7), nn.Flatten(), network.fc)
    output = network.forward_features(images)
    torch.testing.assert_close(output.logits, sequence(images))
    torch.testing.assert_close(output.logits, network(images))
    torch.testing.assert_close(output.pooled, output.features[-1].mean((2, 3)))
    assert all((feature >= 0).all() for feature in output.features)
