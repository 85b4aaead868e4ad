"""The computations of a run that a GPU makes, small enough for a test.

`python -m tests.helpers.workloads` lists the aten operators of all of them. results/operators.md is its output.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor

from src.common.metrics import Agreement, evaluation_metrics
from src.data.image_data import Samples
from src.data.views import crop_and_flip, draw_views, epoch_order, normalise
from src.methods.fitnet import FitNet
from src.methods.method import DistillationLogits, LogitPair, Method, Networks, View, weighted
from src.models.network import Output
from src.models.preactivations import forward_features
from src.training.gradient_anatomy import anatomy
from src.training.serialization import NoSerialization, Parallel, Serial, Serialization
from src.training.standardization import standardize
from tests.helpers.configure import CONF, options
from tests.helpers.losses import observed, three_logits
from tests.helpers.methods import (
    FAMILY,
    STEPS,
    Pair,
    changed_batch,
    configured,
    leaves,
    method_of,
    name_of_pair,
    some_images,
    taught_by,
)
from tests.helpers.operators import CHECKED, record
from tests.helpers.tiny import CLASSES, MEAN, STD, kd, tiny_data

Work = Callable[[], object]
NETWORKS = options("network")
CASES = {f"{case}-{name_of_pair(pair)}": (case, pair) for case, steps in STEPS.items() for pair in steps.pairs}
"""Every method in its variants, with each pair that it supports."""


def image_size(method: Method) -> int:
    """Return a size in pixels at which maps of both networks often do not divide each other, such as 7 and 8.

    FitNet refuses such maps.
    """
    return 16 if isinstance(method, FitNet) else 30


LAST_EPOCH = 239


def network_work(name: str) -> Work:
    """Prepare a training step of a network of `conf/network` that reads all of its outputs, and an evaluation."""
    config: Any = OmegaConf.load(CONF / "network" / f"{name}.yaml")
    network = hydra.utils.get_method(config._target_)(CLASSES)
    size = 64 if name.startswith("imagenet/") else 16
    images = normalise(some_images(2, size), MEAN, STD).to(memory_format=torch.channels_last)
    network.to(memory_format=torch.channels_last)

    def work() -> None:
        output = forward_features(network.train(), images, preactivations=True)
        torch.stack([value.mean() for value in _tensors(output)]).sum().backward()
        with torch.inference_mode():
            network.eval()(images)

    return work


def _tensors(output: Output) -> Iterable[Tensor]:
    unpooled = [] if output.unpooled is None else [output.unpooled]
    return [output.logits, output.pooled, *output.features, *output.preactivations, *unpooled]


def made_for_work(case: str) -> Any:
    """Make the method of a case of `STEPS` with its published weights."""
    changed = {name: value for name, value in STEPS[case].options.items() if name != "cross_entropy_weight"}
    return configured(method_of(case), **changed)


def method_work(
    method: Method, pair: Pair, serialization: Serialization | None = None, *, standardized: bool = False
) -> Work:
    """Prepare all terms and gradients of a method and of its stages, for given outputs of both networks.

    The networks themselves are no part of it, unless the method runs one.
    """
    new_teacher, new_student = pair
    student, teacher, layer = new_student(CLASSES), taught_by(new_teacher), serialization or NoSerialization()
    size, labels = image_size(method), torch.arange(12) % CLASSES
    method.allocate(Networks(student, teacher, (3, size, size), labels, partial(new_student, CLASSES)))
    layer.allocate(student)
    batch = changed_batch(student, teacher, size=size)
    leaves(batch.student)
    adjust = standardize if standardized else torch.nn.Identity()

    def logits_of(view: View) -> LogitPair:
        assert view.teacher is not None
        return LogitPair(adjust(layer(view.student.logits, view.student.pooled)), adjust(view.teacher.logits))

    def work() -> None:
        for part in (*(stage.method for stage in method.stages()), method):
            logits = DistillationLogits(tuple(logits_of(view) for view in batch.views))
            terms = weighted(part.all_terms(batch, logits), part.weights(LAST_EPOCH))
            part.backward(torch.stack(list(terms.values())).sum(), terms)

    return work


def evaluation_work() -> Work:
    """Prepare the metrics of an evaluation, with the agreement with the teacher."""
    logits, _, _, target = three_logits(torch.float32)
    logits = logits.detach()
    metrics, agreement = evaluation_metrics(10), Agreement()

    def work() -> None:
        for _ in range(2):
            metrics.update(logits, target)
            agreement.update(logits, target)
        metrics.compute()
        agreement.compute()
        metrics.reset()
        agreement.reset()

    return work


def data_work(folder: Path) -> Work:
    """Prepare the order of the images of an epoch, their views, and their normalisation."""
    data, images, index = tiny_data(folder, views=2), some_images(), torch.arange(4)

    def work() -> None:
        epoch_order(0, 1, 12)
        epoch_order(0, 1, 12, blocks=torch.arange(12) // 3)
        views = crop_and_flip(images, draw_views(index, seed=0, epoch=1, padding=2, flip=True), padding=2)
        for view in (views, views.contiguous()):
            normalise(view, MEAN, STD)
            normalise(view, torch.tensor(MEAN), torch.tensor(STD))
        data.augment(Samples((images,), index, index, (index,)), epoch=1)

    return work


def gradients_work() -> Work:
    """Prepare the measurement of the gradients of two terms."""
    own, distilled, teacher, target = three_logits(torch.float32)
    batch, logits = observed(distilled, teacher, target, own=own)
    method = kd()
    return lambda: anatomy(weighted(method.all_terms(batch, logits), method.weights(0)), batch, logits, 4.0)


def layers_work() -> Work:
    """Prepare both serialization layers and standardization, with their gradients."""
    student = FAMILY[1](CLASSES)
    layers = (Serial(lr_scale=0.1), Parallel(lr_scale=1.0))
    for layer in layers:
        layer.allocate(student)
    logits = torch.randn(4, CLASSES, requires_grad=True)
    pooled = torch.randn(4, student.classifier_layer.in_features, requires_grad=True)

    def work() -> None:
        for layer in layers:
            standardize(layer(logits, pooled)).square().sum().backward()

    return work


def operators_of_all(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Record the operators of all methods, networks and further parts of a run, by name."""
    methods: dict[str, set[str]] = {}
    for case, pair in CASES.values():
        used = record(method_work(made_for_work(case), pair)).operators
        methods[method_of(case)] = methods.get(method_of(case), set()) | used
    others = {
        "layers": layers_work(), "metrics": evaluation_work(), "data": data_work(folder), "gradients": gradients_work(),
    }  # fmt: skip
    return {
        "methods": methods,
        "networks": {name: record(network_work(name)).operators for name in NETWORKS},
        "others": {name: record(work).operators for name, work in others.items()},
    }


def _users(recorded: Mapping[str, set[str]], operator: str) -> str:
    """Name the users of an operator, or count them if there are many."""
    users = [name for name, used in recorded.items() if operator in used]
    if len(users) == len(recorded):
        return "all"
    return ", ".join(users) if len(users) <= 3 else f"{len(users)} of {len(recorded)}"


def listing(recorded: Mapping[str, Mapping[str, set[str]]]) -> str:
    """Format the operators as Markdown: a table of their users, and the reasons why some are deterministic."""
    operators = sorted({operator for group in recorded.values() for used in group.values() for operator in used})
    rows = [" | ".join((f"`{name}`", *(_users(group, name) for group in recorded.values()))) for name in operators]
    reasons = [
        f"- {', '.join(f'`{name}`' for name in names if name in operators)}: {reason}."
        for names, reason in CHECKED.items()
        if set(names) & set(operators)
    ]
    return "\n".join([HEAD, *(f"| {row} |" for row in rows), "", REASONS, *reasons])


HEAD = f"""# Operators of a run

Made by `python -m tests.helpers.workloads > results/operators.md`, with torch {torch.__version__.split("+")[0]}.

These are the aten operators that methods, networks, metrics and the data path call on the device, in
forward and backward passes. None of them raises an error or is non-deterministic on CUDA under
`trainer.deterministic=true`. tests/training/test_cuda_operators.py checks this for the installed torch.

The operators were recorded on a CPU. On CUDA, cuDNN's operators replace those of batch norm. "Others"
are serialization and standardization (layers), metrics, views and normalisation of images (data), and
the measurement of gradients.

| operator | methods | networks | others |
|---|---|---|---|"""
REASONS = """## Operators that look doubtful

These are deterministic on CUDA under `trainer.deterministic=true`:
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(listing(operators_of_all(Path(temporary))))
