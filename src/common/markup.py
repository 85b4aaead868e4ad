"""Text from users and data, such as names of classes, in Markdown."""

import re


def plain(text: str) -> str:
    r"""Escape text for Markdown, so that it can neither act as markup nor end a line or a cell.

    Underscores within words, as in `resnet20_x4`, are no markup and stay.

    >>> print(plain("a | [b]\n<i> *c* _d_ e_f `g` \\"))
    a \| \[b] &lt;i> \*c\* \_d\_ e_f \`g\` \\
    """
    text = re.sub(r"([\\`*|\[]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
    return re.sub(r"&(?=#|\w)", "&amp;", text).replace("<", "&lt;").replace("~~", "\\~~")
