"""The settings of Sphinx, which `make docs` runs. The site needs no network and loads nothing from elsewhere."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import tables  # noqa: E402  # stands beside this file

project = "AEKT"
author = "the AEKT contributors"
copyright = "the AEKT contributors, MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generated/*"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|lightning|pydantic)\..*")]  # other projects' pages are not reachable offline
default_role = "code"
html_theme = "furo"
html_title = "AEKT"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
add_module_names = False


def to_rst(app: Any, kind: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code` and indented blocks: escape what reStructuredText would take for markup."""
    in_example = False
    for number, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if in_example:
            continue
        if re.match(r" {4,}\S", line) and "`" not in line:
            lines[number] = "    | " + line.strip().replace("|", r"\|").replace("*", r"\*").replace("_", r"\_")
            continue
        parts = line.split("`")
        for outside in range(0, len(parts), 2):
            parts[outside] = parts[outside].replace("|", r"\|").replace("*", r"\*").replace("_ ", r"\_ ")
        lines[number] = "``".join(parts)


def setup(app: Any) -> None:
    """Write the generated tables, and register the treatment of docstrings."""
    tables.write(Path(__file__).parent / "generated")
    app.connect("autodoc-process-docstring", to_rst)
