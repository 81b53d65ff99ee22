"""A hook of mkdocs: equations become MathML while the site is built, so that pages need no script and no network.

`pymdownx.arithmatex` marks them, `latex2mathml` turns them; what it does not know stops the build.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?:\(|\[)(?P<latex>.*?)\\(?:\)|\])</(?P=tag)>', re.S)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace every equation of a page."""
    return MARKED.sub(lambda found: to_mathml(found["latex"], found["tag"] == "div", page.file.src_uri), content)


def to_mathml(latex: str, block: bool, where: str = "") -> str:
    """One equation.

    Raises:
        ValueError: it holds a command that has no MathML.
    """
    found = convert(html.unescape(latex).strip(), display="block" if block else "inline")
    if unknown := re.findall(r"\\[A-Za-z]+", found):
        raise ValueError(f"{where}: {unknown[0]} cannot be shown in {latex!r}")
    return f'<div class="equation">{found}</div>' if block else found
