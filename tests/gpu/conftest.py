import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.card import restored_numerics

# cuBLAS reads this when it starts. Deterministic runs need it, and the first test may not be one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Compute in float32 without TF32, and with deterministic algorithms, as a run does by default."""
    with restored_numerics():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True)
        yield
