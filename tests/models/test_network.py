"""The interface of networks: pooling, and the measurement of output sizes."""

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.checkpoints import weights_digest
from src.models.network import Network, Output, Shapes, measure_shapes


class Small(Network):
    """A network with one convolution, and with dropout that a measurement must not draw from."""

    classifier_name = "classifier"

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(4, 5)

    def forward_features(self, images: Tensor) -> Output:
        features = self.norm(self.convolution(images))
        pooled = self.pool(features)
        return Output(self.classifier(self.dropout(pooled)), (features,), pooled, unpooled=features)


def test_shapes_are_measured_without_the_batch_dimension():
    assert measure_shapes(Small(), (3, 9, 7)) == Shapes(logits=5, features=((4, 4, 3),), pooled=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_of_any_dtype_are_measured(dtype: torch.dtype):
    assert measure_shapes(Small().to(dtype), (3, 9, 7)).logits == 5


@pytest.mark.parametrize("training", [True, False])
def test_a_measurement_leaves_the_network_as_it_was(training: bool):
    network = Small().train(training)
    digest, random_state = weights_digest(network), torch.get_rng_state()
    measure_shapes(network, (3, 9, 7))
    assert network.training == network.dropout.training == training
    assert weights_digest(network) == digest
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_call_returns_the_logits():
    network = Small().eval()
    images = torch.randn(2, 3, 9, 7)
    assert torch.equal(network(images), network.forward_features(images).logits)


def test_the_last_map_is_pooled_by_its_mean():
    maps = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    assert torch.equal(Network.pool(maps), torch.tensor([[2.0, -2.5]]))


def test_preactivations_are_empty_unless_requested():
    assert Small().forward_features(torch.randn(2, 3, 9, 7)).preactivations == ()


def test_the_classifier_layer_is_found_by_its_name():
    network = Small()
    assert network.classifier_layer is network.classifier
    network.classifier_name = "fc"
    with pytest.raises(UserError, match="Small has no layer 'fc': set its class attribute classifier_name"):
        _ = network.classifier_layer


def test_the_classifier_layer_is_linear():
    network = Small()
    network.classifier_name = "convolution"
    with pytest.raises(UserError, match="The layer 'convolution' of Small is a Conv2d: the last layer must be"):
        _ = network.classifier_layer


def test_a_subclass_has_to_define_its_features():
    with pytest.raises(NotImplementedError, match=r"Network defines no forward_features\(\)"):
        Network()(torch.zeros(1, 3, 4, 4))
