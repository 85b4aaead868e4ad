import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from src.analysis.document import Picture, Section, Table, html, latex, markdown
from src.analysis.figures import save

HOSTILE = '</td><script src="https://example.org/x.js">alert(1)</script>| "quoted" & $x_1$ \\input{/etc/passwd} \n%'


class Page(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def sections(tmp_path: Path) -> list[Section]:
    picture = Picture(save(Figure(figsize=(1, 1)), tmp_path / "dot.png"), HOSTILE, wide=True)
    tables = [Table(HOSTILE, ["network", HOSTILE], [[HOSTILE, "1.0 +- 0.2"]]) for _ in range(2)]
    tables[1] = tables[1]._replace(sentences=True)
    return [Section(HOSTILE, [HOSTILE], tables, [picture]), Section("second")]


def test_the_page_escapes_everything_and_needs_nothing_else(sections: list[Section]) -> None:
    text = html(HOSTILE, sections)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in text
    assert "@import" not in text
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert page.text.count("alert(1)") >= 8
    assert "1.0 \N{PLUS-MINUS SIGN} 0.2" in page.text
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_a_row_of_markdown_stays_a_row(sections: list[Section]) -> None:
    text = markdown(sections)
    rows = [line for line in text.splitlines() if line.startswith("|") and "1.0 +- 0.2" in line]
    assert len(rows) == 2
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script" not in text
    assert "(dot.png)" in text


def test_latex_reads_no_command_out_of_a_name(sections: list[Section]) -> None:
    text = latex(sections)
    assert r"\input" not in text
    assert r"\textbackslash{}input\{" in text
    assert r"1.0 $\pm$ 0.2" in text
    for command in ("toprule", "midrule", "bottomrule", "begin{table}", "end{table}", "resizebox"):
        assert text.count(f"\\{command}") == 2
    braces = text.replace(r"\{", "").replace(r"\}", "")
    assert braces.count("{") == braces.count("}")
    for line in text.splitlines()[1:]:
        assert not re.search(r"(?<!\\)[%#]", line), line
