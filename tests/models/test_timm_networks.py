"""Classifiers of timm as networks: the same logits and the same names."""

import copy
import sys
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.models.timm_networks import TimmNetwork, import_timm

MODELS = {  # timm's test networks: channels x size of each of the features, for images of 96 pixels
    "test_resnet": "32x48 32x24 48x12 192x6 96x3",
    "test_convnext": "24x24 32x12 48x6 64x3",
    "test_efficientnet": "16x48 24x24 32x12 48x6 64x3",
}


@pytest.mark.parametrize("name", [*MODELS, "test_vit"])
@torch.no_grad()
def test_logits_and_names_match_timm(name: str):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    network = TimmNetwork(copy.deepcopy(model)).eval()
    assert list(network.state_dict()) == list(model.state_dict())
    assert [key for key, _ in network.named_parameters()] == [key for key, _ in model.named_parameters()]

    size = 160 if name == "test_vit" else 96
    images = torch.randn(2, 3, size, size)
    logits = model(images)
    output = network.forward_features(images)
    assert torch.equal(network(images), logits)
    torch.testing.assert_close(output.logits, logits)
    assert torch.equal(network.classifier_layer(output.pooled), output.logits)
    torch.testing.assert_close(output.pooled, model.forward_head(model.forward_features(images), pre_logits=True))
    found = [f"{feature.shape[1]}x{feature.shape[2]}" for feature in output.features]
    assert found == MODELS.get(name, "64x10").split()
    assert not network.classifier_layer._forward_pre_hooks


@torch.no_grad()
def test_features_are_the_intermediates_of_timm():
    timm = pytest.importorskip("timm")
    network: Any = TimmNetwork(timm.create_model("test_resnet")).eval()
    images = torch.randn(1, 3, 96, 96)
    expected = network.model.forward_intermediates(images, intermediates_only=True)
    assert all(map(torch.equal, network.forward_features(images).features, expected))


def test_train_mode_reaches_the_models_own_code():
    timm = pytest.importorskip("timm")
    # The model's forward_head calls dropout as a function. There is no dropout module.
    network: Any = TimmNetwork(timm.create_model("test_resnet", drop_rate=0.5))
    final = torch.randn(4, 96, 2, 2)
    assert torch.equal(network.eval().model.forward_head(final), network.model.forward_head(final))
    assert not torch.equal(network.train().model.forward_head(final), network.model.forward_head(final))


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnetv2_50x1_bit", "does not end in one linear layer"), ("crossvit_9_240", "does not end in one linear layer")],
)
def test_classifiers_other_than_a_linear_layer_are_refused(name: str, message: str):
    timm = pytest.importorskip("timm")
    with torch.device("meta"), pytest.raises(UserError, match=message):
        TimmNetwork(timm.create_model(name))


def test_a_network_without_classifier_is_refused():
    timm = pytest.importorskip("timm")
    with pytest.raises(UserError, match="ResNet has no classifier of its own: give a number of classes"):
        TimmNetwork(timm.create_model("test_resnet", num_classes=0))


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm/NAME needs the package timm: pip install timm"):
        import_timm()
