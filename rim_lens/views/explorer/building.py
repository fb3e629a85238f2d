"""What the head explorer shows: measured here, kept as float32, small enough to open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from rim_lens.capturing import capture
from rim_lens.chat.conditions import render_conditions
from rim_lens.chat.sentences import Split, cot_sentences, split_sentences
from rim_lens.chat.spans import ATOMS, COMPOSITES, SpanBatch
from rim_lens.errors import CaptureError, ConditionError, NotEnoughData, UnknownSpan, ViewTooLarge
from rim_lens.hooks.attention import SpanAttention
from rim_lens.lens import model_facts
from rim_lens.views.explorer.page import FORMAT_VERSION, MAX_BYTES, Arrays, ExplorerView, page_bytes, palette
from rim_lens.views.explorer.reading import GroupMasses, HeadPatterns
from rim_lens.views.explorer.tokens import token_texts
from rim_lens.views.plots import style
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Head, Model
    from rim_lens.prompts import Prompt

MAX_SENTENCES = 32
_ROWS_SHARE = 0.35  # of the budget goes to full rows where no window was asked for
_CAVEAT = (
    "Attention says where a head looks, not what it carries: a head can look hard and write nothing. Effects say what removing it does;"
    " where nothing was removed it reads “not tested”."
)


@dataclass(frozen=True)
class HeadView(ExplorerView):
    """Everything a page or widget of the head explorer holds.

    Attributes:
        data: Plain values: model, conditions, tokens, groups, names of arrays.
        arrays: float32 arrays that `data` names by their place: maps [span, layer, head], group masses [layer, head,
            from, to], rows of chosen heads (row q has q + 1 entries, rows one after the other).
        batches: The prompts that were read, by condition.
    """

    batches: dict[str, SpanBatch]
    of: ClassVar[str] = "heads"

    def __repr__(self) -> str:
        conditions = ", ".join(one["name"] for one in self.data["conditions"])
        return f"HeadView({self.data['title']}: {conditions}; {self.n_bytes / 1e6:.1f} MB)"


def head_view(
    model: Model,
    chat: ChatFormat,
    prompts: Sequence[Prompt | str],
    conditions: Sequence[str] | Mapping[str, str | Sequence[str] | None] | Mapping[str, SpanBatch] = (
        "off",
        "careful",
    ),
    *,
    heads: Sequence[Head] | None = None,
    effects: Mapping[str, Any] | Any | None = None,
    effect_unit: str = "nats",
    span: str | None = None,
    shown: int = 1,
    last: int | None = None,
    max_sentences: int = MAX_SENTENCES,
    split: Split = split_sentences,
    max_bytes: int = MAX_BYTES,
    system: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> HeadView:
    """Measure what the head explorer shows.

    The map's masses are those of the last prompt token, mean over all prompts. For the first `shown` prompts every head's
    attention is kept between spans and sentences of the chain of thought, and full rows for `heads`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its format.
        prompts: Records or strings.
        conditions: As `render_conditions` takes them; or name → SpanBatch of these very prompts, for text that a model wrote.
        heads: (layer, head) pairs whose full rows are kept. None: the tested ones with the largest effects, and those
            whose mass on `span` differs most between the first two conditions, eight together.
        effects: Of removing each head: an array or DataArray [layer, head] (NaN: not tested), a mapping from (layer,
            head), or a table with columns layer, head, effect, as `refusal_heads(...).table`; or a mapping from names to such.
        effect_unit: What effects are in.
        span: What the map shows first: "think" where it is, when None.
        shown: How many prompts can be looked at token by token.
        last: How many last query rows of each of `heads` are kept; None: all that the budget allows.
        max_sentences: Neighbouring sentences of a longer chain of thought are taken together.
        split: How a chain of thought is cut into sentences, see `cot_sentences`.
        max_bytes: Of the page.
        system: System words.
        seed: Of filler and unrelated text.
        progress: Show progress bars.

    Raises:
        ConditionError: No condition, or batches of other prompts.
        UnknownHead: The model lacks a head asked for.
        UnknownSpan: No condition has that span in every prompt.
        ViewTooLarge: The page would not fit in `max_bytes`; raised before any pass, with the sizes.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    >>> view = rl.views.head_view(model, rl.ChatFormat.from_model(model), requests)
    >>> [one["name"] for one in view.data["conditions"]], view.n_bytes < 100_000
    (['off', 'careful'], True)
    """
    batches = _batches(chat, prompts, conditions, system, seed)
    n_prompts = len(next(iter(batches.values())))
    if not 1 <= shown <= n_prompts:
        raise NotEnoughData(
            f"shown={shown} prompts were asked for; give 1 to {n_prompts}, as many as there are."
        )
    facts = model_facts(model)
    chosen = None if heads is None else facts.check_heads(heads)
    maps = _effects(effects, facts.n_layers, facts.n_heads, effect_unit)
    spans = [
        name
        for name in (*ATOMS, *COMPOSITES)
        if any(name in batch.spans.present() for batch in batches.values())
    ]
    first_span = span or ("think" if "think" in spans else spans[-1])
    if first_span not in spans:
        raise UnknownSpan(
            f"span {first_span!r} is in no condition's every prompt; there are {', '.join(spans)}."
        )
    cut = {
        (row, name): _groups(chat, batch.select([row]), max_sentences, split)
        for row in range(shown)
        for name, batch in batches.items()
    }
    last = _window(
        [len(groups.of) for groups in cut.values()],
        [len(groups.names) for groups in cut.values()],
        facts.n_layers * facts.n_heads,
        8 if chosen is None else len(chosen),
        last,
        max_bytes,
        len(spans) * len(batches) + len(maps),
    )

    arrays = Arrays()
    kept = arrays.keep
    told, masses = [], []
    for name, batch in batches.items():
        mass = capture(model, batch, SpanAttention(), progress=progress)["attention_mass"].mean("prompt")
        mass = mass.transpose("span", "layer", "head")
        masses.append(mass)
        present = [str(one) for one in mass["span"].values]
        told.append(
            {
                "name": name,
                "colour": style.condition_colour(name),
                "spans": present,
                "mass": kept(mass.values),
            }
        )
    if chosen is None:
        chosen = _telling(masses, maps, first_span)
    looked = [
        {
            "id": visible(next(iter(batches.values())).prompts[row].id),
            "conditions": [
                _one(model, chat, batch.select([row]), cut[row, name], chosen, last, kept)
                for name, batch in batches.items()
            ],
        }
        for row in range(shown)
    ]
    start = chosen[0] if chosen else (0, 0)
    data = {
        "format_version": FORMAT_VERSION,
        "title": f"Where the heads of {visible(facts.name)} look",
        "about": _about(facts, batches, n_prompts, chosen, last, maps),
        "caveat": _CAVEAT,
        "model": {"name": visible(facts.name), "n_layers": facts.n_layers, "n_heads": facts.n_heads},
        "n_prompts": n_prompts,
        "palette": palette(),
        "atoms": list(ATOMS),
        "composites": {name: list(parts) for name, parts in COMPOSITES.items()},
        "spans": spans,
        "conditions": told,
        "effects": [{"name": name, "unit": unit, "values": kept(values)} for name, unit, values in maps],
        "prompts": looked,
        "start": {
            "stat": "shift" if len(told) > 1 and _in_both(told, first_span) else "massA",
            "span": first_span,
            "head": list(start),
        },
    }
    return HeadView(data, tuple(arrays), batches)


# --- prompts, groups -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """One prompt's tokens in groups: its spans, the chain of thought by sentences."""

    of: list[int]  # of each real token
    names: list[dict[str, Any]]


def _batches(
    chat: ChatFormat, prompts: Sequence[Prompt | str], conditions: Any, system: str | None, seed: int
) -> dict[str, SpanBatch]:
    if not len(conditions):
        raise ConditionError("no condition was named; give one or more, for instance ('off', 'careful').")
    if not (
        isinstance(conditions, Mapping) and any(isinstance(one, SpanBatch) for one in conditions.values())
    ):
        return render_conditions(chat, prompts, conditions, system=system, seed=seed)
    wanted = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
    for name, batch in conditions.items():
        if not isinstance(batch, SpanBatch) or [prompt.text for prompt in batch.prompts] != wanted:
            raise ConditionError(
                f"condition {name!r} is not a SpanBatch of the {len(wanted)} prompts given; render or generate it from them."
            )
    return dict(conditions)


def _groups(chat: ChatFormat, one: SpanBatch, max_sentences: int, split: Split) -> _Cut:
    atoms = one.atoms_of(0)
    names: list[dict[str, Any]] = []
    sentences = np.full(len(atoms), -1)
    said: tuple[str, ...] = ()
    if "cot" in atoms:
        found = cot_sentences(chat, one, split)
        said, sentences = found.texts[0], found.index[0, -len(atoms) :].numpy()
    per = max(1, -(-len(said) // max(1, max_sentences)))  # sentences taken together
    keys: dict[tuple[str, int], int] = {}
    of = []
    for atom, sentence in zip(atoms, sentences.tolist(), strict=True):
        key = (atom, sentence // per if atom == "cot" else -1)
        if key not in keys:
            keys[key] = len(keys)
            names.append(_named(atom, key[1], per, said))
        of.append(keys[key])
    return _Cut(of, names)


def _named(atom: str, block: int, per: int, said: tuple[str, ...]) -> dict[str, Any]:
    if atom != "cot" or len(said) < 2:
        return {"span": atom, "name": atom, "sentence": None}
    first, stop = block * per, min((block + 1) * per, len(said))
    number = f"{first + 1}" if stop - first == 1 else f"{first + 1}–{stop}"
    text = visible(" ".join(said[first:stop]))
    return {"span": atom, "name": f"cot {number}", "sentence": text if len(text) <= 240 else text[:239] + "…"}


def _one(
    model: Model, chat: ChatFormat, one: SpanBatch, cut: _Cut, heads: Sequence[Head], last: int, kept: Any
) -> dict[str, Any]:
    n = len(cut.of)
    position = int(one.prompt_last[0])
    groups = GroupMasses(torch.tensor(cut.of), len(cut.names), position)
    readers = [groups, HeadPatterns(heads, last=last)] if heads else [groups]
    data = capture(model, one, *readers)
    rows = {}
    if heads:
        patterns = data["attention_patterns"].values[0]
        first = n - patterns.shape[1]
        for place, (layer, head) in enumerate(heads):
            rows[f"{layer}.{head}"] = {"first": first, "values": kept(packed(patterns[place], first))}
    return {
        "tokens": token_texts(chat, one.tokens[0].tolist()),
        "atoms": one.atoms_of(0),
        "groups": cut.names,
        "group_of": cut.of,
        "last": position,
        "summary": kept(data["group_mass"].values[0]),
        "rows": rows,
    }


def packed(rows: Float[np.ndarray, "query key"], first: int) -> Float[np.ndarray, " entry"]:
    """What can be seen of each row, one after the other: row q has q + 1 entries.

    >>> packed(np.array([[1.0, 0.0], [0.25, 0.75]]), first=0).tolist()
    [1.0, 0.25, 0.75]
    """
    return np.concatenate([row[: first + place + 1] for place, row in enumerate(rows)])


# --- what is worth the room ------------------------------------------------------------------------------


def _window(
    lengths: Sequence[int],
    n_groups: Sequence[int],
    n_model_heads: int,
    n_heads: int,
    last: int | None,
    max_bytes: int,
    n_maps: int,
) -> int:
    """How many last rows are kept; refuses what does not fit."""

    def rows(window: int) -> int:
        return n_heads * sum(page_bytes(sum(range(max(0, n - window) + 1, n + 1))) for n in lengths)

    fixed = (
        page_bytes(n_model_heads * n_maps)
        + sum(page_bytes(n_model_heads * (n + 1) * n) for n in n_groups)
        + 40 * sum(lengths)
    )  # texts of tokens and their labels
    longest = max(lengths)
    if last is None:
        room = max(_ROWS_SHARE * max_bytes, 0.9 * max_bytes - fixed)
        low, high = 1, longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if rows(middle) <= room else (low, middle - 1)
        last = low
    elif last < 1:
        raise CaptureError(
            f"last={last} rows were asked for; ask for one at least, or None for all that fit."
        )
    last = min(last, longest)
    if fixed + rows(last) > max_bytes:
        raise ViewTooLarge(
            f"the page would take {(fixed + rows(last)) / 1e6:.0f} MB, the limit is {max_bytes / 1e6:.0f}: {fixed / 1e6:.0f} MB for"
            f" spans and sentences of all {n_model_heads} heads, {rows(last) / 1e6:.0f} MB for the last {last} rows of {n_heads} heads."
            " Show fewer prompts (shown=1) or conditions, keep fewer heads or rows (heads=, last=), lower max_sentences, or raise"
            " max_bytes."
        )
    return last


def _telling(masses: Sequence[Any], maps: Sequence[tuple[str, str, np.ndarray]], span: str) -> list[Head]:
    """Eight heads to begin with: the largest effects, then the largest shift of mass on the span."""
    orders = []
    for _, _, values in maps[:1]:
        orders.append(np.where(np.isnan(values), -np.inf, np.abs(values)))
    held = [mass.sel(span=span).values for mass in masses if span in mass["span"].values]
    orders.append(np.abs(held[0] - held[1]) if len(held) > 1 else held[0])
    chosen: list[Head] = []
    for order, most in zip(orders, [5, 8] if len(orders) > 1 else [8], strict=True):
        for flat in np.argsort(-order, axis=None, kind="stable"):
            layer, head = (int(index) for index in np.unravel_index(flat, order.shape))
            if len(chosen) >= most or not np.isfinite(order[layer, head]):
                break
            if (layer, head) not in chosen:
                chosen.append((layer, head))
    return chosen


def _effects(given: Any, n_layers: int, n_heads: int, unit: str) -> list[tuple[str, str, np.ndarray]]:
    if given is None:
        return []
    if isinstance(given, Mapping) and given and all(isinstance(key, str) for key in given):
        return [(visible(name), unit, _grid(one, n_layers, n_heads)) for name, one in given.items()]
    return [("effect of removing the head", unit, _grid(given, n_layers, n_heads))]


def _grid(given: Any, n_layers: int, n_heads: int) -> Float[np.ndarray, "layer head"]:
    values = np.full((n_layers, n_heads), np.nan, dtype=np.float32)
    if hasattr(given, "columns"):
        given = {
            (int(layer), int(head)): effect
            for layer, head, effect in zip(given["layer"], given["head"], given["effect"], strict=True)
        }
    if isinstance(given, Mapping):
        for (layer, head), effect in given.items():
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise CaptureError(
                    f"an effect of head ({layer}, {head}) was given; the model has {n_layers} layers of {n_heads} heads."
                )
            values[layer, head] = effect
        return values
    if hasattr(given, "dims"):
        given = given.transpose("layer", "head").values
    array = np.asarray(given, dtype=np.float32)
    if array.shape != values.shape:
        raise CaptureError(
            f"effects of shape {array.shape} were given; they must be [layer, head], {values.shape}."
        )
    return np.where(np.isinf(array), np.nan, array)


def _in_both(told: Sequence[Mapping[str, Any]], span: str) -> bool:
    return all(span in one["spans"] for one in told[:2])


def _about(
    facts: Any,
    batches: Mapping[str, SpanBatch],
    n_prompts: int,
    heads: Sequence[Head],
    last: int,
    maps: Sequence[Any],
) -> str:
    from rim_lens import __version__

    longest = max(int(batch.lengths.max()) for batch in batches.values())
    rows = "all rows" if last >= longest else f"the last {last} rows"
    tested = "" if maps else " No head was tested by removal here."
    return (
        f"{facts.n_layers} layers × {facts.n_heads} heads; {n_prompts} {'prompt' if n_prompts == 1 else 'prompts'} under"
        f" {', '.join(batches)}. Mass: attention of the last prompt token, summed over a span. Full patterns: {len(heads)} {'head' if len(heads) == 1 else 'heads'},"
        f" {rows}; spans and sentences: every head.{tested} rim_lens {__version__}."
    )
