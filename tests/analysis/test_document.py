"""The three forms of a report. Names in it may come from anywhere, so all text is escaped."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from src.analysis.document import Picture, Section, Table, html, latex, markdown
from src.analysis.figures import save

HOSTILE = '</td><script src="https://example.org/x.js">alert(1)</script>| "quoted" & $x_1$ \\input{/etc/passwd} \n%'


class Page(HTMLParser):
    """Collect the tags with their attributes, and all text."""

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


def test_the_page_escapes_all_text_and_is_self_contained(sections: list[Section]) -> None:
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


def test_a_cell_cannot_break_a_markdown_row(sections: list[Section]) -> None:
    text = markdown(sections)
    rows = [line for line in text.splitlines() if line.startswith("|") and "1.0 +- 0.2" in line]
    assert len(rows) == 2
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "<script" not in text
    assert "(dot.png)" in text


def test_a_name_cannot_be_a_latex_command(sections: list[Section]) -> None:
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


@pytest.mark.parametrize("name", ["[v2] birds", "*birds", "birds\\", "R&D_x~y^z", "100 % #1 {a} $b$"])
def test_a_name_is_text_in_all_three_forms(name: str) -> None:
    sections = [Section("Results", [], [Table("", ["network", "top-1"], [["first", "1"], [name, "2"]])])]
    row = next(line for line in latex(sections).splitlines() if line.rstrip(" \\").endswith("& 2"))
    assert not re.match(r"\s*[\[*]", row), "an argument of the end of the row before it"
    assert not re.search(r"(?<!\\)[%#&_^$~]", row.replace(" & ", ""))
    cells = re.findall(r"(?:\\.|[^|\\])+", markdown(sections).splitlines()[5])
    assert [re.sub(r"\\(.)", r"\1", cell).strip().replace("&amp;", "&") for cell in cells] == [name, "2"]
    assert name in Page(html("", sections)).text


def test_rows_with_sentences_name_their_columns_for_narrow_screens() -> None:
    table = Table("caption", ["compared", "points", "p", "verdict"], [["one", "+1.0", "0.01", "is higher"]])
    wide, narrow = (Page(html("t", [Section("s", tables=[table._replace(sentences=flag)])])) for flag in (False, True))
    named = [[attributes.get("data-column") for tag, attributes in page.tags if tag == "td"] for page in (wide, narrow)]
    assert named == [[None] * 3, ["points", "p", "verdict"]]


def test_only_a_page_of_several_sections_has_a_list_of_them() -> None:
    one, two = (Page(html("t", [Section(title) for title in titles])) for titles in (["a"], ["a", "b"]))
    assert "nav" not in [tag for tag, _ in one.tags]
    assert [attributes["href"] for tag, attributes in two.tags if tag == "a"] == ["#section1", "#section2"]
    assert {"section1", "section2"} <= {attributes.get("id") for _, attributes in two.tags}
