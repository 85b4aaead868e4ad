"""Networks of libraries with their published weights, and what those networks have to be fed."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models
from torch import Tensor

from src.data.imagenet import WNIDS
from src.errors import UserError
from src.files import by_one_process
from src.models.network import Network
from src.models.timm_networks import TimmNetwork, import_timm
from src.models.torchvision_networks import TorchvisionNetwork

LIBRARIES = ("torchvision", "timm")


class Pretrained(NamedTuple):
    """A network, and how it was trained."""

    network: Network
    """With the published weights, or fresh ones where nothing was to be downloaded."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """In pixels, of its preprocessing's final crop."""
    class_names: tuple[str, ...] | None
    """ImageNet's wnids in the order of its logits where it has those 1000 classes."""


def pretrained(source: str, num_classes: int | None = None, *, download: bool = True) -> Pretrained:
    """A library's network: `torchvision/NAME` (weights IMAGENET1K_V1 where it has those; `torchvision/NAME/WEIGHTS`
    chooses others) or `timm/NAME` (NAME may carry a tag of weights).

    `num_classes` None keeps its own classifier; a number that differs from its own gives it a fresh one. Weights come
    from the library's own cache or, once, from the network; no code in them is executed. `download=False` touches
    neither: the weights are fresh. Raises `UserError` where a name is unknown, timm is missing, the weights cannot be
    had, or the network does not end in a linear layer.
    """
    library, _, name = source.partition("/")
    if library not in LIBRARIES:
        raise UserError(f"{source} is of no known library: give torchvision/NAME or timm/NAME.")
    return (_torchvision if library == "torchvision" else _timm)(source, name, num_classes, download)


def architecture(source: str, num_classes: int) -> Network:
    """The network of a source with fresh weights."""
    return pretrained(source, num_classes, download=False).network


def _torchvision(source: str, name: str, num_classes: int | None, download: bool) -> Pretrained:
    name, _, variant = name.partition("/")
    _check_known(source, name, torchvision.models.list_models(module=torchvision.models))
    choices = torchvision.models.get_model_weights(name)
    if variant:
        _check_known(source, variant, list(choices.__members__))
    weights = choices[variant] if variant else choices.__members__.get("IMAGENET1K_V1", choices.DEFAULT)
    own = len(weights.meta["categories"])
    options: dict[str, Any] = {"num_classes": num_classes or own}
    if name.startswith("vit_"):
        options["image_size"] = weights.meta["min_size"][0]
    if name in ("googlenet", "inception_v3"):  # trained on images of another normalisation, beside helpers
        options |= {"transform_input": True, "aux_logits": False, "init_weights": not download}
    network = TorchvisionNetwork(torchvision.models.get_model(name, **options))
    if download:
        try:
            with by_one_process(Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name):
                state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            network.load_state_dict(_fitted(network, state, own))
        except Exception as error:  # no connection, another hash, a damaged file in the cache
            place = f"put {weights.url} into {torch.hub.get_dir()}/checkpoints"
            raise _not_had(source, error, place) from error
    preprocessing = weights.transforms()
    names = _class_names(own, num_classes)
    size = preprocessing.crop_size[0]
    return Pretrained(network, tuple(preprocessing.mean), tuple(preprocessing.std), size, names)


def _fitted(network: TorchvisionNetwork, state: dict[str, Tensor], own: int) -> dict[str, Tensor]:
    """Published weights under the network's names; its own, fresh classifier where the number of classes differs."""
    fitted = {}
    for name, value in state.items():
        if not name.startswith(("aux1.", "aux2.", "AuxLogits.")):
            # DenseNet's files are older than its names: denselayer1.norm.1.weight
            fitted[re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2", name)] = value
    if network.classifier_layer.out_features != own:
        head = f"{network.classifier_name}."
        fitted |= {name: value for name, value in network.state_dict().items() if name.startswith(head)}
    return fitted


def _timm(source: str, name: str, num_classes: int | None, download: bool) -> Pretrained:
    timm = import_timm()
    base, _, tag = name.partition(".")
    _check_known(source, base, timm.list_models())
    if tag:
        _check_known(source, name, timm.list_models(f"{base}.*", pretrained=True))
    if download and not timm.is_model_pretrained(name):
        raise UserError(f"{source}: timm has no weights for {name}, choose one that timm.list_pretrained() names.")
    try:
        model = timm.create_model(name, pretrained=download, num_classes=num_classes)
    except Exception as error:  # no connection, or a damaged file in the cache
        if not download:
            raise
        place = "load it once where there is a connection, and bring the Hugging Face cache (HF_HOME)"
        raise _not_had(source, error, place) from error
    network = TimmNetwork(model)
    preprocessing = timm.data.resolve_model_data_config(model)
    names = _class_names(model.pretrained_cfg["num_classes"], num_classes)
    size = preprocessing["input_size"][-1]
    return Pretrained(network, tuple(preprocessing["mean"]), tuple(preprocessing["std"]), size, names)


def _class_names(own: int, num_classes: int | None) -> tuple[str, ...] | None:
    return WNIDS if own == len(WNIDS) and num_classes in (None, own) else None


def _check_known(source: str, name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    near = ", ".join(difflib.get_close_matches(name, names, n=5))
    raise UserError(f"{source}: there is no {name!r}" + (f", near it are {near}." if near else "."))


def _not_had(source: str, error: Exception, place: str) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"The weights of {source} cannot be had ({type(error).__name__}: {reason}): {place}.")
