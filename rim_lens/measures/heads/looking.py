"""Where heads look, prompt by prompt, and how that moves between two conditions of the same requests.

Everything here works on what `rl.capture(model, batch, rl.SpanAttention())` gives: one row per prompt, by default the
last prompt token, which produces the first generated one. So there is no function where one capture says it:

- Attention to a given chain of thought from the row that produces the answer:
  ``rl.capture(model, cot, rl.SpanAttention(["cot"]))["attention_mass"]``. Of a chain that the model wrote itself:
  ``rl.SpanAttention(["cot"], query=answer_row(out.batch))`` on ``out.batch``.
- Share of a row on the sink: ``data["attention_mass"].sel(span="sink")``.
- Mass against what uniform attention would give: ``rl.SpanAttention(normalise="uniform")``.

What none of it shows: that a head carries anything. A decoy that looks as a refusal head does and writes nothing has the
same numbers; so does a head that rests on the empty block because there is nothing to do. Measure harmless requests too (a
head that moves there as well is positional), and ablate before you conclude.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from rim_lens.chat.spans import ATOMS, COMPOSITES, NEAREST, SpanBatch
from rim_lens.errors import CaptureError, EmptySpan, StatisticsError, UnknownSpan

if TYPE_CHECKING:
    import xarray as xr

CONDITIONS = ("first", "second")


def empty_block_span(batch: SpanBatch) -> str:
    """The span that stands for the empty think block: "gap" (paper, section 3), or "think" where some prompt has no gap.

    Between the tags of some formats there is no token (the toy's), and then the tags are all there is to look at.

    Raises:
        EmptySpan: Some prompt has no think block at all.

    >>> from rim_lens.chat import ChatFormat
    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> empty_block_span(ChatFormat.from_tokenizer(toy_tokenizer()).render("make bread please + 3 4 6", think="off"))
    'think'
    """
    name = "gap" if bool(batch.spans["gap"].any(dim=1).all()) else "think"
    batch.spans.require(name)
    return name


def answer_row(batch: SpanBatch) -> Bool[Tensor, "prompt pos"]:
    """The row of each prompt that produces the first token of the answer: after the closing tag and what follows it.

    In prompts that end where the answer begins, the last one. In what a model wrote (``rl.generate(...).batch``), the row
    before the first token of the answer after the last think block. Made for ``rl.SpanAttention(query=...)``, which
    then gives the statistics of one row.

    Raises:
        EmptySpan: In some prompt the think block is still open, or nothing was answered after it.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[:4]
    >>> out = rl.generate(model, chat.render(harmful, think="open"), max_new_tokens=12)
    >>> data = rl.capture(model, out.batch, rl.SpanAttention(["cot"], query=rl.answer_row(out.batch)))
    >>> data["attention_mass"].sel(span="cot").dims
    ('prompt', 'layer', 'head')
    """
    width = batch.tokens.shape[1]
    places = torch.arange(width)
    closed = batch.finished_thinking or (batch.think != "open",) * len(batch)
    written = batch.n_generated or (0,) * len(batch)
    rows = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    without = []
    for row in range(len(batch)):
        closing = batch.spans["think_close"][row].nonzero().flatten()
        after = int(closing[-1]) if len(closing) else -1
        said = (batch.spans["answer"][row] & (places > after)).nonzero().flatten()
        if not closed[row] or (len(said) == 0 and written[row]):
            without.append(row)
        else:
            rows[row, int(said[0]) - 1 if len(said) else width - 1] = True
    if without:
        raise EmptySpan(
            f"no row of {len(without)} of {len(batch)} prompts (first: {batch.prompts[without[0]].id!r}) produces an answer:"
            " the think block is still open, or nothing was said after it. Leave them out (batch.select), or let the model"
            " write more (max_new_tokens=, close_unfinished=True)."
        )
    return rows


# --- one condition -----------------------------------------------------------------------------------


def argmax_in(data: xr.Dataset, span: str) -> xr.DataArray:
    """Whether the row's largest entry is on a span, an atom or a composite such as "think": Bool (prompt, layer, head).

    Raises:
        EmptySpan: Some prompt has no token there.
        UnknownSpan: No span bears that name.
        StatisticsError: The dataset is of no single row per prompt.
    """
    found = _one_row(data)
    _require(data, span)
    meanings = str(found.attrs["flag_meanings"]).split()
    inside = found.isin([meanings.index(atom) for atom in COMPOSITES.get(span, (span,))])
    inside.attrs = {"span": span}
    return inside.rename("argmax_in")


def entropy_share(data: xr.Dataset) -> xr.DataArray:
    """Entropy of the row ÷ log of the keys it sees: 0 where one key gets all, 1 where all get the same.

    So rows of prompts of unequal length can be held side by side. NaN where a row sees one key only.

    Raises:
        StatisticsError: The dataset is of no single row per prompt.
    """
    _one_row(data)
    keys = data["visible_keys"]
    share = data["attention_entropy"] / np.log(keys.where(keys > 1))
    share.attrs = {"units": "share of the log of the visible keys"}
    return share.rename("entropy_share")


# --- two conditions ----------------------------------------------------------------------------------


def argmax_shift(
    first: xr.Dataset, second: xr.Dataset, *, leaves: str = "assistant", enters: str = "gap"
) -> xr.DataArray:
    """Whether a head's largest entry is on `leaves` in the first condition and on `enters` in the second.

    The paper's statistic of refusal heads (section 3; first = open, second = off); its score is the mean over harmful
    prompts. Count it on harmless ones too: the paper did not, and a head that moves on both follows the position, not the
    request.

    Args:
        first: From ``rl.capture(model, open_, rl.SpanAttention())``.
        second: The same of the same requests in another condition.
        leaves: An atom or a composite; where the role word has several tokens any of them counts.
        enters: An atom or a composite; see `empty_block_span`.

    Returns:
        Bool (prompt, layer, head), in the order of `first`.

    Raises:
        EmptySpan: Some prompt has no token in the span, in that condition.
        UnknownSpan: No span bears that name.
        StatisticsError: The datasets are not of the same prompts, or are of no single row per prompt.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[:4]
    >>> open_, off = (rl.capture(model, chat.render(harmful, think=how), rl.SpanAttention()) for how in ("open", "off"))
    >>> moved = rl.argmax_shift(open_, off, enters="think")
    >>> moved.dims, moved.dtype.name
    (('prompt', 'layer', 'head'), 'bool')
    """
    first, second = matched(first, second)
    left, entered = argmax_in(first, leaves), argmax_in(second, enters)
    moved = left & entered
    moved.attrs = {**told(first, second), "leaves": leaves, "enters": enters}
    return moved.rename("argmax_shift")


def mass_shift(first: xr.Dataset, second: xr.Dataset, span: str, other: str | None = None) -> xr.DataArray:
    """Attention mass on a span in the first condition − mass on it (or on `other`) in the second.

    Positive where the head looks there more in the first. The unit is that of the datasets: a share, or a multiple of
    uniform attention.

    It does not show that what is looked at is used; and a long span has much mass from its length alone.

    Args:
        first: From `rl.capture` with `rl.SpanAttention`, the span among those read.
        second: The same of the same requests in another condition.
        span: Read in the first, and in the second where `other` is None.
        other: Another span to read in the second ("cot" against "think", say).

    Returns:
        Float (prompt, layer, head), in the order of `first`.

    Raises:
        EmptySpan: Some prompt has no token in the span, in that condition.
        CaptureError: The span was not read.
        StatisticsError: The datasets are not of the same prompts, of no single row per prompt, or of different units.
    """
    first, second = matched(first, second)
    before, after = mass(first, span), mass(second, other or span)
    if before.attrs.get("units") != after.attrs.get("units"):
        raise StatisticsError(
            f"one dataset has masses in {before.attrs.get('units')!r}, the other in {after.attrs.get('units')!r}; capture"
            " both with the same normalise=."
        )
    shift = before.drop_vars("span") - after.drop_vars("span")
    shift.attrs = {
        **told(first, second),
        "units": before.attrs.get("units", ""),
        "span": span,
        "other": other or span,
    }
    return shift.rename("mass_shift")


def matched(first: xr.Dataset, second: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Return two captures of one row per prompt with the prompts of the second in the order of the first.

    Raises:
        StatisticsError: They are not of the same prompts or heads, or are of no single row per prompt.
    """
    ids = []
    for data in (first, second):
        _one_row(data)
        if "prompt" not in data.coords:
            raise StatisticsError(
                "a dataset has no prompt ids, so that nothing can be paired; take both from rl.capture, not from a reader's"
                " result."
            )
        ids.append(data["prompt"].values.tolist())
    here, there = map(set, ids)
    if here != there or len(ids[0]) != len(ids[1]) or len(here) != len(ids[0]):
        odd = sorted(map(str, here ^ there))
        raise StatisticsError(
            f"the datasets are of {len(ids[0])} and {len(ids[1])} prompts, {len(here & there)} of them in both"
            f"{f' (not in both: {odd[0]!r})' if odd else ''}; statistics are paired by prompt id. Capture the same requests"
            " in both conditions, each once."
        )
    shapes = [(data.sizes["layer"], data.sizes["head"]) for data in (first, second)]
    if shapes[0] != shapes[1]:
        raise StatisticsError(
            f"the datasets have {shapes[0]} and {shapes[1]} layers and heads; take both from one model, or from models of one"
            " shape."
        )
    return first, second.sel(prompt=first["prompt"].values)


def _one_row(data: xr.Dataset) -> xr.DataArray:
    needed = ("attention_argmax", "attention_entropy", "visible_keys")
    lacking = [name for name in needed if name not in data]
    if lacking or "spans_present" not in data["attention_argmax"].attrs:
        what = f"lacks {', '.join(lacking)}" if lacking else "was captured by an earlier version"
        raise StatisticsError(
            f"a dataset {what}: it is not of one row per prompt. Capture rl.SpanAttention() with query='prompt_last' (the"
            " default) or a mask of one row in each prompt, such as rl.answer_row(batch)."
        )
    return data["attention_argmax"]


def present(data: xr.Dataset) -> Sequence[str]:
    """The spans that have a token in every prompt."""
    return str(data["attention_argmax"].attrs["spans_present"]).split()


def _require(data: xr.Dataset, span: str) -> None:
    if span not in (*ATOMS, *COMPOSITES):
        raise UnknownSpan(f"no span is called {span!r}; there are {', '.join((*ATOMS, *COMPOSITES))}.")
    there = present(data)
    if span not in there:
        nearest = NEAREST.get(span)
        advice = f" Ask for {nearest!r} instead." if nearest in there else ""
        raise EmptySpan(
            f"span {span!r} has no token in some prompts of condition {data.attrs.get('condition', '')!r}; whether a head looks"
            f" there is undefined, not no.{advice}"
        )


def mass(data: xr.Dataset, span: str) -> xr.DataArray:
    """Mass on one span, or why there is none.

    Raises:
        EmptySpan: Some prompt has no token there.
        CaptureError: The span was not read.
    """
    _require(data, span)
    read = data["span"].values.tolist()
    if span not in read:
        raise CaptureError(
            f"span {span!r} was not read, only {', '.join(read)}; capture rl.SpanAttention() without names, or with that one"
            " among them."
        )
    return data["attention_mass"].sel(span=span)


def told(first: xr.Dataset, second: xr.Dataset) -> dict[str, str]:
    """Which conditions were held side by side, for the attributes of a result; and which weights, where they are of two models."""
    both = dict(zip(CONDITIONS, (first, second), strict=True))
    found = {name: str(data.attrs.get("condition", "")) for name, data in both.items()}
    weights = {f"{name}_weights": str(data.attrs.get("weights_digest", "")) for name, data in both.items()}
    return found | weights if len(set(weights.values())) > 1 else found
