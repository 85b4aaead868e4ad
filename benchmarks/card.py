"""The device of a benchmark: facts about it, its measured peak rates, and torch's numerical settings."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.timing import seconds_per_call

PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
"""Data type of a matrix product, and whether its float32 products use TF32."""


def describe(device: torch.device) -> dict[str, Any]:
    """Collect the device's name and memory, and the versions of the driver and of the libraries."""
    facts: dict[str, Any] = {"device": device.type, "python": platform.python_version(), "torch": torch.__version__}
    facts |= {
        "lightning": L.__version__,
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), **facts}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "memory": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def driver_version() -> str | None:
    """Ask nvidia-smi for the version of the driver. Returns None if it does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_numerics(*, benchmark: bool = False, tf32: bool = False) -> None:
    """Restore torch's default numerical settings, which a run of Lightning may have changed.

    `benchmark` lets cuDNN time its algorithms. `tf32` is for matrix products. Convolutions use TF32 by default.
    """
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = tf32


@contextlib.contextmanager
def restored_numerics() -> Iterator[None]:
    """Restore torch's numerical settings after the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        reset_numerics(benchmark=before[1])
        torch.use_deterministic_algorithms(before[0])


def convolution_precision(mixed: bool) -> str:
    """Return the key of `PRECISIONS` in which the device computes convolutions at the moment."""
    if mixed:
        return "bfloat16"
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    return "tf32" if cudnn.conv.fp32_precision == "tf32" else "float32"


def measure_peaks(device: torch.device, size: int) -> dict[str, float]:
    """Measure the operations per second of a product of two `size` x `size` matrices in each precision.

    The fastest of three measurements counts. On a CPU, TF32 is the same as float32.
    """
    peaks = {}
    for name, (dtype, tf32) in PRECISIONS.items():
        reset_numerics(tf32=tf32)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_time_product(a, b, device) for _ in range(4))
        peaks[name] = 2 * size**3 / seconds
    reset_numerics()
    return peaks


def _time_product(a: Tensor, b: Tensor, device: torch.device, calls: int = 4) -> float:
    def multiply() -> None:
        for _ in range(calls):
            torch.mm(a, b)
        wait_for(device)

    wait_for(device)
    return seconds_per_call(multiply) / calls


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors have held on the device since `reset_peak_memory`. None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def capture(step: Callable[[], None], warm_up: int) -> Callable[[], None]:
    """Record a training step in a CUDA graph. Returns the function that replays it.

    The step runs `warm_up` times first, on the stream of the capture. This makes the optimiser's state, chooses cuDNN's
    algorithms and creates the handles of the libraries, none of which a capture may do.
    """
    graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.synchronize()
    # A failed capture would leave its own stream behind, so the current stream is entered first.
    with torch.cuda.stream(current), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
