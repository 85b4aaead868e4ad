"""README and docs: links lead somewhere, commands exist, and the site builds and loads nothing from elsewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from src.config.validation import validate
from tests.helpers.configure import configure, options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:torchrun \S+|srun|python) -m src\.(\w+)(.*)$", re.M)
LEFT_OUT = ("--", "-m", "hydra/", "hydra.", "run=", "checkpoint=", "||")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", without_code(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_and_tables_are_narrow(page: Path) -> None:
    for line in without_code(page.read_text()).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) <= 7, f"{page.name}: a table has more than six columns: {line}"
        elif "](" not in line:
            assert len(line) <= 110, f"{page.name}: {line}"


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every command of this project in the pages' code, with the options that Hydra composes."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for name, rest in COMMAND.findall(block.replace("\\\n", " ")):
                arguments = [word for word in shlex.split(rest.partition("||")[0], comments=True) if "=" in word]
                found.append((name, tuple(word for word in arguments if not word.startswith(LEFT_OUT))))
    return sorted(set(found))


@pytest.mark.parametrize(("name", "arguments"), [c for c in commands() if c[0] not in ("predict", "wandb_workspace")])
def test_every_command_composes(name: str, arguments: tuple[str, ...]) -> None:
    if any(word in " ".join(arguments) for word in ("mse", "cosine", "lowrank", "twolayers", "stripes")):
        pytest.skip("an example of docs/extending.md, which tests/test_extending.py runs")
    cfg = configure(*map(first_choice, arguments), command=name)
    if name == "train":
        validate(cfg)


def first_choice(argument: str) -> str:
    """One job of a sweep: `seed=0,1,2` becomes `seed=0`."""
    (override,) = OverridesParser.create().parse_overrides([argument])
    if not override.is_sweep_override():
        return argument
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def test_every_command_of_the_project_is_explained() -> None:
    explained = {name for name, _ in commands()} | {"predict"}
    files = {file.stem for file in (ROOT / "src").glob("*.py")} - {"__init__", "command"}
    assert files <= explained | {"wandb_workspace"}


def test_the_readme_is_short_and_names_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    missing = [method for method in options("method") if f"`{method}`" not in readme]
    assert not missing, f"add to the families of methods in README.md: {missing}"


def test_the_table_of_methods_is_complete() -> None:
    table = (ROOT / "results" / "methods" / "table.md").read_text()
    missing = [method for method in options("method") if f"| {method} |" not in table]
    assert not missing, f"add to results/methods/table.md by `python -m benchmarks.methods {' '.join(missing)}`"


def test_every_room_of_src_is_on_the_map() -> None:
    rooms = {folder.name for folder in (ROOT / "src").iterdir() if (folder / "__init__.py").is_file()}
    for page in (ROOT / "README.md", ROOT / "docs" / "concepts.md"):
        missing = [room for room in rooms if f"{room}/" not in page.read_text()]
        assert not missing, f"add to the map of src/ in {page.name}: {missing}"


def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 2
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"(https?:[^\"]*)", html)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"(https?:[^\"]*)", html)
        assert not loaded, f"{page.name} loads {loaded}"
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"url\([\"']?https?:", style.read_text()), style


def messages() -> str:
    """All strings of `src/`; what f-strings insert is left out."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_in_troubleshooting_is_one_of_the_project() -> None:
    known = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [message for entry in re.findall(r"^\*\*(\".*\")\*\*$", page, re.M) for message in entry.split('", "')]
    assert len(quoted) > 30
    for message in quoted:
        for fragment in filter(None, (part.strip(' ":') for part in message.split("..."))):
            assert fragment in known or fragment.startswith("Key"), f"no message of src/ has: {fragment}"
