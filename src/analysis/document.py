"""What a report holds, and its three forms: Markdown, LaTeX (booktabs) and one HTML page that needs nothing else."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from tabulate import LATEX_ESCAPE_RULES, tabulate


class Table(NamedTuple):
    """Cells of text; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: bool = False
    """Whether the last column holds some."""


class Picture(NamedTuple):
    """A PNG file, and what it shows in words."""

    file: Path
    caption: str
    wide: bool = False
    """Whether it takes the whole width of a page."""


class Section(NamedTuple):
    """What belongs under one title."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def markdown(sections: Sequence[Section]) -> str:
    """All sections; pictures are named relative to where they lie."""
    lines = []
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for table in section.tables:
            body = tabulate(
                [[_plain(cell) for cell in row] for row in table.rows],
                [_plain(column) for column in table.columns],
                tablefmt="pipe",
                disable_numparse=True,
            )
            lines += [body, "", _plain(table.caption), ""]
        lines += [line for note in section.notes for line in (_plain(note), "")]
        lines += [line for p in section.pictures for line in (f"![{_plain(p.caption)}]({p.file.name})", "")]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that is no markup and ends no cell."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")


def latex(sections: Sequence[Section]) -> str:
    r"""The tables, for a document with \usepackage{booktabs,graphicx}; a wide one shrinks to the line."""
    lines = [r"% needs \usepackage{booktabs,graphicx}"]
    box = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
    for section in sections:
        for table in section.tables:
            rows = [[" ".join(cell.split()) for cell in row] for row in table.rows]
            body = tabulate(rows, table.columns, tablefmt="latex_booktabs", disable_numparse=True)
            caption = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in f"{section.title}. {table.caption}")
            lines += [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{' '.join(caption.split())}}}",
                rf"{box}{body}}}",
                r"\end{table}",
            ]
    return "\n".join(lines).replace("+-", r"$\pm$") + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """One page; pictures are inside it, and all text is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections)
