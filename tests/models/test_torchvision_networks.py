"""Classifiers of torchvision as networks: the same logits, the same names, and features on request."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from src.common.errors import UserError
from src.models.checkpoints import load_weights, save_weights, weights_digest
from src.models.network import Network
from src.models.torchvision_networks import LibraryNetwork, TorchvisionNetwork, last_map, resnet18


def small_vit(num_classes: int) -> VisionTransformer:
    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=num_classes)


def small_swin(num_classes: int) -> SwinTransformer:
    return SwinTransformer([4, 4], 16, [2, 2, 2], [2, 2, 2], [4, 4], num_classes=num_classes)


def small_convnext(num_classes: int) -> ConvNeXt:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], 0, 1, num_classes)


SMALL: dict[str, Callable[[int], nn.Module]] = {"vit": small_vit, "swin": small_swin, "convnext": small_convnext}


def make(name: str) -> tuple[Any, Any]:
    """Make a model of 10 classes, and the network of a copy of it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    small = SMALL.get(name)
    model = small(10) if small else torchvision.models.get_model(name, num_classes=10, **options)
    return model.eval(), TorchvisionNetwork(copy.deepcopy(model)).eval()


# Image size, name of the classifier, and channels x size of each of the features.
MODELS = {
    "resnet18": (64, "fc", "64x32 64x16 128x8 256x4 512x2"),
    "vgg11": (64, "classifier.6", "64x64 128x32 256x16 512x8 512x4"),
    "densenet121": (64, "classifier", "64x32 256x16 512x8 1024x4 1024x2"),
    "mobilenet_v2": (64, "classifier.1", "16x32 24x16 32x8 96x4 1280x2"),
    "mobilenet_v3_small": (64, "classifier.3", "16x32 16x16 24x8 48x4 576x2"),
    "efficientnet_b0": (64, "classifier.1", "16x32 24x16 40x8 112x4 1280x2"),
    "regnet_x_400mf": (64, "fc", "32x32 32x16 64x8 160x4 400x2"),
    "shufflenet_v2_x0_5": (64, "fc", "24x32 48x8 96x4 1024x2"),
    "googlenet": (64, "fc", "64x32 192x16 480x8 832x4 1024x2"),
    "convnext": (64, "classifier.2", "8x16 16x8 32x4"),
    "swin": (64, "head", "16x16 32x8 64x4"),
    "vit": (32, "heads.head", "16x4"),
}
HEAVY = ("vgg11", "densenet121", "efficientnet_b0", "googlenet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in MODELS]
)
@torch.no_grad()
def test_logits_and_names_match_torchvision(name: str):
    size, classifier, features = MODELS[name]
    model, network = make(name)
    state = model.state_dict()
    assert list(network.state_dict()) == list(state)
    assert [key for key, _ in network.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert network.classifier_layer is network.get_submodule(classifier)

    images = torch.randn(2, 3, size, size)
    logits = model(images)
    output = network.forward_features(images)
    assert torch.equal(network(images), logits)
    assert torch.equal(output.logits, logits)
    assert torch.equal(network.classifier_layer(output.pooled), logits)
    found = [f"{feature.shape[1]}x{feature.shape[2]}" for feature in output.features]
    assert found == features.split()
    assert all(len(feature) == 2 and feature.shape[2] == feature.shape[3] for feature in output.features)


@torch.no_grad()
def test_features_of_a_resnet_are_its_stages_after_relu():
    model, network = make("resnet18")
    images = torch.randn(2, 3, 64, 64)
    stem = model.relu(model.bn1(model.conv1(images)))
    expected: list[Tensor] = [stem, model.layer1(model.maxpool(stem))]
    for stage in (model.layer2, model.layer3, model.layer4):
        expected.append(stage(expected[-1]))
    output = network.forward_features(images)
    assert len(output.features) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(output.features, expected, strict=True))
    assert torch.equal(output.pooled, expected[-1].mean((2, 3)))


@torch.no_grad()
def test_features_of_a_swin_transformer_are_its_stages_with_channels_first():
    model, network = make("swin")
    x, expected = torch.randn(2, 3, 64, 64), []
    features = network.forward_features(x).features
    for index, part in enumerate(model.features):  # patches, stage, merging, stage, ...
        x = part(x)
        if index % 2:
            expected.append(x.permute(0, 3, 1, 2))
    assert all(torch.equal(one, other) for one, other in zip(features, expected, strict=True))


@torch.no_grad()
def test_features_of_a_vit_are_the_tokens_of_its_patches():
    model, network = make("vit")
    images = torch.randn(2, 3, 32, 32)
    class_token = model.class_token.expand(2, -1, -1)
    tokens = model.encoder(torch.cat([class_token, model._process_input(images)], dim=1))
    output = network.forward_features(images)
    assert torch.equal(output.features[0].flatten(2), tokens[:, 1:].transpose(1, 2))
    assert torch.equal(output.features[0][:, :, 1, 2], tokens[:, 1 + 4 * 1 + 2])
    assert torch.equal(output.pooled, tokens[:, 0])


def test_a_call_for_logits_registers_no_hooks():
    _, network = make("resnet18")
    seen = []
    network.layer2.register_forward_hook(lambda *_: seen.append(len(network.layer1._forward_hooks)))
    images = torch.randn(2, 3, 32, 32)
    block = network.layer1[0]
    network.layer1[1].register_forward_hook(lambda *_: seen.append(len(block._forward_hooks)))
    network(images)
    assert seen == [0, 0]
    network.forward_features(images)
    assert seen[2] == 1
    assert not block._forward_hooks
    assert not network.fc._forward_pre_hooks


def test_hooks_are_removed_if_the_model_raises():
    _, network = make("vit")
    with pytest.raises(AssertionError, match="image height"):
        network.forward_features(torch.zeros(1, 3, 16, 16))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_checkpoints_load_in_both_directions(tmp_path: Path):
    model, network = make("resnet18")
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    other = resnet18(10)
    load_weights(other, tmp_path / "theirs.pth")
    assert weights_digest(other) == weights_digest(model)

    save_weights(network, tmp_path / "ours.pth")
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=10).load_state_dict(content["model"])


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@torch.no_grad()
def test_copies_share_no_parameters_with_the_original(name: str):
    _, network = make(name)
    digest = weights_digest(network)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(torch.randn(1, 3, 32, 32)).any(), "the copied model uses other parameters than the copy"
        assert weights_digest(network) == digest


def test_train_mode_and_dtype_reach_the_model():
    _, network = make("vit")
    assert not network.model.training
    assert network.train().model.training
    assert network.double().model.class_token.dtype == torch.float64
    assert network.model.class_token is network.class_token
    logits = network.eval()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("table", torch.ones(1), persistent=False)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3))) * self.scale * self.table


def test_the_network_shares_the_models_own_buffers():
    network = LibraryNetwork(model := Scaled(), model.head)
    assert list(network.state_dict()) == ["scale", "head.weight", "head.bias"]
    network.load_state_dict({**network.state_dict(), "scale": torch.zeros(1)})
    assert not network(torch.randn(2, 3, 4, 4)).any()
    assert network.double()(torch.randn(2, 3, 4, 4).double()).dtype == torch.float64


class Holder(nn.Module):
    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student


def test_parameters_are_listed_only_once_inside_another_module():
    model, network = make("resnet18")
    held = Holder(network)
    assert list(held.state_dict()) == [f"student.{name}" for name in model.state_dict()]
    assert len(list(held.parameters())) == len(list(model.parameters()))
    fresh = Holder(make("resnet18")[1])
    fresh.load_state_dict(held.state_dict())


def test_convolutional_classifiers_are_refused():
    with pytest.raises(UserError, match="SqueezeNet does not end in one linear layer"):
        TorchvisionNetwork(torchvision.models.squeezenet1_1())


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(2, 8, 4, 4), (2, 5, 2, 2)], True),
        ([(2, 5, 4, 4), (2, 8, 2, 2)], False),
        ([(2, 5, 4)], False),
        ([], False),
    ],
    ids=["same width", "other width", "no map", "no features"],
)
def test_the_last_map_must_have_the_width_of_the_classifier(shapes: list[tuple[int, ...]], found: bool):
    maps = [torch.zeros(shape) for shape in shapes]
    unpooled = last_map(maps, torch.zeros(2, 5))
    assert unpooled is (maps[-1] if found else None)
