"""A training step does not make the host wait for a GPU: on a fake CUDA device, and in Lightning's loop."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.data.array_data import ArrayReader
from src.data.batches import EpochBatches
from src.data.image_data import Samples
from src.data.views import normalise
from src.runs.history import History
from src.teachers.device_view_store import DeviceViewStore
from src.teachers.view_store import ViewStore
from src.training.distiller import Distiller
from src.training.serialization import Parallel, Serial, Serialization
from src.training.term_log import TermLog
from tests.helpers.fake_cuda import CUDA, HostWaits, fake_cuda, to_fake_cuda
from tests.helpers.methods import LOGIT_METHODS, STEPS, made_for_steps, method_of
from tests.helpers.tiny import CLASSES, kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer

IMAGES, BATCH = 44, 8
FIRST_STEP = {"crd": ["aten._local_scalar_dense.default"]}
"""CRD measures its normalising constants in its first step, and looks whether a checkpoint has brought them."""
EVERY_STEP = {"kdsvd": ["aten._linalg_svd.default"] * 6}
"""KDSVD decomposes feature maps. torch's decompositions wait for the device."""


def steps_on_fake_cuda(folder: Path, distiller: Distiller, steps: int = 2) -> list[list[str]]:
    """Read, augment and observe batches, and compute the loss. Returns the host's waits of each step."""
    data = tiny_data(folder, views=distiller.method.views_per_image)
    next(iter(EpochBatches(IMAGES, BATCH, seed=0)))  # the hash of the seed and the epoch is kept from here on
    data.augment(ArrayReader(data.arrays.train_images, data.arrays.train_labels, None)[share(0)], 0)
    found = []
    with fake_cuda() as mode:
        to_fake_cuda(distiller, mode)
        distiller.normalisation = to_fake_cuda(distiller.normalisation, mode)
        if (teacher := distiller.teacher) is not None:
            to_fake_cuda(teacher.network, mode)
            teacher.normalisation = to_fake_cuda(teacher.normalisation, mode)
            if isinstance(store := teacher.view_store, DeviceViewStore):
                store.logits, store.unknown, store.slots = to_fake_cuda(
                    [store.logits, store.unknown, store.slots], mode
                )
            teacher.columns = None if teacher.columns is None else to_fake_cuda(teacher.columns, mode)
        images, labels = (to_fake_cuda(each, mode) for each in (data.arrays.train_images, data.arrays.train_labels))
        reader = ArrayReader(images, labels, None)
        batches = iter(EpochBatches(IMAGES, BATCH, seed=0, device=CUDA))
        for step in range(steps):
            with HostWaits() as waits:
                distiller.training_step(data.augment(reader[next(batches)], 0), step)
            found.append(waits.found)
    return found


def share(epoch: int) -> Any:
    return next(iter(EpochBatches(IMAGES, BATCH, seed=0, epoch=epoch)))


def prepared(folder: Path, case: str, serialization: Serialization | None = None, **options: Any) -> Distiller:
    """Make a distiller for a case of `STEPS`. Its loop reports epoch 0 and step 0."""
    new_teacher, new_student = STEPS[case].pairs[0]
    method = made_for_steps(case)
    distiller = tiny_distiller(
        tiny_data(folder, views=method.views_per_image),
        method,
        teacher=tiny_teacher(new_teacher) if method.needs_teacher else None,
        serialization=serialization,
        new_student=new_student,
        **options,
    )
    distiller._trainer = None
    return distiller


@pytest.fixture(autouse=True)
def without_loop(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "fake" in request.node.name:
        monkeypatch.setattr(Distiller, "current_epoch", 0)
        monkeypatch.setattr(Distiller, "global_step", 0)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_on_a_fake_gpu_waits_for_nothing(tmp_path: Path, case: str) -> None:
    distiller = prepared(tmp_path, case)
    every = EVERY_STEP.get(method_of(case), [])
    for stage in [*(distiller.for_stage(stage) for stage in distiller.method.stages()), distiller]:
        assert steps_on_fake_cuda(tmp_path, stage) == [FIRST_STEP.get(method_of(case), []) + every, every]


@pytest.mark.parametrize("serialization", [Serial(0.1), Parallel(0.1)], ids=["serial", "parallel"])
@pytest.mark.parametrize("method", [name for name in LOGIT_METHODS if name in STEPS])
def test_serialized_and_standardized_logits_on_a_fake_gpu_wait_for_nothing(
    tmp_path: Path, method: str, serialization: Serialization
) -> None:
    distiller = prepared(tmp_path, method, serialization, standardize_logits=True)
    assert steps_on_fake_cuda(tmp_path, distiller) == [[], []]


def test_a_teacher_of_another_class_order_and_size_on_a_fake_gpu_waits_for_nothing(tmp_path: Path) -> None:
    distiller = prepared(tmp_path, "kd")
    assert distiller.teacher is not None
    distiller.teacher.select_classes([2, 0, 1, 3])
    distiller.teacher.image_size = 24
    assert steps_on_fake_cuda(tmp_path, distiller) == [[], []]


@pytest.mark.parametrize("known", [True, False], ids=["all answers", "no answers"])
def test_a_view_store_on_a_fake_gpu_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    distiller = prepared(tmp_path, "kd")
    data, teacher = tiny_data(tmp_path), distiller.teacher
    assert teacher is not None
    store = ViewStore(tmp_path / "a.views", IMAGES, data.view_count(1), CLASSES)
    teacher.view_store = copy = DeviceViewStore(store, data.view_records(1), torch.device("cpu"))
    copy.is_complete = known
    writer = Mock()  # the thread may wait
    monkeypatch.setattr(copy, "writer", writer)
    monkeypatch.setattr(torch.cuda, "Event", Mock())
    assert steps_on_fake_cuda(tmp_path, distiller) == [[], []]
    assert writer.submit.call_count == (0 if known else 2)


def test_an_evaluation_batch_on_a_fake_gpu_waits_for_nothing(tmp_path: Path) -> None:
    distiller = prepared(tmp_path, "kd")
    with fake_cuda() as mode:
        to_fake_cuda(distiller, mode)
        distiller.normalisation = to_fake_cuda(distiller.normalisation, mode)
        for metric in [*distiller.metrics.values(), distiller.agreement]:
            metric._device = CUDA
            for name, value in metric._defaults.items():
                setattr(metric, name, to_fake_cuda(value, mode))
        distiller.teacher_predictions = {"test": to_fake_cuda(torch.zeros(17, dtype=torch.int64), mode)}
        images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        target = index = torch.zeros(5, dtype=torch.int64, device=CUDA)
        with HostWaits() as waits, torch.no_grad():
            distiller.eval().test_step(Samples((images,), target, index), 0)
    assert waits.found == []


# The instrument


def pixels_read(x: Tensor) -> Any:
    return x[x > 1]


@pytest.mark.parametrize(
    ("code", "wait"),
    [
        (lambda x: normalise(x, [0.1] * 3, [0.1] * 3), ["aten._to_copy.default"] * 2),
        (lambda x: x[[1, 2]], ["aten._to_copy.default"]),
        (lambda x: x.sum().item(), ["aten._local_scalar_dense.default"]),
        (lambda x: bool((x > 1).any()), ["aten._local_scalar_dense.default"]),
        (lambda x: x.cpu(), ["aten._to_copy.default"]),
        (lambda x: torch.zeros(4, 3, 8, 8, dtype=torch.uint8).copy_(x), ["aten.copy_.default"]),
        (lambda x: torch.tensor([1, 2]).to(x.device), ["aten._to_copy.default"]),
        (lambda x: x[torch.tensor([1, 2])], ["aten.index.Tensor with indices of the host"]),
        (lambda x: x.float() + 1, []),
    ],
)
def test_waits_on_a_fake_gpu_are_found(code: Any, wait: list[str]) -> None:
    with fake_cuda(), HostWaits() as waits:
        code(torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=CUDA))
    assert waits.found == wait


@pytest.mark.parametrize(
    ("code", "wait"),
    [
        (pixels_read, "aten.index.Tensor with a mask"),
        (torch.nonzero, "aten.nonzero.default"),
        (torch.unique, "aten._unique2.default"),
    ],
)
def test_shapes_that_depend_on_values_on_a_fake_gpu_are_found(code: Any, wait: str) -> None:
    with fake_cuda(), HostWaits() as waits, pytest.raises(Exception, match="aten"):
        code(torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=CUDA))
    assert wait in waits.found


# Lightning's loop


class Reads(TorchDispatchMode):
    """Count the numbers that Python reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountReads(L.Callback):
    """Count the reads between the starts of the batches of an epoch."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.mode: Reads | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.stop()
        self.mode = Reads()
        self.mode.__enter__()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.reads.append(self.mode.count)
            self.mode = None


@pytest.mark.parametrize(("every", "quiet"), [(4, [0, 1, 2]), (1, [])])
def test_the_loop_reads_numbers_only_where_it_logs_or_checks(tmp_path: Path, every: int, quiet: list[int]) -> None:
    """44 images in batches of 8 are six steps. With `every` of 4, the fourth step logs and checks.

    In later steps, Lightning reads the loss of the progress bar again. By then this number lies on the host.
    """
    data = tiny_data(tmp_path)
    data.device_memory = True
    counted = CountReads()
    trainer = tiny_trainer(1, callbacks=[TermLog(every), History(tmp_path), counted], log_every_n_steps=4)
    trainer.fit(tiny_distiller(data, kd(), teacher=tiny_teacher(), serialization=Serial(0.1)), datamodule=data)
    assert len(counted.reads) == 6
    assert [step for step, reads in enumerate(counted.reads[:5]) if reads == 0] == quiet
    assert counted.reads[3] > counted.reads[4] == (1 if quiet else counted.reads[2])
