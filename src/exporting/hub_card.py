"""The README.md of a folder for the Hugging Face Hub: the model card, after a block of metadata that the Hub reads.

The fields are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from src.exporting.card import model_card
from src.exporting.checking import Check
from src.exporting.forms import Form, import_extra
from src.models.timm_networks import TimmNetwork
from src.runs.result import Result
from src.setup.reopen import Opened

DATASETS = {
    ("cifar10", 10): "uoft-cs/cifar10",
    ("cifar100", 100): "uoft-cs/cifar100",
    ("imagenet", 1000): "ILSVRC/imagenet-1k",
}
"""Names on the Hub of known data sets, by name and number of classes. A folder of the user's may have the same name."""

TIMM_LINES = """
```python
import timm

student = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
```

`transform` makes the input of a Pillow image. `pretrained=True` is necessary: without it, the
weights are random. `hf-hub:USER/NAME` instead of `local-dir:FOLDER` downloads the weights.
"""
OWN_LINES = """
```python
from src.exporting.hub import load_hub_folder

student = load_hub_folder("FOLDER").classifier
```

`student` maps uint8 images [batch, 3, height, width] to logits, with the normalisation inside. The
code is that of the project AEKT.
"""
FOLDER_LINES = """
`FOLDER` is a copy of this repository: `hf download USER/NAME --local-dir FOLDER`. With the project
AEKT installed, this command classifies pictures:

    python -m src.predict FOLDER image.png

## Licence

No licence is stated yet. To state one, add `license: NAME` to the metadata at the top of this file.
"""


class Score(NamedTuple):
    """A measured score of the student."""

    split: str
    kind: str
    """The name of the metric on the Hub, if the Hub knows it."""
    name: str
    value: float


def readme(file: Path, opened: Opened, metadata: Mapping[str, Any], result: Result | None, check: Check) -> str:
    """Write the README.md beside the weights in `file`."""
    published = _published(opened, metadata)
    usage = (TIMM_LINES if _is_timm(opened) else OWN_LINES) + FOLDER_LINES
    if published:
        licence = published.get("license", "not stated by timm")
        usage += f"The student was trained from the weights {metadata['initial_weights']} (licence: {licence}).\n"
    data = card_data(opened, metadata, result, check)
    text = model_card(file, Form("safetensors", "float32"), metadata, check, usage)
    return str(import_extra("huggingface_hub", "hub").ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def card_data(opened: Opened, metadata: Mapping[str, Any], result: Result | None, check: Check) -> Any:
    """Make the metadata, a `ModelCardData`. The licence is left to the user."""
    hub = import_extra("huggingface_hub", "hub")
    name, is_timm = metadata["data"]["name"], _is_timm(opened)
    known = None if opened.cfg.data.get("path") else DATASETS.get((name, len(metadata["class_names"])))
    published = _published(opened, metadata)
    teacher_tags = ["knowledge-distillation"] if metadata["teacher"] else []
    results = [
        hub.EvalResult(
            task_type="image-classification",
            dataset_type=known or name,
            dataset_name=name,
            dataset_split=score.split,
            metric_type=score.kind,
            metric_name=score.name,
            metric_value=round(score.value, 5),
        )
        for score in scores(result, check)
    ]
    return hub.ModelCardData(
        pipeline_tag="image-classification",
        library_name="timm" if is_timm else "aekt",
        tags=["image-classification", *(["timm"] if is_timm else []), *teacher_tags],
        base_model=published.get("hf_hub_id") if published else None,
        datasets=[known] if known else None,
        metrics=["accuracy"],
        model_name=f"{metadata['network']} for {name}",
        eval_results=results,
    )


def scores(result: Result | None, check: Check) -> Iterator[Score]:
    """List the scores in a run's result, which are those of its last weights.

    Without a result, the only score is the accuracy that the export measured.
    """
    if result is None:
        yield Score("test", "accuracy", f"Top-1 accuracy on {check.images:,} test images", check.accuracy)
        return
    for split, metrics in (("test", result.test), ("validation", result.val)):
        if metrics is None:
            continue
        yield Score(split, "accuracy", f"Top-1 accuracy ({result.end})", metrics.accuracy)
        if len(result.class_names) > 5:
            yield Score(split, "top_5_accuracy", f"Top-5 accuracy ({result.end})", metrics.top5)
        yield Score(split, "nll", f"Negative log-likelihood in nats ({result.end})", metrics.nll)
        yield Score(split, "ece", f"Expected calibration error ({result.end})", metrics.ece)
        if metrics.agreement is not None:
            yield Score(split, "agreement", f"Same top-1 class as the teacher ({result.end})", metrics.agreement)


def _is_timm(opened: Opened) -> bool:
    return isinstance(opened.distiller.student, TimmNetwork)


def _published(opened: Opened, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return timm's description of the published weights that the student started from, if it started from any."""
    student: Any = opened.distiller.student
    started = str(metadata["initial_weights"]).startswith("timm/") and _is_timm(opened)
    return dict(student.model.pretrained_cfg) if started else None
