"""CircuitsVis, safe and offline.

Called as it is, CircuitsVis inserts some tokens as HTML (``<think>`` vanishes), breaks out of its page at a token
``</script>``, loads its code from a network and takes a minute for 16 heads of 256 tokens. Here every token is shown
literally, the code is the local copy and stands once in a page however many pictures there are, the page's policy
allows no request, and what a browser would choke on is refused with advice.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import CaptureError, UnknownHead, ViewTooLarge
from rim_lens.views import offline
from rim_lens.views.explorer.tokens import token_texts
from rim_lens.views.plots.style import BLUE, FONT

if TYPE_CHECKING:
    import xarray as xr

    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Head

# Heads × tokens²: sixteen heads of 64 tokens. A browser is busy with them for seconds, see docs/views.md; the explorer is not.
MAX_CELLS = 66_000
MAX_COLOURED = 20_000  # tokens × heads in one view of coloured tokens
_STYLE = f"""body {{ margin: 0; padding: 12px 16px; background: #fff; color: #1F2328; font: 14px/1.5 {FONT}; }}
figure {{ margin: 0 0 28px; }} figcaption {{ color: #57606a; overflow-wrap: anywhere; }}
figcaption b {{ color: #1F2328; }} .picture {{ overflow-x: auto; unicode-bidi: isolate; }}
"""
_SCRIPT = """
for (const [place, one] of JSON.parse(document.getElementById("pictures").textContent).entries()) {
  CircuitsVis.render("picture-" + place, CircuitsVis[one.element], one.props);
}
document.body.dataset.drawn = "yes";
"""


@dataclass(frozen=True)
class CircuitsVisPage:
    """CircuitsVis pictures that share one page; ``a + b`` puts them under each other.

    Attributes:
        pictures: Each with its element, its properties and a caption.
    """

    pictures: tuple[dict[str, Any], ...]

    def __add__(self, other: CircuitsVisPage) -> CircuitsVisPage:
        return CircuitsVisPage(self.pictures + other.pictures)

    def to_html(self) -> str:
        """The whole page, about 1.3 MB: it opens offline and asks for nothing."""
        body = "".join(
            f"<figure><figcaption><b>{html.escape(one['title'])}</b> {html.escape(one['caption'])}</figcaption>"
            f'<div class="picture" id="picture-{place}"></div></figure>\n'
            for place, one in enumerate(self.pictures)
        )
        told = [{"element": one["element"], "props": one["props"]} for one in self.pictures]
        data = [("pictures", "application/json", offline.harmless_json(told))]
        title = self.pictures[0]["title"] if self.pictures else "CircuitsVis"
        return offline.page(title, _STYLE, body, [offline.as_read(_library() + _SCRIPT)], data)

    def write(self, path: str | Path) -> Path:
        """Write the page to a file and return its path."""
        target = Path(path)
        offline.write(target, self.to_html())
        return target

    def _repr_html_(self) -> str:
        return offline.frame(self.to_html(), "CircuitsVis", "36em")

    def __repr__(self) -> str:
        return f"CircuitsVisPage({', '.join(one['title'] for one in self.pictures)})"


def circuitsvis_heads(
    chat: ChatFormat,
    batch: SpanBatch,
    patterns: xr.DataArray | Float[np.ndarray, "head query key"],
    *,
    row: int = 0,
    spans: Sequence[str] | None = None,
    max_cells: int = MAX_CELLS,
) -> CircuitsVisPage:
    """Patterns of several heads side by side; a click enlarges one.

    Args:
        chat: The format of the batch.
        batch: The prompts that were read.
        patterns: From `head_patterns`: (prompt, row_head, query, key), all query rows; or an array [head, query, key] as wide
            as the batch.
        row: Which prompt.
        spans: Show only the tokens of these spans, as queries and keys; None for all. What falls outside is left out, so
            that rows no longer sum to 1.
        max_cells: Most heads × tokens²; how long a browser takes for so many is in docs/views.md.

    Raises:
        CaptureError: The patterns do not fit the batch, or are not square.
        EmptySpan: A span asked for has no token.
        ViewTooLarge: More than `max_cells`.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:1], think="off")
    >>> rl.views.circuitsvis_heads(chat, off, rl.views.head_patterns(model, off, [(0, 5), (1, 3)]))
    CircuitsVisPage(L0H5, L1H3 (off))
    """
    values, names = _square(batch, patterns, row)
    places = _places(batch, row, spans)
    _check_cells(len(names), len(places), max_cells)
    props = {
        "attention": values[:, places][:, :, places].tolist(),
        "tokens": _tokens(chat, batch, row, places),
        "attentionHeadNames": names,
        "minValue": 0,
        "maxValue": 1,
        "positiveColor": BLUE,
        "maskUpperTri": True,
    }
    return _page("AttentionHeads", props, f"{', '.join(names)} ({batch.name})", batch, row, places)


def circuitsvis_pattern(
    chat: ChatFormat,
    batch: SpanBatch,
    patterns: xr.DataArray | Float[np.ndarray, "head query key"],
    head: Head | None = None,
    *,
    row: int = 0,
    spans: Sequence[str] | None = None,
    max_cells: int = MAX_CELLS,
) -> CircuitsVisPage:
    """The pattern of one head; hovering tells each value.

    Args:
        chat: The format of the batch.
        batch: The prompts that were read.
        patterns: From `head_patterns`, all query rows; or an array [head, query, key] as wide as the batch.
        head: (layer, head), where the patterns bear names; None takes the first.
        row: Which prompt.
        spans: Show only the tokens of these spans; None for all.
        max_cells: Most tokens².

    Raises:
        CaptureError: The patterns do not fit the batch, or are not square.
        EmptySpan: A span asked for has no token.
        UnknownHead: The patterns do not hold that head.
        ViewTooLarge: More than `max_cells`.
    """
    values, names = _square(batch, patterns, row)
    wanted = names[0] if head is None else f"L{head[0]}H{head[1]}"
    if wanted not in names:
        raise UnknownHead(
            f"{wanted} was asked for; these patterns hold {', '.join(names)}. Read it with rl.views.head_patterns."
        )
    places = _places(batch, row, spans)
    _check_cells(1, len(places), max_cells)
    props = {
        "attention": values[names.index(wanted)][places][:, places].tolist(),
        "tokens": _tokens(chat, batch, row, places),
        "minValue": 0,
        "maxValue": 1,
        "positiveColor": BLUE,
        "showAxisLabels": True,
        "maskUpperTri": True,
    }
    return _page("AttentionPattern", props, f"{wanted} ({batch.name})", batch, row, places)


def circuitsvis_tokens(
    chat: ChatFormat,
    batch: SpanBatch,
    rows: xr.DataArray | Float[np.ndarray, "head key"],
    *,
    row: int = 0,
    spans: Sequence[str] | None = None,
) -> CircuitsVisPage:
    """Tokens coloured by the attention they get from one query row, for one head or several to choose among.

    Args:
        chat: The format of the batch.
        batch: The prompts that were read.
        rows: ``attention_rows`` from `rl.capture` with `rl.AttentionRows`: (prompt, row_head, key); or an array [head, key].
        row: Which prompt.
        spans: Show only the tokens of these spans; None for all.

    Raises:
        CaptureError: The rows do not fit the batch.
        EmptySpan: A span asked for has no token.
        ViewTooLarge: Too many tokens × heads.
    """
    values, names = _values(batch, rows, row, ("row_head", "key"))
    if values.ndim != 2 or values.shape[-1] != batch.tokens.shape[1]:
        raise CaptureError(
            f"rows of shape {values.shape} were given for prompts of {batch.tokens.shape[1]} positions; they must be"
            " (head, key), as rl.capture(model, batch, rl.AttentionRows(heads))['attention_rows'] gives them."
        )
    places = _places(batch, row, spans)
    if len(names) * len(places) > MAX_COLOURED:
        raise ViewTooLarge(
            f"{len(names)} heads × {len(places)} tokens were asked for; at most {MAX_COLOURED} together. Name fewer heads,"
            " crop to spans, or use rl.views.write_explorer."
        )
    # This element inserts its tokens as HTML, the others draw text.
    tokens = [html.escape(token, quote=False) for token in _tokens(chat, batch, row, places)]
    if len(names) == 1:
        props = {
            "tokens": tokens,
            "values": values[0][places].tolist(),
            "minValue": 0,
            "maxValue": max(float(values[0][places].max()), 1e-9),
            "positiveColor": BLUE,
        }
        return _page("ColoredTokens", props, f"{names[0]} ({batch.name})", batch, row, places)
    props = {"tokens": tokens, "values": values[:, places].T.tolist(), "labels": names}
    return _page("ColoredTokensMulti", props, f"{', '.join(names)} ({batch.name})", batch, row, places)


@cache
def _library() -> str:
    import circuitsvis

    file = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    text = file.read_text(encoding="utf-8")
    # The map of the source is a file beside it that the page does not have.
    return "\n".join(line for line in text.splitlines() if not line.startswith("//# sourceMappingURL"))


def _values(batch: SpanBatch, given: Any, row: int, dims: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """One prompt's numbers with the names of their heads; on left padding they are 0."""
    if not 0 <= row < len(batch):
        raise CaptureError(f"row {row} was asked for; the batch has {len(batch)}, counted from 0.")
    if hasattr(given, "dims"):
        if set(given.dims) != {"prompt", *dims}:
            raise CaptureError(
                f"an array with dimensions {given.dims} was given; it must have prompt, {', '.join(dims)}."
            )
        asked = batch.prompts[row].id
        held = [str(name) for name in given["prompt"].values]
        if asked not in held:
            raise CaptureError(
                f"the batch's prompt {asked!r} is not among those read ({', '.join(held[:3])} …); give the batch that was read."
            )
        one = given.isel(prompt=held.index(asked)).transpose(*dims)
        names = [str(name) for name in one["row_head"].values]
        values = one.values
    else:
        values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float32)
        names = [f"head {place}" for place in range(len(values))]
    if not names or not np.isfinite(values).all():
        raise CaptureError("no head was given, or NaN or infinity is among the numbers; read them anew.")
    return values, names


def _square(batch: SpanBatch, given: Any, row: int) -> tuple[Float[np.ndarray, "head query key"], list[str]]:
    values, names = _values(batch, given, row, ("row_head", "query", "key"))
    width = batch.tokens.shape[1]
    if values.ndim != 3 or values.shape[1:] != (width, width):
        raise CaptureError(
            f"patterns of shape {values.shape} were given for prompts of {width} positions; they must be (head, {width},"
            f" {width}), as rl.views.head_patterns(model, batch, heads) gives them without last=."
        )
    return values, names


def _places(batch: SpanBatch, row: int, spans: Sequence[str] | None) -> list[int]:
    if isinstance(spans, str):
        raise CaptureError(f"spans={spans!r} is one name; give a list of names: spans=[{spans!r}].")
    wanted = batch.attention_mask[row].bool()
    if spans is not None:
        chosen = batch.select([row])
        inside = torch.stack([chosen.spans.require(name)[0] for name in spans]).any(dim=0)
        wanted = torch.nn.functional.pad(inside, (len(wanted) - len(inside), 0))
    return [int(place) for place in wanted.nonzero().flatten()]


def _tokens(chat: ChatFormat, batch: SpanBatch, row: int, places: Sequence[int]) -> list[str]:
    first = int(batch.tokens.shape[1] - batch.attention_mask[row].sum())
    texts = token_texts(chat, batch.tokens[row, first:].tolist())
    return [texts[place - first] for place in places]


def _check_cells(n_heads: int, n_tokens: int, most: int) -> None:
    cells = n_heads * n_tokens**2
    if cells > most:
        fits = int(most / n_tokens**2)
        few = (
            f"at most {fits} heads of so many tokens"
            if fits
            else f"a head of at most {int(most**0.5)} tokens"
        )
        raise ViewTooLarge(
            f"{n_heads} heads × {n_tokens}² tokens are {cells} cells, about {cells / 17_000:.0f} s in a browser; the cap is"
            f" {most}, {few}. Choose heads by their mass first, crop with spans=[...], or use rl.views.write_explorer,"
            " which is made for long prompts. max_cells= lifts the cap."
        )


def _page(
    element: str, props: dict[str, Any], title: str, batch: SpanBatch, row: int, places: Sequence[int]
) -> CircuitsVisPage:
    chosen = batch.select([row])
    offset = batch.tokens.shape[1] - chosen.tokens.shape[1]
    atoms = chosen.atoms_of(0)
    runs: list[tuple[str, int, int]] = []
    for shown, place in enumerate(places):
        atom = atoms[place - offset]
        if runs and runs[-1][0] == atom:
            runs[-1] = (atom, runs[-1][1], shown)
        else:
            runs.append((atom, shown, shown))
    told = [f"{atom} {first}" if first == last else f"{atom} {first}–{last}" for atom, first, last in runs]
    caption = f"Tokens by span, counted from 0: {', '.join(told)}."
    return CircuitsVisPage(({"element": element, "props": props, "title": title, "caption": caption},))
