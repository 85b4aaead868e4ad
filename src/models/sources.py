"""Networks of torchvision and timm, with their published weights and the preprocessing that the weights need."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models
from torch import Tensor

from src.common.errors import UserError
from src.common.files import one_process_at_a_time
from src.data.imagenet import WNIDS
from src.models.network import Network
from src.models.timm_networks import TimmNetwork, import_timm
from src.models.torchvision_networks import TorchvisionNetwork

LIBRARIES = ("torchvision", "timm")


class Pretrained(NamedTuple):
    """A network, and the preprocessing and classes that it was trained with."""

    network: Network
    """With the published weights, or with fresh weights if `download` was False."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """Size of the final crop of its preprocessing, in pixels."""
    class_names: tuple[str, ...] | None
    """The wnids of ImageNet's 1000 classes, in the order of the logits. None if the network has other classes."""


def pretrained(source: str, num_classes: int | None = None, *, download: bool = True) -> Pretrained:
    """Make a library's network with its published weights.

    `source` is one of:

    - `torchvision/NAME`: the weights are IMAGENET1K_V1, or the library's default if these do not exist.
    - `torchvision/NAME/WEIGHTS` chooses the weights.
    - `timm/NAME`: NAME may contain a tag that chooses the weights.

    If `num_classes` is None, the network keeps its own classifier. If the number differs from its own, the network gets
    a fresh classifier. Weights come from the library's cache, or are downloaded once. No code in them is executed. With
    `download=False` the weights are fresh, and neither cache nor internet is used.

    Raises `UserError` if a name is unknown, timm is missing, the weights are not available, or the network does not end
    in a linear layer.

    >>> pretrained("torchvision/mobilenet_v3_small", 10, download=False).image_size
    224
    """
    library, _, name = source.partition("/")
    if library not in LIBRARIES:
        raise UserError(f"{source} does not name a known library: give torchvision/NAME or timm/NAME.")
    return (_torchvision if library == "torchvision" else _timm)(source, name, num_classes, download)


def architecture(source: str, num_classes: int) -> Network:
    """Make the network of a source with fresh weights (see `pretrained`)."""
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
    if name in ("googlenet", "inception_v3"):  # trained with another normalisation and with auxiliary heads
        options |= {"transform_input": True, "aux_logits": False, "init_weights": not download}
    network = TorchvisionNetwork(torchvision.models.get_model(name, **options))
    if download:
        try:
            with one_process_at_a_time(Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name):
                state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            network.load_state_dict(_fitted(network, state, own))
        except Exception as error:  # no connection, a wrong hash, or a damaged file in the cache
            advice = f"put {weights.url} into {torch.hub.get_dir()}/checkpoints"
            raise _not_available(source, error, advice) from error
    preprocessing = weights.transforms()
    names = _class_names(own, num_classes)
    size = preprocessing.crop_size[0]
    return Pretrained(network, tuple(preprocessing.mean), tuple(preprocessing.std), size, names)


def _fitted(network: TorchvisionNetwork, state: dict[str, Tensor], own: int) -> dict[str, Tensor]:
    """Rename published weights to the network's names, and drop the weights of auxiliary heads.

    If the number of classes differs, the classifier keeps the network's own fresh weights.
    """
    fitted = {}
    for name, value in state.items():
        if not name.startswith(("aux1.", "aux2.", "AuxLogits.")):
            # The files of DenseNet have names of an older version, such as denselayer1.norm.1.weight.
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
        raise UserError(f"{source}: timm has no weights for {name}. Choose a name of timm.list_pretrained().")
    try:
        model = timm.create_model(name, pretrained=download, num_classes=num_classes)
    except Exception as error:  # no connection, or a damaged file in the cache
        if not download:
            raise
        advice = "load them once on a machine with a connection, and copy its Hugging Face cache (HF_HOME)"
        raise _not_available(source, error, advice) from error
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
    similar = ", ".join(difflib.get_close_matches(name, names, n=5))
    raise UserError(f"{source}: there is no {name!r}." + (f" Similar names are {similar}." if similar else ""))


def _not_available(source: str, error: Exception, advice: str) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"The weights of {source} are not available ({type(error).__name__}: {reason}): {advice}.")
