"""The contents of a report, and its three forms: Markdown, LaTeX (booktabs), and one self-contained HTML page."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from tabulate import LATEX_ESCAPE_RULES, tabulate

from src.common.markup import plain


class Table(NamedTuple):
    """A table of text. The first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sentences: bool = False
    """True if the last column holds sentences, which wrap. Other cells stay on one line."""


class Picture(NamedTuple):
    """A PNG file and its caption."""

    file: Path
    caption: str
    wide: bool = False
    """True if the picture takes the whole width of a page."""


class Section(NamedTuple):
    """The notes, tables and pictures under one title."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def markdown(sections: Sequence[Section]) -> str:
    """Write all sections as Markdown. Pictures are linked by their file name, so keep them beside the text."""
    lines = []
    for section in sections:
        lines += [f"## {plain(section.title)}", ""]
        for table in section.tables:
            body = tabulate(
                [[plain(cell) for cell in row] for row in table.rows],
                [plain(column) for column in table.columns],
                tablefmt="pipe",
                disable_numparse=True,
            )
            lines += [body, "", plain(table.caption), ""]
        lines += [line for note in section.notes for line in (plain(note), "")]
        lines += [line for p in section.pictures for line in (f"![{plain(p.caption)}]({p.file.name})", "")]
    return "\n".join(lines)


def latex(sections: Sequence[Section]) -> str:
    r"""Write the tables for a document with \usepackage{booktabs,graphicx}. A wide table shrinks to the line width."""
    lines = [r"% needs \usepackage{booktabs,graphicx}"]
    box = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
    for section in sections:
        for table in section.tables:
            rows = [[" ".join(cell.split()) for cell in row] for row in table.rows]
            body = tabulate(rows, table.columns, tablefmt="latex_booktabs", disable_numparse=True)
            body = re.sub(r"^( *)([\[*])", r"\1{\2}", body, flags=re.M)  # else an argument of the \\ before it
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
    """Write one HTML page that contains its pictures. All text is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections)
