"""Digests of the code, the data and the teacher of a run, and the versions of its libraries."""

import ast
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.runs.identity import identity
from src.runs.result import Fingerprints

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "numpy")
"""Packages whose version can change a result."""


def fingerprints(cfg: DictConfig, data_digest: str, teacher_digest: str | None) -> Fingerprints:
    """Compute the digests that must not change if a run in an existing folder is to continue."""
    modules = {target.rpartition(".")[0] for target in run_targets(cfg) if target.startswith("src.")}
    if cfg.also:
        modules.add("src.methods.combined")
    return Fingerprints(
        code=code_digest(["src.training.distiller", *sorted(modules)]), data=data_digest, teacher=teacher_digest
    )


def run_targets(cfg: DictConfig) -> list[str]:
    """List every `_target_` of a run's identity, sorted. Targets that only make the teacher are left out."""
    decides = {name: value for name, value in identity(cfg).items() if name != "teacher"}
    return sorted(set(_targets(decides)))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def code_digest(modules: Iterable[str]) -> str:
    """Hash the code of the named modules, and of all modules of this package that they import.

    Comments, docstrings and layout are ignored, except in a module's C++ file.
    """
    seen: dict[str, str] = {}
    waiting = list(modules)
    options: Any = {"show_empty": True} if sys.version_info >= (3, 13) else {}  # as Python 3.10 to 3.12 always do
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        file = (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                waiting.append(node.module or "")
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not _is_string(part)]  # type: ignore[attr-defined]
        seen[module] = ast.dump(tree, **options).replace(", type_params=[]", "")
        if (kernels := file.with_suffix(".cpp")).is_file():
            seen[kernels.name] = kernels.read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`, and the commit if this is a git checkout."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return {**found, "commit": git.stdout.strip()}
