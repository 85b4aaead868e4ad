"""The notebooks run from top to bottom, and are stored with their outputs."""

import ast
import importlib
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(file: Path) -> list[Any]:
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]


@every_notebook
def test_notebooks_are_stored_as_they_ran(file: Path) -> None:
    code = code_cells(file)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(ROOT) not in file.read_text()


@every_notebook
def test_notebooks_import_names_that_exist(file: Path) -> None:
    lines = [line for cell in code_cells(file) for line in cell.source.splitlines() if not line.startswith("%")]
    imports = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, alias.name) for node in imports for alias in node.names if str(node.module).startswith("src")]
    assert ours
    for module, name in ours:
        assert hasattr(importlib.import_module(str(module)), name), f"{module} has no {name}"


@pytest.mark.slow
@every_notebook
def test_notebooks_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in a folder of their own, where no earlier run exists, and leave nothing behind."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()


def test_there_are_notebooks() -> None:
    assert {"quickstart", "gradient_analysis", "class_relations", "comparing_methods"} <= {f.stem for f in NOTEBOOKS}
