"""Rows about a part of a training step: the data path, the loss, and the teacher's answers."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.customary import masked_dkd, torchvision_loader
from benchmarks.images import CLASSES
from benchmarks.process_memory import peak_growth
from benchmarks.timing import Place, Row, divide, measure_in_turn, megabytes, milliseconds, seconds_per_call
from benchmarks.trial import (
    BATCH_SIZE,
    SMALLEST,
    batches_per_epoch,
    compose_training,
    give_weights,
    make_trial,
    repeat_views,
)
from src.config.instantiate import instantiate
from src.data.array_data import ArrayData
from src.data.views import normalise
from src.methods.method import Batch, DistillationLogits, LogitPair, Method, View, logits_only, weighted
from src.models.network import Network
from src.setup.networks import make_network
from src.teachers.teacher import Teacher

DELIVERED = 20
"""Batches that are timed in each round of the data path."""


def data(place: Place) -> Iterator[Row]:
    """Training images, gathered, cropped, flipped and normalised, against torchvision."""
    for batch_size in place.options.batch_sizes:
        source = make_trial(place, "vanilla", SMALLEST, batch_size).data
        sides = {
            "ours": _our_side(source, place.options.batches),
            "torchvision": _torchvision_side(source, batch_size),
        }
        found = measure_in_turn(sides, place.options.rounds)
        ratios = divide(found["torchvision"], found["ours"])
        yield Row(
            "the data path", "torchvision, 2 workers", f"batch {batch_size}", ratios, "speed >= 10", milliseconds(found)
        )


def augmentation(place: Place) -> Iterator[Row]:
    """Views with a policy or with mixing, against torchvision. Both sides have one process."""
    for name in ("trivial", "randaugment", "mixup", "cutmix"):
        source = make_trial(place, "vanilla", SMALLEST, BATCH_SIZE, overrides=(f"augmentation={name}",)).data
        sides = {
            "ours": _our_side(source, place.options.batches),
            "torchvision": _torchvision_side(source, BATCH_SIZE, workers=0, augmentation=name),
        }
        found = measure_in_turn(sides, place.options.rounds)
        ratios = divide(found["torchvision"], found["ours"])
        yield Row(
            f"augmentation={name}", "torchvision, 1 process", "batch 64", ratios, "speed >= 3", milliseconds(found)
        )


def _our_side(source: ArrayData, repeated: int) -> Callable[[], float]:
    batches = repeat_views(source, repeated)
    return lambda: seconds_per_call(lambda: normalise(next(batches).images[0], source.mean, source.std), DELIVERED)


def _torchvision_side(source: ArrayData, batch_size: int, **options: Any) -> Callable[[], float]:
    loader = torchvision_loader(source, batch_size, 2 + 2 * DELIVERED // batches_per_epoch(source), **options)

    def deliver() -> float:
        batches = iter(loader)
        for _ in range(5):  # the workers fetched these while they started
            next(batches)
        return seconds_per_call(lambda: next(batches), DELIVERED)

    return deliver


def loss(place: Place) -> Iterator[Row]:
    """The loss of AEKT with its gradient, against cross-entropy and DKD by masks: time and memory."""
    method = instantiate(compose_training("aekt", SMALLEST, place.images, BATCH_SIZE).method, "method")
    for classes in (1000, 21_841):
        torch.manual_seed(0)
        student, teacher = (3 * torch.randn(512, classes)).requires_grad_(), 3 * torch.randn(512, classes)
        target = torch.randint(classes, (512,))
        sides = {
            "ours": partial(_differentiate, partial(method_loss, method), student, teacher, target),
            "masked": partial(_differentiate, masked_dkd, student, teacher, target),
        }
        setting, against = f"B=512, C={classes:,}", "DKD by masks"
        times = measure_in_turn(
            {name: partial(seconds_per_call, side) for name, side in sides.items()}, 3 * place.options.rounds
        )
        ratios = divide(times["ours"], times["masked"])
        yield Row("the AEKT loss with gradient", against, setting, ratios, "time <= 0.5", milliseconds(times))
        peaks = measure_in_turn(
            {name: partial(peak_growth, side) for name, side in sides.items()}, place.options.rounds
        )
        ratios = divide(peaks["ours"], peaks["masked"])
        yield Row("its peak memory", against, setting, ratios, "memory <= 0.7", megabytes(peaks, digits=1))


def _differentiate(
    compute_loss: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, target: Tensor
) -> None:
    """Compute a loss and its gradient at the student's logits [B, C], and drop both."""
    compute_loss(student, teacher, target).backward()
    student.grad = None


def method_loss(method: Method, student: Tensor, teacher: Tensor, target: Tensor, own: Tensor | None = None) -> Tensor:
    """Sum the weighted terms of a method on logits [B, C], as in an epoch after every warm-up.

    `own` are the student's logits before the serialization layer (None: there is no such layer).
    """
    view = View(torch.empty(0), logits_only(student if own is None else own), logits_only(teacher))
    batch = Batch((view,), target, index=target, epoch=1000, step=0)
    terms = method.all_terms(batch, DistillationLogits((LogitPair(student, teacher),)))
    return torch.stack(list(weighted(terms, method.weights(batch.epoch)).values())).sum()


class Form(NamedTuple):
    """The precision and the form in which a teacher computes."""

    precision: str
    folded: bool = False
    """True if batch norms are folded into convolutions."""
    contiguous: bool = False
    """True if the memory format is contiguous instead of channels last."""
    winograd: bool = False

    def __str__(self) -> str:
        switches = [name for name in ("folded", "contiguous", "winograd") if getattr(self, name)]
        return ", ".join([self.precision, *switches])


REFERENCE = str(Form("float32", contiguous=True))


def teacher(place: Place) -> Iterator[Row]:
    """The teacher's answers in each precision and form, against float32 in the form in which it was loaded."""
    precisions = ("float32", "bfloat16") if place.options.bfloat16 else ("float32",)
    off_or_on = (False, True)
    forms = [
        Form(precision, folded, contiguous, winograd)
        for precision, folded, contiguous, winograd in itertools.product(precisions, off_or_on, off_or_on, off_or_on)
        if not winograd or (precision == "float32" and not contiguous)
    ]
    for model in place.options.pairs:
        yield from _form_rows(place, model, forms)


def _form_rows(place: Place, model: str, forms: Sequence[Form]) -> Iterator[Row]:
    cfg, _, source = make_trial(place, "kd", model, BATCH_SIZE)
    network = make_network(cfg.model.teacher, "model.teacher", CLASSES)
    origin = give_weights(network, cfg.model.teacher, source)
    teachers = {str(form): _make_teacher(cfg, network, source, form) for form in forms}
    views = next(iter(source.evaluation_loader("test"))).images[0][:256]
    answers = {name: made.logits(views) for name, made in teachers.items()}
    sides = {
        name: partial(seconds_per_call, partial(made.compute_view_logits, views[:BATCH_SIZE]))
        for name, made in teachers.items()
    }
    found = measure_in_turn(sides, 3 * place.options.rounds)
    expected = answers[REFERENCE]
    kept = {name: (answer.argmax(1) == expected.argmax(1)).double().mean().item() for name, answer in answers.items()}
    fastest = min((name for name in teachers if kept[name] == 1), key=lambda name: statistics.median(found[name]))
    for name, answer in answers.items():
        off = (answer - expected).abs().max() / expected.abs().max()
        note = f"{100 * kept[name]:.1f} % of top-1 answers kept, logits within {off:.1g} of the largest"
        yield Row(
            f"the teacher, {name}",
            REFERENCE,
            f"{model}, {BATCH_SIZE}, {origin}",
            divide(found[name], found[REFERENCE]),
            "keeps top-1",
            f"{note}, recommended" if name == fastest else note,
        )


def _make_teacher(cfg: DictConfig, network: Network, source: ArrayData, form: Form) -> Teacher:
    """Make a teacher in one form, with the weights of a network."""
    copied = make_network(cfg.model.teacher, "model.teacher", CLASSES)
    copied.load_state_dict(network.state_dict())
    made = Teacher(copied, source.mean, source.std, precision=form.precision)
    if form.folded:
        made.fold(source.image_shape)
    if form.winograd:
        made.use_winograd()
    made.to(torch.device("cpu"), torch.contiguous_format if form.contiguous else torch.channels_last)
    return made
