"""The programs that `benchmarks.gpu` times: Lightning's loop, hand-written loops, and the customary loop."""

import torch
from torch import Tensor

from benchmarks.card import capture, convolution_precision, reset_numerics
from benchmarks.customary import time_plain_loop, torchvision_loader
from benchmarks.gpu_bench import FLOAT32, Bench, Setting
from benchmarks.images import CLASSES
from benchmarks.part_rows import method_loss
from benchmarks.timing import seconds_per_call
from benchmarks.trial import Clock, Trial, fit_timed, step_operations
from src.models.preactivations import forward_features
from src.setup.networks import make_network

BATCHES = 16
"""Batches that the hand-written loops repeat."""


class Lightning:
    """The whole loop through Lightning, as the command runs it. Each measurement is one fit."""

    def __init__(self, bench: Bench, trial: Trial) -> None:
        self.bench, self.trial = bench, trial
        self.precision = ""
        """The precision of the convolutions in the last measurement."""

    def __call__(self, steps: int) -> float:
        """Train. Returns the seconds per step after the warm-up."""
        first = self.bench.sizes.warm_up
        clock = Clock(first, first + steps, wait=self.bench.wait)
        limits = {"max_epochs": 1, "limit_train_batches": first + steps + 1, "limit_val_batches": 0}
        reset_numerics()
        fit_timed(self.trial, clock, self.bench.folder, **limits)
        self.precision = convolution_precision(self.trial.cfg.trainer.precision == "bf16-mixed")
        begin, end = clock.times
        return (end - begin) / steps


class Bare:
    """A hand-written loop: the teacher's forward pass, the student's forward and backward pass, and SGD.

    It repeats batches that lie on the device and does not augment them. With `graph`, a CUDA graph replays the step.
    """

    def __init__(self, bench: Bench, model: str, setting: Setting, *, graph: bool) -> None:
        self.bench, self.mixed = bench, setting.mixed
        _, distiller, data = bench.trial("aekt", model, FLOAT32)
        assert distiller.teacher is not None
        distiller.teacher.to(bench.device, torch.channels_last)
        self.distiller, self.teacher = distiller.to(bench.device), distiller.teacher.network
        rows = torch.arange(BATCHES * bench.sizes.batch_size) % len(data.arrays.train_labels)
        images, labels = data.arrays.train_images[rows], data.arrays.train_labels[rows]
        self.images, self.labels = (x.to(bench.device).chunk(BATCHES) for x in (images, labels))
        self.image, self.label = self.images[0].clone(), self.labels[0].clone()
        self.mean, self.std = (255 * torch.tensor(x, device=bench.device)[:, None, None] for x in (data.mean, data.std))
        trained = [parameter for parameter in self.distiller.parameters() if parameter.requires_grad]
        rate = torch.tensor(1e-3, device=bench.device)
        self.optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-4, fused=True)
        reset_numerics(benchmark=True)
        self.run = capture(self.step, bench.sizes.warm_up) if graph else self.step

    def loss(self) -> Tensor:
        """Compute AEKT's loss on the present batch."""
        student, layer = self.distiller.student, self.distiller.serialization
        images = ((self.image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=self.mixed):
            with torch.no_grad():
                answers = self.teacher(images)
            output = forward_features(student, images, False)
            distilled = layer(output.logits, output.pooled)
            return method_loss(self.distiller.method, distilled, answers, self.label, own=output.logits)

    def step(self) -> None:
        """Train on the present batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def __call__(self, steps: int) -> float:
        """Train. Returns the seconds per step."""
        reset_numerics(benchmark=True)

        def train() -> None:
            for number in range(steps):
                self.image.copy_(self.images[number % BATCHES])
                self.label.copy_(self.labels[number % BATCHES])
                self.run()
            self.bench.wait()

        self.bench.wait()
        return seconds_per_call(train) / steps


class Customary:
    """The customary loop: transforms of each image in loader workers, DKD by masks, float32 with torch's defaults."""

    def __init__(self, bench: Bench, model: str) -> None:
        self.bench = bench
        networks = bench.compose("dkd", model, FLOAT32).model
        student, teacher = (make_network(networks[role], "model", CLASSES) for role in ("student", "teacher"))
        self.operations = step_operations(student, teacher, bench.sizes.batch_size)[False]
        """Operations of the matrix products of a step."""
        self.student, self.teacher = student.to(bench.device).train(), teacher.to(bench.device).eval()
        self.loader = torchvision_loader(bench.data, bench.sizes.batch_size, workers=bench.sizes.workers)

    def __call__(self, steps: int) -> float:
        """Train. Returns the seconds per step."""
        reset_numerics(benchmark=True)  # as mdistiller sets it
        return time_plain_loop(self.student, self.teacher, self.loader, steps, self.bench.device)
