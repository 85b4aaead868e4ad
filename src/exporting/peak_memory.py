"""Measure the peak memory of loading an exported file and using it once: `peak_memory.py FILE KIND IMAGES`.

The peak of a process never falls, so this is a separate program, run by its path. It imports numpy and the runtime
that the file needs, and nothing of this project: every other import would raise the first peak. It prints two peaks in
MB (10^6 bytes): after the imports, and at the end.
"""

import resource
import sys
from typing import Any

import numpy as np


def peak() -> float:
    """Return the peak resident memory of this process in MB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with open("/proc/self/status", encoding="utf-8") as status:  # on Linux, ru_maxrss includes the parent's peak
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def run_onnx(file: str, images: np.ndarray) -> float:
    """Compute logits once in onnxruntime. Returns the peak before the file was loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    before = peak()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": images})
    return before


def run_executorch(file: str, images: np.ndarray) -> float:
    """Compute logits once in ExecuTorch, image by image. Returns the peak before the file was loaded."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)
    before = peak()
    method = Runtime.get().load_program(file).load_method("forward")
    for image in torch.from_numpy(images).split(1):
        method.execute([image])
    return before


def run_torch(file: str, kind: str, images: np.ndarray) -> float:
    """Compute logits once in torch. Returns the peak before the file was loaded."""
    import torch
    import torch.export

    torch.set_num_threads(1)
    before = peak()
    program: Any = torch.export.load(file).module() if kind == "exported_program" else torch.jit.load(file)
    with torch.no_grad():
        program(torch.from_numpy(images))
    return before


def main() -> None:
    """Print both peaks."""
    file, kind, images = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
    runs = {"onnx": run_onnx, "executorch": run_executorch}
    before = runs[kind](file, images) if kind in runs else run_torch(file, kind, images)
    print(before, peak())


if __name__ == "__main__":
    main()
