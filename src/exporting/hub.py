"""`format=hub`: write a student as a folder for the Hugging Face Hub, and load such a folder, without the internet.

The folder holds the weights, a configuration and a card. timm writes and loads the students that are networks of timm.
All other students load in this project. The keys of the configuration are timm's, with one more: `network`, the node
that makes a network of this project.
"""

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from src.common.errors import UserError
from src.common.files import write_text
from src.config.instantiate import bind_keys
from src.exporting.checking import Check, compare, predict_in_batches, refuse_mismatch
from src.exporting.forms import Classifier, Form, import_extra
from src.exporting.hub_card import readme
from src.models.timm_networks import TimmNetwork
from src.runs.result import Result, describe_damage
from src.setup.networks import make_network
from src.setup.reopen import Opened, find_targets, is_trusted
from src.training.distiller import Distiller

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
ORIGIN = ("tag", "license", "description", "notes", "origin_url", "paper_name", "paper_ids")
"""Keys by which timm describes the published weights of an architecture. They do not describe the student."""
LARGEST_SIDE = 4096
"""Pixels. A configuration that asks for larger images is refused."""


class Preprocessing(BaseModel):
    """How a picture becomes the network's input, under timm's names."""

    input_size: tuple[Literal[3], PositiveInt, PositiveInt]
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    crop_pct: Annotated[float, Field(gt=0, le=1)]

    @property
    def resize(self) -> tuple[int, int]:
        """Height and width that a resized picture covers before its centre is cut out, computed as timm does."""
        _, height, width = self.input_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    @pydantic.model_validator(mode="after")
    def _check_size(self) -> "Preprocessing":
        if max(self.resize) > LARGEST_SIDE:
            raise ValueError(f"images of more than {LARGEST_SIDE} pixels are not supported")
        return self


class HubConfig(BaseModel):
    """The keys of `config.json` that this project reads. timm reads more of them."""

    label_names: Annotated[list[str], Field(min_length=1)]
    pretrained_cfg: Preprocessing
    network: dict[str, Any] | None = None
    """The node of a network of this project. None for a network of timm."""


class HubStudent(NamedTuple):
    """A student that was loaded from a folder."""

    classifier: Classifier
    class_names: list[str]
    image_size: tuple[int, int]
    """Height and width of the network's input."""
    resize: tuple[int, int]
    """Height and width that a resized picture covers before its centre is cut out."""


def refuse_unfit(distiller: Distiller) -> None:
    """Raise `UserError` if the student does not predict alone, or if a package is missing."""
    if not distiller.predicts_alone:
        raise UserError(
            "format=hub holds the student alone, but this method's student predicts through parts of the method: use "
            "format=onnx."
        )
    for package in ("timm", "huggingface_hub", "safetensors"):
        import_extra(package, "hub")


def export_folder(
    opened: Opened,
    network: Classifier,
    folder: Path,
    metadata: dict[str, Any],
    result: Result | None,
    images: Tensor,
    target: Tensor,
) -> Check:
    """Write the three files of the folder, and compare the student that loads from them with `network`.

    `metadata` is that of `describe`, `result` that of the run, if there is one. `images` [N, 3, H, W] have the classes
    `target` [N]. Raises `UserError` if the logits disagree. In this case the folder stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".hub-") as name:
        staged = Path(name)
        write_network(network, opened.cfg.model.student, staged, metadata)
        exported = predict_in_batches(load_hub_folder(staged).classifier, images)
        check = compare(predict_in_batches(network, images), exported, target)
        refuse_mismatch(check, Form("hub", "float32"))
        write_text(staged / CARD, readme(staged / WEIGHTS, opened, metadata, result, check))
        (staged / WEIGHTS).chmod((staged / CONFIG).stat().st_mode)  # safetensors makes it private
        folder.mkdir(exist_ok=True)
        for file in (WEIGHTS, CONFIG, CARD):
            (staged / file).replace(folder / file)
    return check


def write_network(network: Classifier, node: DictConfig, folder: Path, metadata: dict[str, Any]) -> None:
    """Write weights and configuration. `node` describes a network of this project."""
    names, preprocessing = metadata["class_names"], preprocessing_of(metadata)
    if isinstance(network.network, TimmNetwork):
        model: Any = network.network.model
        origin = {key: None for key in ORIGIN if key in model.pretrained_cfg}
        import_extra("timm", "hub").models.save_for_hf(
            model,
            folder,
            model_config={"label_names": names, "pretrained_cfg": origin},
            data_config=preprocessing,
            safe_serialization=True,
        )
        return
    tensors = {name: value.clone() for name, value in network.network.state_dict().items()}
    import_extra("safetensors.torch", "hub").save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "architecture": metadata["network"],
        "num_classes": len(names),
        "label_names": names,
        "network": _network_options(node),
        "pretrained_cfg": preprocessing,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2))


def preprocessing_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """Describe the preprocessing under timm's names.

    `crop_pct` is the share of the resized picture that is cut out. timm computes the size of that picture from it.
    """
    size, resize = metadata["image_size"], metadata["resize"]
    share = size[0] / resize[0]
    if math.floor(size[0] / share) < resize[0]:  # both divisions were rounded
        share = math.nextafter(share, 0)
    return {
        "input_size": [3, *size],
        "interpolation": "bilinear",
        "crop_pct": share,
        "crop_mode": "center",
        "mean": metadata["mean"],
        "std": metadata["std"],
    }


def _network_options(node: DictConfig) -> dict[str, Any]:
    """Return the target of a network's node and its arguments, without the keys that only describe it."""
    container: Any = OmegaConf.to_container(node, resolve=True)
    options = bind_keys(node, "model.student", {"num_classes"}).keywords
    return {key: value for key, value in container.items() if key == "_target_" or key in options}


def load_hub_folder(folder: str | Path) -> HubStudent:
    """Load the student in a folder that `format=hub` wrote. No code in the folder is executed.

    The classifier maps uint8 images [B, 3, H, W] to logits [B, C]. Raises `UserError` if a file is missing or damaged,
    or if the configuration names a target that `conf/` does not name.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: give a folder that src.export wrote with format=hub.")
    try:
        config = HubConfig.model_validate_json((folder / CONFIG).read_bytes())
    except pydantic.ValidationError as error:
        raise UserError(f"{folder / CONFIG} {describe_damage(error)}: export the student again.") from None
    network = _load_timm_network(folder) if config.network is None else _load_own_network(folder, config)
    preprocessing = config.pretrained_cfg
    classifier = Classifier(network, preprocessing.mean, preprocessing.std)
    return HubStudent(classifier, config.label_names, preprocessing.input_size[1:], preprocessing.resize)


def _load_timm_network(folder: Path) -> nn.Module:
    timm = import_extra("timm", "hub")
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # damaged weights, or an architecture that this version of timm lacks
        raise _not_loaded(folder, error) from error
    return network


def _load_own_network(folder: Path, config: HubConfig) -> nn.Module:
    for target in find_targets(config.network):
        if not is_trusted(str(target)):
            raise UserError(
                f"{folder / CONFIG} would call {target}, which no file in conf/ names: add a network that you trust to "
                "conf/network/."
            )
    safetensors = import_extra("safetensors.torch", "hub")
    try:
        network = make_network(OmegaConf.create(config.network), "network", len(config.label_names))
        network.load_state_dict(safetensors.load_file(folder / WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # damaged weights, or a node that does not make their network
        raise _not_loaded(folder, error) from error
    return network


def _not_loaded(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder} cannot be loaded ({type(error).__name__}: {reason}): export the student again.")
