"""The tables of the documentation that are generated from `conf/`."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def write(folder: Path) -> None:
    """Write all tables as Markdown."""
    folder.mkdir(exist_ok=True)
    (folder / "networks.md").write_text(networks_table(), encoding="utf-8")
    (folder / "pairs.md").write_text(pairs_table(), encoding="utf-8")


def networks_table() -> str:
    """One row per network, with the accuracies that others published for it."""
    lines = []
    for file in sorted((CONF / "network").rglob("*.yaml")):
        node = read(file)
        published = ", ".join(f"{data} {value:.2f} %" for data, value in node.get("published_accuracy", {}).items())
        name = file.relative_to(CONF / "network").with_suffix("")
        lines.append([f"`{name}`", f"`{node['_target_'].rpartition('.')[2]}`", node["learning_rate"], published or "-"])
    return table(["network", "code", "learning rate", "published top-1"], lines)


def pairs_table() -> str:
    """One row per pair."""
    lines = []
    for file in sorted((CONF / "model").glob("*.yaml")):
        teacher, _, student = file.stem.partition("_to_")
        lines.append([f"`{file.stem}`", teacher, student])
    return table(["pair", "teacher", "student"], lines)


def read(file: Path) -> dict[str, Any]:
    """Read a yaml file of `conf/`."""
    node: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return node


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """Write a Markdown table."""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"
