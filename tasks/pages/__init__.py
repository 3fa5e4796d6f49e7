"""Renders the pages that tasks write: templates of jinja2, one style, every figure inside the page."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

INK, PAPER, ACCENT, BLUE = "#1c1c1e", "#ffffff", "#c2410c", "#1d4ed8"


def render(template: str, **values: Any) -> str:
    """Renders a template of this package; values are escaped.

    Args:
        template: name of the file in `templates`.
        values: what the template uses; a missing one raises jinja2.UndefinedError.
    """
    environment = Environment(
        loader=PackageLoader(__name__), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"INK": INK, "PAPER": PAPER, "ACCENT": ACCENT, "BLUE": BLUE}
    return environment.get_template(template).render(**values)


def with_section(page: str, name: str, section: str) -> str | None:
    """Returns a page of an evaluation with a section in its place of this name; an earlier section is replaced.

    Args:
        page: the page as HTML.
        name: of the place, a comment in the template.
        section: HTML.

    Returns:
        None for a page without such a place.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, after = page.partition(start)
    if not found:
        return None
    if end in after:
        after = after.partition(end)[2]
    return f"{before}{start}\n{section}{end}{after}"


def data_url(content: bytes, kind: str) -> str:
    """Returns a file as a data URL, so that the page needs no other file.

    Args:
        content: the bytes of the file.
        kind: its media type, such as image/png.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
