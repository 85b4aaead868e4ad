"""The notebooks run from top to bottom, and are stored with what came out."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@every_notebook
def test_notebooks_are_stored_as_they_ran(file: Path) -> None:
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(ROOT) not in file.read_text()


@pytest.mark.slow
@every_notebook
def test_notebooks_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a place of their own, so that nothing is there before and nothing is left."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()


def test_there_are_notebooks() -> None:
    assert {"quickstart", "gradient_analysis", "class_relations", "comparing_methods"} <= {f.stem for f in NOTEBOOKS}
