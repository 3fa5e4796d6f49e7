"""Unescapes the HTML entities of captions and prompts: the text encoder gets `Tom & Jerry`, not `Tom &amp; Jerry`.

OpenAI's tokenizer of CLIP unescapes its text before it tokenizes, so the encoder was trained on unescaped text.
"""

from __future__ import annotations

import html
import re

# With its semicolon: without one `AT&T` or `a&notb` would be ambiguous.
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_PASSES = 3  # scraped text is escaped twice at times: `&amp;#39;`


def unescape_entities(text: str) -> str:
    """Returns text with its HTML entities unescaped, also those that were escaped again; other text is unchanged."""
    for _ in range(_PASSES):
        unescaped = ENTITY.sub(lambda found: html.unescape(found[0]), text)
        if unescaped == text:
            break
        text = unescaped
    return text
