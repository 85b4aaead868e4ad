"""Methods as `conf/method` configures them, small pairs of networks for them, and the registry of the step tests.

A new method is entered in `STEPS` under its name in `conf/method`, or "name, variant".
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import src.config.resolvers  # noqa: F401  # the configurations of methods use its resolvers
from src.config.instantiate import instantiate
from src.data.image_data import Samples
from src.data.views import normalise
from src.methods.method import Batch, Method, Networks, View
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output, Shapes
from src.models.preactivations import forward_features
from src.models.resnet import resnet8, resnet14
from src.models.shufflenet_v1 import ShuffleV1
from src.models.shufflenet_v2 import ShuffleV2
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from src.teachers.teacher import Teacher
from tests.helpers.configure import METHODS, distils_logits
from tests.helpers.tiny import CLASSES, MEAN, STD, tiny_teacher

CONF = Path(__file__).parents[2] / "conf" / "method"
LOGIT_METHODS = [name for name in METHODS if distils_logits(name)]
FEATURE_METHODS = [name for name in METHODS if name not in LOGIT_METHODS and name != "vanilla"]

NewNetwork = Callable[..., Network]
Pair = tuple[NewNetwork, NewNetwork]
FAMILY: Pair = (resnet14, resnet8)
WIDE_TO_SHUFFLE: Pair = (wrn_16_1, ShuffleV1)
VGG_TO_MOBILE: Pair = (vgg8, MobileNetV2)
PAIRS = (FAMILY, WIDE_TO_SHUFFLE, VGG_TO_MOBILE)
"""Teacher and student. The second pair differs in resolution at every stage, the third at one of them."""
LOGIT_PAIRS = (FAMILY, (wrn_16_1, ShuffleV2), VGG_TO_MOBILE)

taught_by = functools.cache(tiny_teacher)
"""A teacher that several tests share. No test may change it."""


def configured(name: str, pair: str = "", *, epochs: int = 240, **options: Any) -> Any:
    """Make a method as `method=name` does for a pair and a number of epochs. CRD gets few negatives."""
    if name == "crd":
        options = {"negatives": 8, "embedding_size": 6, **options}
    root = {
        "model": {"name": pair, "student": {}},
        "schedule": {"epochs": epochs, "distillation_warmup": 20},
        "standardize_logits": False,
        "method": OmegaConf.merge(_node(name), options),
    }
    return instantiate(OmegaConf.create(root).method, "method")


def _node(name: str) -> Any:
    """Read a file of `conf/method`, with the methods in its defaults list."""
    node: Any = OmegaConf.load(CONF / f"{name}.yaml")
    parents = [entry for entry in node.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return OmegaConf.merge(*map(_node, parents), node)


def on_ten_classes(name: str, **options: Any) -> Any:
    """Make a method on logits for the ten classes of `three_logits`. A peer is one linear layer."""
    made = configured(name, **options)
    networks: Any = SimpleNamespace(
        student_shapes=SimpleNamespace(logits=10),
        new_student=lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10)),
    )
    made.allocate(networks)
    return made


def on_shapes(name: str, student: Shapes, teacher: Shapes, **options: Any) -> Any:
    """Make a method for networks of the given sizes. This is enough for methods that read only the sizes."""
    made = configured(name, **options)
    networks: Any = SimpleNamespace(student_shapes=student, teacher_shapes=teacher)
    made.allocate(networks)
    return made


def networks_of(
    new_teacher: NewNetwork = resnet14, new_student: NewNetwork = resnet8, student: Network | None = None
) -> Networks:
    """Make the input of `allocate`, for a pair and 12 training images of 16 pixels."""
    labels = torch.arange(12) % CLASSES
    new = functools.partial(new_student, CLASSES)
    return Networks(student or new(), taught_by(new_teacher), (3, 16, 16), labels, new)


def some_images(count: int = 4, size: int = 16) -> Tensor:
    """Draw uint8 images [count, 3, size, size], the same ones in every call."""
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def some_samples() -> Samples:
    """Make a batch of four images in one view."""
    index = torch.arange(4)
    return Samples((some_images(),), index % CLASSES, index, (index,))


def changed_batch(
    student: Network,
    teacher: Teacher,
    change: Callable[[Tensor], Tensor] = torch.clone,
    dtype: torch.dtype = torch.float32,
    size: int = 16,
) -> Batch:
    """Make a batch of four images of `size` pixels, with all outputs of both networks. `change` changes each tensor.

    The tensors have no history. A test may call `requires_grad_` on them.
    """
    images = some_images(size=size)
    with torch.no_grad():
        outputs = [forward_features(student, normalise(images, MEAN, STD), True), teacher(images, True)]
    changed = []
    for output in outputs:
        features, before = ([change(x).to(dtype) for x in maps] for maps in (output.features, output.preactivations))
        assert output.unpooled is not None
        pooled, unpooled, logits = (change(x).to(dtype) for x in (output.pooled, output.unpooled, output.logits))
        changed.append(Output(logits, tuple(features), pooled, tuple(before), unpooled))
    index = torch.arange(len(changed[0].logits))
    return Batch((View(change(images.float()), *changed),), index % CLASSES, index, epoch=0, step=0)


def leaves(output: Output) -> dict[str, Tensor]:
    """Name the tensors of an output and make them leaves, so that gradients tell which of them a term reads."""
    assert output.unpooled is not None
    named = {"logits": output.logits, "pooled": output.pooled, "unpooled": output.unpooled}
    named |= {f"features {i}": x for i, x in enumerate(output.features)}
    named |= {f"preactivations {i}": x for i, x in enumerate(output.preactivations)}
    return {name: x.requires_grad_() for name, x in named.items()}


def assert_published_weights(made: Method, **wanted: float) -> None:
    """Assert the weights of a method on features, in the first epoch and in the last."""
    assert made.weights(0) == made.weights(239) == wanted
    assert made.needs_teacher
    assert not made.distils_logits


STUDENT = frozenset({"student"})
NO_CROSS_ENTROPY = {"cross_entropy_weight": 0.0}


@dataclass(frozen=True)
class Steps:
    """The modules that a method trains in a few steps: "student", and names of the method's own modules."""

    trains: frozenset[str] = STUDENT
    """In the main stage."""
    idle: frozenset[str] = frozenset()
    """Modules with parameters that the main stage does not change."""
    first: tuple[frozenset[str], ...] = ()
    """The modules that each stage before the main one trains."""
    pairs: tuple[Pair, ...] = PAIRS
    """The pairs that the method supports."""
    options: dict[str, Any] = field(default_factory=lambda: dict(NO_CROSS_ENTROPY))
    """Without cross-entropy, so that only distillation trains the student."""

    @property
    def own(self) -> frozenset[str]:
        """The method's own modules with parameters."""
        return (self.trains | self.idle) - STUDENT


def of_features(*trains: str, idle: tuple[str, ...] = (), **options: Any) -> Steps:
    """Make the steps of a method on features that trains modules of its own beside the student."""
    return Steps(STUDENT | set(trains), frozenset(idle), **options)


ON_LOGITS = Steps(pairs=LOGIT_PAIRS)
STEPS: dict[str, Steps] = {
    "vanilla": Steps(pairs=LOGIT_PAIRS, options={}),
    "kd": ON_LOGITS,
    "dkd": ON_LOGITS,
    "aekt": ON_LOGITS,
    "nkd": ON_LOGITS,
    "dist": ON_LOGITS,
    "ttm": ON_LOGITS,
    "wttm": ON_LOGITS,
    "wsld": ON_LOGITS,
    "tfkd": ON_LOGITS,
    "mlkd": ON_LOGITS,
    "ctkd": Steps(STUDENT | {"theta"}, pairs=LOGIT_PAIRS),
    "ctkd, instance": Steps(
        STUDENT | {"perceptron"}, pairs=LOGIT_PAIRS, options={**NO_CROSS_ENTROPY, "instance": True}
    ),
    "dml": Steps(STUDENT | {"peer"}, pairs=LOGIT_PAIRS, options={}),
    "fitnet": of_features("regressor"),
    "at": of_features(),
    "sp": of_features(),
    "cc": of_features("student_embedding", "teacher_embedding"),
    "vid": of_features("guesses"),
    "rkd": of_features(),
    "pkt": of_features(),
    "nst": of_features(),
    "crd": of_features("student_embedding", "teacher_embedding"),
    "simkd": of_features("projector", idle=("classifier",), options={}),
    "reviewkd": of_features("fusions"),
    "catkd": of_features(idle=("teacher_classifier",)),
    "srrl": of_features("connector", idle=("classifier",)),
    "ofd": of_features("transfers"),
    "kdsvd": of_features(pairs=(FAMILY,)),
    "fsp": of_features(first=(STUDENT,), pairs=(FAMILY,), options={}),
    "ab": of_features(idle=("connectors",), first=(STUDENT | {"connectors"},), options={}),
    "ft": of_features(
        "translator",
        idle=("paraphraser", "decoder"),
        first=(frozenset({"paraphraser", "decoder"}),),
        pairs=(FAMILY, WIDE_TO_SHUFFLE),  # a factor of one pixel, such as MobileNetV2's, is refused
    ),
    "ft, whole factor": of_features(
        "translator",
        idle=("paraphraser", "decoder"),
        first=(frozenset({"paraphraser", "decoder"}),),
        options={**NO_CROSS_ENTROPY, "whole_factor": True},
    ),
}
TWO_STAGES = [name for name, steps in STEPS.items() if steps.first]


def method_of(case: str) -> str:
    """Return the method that a key "method" or "method, part" of a registry belongs to."""
    return case.split(",")[0]


def made_for_steps(case: str, **options: Any) -> Any:
    """Make the method of a case of `STEPS`, with the options of the case."""
    return configured(method_of(case), **{**STEPS[case].options, **options})


def name_of_pair(pair: Pair) -> str:
    """Name a pair in the id of a test."""
    return f"{pair[0].__name__}-{pair[1].__name__}"
