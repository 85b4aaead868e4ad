"""The card of a folder for the Hub: its metadata has the Hub's fields, and its scores are those of the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from src.exporting.checking import Check, compare
from src.exporting.hub_card import Score, readme, scores
from src.methods.vanilla import Vanilla
from src.models.resnet import resnet8
from src.models.sources import architecture
from src.runs.result import Metrics, Parameters, Result
from src.setup.reopen import Opened
from tests.helpers.exports import METADATA
from tests.helpers.tiny import CLASSES, tiny_data, tiny_distiller

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("timm")

TEACHER = {"name": "resnet20", "accuracy": 0.75, "sha256": "1" * 64}
TRAINED = {
    **METADATA, "method": "kd", "serialization": "none", "teacher": TEACHER, "seed": 3, "epochs": 2, "train_images": 44,
}  # fmt: skip
SPECIFICATION = {
    "task": {"type", "name"},
    "dataset": {"type", "name", "config", "split", "revision", "args"},
    "metrics": {"type", "value", "name", "config", "args", "verified"},
}
"""The fields of a result of the model-index in https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""


def check() -> Check:
    logits = torch.eye(CLASSES)
    return compare(logits, logits, torch.tensor([0, 1, 2, 2]))


def result_of(classes: int, **values: Any) -> Result:
    defaults: dict[str, Any] = {
        "test": Metrics(accuracy=0.5, top5=0.75, nll=1.25, ece=0.125, agreement=0.25), "best_epoch": None,
        "seconds": 1.0, "parameters": Parameters(student=1, teacher=None, training_only=0), "data": "tiny",
        "method": "kd", "serialization": "none", "teacher": None, "student": "resnet8", "seed": 3, "epochs": 2,
        "train_images": 44, "class_names": [str(number) for number in range(classes)], "settings": {},
    }  # fmt: skip
    return Result(**{**defaults, **values})


def card_of(
    tmp_path: Path, metadata: dict[str, Any], result: Result | None = None, network: Any = None, **data: Any
) -> tuple[dict[str, Any], str]:
    """Write a card, and return its metadata and its text as a plain reader of YAML finds them."""
    (tmp_path / "model.safetensors").write_bytes(b"content")
    distiller = tiny_distiller(tiny_data(tmp_path), Vanilla(), new_student=network or resnet8)
    opened = Opened(OmegaConf.create({"data": {"path": None, **data}}), distiller, tiny_data(tmp_path))
    text = readme(tmp_path / "model.safetensors", opened, metadata, result, check())
    (tmp_path / "README.md").write_text(text)
    assert text.startswith("---\n")
    _, block, body = text.split("---\n", 2)
    return yaml.safe_load(block), body


def test_the_metadata_has_the_fields_that_the_hub_documents(tmp_path: Path) -> None:
    block, body = card_of(tmp_path, {**TRAINED, "test": {"accuracy": 0.5}}, result_of(CLASSES))
    assert block["library_name"] == "aekt"
    assert block["pipeline_tag"] == "image-classification"
    assert block["tags"] == ["image-classification", "knowledge-distillation"]
    assert block["metrics"] == ["accuracy"]
    assert block.keys() == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}  # no licence, no data set
    (model,) = block["model-index"]
    assert model["name"] == "resnet8 for tiny"
    (found,) = model["results"]
    assert found["task"] == {"type": "image-classification"}
    assert found["dataset"] == {"name": "tiny", "type": "tiny", "split": "test"}
    for part, fields in SPECIFICATION.items():
        for each in found[part] if part == "metrics" else [found[part]]:
            assert each.keys() <= fields
    assert [(metric["type"], metric["value"]) for metric in found["metrics"]] == [
        ("accuracy", 0.5), ("nll", 1.25), ("ece", 0.125), ("agreement", 0.25),
    ]  # fmt: skip
    assert found["metrics"][0]["name"] == "Top-1 accuracy (the last epoch)"
    assert "| trained by | kd, serialization none, seed 3, 2 epochs of 44 images |" in body
    assert "No licence is stated yet" in body


def test_the_library_of_the_hub_reads_the_same(tmp_path: Path) -> None:
    card_of(tmp_path, TRAINED, result_of(CLASSES, val=Metrics(accuracy=0.4, top5=1.0, nll=2.0, ece=0.2)))
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "resnet8 for tiny"
    assert {(each.dataset_split, each.metric_type): each.metric_value for each in data.eval_results} == {
        ("test", "accuracy"): 0.5, ("test", "nll"): 1.25, ("test", "ece"): 0.125, ("test", "agreement"): 0.25,
        ("validation", "accuracy"): 0.4, ("validation", "nll"): 2.0, ("validation", "ece"): 0.2,
    }  # fmt: skip


def test_top_5_is_a_score_of_more_than_five_classes() -> None:
    assert "top_5_accuracy" not in [score.kind for score in scores(result_of(5), check())]
    assert Score("test", "top_5_accuracy", "Top-5 accuracy (the last epoch)", 0.75) in scores(result_of(6), check())


def test_a_run_that_ended_early_says_so() -> None:
    first, *_ = scores(result_of(4, epochs_wanted=9), check())
    assert first.name == "Top-1 accuracy (epoch 2 of 9, in which a callback ended the run)"


def test_without_a_run_the_score_is_what_the_export_measured(tmp_path: Path) -> None:
    block, _ = card_of(tmp_path, METADATA)
    (found,) = block["model-index"][0]["results"]
    assert found["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "Top-1 accuracy on 4 test images"}]
    assert block["tags"] == ["image-classification"]


@pytest.mark.parametrize(
    ("name", "classes", "path", "expected"),
    [
        ("cifar10", 10, None, "uoft-cs/cifar10"),
        ("cifar10", 10, "mine.npz", None),
        ("cifar10", 4, None, None),
        ("birds", 10, None, None),
    ],
)
def test_only_a_known_data_set_is_named(
    name: str, classes: int, path: str | None, expected: str | None, tmp_path: Path
) -> None:
    metadata = {**TRAINED, "data": {"name": name, "digest": "1"}, "class_names": ["x"] * classes}
    block, _ = card_of(tmp_path, metadata, path=path)
    assert block.get("datasets") == ([expected] if expected else None)
    dataset = block["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": name, "type": expected or name, "split": "test"}


@pytest.mark.parametrize("started", ["timm/mobilenetv3_small_050.lamb_in1k", None])
def test_published_weights_are_named_with_their_licence(started: str | None, tmp_path: Path) -> None:
    def network(classes: int) -> Any:
        return architecture("timm/mobilenetv3_small_050.lamb_in1k", classes)

    block, body = card_of(tmp_path, {**TRAINED, "initial_weights": started}, network=network)
    assert block["library_name"] == "timm"
    assert "timm" in block["tags"]
    assert block.get("base_model") == started
    assert ("licence: apache-2.0" in body) == bool(started)
    assert ("| initial weights | those of timm/mobilenetv3_small_050.lamb_in1k |" in body) == bool(started)
    assert "license" not in block


def test_names_cannot_act_as_markup_template_or_metadata(tmp_path: Path) -> None:
    names = ["{{ 1 / 0 }}", "{% x", "a\n---\nlicense: mit\n---", "<b>"]
    metadata = {**TRAINED, "class_names": names, "network": "x: [\n---", "data": {"name": "a: {b}", "digest": "1"}}
    block, body = card_of(tmp_path, metadata)
    assert "license" not in block
    assert block["model-index"][0]["results"][0]["dataset"]["name"] == "a: {b}"
    assert "{{ 1 / 0 }}, {% x, a --- license: mit ---, &lt;b>" in body
