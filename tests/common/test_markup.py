"""Names in Markdown show as they are, whatever characters they hold."""

import pytest

from src.common.markup import plain


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("resnet20_x4 (seed 0) +- 0.1 %", "resnet20_x4 (seed 0) +- 0.1 %"),
        ("flowers, v2", "flowers, v2"),
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("*bold* _soft_ `code`", r"\*bold\* \_soft\_ \`code\`"),
        ("[x](javascript:y)", r"\[x](javascript:y)"),
        ("<b>", "&lt;b>"),
        ("&lt; R&D &", "&amp;lt; R&amp;D &"),
        ("a\nb\tc", "a b c"),
        ("~~x~~", r"\~~x\~~"),
    ],
)
def test_text_cannot_act_as_markup(text: str, escaped: str) -> None:
    assert plain(text) == escaped
