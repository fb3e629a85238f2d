"""Pages that ask for nothing: which scripts may run, data that cannot end its own tag, frames for notebooks."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def policy(scripts: Iterable[str]) -> str:
    """A content security policy: no request at all, and no script but these."""
    digests = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    # Plotly sets styles of its own, and draws maps as images made in the page.
    return (
        f"default-src 'none'; script-src {digests or chr(39) + 'none' + chr(39)}; style-src 'unsafe-inline'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )


def harmless_json(value: Any) -> str:
    r"""JSON that can stand in a page: no character opens or closes a tag.

    >>> harmless_json("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_read(script: str) -> str:
    """A script as the browser reads it, whose digest the policy names: newlines alone, and no end of its own tag."""
    lines = script.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"</(script)", r"<\\/\1", lines, flags=re.IGNORECASE)


def page(
    title: str, style: str, body: str, scripts: Iterable[str], data: Iterable[tuple[str, str, str]]
) -> str:
    """A whole page that opens offline.

    Args:
        title: Plain text.
        style: CSS.
        body: HTML, trusted.
        scripts: Scripts of our own or of a library, as `as_read` gives them; modules, run in that order.
        data: (id, media type, text that ends no tag): what the scripts read.
    """
    scripts = list(scripts)
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy(scripts))}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n',
            f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n",
            "<noscript><p>This page draws with JavaScript.</p></noscript>\n",
            *(f'<script type="{media}" id="{key}">{text}</script>\n' for key, media, text in data),
            *(f'<script type="module">{script}</script>\n' for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def frame(document: str, title: str, height: str) -> str:
    """A page inside a notebook, in a frame of its own: it can run its scripts, and reach neither notebook nor network."""
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(document)}" title="{html.escape(title)}"'
        f' style="width:100%;height:{height};border:1px solid #8884;border-radius:6px"></iframe>'
    )


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)
