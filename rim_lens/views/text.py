"""How text from models, tokenizers and prompts is shown: every character visible, none of it obeyed."""

from __future__ import annotations

import html
import re

_JOINER = "\u200d"  # holds emoji and some scripts' letters together
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: object) -> str:
    r"""Write out what cannot be seen or would change how other text is seen.

    Control characters, direction marks, zero-width characters and lone surrogates become escapes; letters of
    every script and emoji stay as they are. It does not make text safe in HTML.

    >>> visible("a\tb\x00\u202ec")
    'a\\tb\\x00\\u202ec'
    >>> visible("</think> \u05d0 \U0001f468\u200d\U0001f469")
    '</think> א 👨‍👩'
    """
    characters = str(text)
    return "".join(
        character
        if character.isprintable() or (character == _JOINER and _joins(characters, place))
        else _escaped(character)
        for place, character in enumerate(characters)
    )


def plotly_text(text: object) -> str:
    """Text for a plotly label or hover, where plotly would otherwise read tags.

    >>> plotly_text("<think>")
    '&lt;think&gt;'
    """
    return html.escape(visible(text), quote=False)


def markdown_text(text: object) -> str:
    r"""Plain text inside Markdown, table cells included.

    >>> print(markdown_text("a|b <b> [x](y)"))
    a\|b &lt;b> \[x\](y)
    """
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", visible(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def markdown_code(text: object) -> str:
    """A code span that holds any text, backticks and table bars included.

    >>> markdown_code("</think>"), markdown_code("a`b")
    ('`</think>`', '`` a`b ``')
    """
    shown = visible(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest or not shown.strip() else f"{fence}{shown}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """A fenced block that no line of the text can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _NAMED:
        return _NAMED[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _joins(text: str, place: int) -> bool:
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return bool(before and after) and all(
        ord(near) > 0x7F and (near.isprintable() or near == "\ufe0f") for near in (before, after)
    )
