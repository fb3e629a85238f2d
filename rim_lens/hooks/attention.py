"""Readers of attention: mass on named spans, and full rows of named heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import ATOMS, SpanBatch, Spans
from rim_lens.errors import EmptySpan, SpanError, WrongHookShape
from rim_lens.hooks.base import Edit
from rim_lens.hooks.positions import Positions, rows_to_read
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import Attention, Head, Model, ModelFacts, RowHook, Site, hook_name


class SpanAttention(Reader):
    """Attention mass of every head on named spans, summed inside the hook.

    The mass of a query row on a span is the *sum* of the row's post-softmax attention over the span's keys;
    the masses on the atoms sum to 1. Nothing of size query × key is kept.

    Gives ``attention_mass`` (prompt, layer, head, span), a share between 0 and 1. Where one row is read ("prompt_last",
    or a mask of one row in each prompt) it also gives

    - ``attention_argmax`` (prompt, layer, head): the atom that holds the row's largest entry, as an index into `ATOMS`
      (paper, section 3: the argmax key position). The sink is an atom of its own, so a head that rests on the first
      token shows as such. Of equal entries the first counts.
    - ``attention_argmax_pos`` (prompt, layer, head): the position of that key, counted in tokens from the first token of
      the `assistant` span, negative before it, whatever the padding (paper, figure A3). The span is the role word: in
      ChatML 0 is ``assistant`` and −1 the ``<|im_start|>`` before it. Left out where some prompt has no such span.
    - ``attention_entropy`` (prompt, layer, head): entropy of the row in nats; 0 where one key gets all.
    - ``visible_keys`` (prompt, layer): keys at or before the row, padding left out; the entropy is at most the log of
      that. A layer's sliding window is not taken into account.

    Mass says where a head looks, not what it carries: a head with all its mass on a span may write nothing
    from it. Ablate before you conclude.

    Args:
        spans: Names of the spans to read (default: every span with a token in each prompt), or the
            masks themselves (`batch.spans`) for use outside `capture`.
        query: "prompt_last" (default: the row that produces the first token), a span's name or a mask
            (the mean over its rows), or "generated".
        normalise: None, or "uniform": mass ÷ (keys of the span ÷ visible keys), so 1 means as much as
            uniform attention would give.

    Raises:
        EmptySpan: A span asked for has no token in some prompt.
        UnknownSpan: No span bears that name.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> reader = rl.SpanAttention(spans=off.spans).register(model)
    >>> _ = model(off.tokens, attention_mask=off.attention_mask)
    >>> reader.result["attention_mass"].dims
    ('prompt', 'layer', 'head', 'span')
    >>> reader.remove()
    """

    reads: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(
        self,
        spans: Spans | Sequence[str] | None = None,
        query: Positions = "prompt_last",
        normalise: Literal["uniform"] | None = None,
    ) -> None:
        super().__init__()
        if normalise not in (None, "uniform"):
            raise ValueError(f"normalise={normalise!r} was asked for; there are None and 'uniform'.")
        if isinstance(spans, str):
            raise SpanError(f"spans={spans!r} is one name; give a list of names: spans=[{spans!r}].")
        self.spans = spans
        self.query = query
        self.normalise = normalise
        self._names: list[str] = []
        self._anchored: bool | None = None

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        if batch is not None and isinstance(self.spans, Spans):
            raise SpanError(
                "SpanAttention was given masks, and a batch is bound as well. Give names (spans=['request', 'think']),"
                " or none for all that are present."
            )
        masks = self._masks(batch)
        self._names = self._choose(masks)
        self._anchored = _has_assistant(masks)
        if isinstance(self.query, str) and self.query not in ("all", "prompt_last", "generated"):
            masks.require(self.query)
        attrs = {
            "query": self.query if isinstance(self.query, str) else "mask",
            "normalise": self.normalise or "none",
        }
        variables = [
            Variable(
                "attention_mass",
                ("layer", "head", "span"),
                (facts.n_layers, facts.n_heads, len(self._names)),
                {"span": self._names},
                {"units": "share" if self.normalise is None else "multiple of uniform attention", **attrs},
            )
        ]
        if self._one_row():
            variables += self._of_one_row(facts, masks, attrs)
        return variables

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [
            (hook_name("pattern", layer), RowHook(partial(self._reduce, layer)))
            for layer in range(facts.n_layers)
        ]

    def _of_one_row(self, facts: ModelFacts, masks: Spans, attrs: dict[str, Any]) -> list[Variable]:
        def per_head(name: str, dtype: str, **more: Any) -> Variable:
            return Variable(
                name, ("layer", "head"), (facts.n_layers, facts.n_heads), attrs={**more, **attrs}, dtype=dtype
            )

        variables = [
            per_head(
                "attention_argmax",
                "int8",
                flag_meanings=" ".join(ATOMS),
                flag_values=list(range(len(ATOMS))),
                spans_present=" ".join(masks.present()),  # what a comparison may ask for
            ),
            per_head("attention_entropy", "float32", units="nats"),
            Variable(
                "visible_keys", ("layer",), (facts.n_layers,), attrs={"units": "keys", **attrs}, dtype="int32"
            ),
        ]
        if self._anchored:
            told = {"units": "tokens", "origin": "first token of the assistant span"}
            variables.insert(1, per_head("attention_argmax_pos", "int32", **told))
        return variables

    def _one_row(self) -> bool:
        if isinstance(self.query, str):
            return self.query == "prompt_last"
        return bool((self.query.sum(dim=1) == 1).all())

    def _choose(self, masks: Spans) -> list[str]:
        if self.spans is None or isinstance(self.spans, Spans):
            return masks.present()
        for name in self.spans:
            masks.require(name)
        return list(self.spans)

    def _masks(self, batch: SpanBatch | None) -> Spans:
        if isinstance(self.spans, Spans):
            return self.spans
        if batch is None:
            raise SpanError(
                "SpanAttention does not know the spans of what is being read. Pass them (spans=batch.spans), or run it"
                " through rl.capture, which binds the batch."
            )
        return batch.spans

    def _reduce(self, layer: int, seen: Attention) -> None:
        n_prompts, n_keys, offset = seen.n_prompts, seen.n_keys, seen.offset
        masks = self._masks(self._batch)
        width = masks["sink"].shape[1]
        if masks["sink"].shape[0] != n_prompts or (offset == 0 and width != n_keys):
            raise WrongHookShape(
                f"the spans describe {masks['sink'].shape[0]} prompts of {width} positions, but this pass has"
                f" {n_prompts} of {n_keys}. Pass the spans of the batch that is really being read. A reader that was registered"
                " before and not removed stays on the model: reader.remove(), or model.reset_hooks() where its name is lost."
            )
        queries = rows_to_read(self.query, self._batch, _real(masks), offset, n_prompts, seen.n_queries)
        if not queries.any():
            return  # a later step of a generation: the row asked for was read at the prefill
        if not self._names:
            self._names = self._choose(masks)
        keys = _membership(masks, self._names, n_keys).to(seen.device).float()
        rows, visible = seen.mean(queries), _uniform(seen, queries, masks)
        mass = torch.einsum("phk,psk->phs", rows, keys)
        if self.normalise == "uniform":
            expected = torch.einsum("pk,psk->ps", visible, keys)
            if bool((expected == 0).any()):
                raise EmptySpan(
                    "a span lies wholly after the query rows: uniform attention there is 0, nothing to divide by."
                )
            mass = mass / expected[:, None]
        self.keep("attention_mass", layer, mass)
        if self._one_row():
            self._keep_one_row(layer, rows, visible, masks)

    def _keep_one_row(
        self,
        layer: int,
        rows: Float[Tensor, "prompt head key"],
        visible: Float[Tensor, "prompt key"],
        masks: Spans,
    ) -> None:
        top = rows.argmax(dim=-1)
        atoms = _membership(masks, ATOMS, rows.shape[-1]).to(rows.device)
        holder = atoms.to(torch.int8).argmax(dim=1)  # [prompt, key] → which atom the key is in
        self.keep("attention_argmax", layer, holder.gather(1, top).to(torch.int8))
        if self._anchored is None:
            self._anchored = _has_assistant(masks)
        if self._anchored:
            origin = masks["assistant"].int().argmax(dim=1).to(rows.device)
            self.keep("attention_argmax_pos", layer, (top - origin[:, None]).int())
        self.keep("attention_entropy", layer, torch.special.entr(rows).sum(dim=-1))
        self.keep("visible_keys", layer, (visible > 0).sum(dim=-1).int())


class AttentionRows(Reader):
    """Full attention rows of heads asked for by name.

    Gives ``attention_rows`` (prompt, row_head, key): the query row's post-softmax attention to each key,
    0 on left padding. Grows with heads × keys, hence by name only.

    Args:
        heads: (layer, head) pairs, in the order wanted.
        query: "prompt_last" (default), or a span's name or mask (the mean over its rows).

    Raises:
        UnknownHead: The model lacks one of the heads.
    """

    reads: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(self, heads: Iterable[Head], query: Positions = "prompt_last") -> None:
        super().__init__()
        self.heads = list(heads)
        self.query = query
        self._width = 0

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        heads = facts.check_heads(self.heads)
        if batch is None:
            raise SpanError("AttentionRows needs the batch it reads: run it through rl.capture.")
        self._width = batch.tokens.shape[1]
        return [
            Variable(
                "attention_rows",
                ("row_head", "key"),
                (len(heads), self._width),
                {"row_head": [f"L{layer}H{head}" for layer, head in heads]},
                {"units": "share"},
            )
        ]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        heads = facts.check_heads(self.heads)
        layers = sorted({layer for layer, _ in heads})
        return [
            (hook_name("pattern", layer), RowHook(partial(self._reduce, layer, heads))) for layer in layers
        ]

    def _reduce(self, layer: int, heads: list[Head], seen: Attention) -> None:
        n_keys = seen.n_keys
        if self._batch is None:
            raise SpanError("AttentionRows needs the batch it reads: run it through rl.capture.")
        real = _real(self._batch.spans)
        queries = rows_to_read(self.query, self._batch, real, seen.offset, seen.n_prompts, seen.n_queries)
        if not queries.any():
            return  # a later step of a generation
        if n_keys > self._width:
            raise WrongHookShape(
                f"AttentionRows was laid out for {self._width} keys, but this pass has {n_keys}: rows of tokens written"
                " under a cache grow. Read them in one pass over the finished batch (rl.generate(...).batch)."
            )
        # `place` stands in for the layer: rows come back in the order asked for
        places = [place for place, (its_layer, _) in enumerate(heads) if its_layer == layer]
        rows = seen.mean(queries, [heads[place][1] for place in places])
        for row, place in enumerate(places):
            padded = torch.nn.functional.pad(rows[:, row], (self._width - n_keys, 0))
            self.keep("attention_rows", place, padded)


def _membership(spans: Spans, names: Sequence[str], n_keys: int) -> Bool[Tensor, "prompt span key"]:
    masks = torch.stack([spans[name] for name in names], dim=1)
    return torch.nn.functional.pad(
        masks, (0, n_keys - masks.shape[-1])
    )  # keys past the prompt are in no span


def _has_assistant(spans: Spans) -> bool:
    return bool(spans["assistant"].any(dim=1).all())


def _real(spans: Spans) -> Bool[Tensor, "prompt pos"]:
    return torch.stack(list(spans.atoms().values())).any(dim=0)


def _uniform(
    seen: Attention, queries: Bool[Tensor, "prompt query"], spans: Spans
) -> Float[Tensor, "prompt key"]:
    """Mean over the chosen query rows of uniform attention over the visible keys."""
    real = torch.nn.functional.pad(_real(spans), (0, seen.n_keys - spans["sink"].shape[1]), value=True)
    real, queries = real.to(seen.device), queries.to(seen.device).float()
    weights = torch.nn.functional.pad(queries / queries.sum(dim=1, keepdim=True), (seen.offset, 0))
    each = weights / real.cumsum(dim=1).clamp(min=1)  # what a row gives to each key it sees
    return real * each.flip(1).cumsum(dim=1).flip(1)
