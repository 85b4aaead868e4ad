"""The program that measures peak memory: it imports only what the file needs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.exporting import peak_memory
from src.exporting.forms import Form, write_form
from tests.helpers.exports import random_classifier, random_images

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PROGRAM = Path(peak_memory.__file__)


@pytest.fixture
def images_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", random_images().numpy())
    return tmp_path / "images.npy"


def measure(file: Path, kind: str, images: Path, blocked: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program by its path, in a process in which the packages in `blocked` cannot be imported."""
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked.split()})); "
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    )
    command: list[str | Path] = [sys.executable, "-W", "ignore", "-c", code, file, kind, images]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parent)


@pytest.mark.parametrize(
    "format", ["onnx", "exported_program", "torchscript", pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_the_peak_rises_when_the_file_is_used(format: str, images_file: Path, tmp_path: Path) -> None:
    if format == "executorch":
        pytest.importorskip("executorch")
    form = Form(format, "float32")
    file = tmp_path / form.file_name
    write_form(random_classifier(), file, form, random_images(), {})
    ran = measure(file, format, images_file, blocked="src torch onnx" if format == "onnx" else "src onnx onnxruntime")
    assert ran.returncode == 0, ran.stderr
    before, after = map(float, ran.stdout.split())
    assert 10 < before < after < before + 2000


def test_torch_files_need_torch(images_file: Path, tmp_path: Path) -> None:
    """If blocking torch did not work, the test of ONNX files would prove nothing."""
    form = Form("torchscript", "float32")
    write_form(random_classifier(), tmp_path / "student.pt", form, random_images(), {})
    ran = measure(tmp_path / "student.pt", "torchscript", images_file, blocked="torch")
    assert ran.returncode != 0
    assert "import of torch halted" in ran.stderr


def test_the_peak_counts_freed_memory_in_megabytes() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import peak_memory, numpy as np; "
        "before = peak_memory.peak(); np.ones(200_000_000, dtype=np.uint8); print(peak_memory.peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ran.stdout) == pytest.approx(200, abs=10)
