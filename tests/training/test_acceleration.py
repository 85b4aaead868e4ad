"""Fused optimisers and the teacher's stream. `test_compilation.py` tests compiled terms."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.training.acceleration import SideStream, make_fused
from src.training.dot import DOT

CUDA = torch.device("cuda")


def trainer(device: str, precision: str = "32-true", clip: float | None = None) -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, precision=precision, gradient_clip_val=clip)


@pytest.mark.parametrize(
    ("options", "device", "fused"),
    [
        ({}, "cuda", True),
        ({}, "cpu", None),
        ({"fused": False}, "cuda", False),
        ({"foreach": True}, "cuda", None),
    ],
    ids=["on a GPU", "on a CPU", "the user says no", "the user chooses foreach"],
)
def test_an_optimiser_is_fused_on_a_gpu_unless_the_configuration_chooses(
    options: dict[str, Any], device: str, fused: bool | None
) -> None:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1 * number} for number in (1, 2)]
    made = make_fused(partial(torch.optim.SGD, momentum=0.9, **options), groups, trainer(device))
    assert [group["fused"] for group in made.param_groups] == [fused] * 2
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.2]
    assert groups[0].keys() == {"params", "lr"}, "the groups are not changed"


def test_an_optimiser_without_a_fused_kernel_stays_as_it_is() -> None:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1}]
    assert "fused" not in make_fused(partial(DOT, momentum=0.9), groups, trainer("cuda")).param_groups[0]


def test_a_checkpoint_of_another_device_does_not_change_the_choice() -> None:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1}]
    on_gpu, on_cpu = (make_fused(torch.optim.SGD, groups, trainer(device)) for device in ("cuda", "cpu"))
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert on_gpu.param_groups[0]["fused"] is True
    on_cpu.load_state_dict(on_gpu.state_dict())
    assert on_cpu.param_groups[0]["fused"] is None


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [("16-mixed", 1.0, None), ("16-mixed", None, True), ("bf16-mixed", 1.0, True), ("32-true", 1.0, True)],
)
def test_lightning_can_clip_scaled_gradients(precision: str, clip: float | None, fused: bool | None) -> None:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1}]
    made = make_fused(torch.optim.SGD, groups, trainer("cuda", precision, clip))
    assert made.param_groups[0]["fused"] is fused


class FakeStream:
    """A CUDA stream that notes for which stream it waits."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Any) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, *_: Any) -> None:
        self.log.append(f"leave {self.name}")


def test_the_second_stream_waits_for_the_inputs_and_the_first_one_for_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    stream = SideStream(CUDA)
    with stream.beside():
        log.append("teacher")
    log.append("student")
    stream.join()
    assert log == [
        "side waits for main", "enter side", "teacher", "leave side", "student", "main waits for side"
    ]  # fmt: skip
    assert copy.deepcopy(stream) is stream


def test_on_a_cpu_everything_runs_in_place() -> None:
    stream = SideStream(torch.device("cpu"))
    with stream.beside():
        value = torch.ones(2)
    stream.join()
    assert stream.stream is None
    assert value.sum() == 2
