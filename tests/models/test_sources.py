"""Networks of libraries come with weights, classes and preprocessing. Missing ones are reported in one sentence."""

import re
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor

from src.common.errors import UserError
from src.data.imagenet import WNIDS
from src.models import sources
from src.models.checkpoints import weights_digest
from src.models.sources import architecture, pretrained

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAME = "mobilenet_v3_small"  # the smallest of torchvision that ends in a linear layer
TIMM = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(cache: Path, name: str, state: dict[str, Tensor], weights: str = "IMAGENET1K_V1") -> Path:
    """Write weights under the name that torchvision looks for."""
    file = cache / Path(torchvision.models.get_model_weights(name)[weights].url).name
    torch.save(state, file)
    return file


@pytest.fixture
def published(cache: Path) -> dict[str, Tensor]:
    """Random weights in the cache, in place of the published ones."""
    torch.manual_seed(5)
    state = torchvision.models.get_model(NAME).state_dict()
    put(cache, NAME, state)
    return state


def test_a_teacher_comes_with_its_weights_classes_and_preprocessing(published: dict[str, Tensor]):
    network, mean, std, image_size, class_names = pretrained(f"torchvision/{NAME}")
    state = network.state_dict()
    assert list(state) == list(published)
    assert all(torch.equal(state[name], value) for name, value in published.items())
    assert (mean, std, image_size, class_names) == (IMAGENET_MEAN, IMAGENET_STD, 224, WNIDS)
    assert network.classifier_layer.out_features == 1000


def test_another_number_of_classes_replaces_only_the_classifier(published: dict[str, Tensor]):
    found = pretrained(f"torchvision/{NAME}", 7)
    state = found.network.state_dict()
    head = ["classifier.3.weight", "classifier.3.bias"]
    assert [tuple(state[name].shape) for name in head] == [(7, 1024), (7,)]
    assert all(torch.equal(state[name], value) for name, value in published.items() if name not in head)
    assert found.class_names is None
    assert found.network(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_the_same_number_of_classes_keeps_the_classifier(published: dict[str, Tensor]):
    found = pretrained(f"torchvision/{NAME}", 1000)
    assert torch.equal(found.network.classifier_layer.weight, published["classifier.3.weight"])
    assert found.class_names == WNIDS


def test_weights_can_be_chosen(cache: Path):
    torch.manual_seed(0)
    first, second = (torchvision.models.mobilenet_v2().state_dict() for _ in range(2))
    put(cache, "mobilenet_v2", first)
    put(cache, "mobilenet_v2", second, "IMAGENET1K_V2")
    for variant, state in (("", first), ("/IMAGENET1K_V2", second), ("/IMAGENET1K_V1", first)):
        network = pretrained(f"torchvision/mobilenet_v2{variant}").network
        assert torch.equal(network.classifier_layer.weight, state["classifier.1.weight"])


def test_weights_without_a_first_version_are_the_librarys_default():
    weights = torchvision.models.get_model_weights("vit_h_14")
    assert "IMAGENET1K_V1" not in weights.__members__
    with torch.device("meta"):
        assert pretrained("torchvision/vit_h_14", download=False).image_size == 518


def test_the_image_size_is_that_of_the_chosen_weights():
    with torch.device("meta"):
        network, _, _, size, _ = pretrained("torchvision/vit_b_16/IMAGENET1K_SWAG_E2E_V1", download=False)
        assert size == 384
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.slow
@torch.no_grad()
def test_weights_of_auxiliary_heads_are_left_out(cache: Path):
    torch.manual_seed(0)
    model = torchvision.models.googlenet(init_weights=False, transform_input=True, aux_logits=True).eval()
    put(cache, "googlenet", model.state_dict())
    network = pretrained("torchvision/googlenet").network.eval()
    assert not any("aux" in name for name in network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network(images), model(images))
    assert network.train()(images.expand(2, -1, -1, -1)).shape == (2, 1000)


@pytest.mark.slow
def test_weights_under_old_names_are_renamed(cache: Path):
    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(norm|relu|conv))(\d)", r"\1.\3", name): value for name, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    put(cache, "densenet121", old)
    restored = pretrained("torchvision/densenet121").network.state_dict()
    assert all(torch.equal(restored[name], value) for name, value in state.items())


def test_without_download_the_cache_is_not_read(cache: Path):
    put(cache, NAME, {"not": torch.zeros(1)})
    torch.manual_seed(3)
    found = pretrained(f"torchvision/{NAME}", download=False)
    torch.manual_seed(3)
    assert weights_digest(found.network) == weights_digest(torchvision.models.get_model(NAME))
    assert found[1:] == (IMAGENET_MEAN, IMAGENET_STD, 224, WNIDS)
    assert architecture(f"torchvision/{NAME}", 5).classifier_layer.out_features == 5


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def refusal(source: str, match: str, **options: Any) -> str:
    """Check that the source is refused in one line, and return the message."""
    with pytest.raises(UserError, match=match) as error:
        pretrained(source, **options)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_no_connection_and_no_cache_is_one_sentence(cache: Path):
    message = refusal(
        f"torchvision/{NAME}", rf"weights of torchvision/{NAME} are not available \(URLError: .*no network"
    )
    assert f"put https://download.pytorch.org/models/{NAME}-" in message
    assert message.endswith(f"into {cache}.")


def test_damaged_hostile_and_other_files_in_the_cache_are_refused(cache: Path, tmp_path: Path):
    marker = tmp_path / "executed"
    file = put(cache, NAME, {"x": Hostile(marker)})  # type: ignore[dict-item]
    refusal(f"torchvision/{NAME}", r"are not available \(UnpicklingError")
    assert not marker.exists()
    file.write_bytes(b"half a file")
    refusal(f"torchvision/{NAME}", "are not available")
    put(cache, NAME, torchvision.models.mobilenet_v2().state_dict())
    refusal(f"torchvision/{NAME}", r"are not available \(RuntimeError: Error.* in loading state_dict")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("keras/resnet18", "keras/resnet18 does not name a known library: give torchvision/NAME or timm/NAME"),
        ("resnet18", "resnet18 does not name a known library"),
        ("torchvision/resnet19", r"there is no 'resnet19'\. Similar names are resnet18, "),
        ("torchvision/", r"there is no ''\.$"),
        ("torchvision/fcn_resnet50", r"there is no 'fcn_resnet50'\. Similar names are "),
        ("torchvision/resnet18/IMAGENET1K_V2", r"there is no 'IMAGENET1K_V2'\. Similar names are IMAGENET1K_V1"),
        ("torchvision/squeezenet1_1", "SqueezeNet does not end in one linear layer"),
    ],
)
def test_unknown_names_are_refused(source: str, match: str):
    refusal(source, match, download=False)


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty cache of Hugging Face, without a connection."""
    pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_timm(hub: Path) -> dict[str, Tensor]:
    """Write random weights under the names that timm looks for."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(6)
    state = timm.create_model(TIMM).state_dict()
    repository = hub / f"models--timm--{TIMM}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    return state


@pytest.mark.parametrize("name", [TIMM, "test_resnet"])
def test_weights_of_timm_come_from_its_cache(name: str, hub: Path):
    published = put_timm(hub)
    found = pretrained(f"timm/{name}")
    state = found.network.state_dict()
    assert list(state) == list(published)
    assert all(torch.equal(state[key], value) for key, value in published.items())
    assert found[1:] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 160, WNIDS)


def test_another_number_of_classes_replaces_only_the_classifier_of_timm(hub: Path):
    published = put_timm(hub)
    found = pretrained(f"timm/{TIMM}", 7)
    state = found.network.state_dict()
    assert state["fc.weight"].shape == (7, 96)
    kept = {name: value for name, value in published.items() if not name.startswith("fc.")}
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert found.class_names is None


def test_timm_works_without_download_and_reports_a_missing_connection(hub: Path):
    found = pretrained(f"timm/{TIMM}", download=False)
    assert found[1:] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 160, WNIDS)
    assert architecture(f"timm/{TIMM}", 5).classifier_layer.out_features == 5
    message = refusal(f"timm/{TIMM}", rf"weights of timm/{TIMM} are not available \(")
    assert "HF_HOME" in message


def test_only_weights_for_imagenets_1000_classes_have_class_names():
    pytest.importorskip("timm")
    with torch.device("meta"):
        found = pretrained("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", download=False)
        assert found.class_names == WNIDS
        found = pretrained("timm/vit_tiny_patch16_224.augreg_in21k", download=False)
        assert found.network.classifier_layer.out_features == 21843
        assert found.class_names is None
        assert pretrained("timm/vit_tiny_patch16_224.augreg_in21k", 1000, download=False).class_names is None


@pytest.mark.parametrize(
    ("source", "match", "download"),
    [
        ("timm/resnet19", r"there is no 'resnet19'\. Similar names are resnet18", False),
        ("timm/resnet18.a9_in1k", r"there is no 'resnet18\.a9_in1k'\. Similar names are resnet18\.a", False),
        ("timm/hf-hub:somebody/something", "there is no 'hf-hub:somebody/something'", False),
        ("timm/local-dir:/somewhere", "there is no 'local-dir:/somewhere'", False),
        ("timm/coatnet_0_224", "timm has no weights for coatnet_0_224", True),
        ("timm/crossvit_9_240", "CrossVit does not end in one linear layer", False),
    ],
)
def test_unknown_names_of_timm_are_refused(source: str, match: str, download: bool):
    pytest.importorskip("timm")
    refusal(source, match, download=download)


def test_missing_timm_is_reported_before_any_other_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refusal("timm/anything", "needs the package timm: pip install timm")
    assert sources.LIBRARIES == ("torchvision", "timm")
