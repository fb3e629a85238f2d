"""Patching between two runs: activations of a source run put in place of those of the run under way.

The source may be the same requests in another condition (off, a given CoT, filler), their twins, or the same prompts on
a tuned model. Row i of the source stands for row i of the target, and tokens correspond by span and position rule
(`rim_lens.hooks.alignment`).

Denoising puts what a sound run computed into one that lacks the behaviour, noising the reverse; which of the two it is
follows from which batch is the source and which is read. They answer different questions (enough for the behaviour,
or needed for it) and need not agree.

The setters of `transformer_lens.patching` are not used: they take the corrupted tokens without an attention mask, match
rows by absolute position, so that padding and spans of unequal length are beyond them, and are no context managers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, ReferenceMismatch, SpanError, UnknownLayer, WrongHookShape
from rim_lens.hooks.ablating import by_layer, put
from rim_lens.hooks.alignment import Align, Alignment, check_rule
from rim_lens.hooks.base import Edit, describe
from rim_lens.hooks.editing import AligningEditor, Change, Rows
from rim_lens.hooks.heads import some_heads
from rim_lens.hooks.neurons import some_neurons
from rim_lens.hooks.own_pass import OwnPass
from rim_lens.hooks.pairing import Found, Pairing
from rim_lens.hooks.positions import Positions, chosen_rows, is_word
from rim_lens.hooks.recording import Recording, record, require_same_shapes
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name, model_facts, weights_digest

# (site, layer) → the columns patched there, or None for all
Spots = Mapping[tuple[Site, int], list[int] | None]


class _Patch(AligningEditor):
    """Puts rows of a source run in place of this run's."""

    def __init__(
        self,
        source: SpanBatch | Recording,
        positions: Positions,
        align: Align,
        source_model: Model | None,
        batch: SpanBatch | None,
    ) -> None:
        super().__init__(positions)
        check_rule(align)
        if isinstance(source, Recording) and source_model is not None:
            raise ReferenceMismatch(
                f"{type(self).__name__} was given a recording and a source_model; a recording is of its own model. Give one"
                " of them."
            )
        self.align = align
        self._source = source
        self._source_model = source_model
        self._source_batch = source.batch if isinstance(source, Recording) else source
        self._pairing = Pairing(self._source_batch, align)
        if batch is not None:
            self.check_prompts(batch)
            self._batch, self._members = batch, list(range(len(batch)))

    def spots(self, facts: ModelFacts) -> Spots:
        """Return what is patched where; refuses what the model lacks. Override this."""
        raise NotImplementedError

    def __repr__(self) -> str:
        source = describe(self._source)
        if self._source_model is not None:
            source += f" of a model with weights {weights_digest(self._source_model)[:8]}"
        return f"{super().__repr__()[:-1]}, source={source})"

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        super().check_prompts(batch)
        self._unaligned = self._pairing.check(batch, self.positions, type(self).__name__)

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        spots = self.spots(facts)
        recording = self._recording(model, facts, list(spots))
        changes: dict[tuple[Site, int], Change] = {}
        for spot, columns in spots.items():
            recorded = recording.activations[spot]
            if columns is None:
                changes[spot] = partial(self._patch, None, recorded)
            else:
                changes[spot] = partial(self._patch, torch.tensor(columns), recorded[:, :, columns])
        return changes

    @property
    @override
    def by_row(self) -> bool:
        return True

    @override
    def own_pass(self, model: Model) -> list[tuple[str, Edit]]:
        return OwnPass(model, type(self).__name__, self._prompts, like=self._source_batch).hooks()

    def _recording(
        self, model: Model, facts: ModelFacts, spots: list[tuple[Site, int]], heads: Iterable[Head] = ()
    ) -> Recording:
        """The recording, made now where prompts were given; refused if it does not fit the model."""
        found = self._source
        if not isinstance(found, Recording):
            source_model = model
            if self._source_model is not None:
                source_model = self._source_model
                require_same_shapes(facts, model_facts(source_model))
            sites = list(dict.fromkeys(site for site, _ in spots))
            found = record(source_model, found, sites, sorted({layer for _, layer in spots}), heads)
        found.require(facts, spots, heads)
        return found

    def _prompts(self) -> SpanBatch | None:
        if self._batch is None and not is_word(self.positions, "all"):
            raise SpanError(
                f"{type(self).__name__}(positions={describe(self.positions)}) does not know the prompts that are read. Pass"
                " batch=, or hand the editor to rl.capture, rl.generate or rl.refusal_score, which bind them."
            )
        return self._batch

    def _patch(
        self, index: Tensor | None, recorded: Float[Tensor, "prompt pos *column"], values: Tensor, rows: Rows
    ) -> Tensor:
        if self._batch is None:
            found = self._by_position(rows)
        else:
            assert self._members is not None  # noqa: S101 - bound together with the batch
            if int(rows.prompt.max()) >= len(self._batch):
                raise WrongHookShape(
                    f"{type(self).__name__} is bound to {len(self._batch)} prompts, and this pass has more. Bind the batch"
                    " that is read."
                )
            found = self._pairing.find(self._batch, self._members, rows)
        return put(values, index, found.rows, recorded[found.prompt.cpu(), found.pos.cpu()])

    def _by_position(self, rows: Rows) -> Found:
        # Sound for a pass of the source's own shape and padding alone; `OwnPass` refuses other shapes, and looks into padding.
        real = self._source_batch.attention_mask.bool().to(rows.pos.device)
        inside = (rows.prompt < real.shape[0]) & (rows.pos < real.shape[1])
        found = inside & real[rows.prompt.clamp(max=real.shape[0] - 1), rows.pos.clamp(max=real.shape[1] - 1)]
        return Found(found, rows.prompt[found], rows.pos[found])


class PatchHeads(_Patch):
    """Put the outputs z of heads, before W_O, of a source run in place of this run's.

    An effect shows that what the heads write differs between the runs in a way the model uses; not where the heads
    got it from. Tokens without a counterpart, generated ones among them, stay as they are; `unaligned` counts them.

    Args:
        heads: (layer, head) pairs, at least one.
        source: Prompts, run on the model each time the component is attached, without any other component; or a ready
            `Recording` (rl.record), so that a scan over heads runs the source once.
        positions: Rows of *this* run to patch: "all", "prompt_last", a span's name, or a mask [prompt, pos].
        align: How tokens of a span correspond where it is of unequal length: "end", "start" or "stretch"; see `align`.
        source_model: Run the source prompts on this model (a tuned one of the same shapes) instead. Both must be loaded
            alike: folded weights (compatibility mode with processing) make other numbers of the same shapes.
        batch: The prompts that will be read, for use where nothing binds them: `with PatchHeads(..., batch=off).on(model):
            model(off.tokens, attention_mask=off.attention_mask)`. With neither, only whole runs of the source's own shape
            are patched, position for position, and which requests those are is up to the caller.

    Raises:
        UnknownHead: No head was named; or, on attaching, the model lacks one.
        ReferenceMismatch: The source has another number of prompts than are read, is of another vocabulary, of a
            model of other shapes, or of a dtype that would have to be rounded; or the recording lacks a layer.
        EmptySpan: Nothing asked for aligns in some prompt; raised when the prompts are bound.
        NotFinite: The source run gives NaN or infinity.
        SpanError: While the model runs: prompts are needed and none are bound.
        WrongHookShape: While the model runs: the pass has another shape than the prompts bound, or attends to what is padding in them.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    >>> off, cot = chat.render(requests, think="off"), chat.render(requests, think=chat.cots(requests, "careful"))
    >>> patch = rl.PatchHeads([(1, 5)], source=cot, positions="prompt_last")
    >>> effect = rl.refusal_score(model, off, patch) - rl.refusal_score(model, off)
    >>> patch.unaligned.tolist()
    [0, 0]
    """

    def __init__(
        self,
        heads: Iterable[Head],
        source: SpanBatch | Recording,
        positions: Positions = "all",
        align: Align = "end",
        source_model: Model | None = None,
        batch: SpanBatch | None = None,
    ) -> None:
        super().__init__(source, positions, align, source_model, batch)
        self.heads = some_heads(heads)

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("z",)

    @override
    def spots(self, facts: ModelFacts) -> Spots:
        return {("z", layer): chosen for layer, chosen in by_layer(facts.check_heads(self.heads)).items()}


class PatchNeurons(_Patch):
    """Put the activations of MLP neurons (`hook_post`) of a source run in place of this run's.

    Args:
        neurons: (layer, neuron) pairs, at least one.
        source: Prompts or a recording; see `PatchHeads`.
        positions: Rows of this run to patch.
        align: How tokens of a span of unequal length correspond.
        source_model: Run the source prompts on this model instead.
        batch: The prompts that will be read, where nothing binds them.

    Raises:
        UnknownNeuron: No neuron was named; or, on attaching, the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts.
        RimLensError: As `PatchHeads`.
    """

    def __init__(
        self,
        neurons: Iterable[tuple[int, int]],
        source: SpanBatch | Recording,
        positions: Positions = "all",
        align: Align = "end",
        source_model: Model | None = None,
        batch: SpanBatch | None = None,
    ) -> None:
        super().__init__(source, positions, align, source_model, batch)
        self.neurons = some_neurons(neurons)

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("post",)

    @override
    def spots(self, facts: ModelFacts) -> Spots:
        return {
            ("post", layer): chosen for layer, chosen in by_layer(facts.check_neurons(self.neurons)).items()
        }


class PatchResidual(_Patch):
    """Put the residual stream of a source run in place of this run's, before or after layers.

    It carries everything the source computed at that place up to that layer, so an effect locates a difference in
    layer and span; it does not say which component made it.

    Args:
        layers: Layers, at least one.
        source: Prompts or a recording; see `PatchHeads`.
        positions: Rows of this run to patch.
        site: "resid_pre" (what the layer reads) or "resid_post" (what it leaves).
        align: How tokens of a span of unequal length correspond.
        source_model: Run the source prompts on this model instead.
        batch: The prompts that will be read, where nothing binds them.

    Raises:
        UnknownLayer: No layer was named; or, on attaching, the model lacks one.
        RimLensError: As `PatchHeads`.
    """

    def __init__(
        self,
        layers: Iterable[int],
        source: SpanBatch | Recording,
        positions: Positions = "all",
        site: Literal["resid_pre", "resid_post"] = "resid_pre",
        align: Align = "end",
        source_model: Model | None = None,
        batch: SpanBatch | None = None,
    ) -> None:
        if site not in ("resid_pre", "resid_post"):
            raise ValueError(f"site={site!r} was asked for; there are 'resid_pre' and 'resid_post'.")
        super().__init__(source, positions, align, source_model, batch)
        self.layers = list(layers)
        if not self.layers:
            raise UnknownLayer("no layer was named, so nothing would be edited; give at least one.")
        self.site: Site = site

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return (self.site,)

    @override
    def spots(self, facts: ModelFacts) -> Spots:
        return {(self.site, facts.check_layer(layer)): None for layer in self.layers}


class PatchAttention(_Patch):
    """Put the attention of heads in a source run in place of this run's: where they look, not what they read there.

    The post-softmax row of a token becomes that of its counterpart, each key's entry taken from the key's counterpart.
    A row has a sound counterpart only if the keys it sees and those its counterpart sees correspond one to one:

    - ``keys="same"`` (default) refuses every other row, before any pass;
    - ``keys="shared"`` puts the source's attention on the keys both sides have and renormalises it to 1, so that keys
      the source lacks get nothing and what the source gave to keys missing here is shared out in proportion. That is
      another pattern than either run's: say so where you use it.

    Rows without a counterpart stay as they are (`unaligned`), those of generated tokens among them.

    Args:
        heads: (layer, head) pairs, at least one.
        source: Prompts, or a recording with these heads' patterns (``rl.record(model, batch, ["pattern"], heads=heads)``).
        positions: Query rows of this run to patch.
        keys: "same" or "shared".
        align: "end" or "start"; "stretch" would let two keys share one entry.
        source_model: Run the source prompts on this model instead.
        batch: The prompts that will be read, where nothing binds them.

    Raises:
        UnknownHead: No head was named; or, on attaching, the model lacks one.
        SpanError: keys="same" and the keys of some row do not correspond one to one.
        EmptySpan: No row asked for has a counterpart in some prompt; or, while the model runs with keys="shared", a
            source row has no attention at all on shared keys.
        RimLensError: As `PatchHeads`.
    """

    edits = ("pattern",)

    def __init__(
        self,
        heads: Iterable[Head],
        source: SpanBatch | Recording,
        positions: Positions = "all",
        keys: Literal["same", "shared"] = "same",
        align: Literal["end", "start"] = "end",
        source_model: Model | None = None,
        batch: SpanBatch | None = None,
    ) -> None:
        if keys not in ("same", "shared"):
            raise ValueError(f"keys={keys!r} was asked for; there are 'same' and 'shared'.")
        if align not in ("end", "start"):
            raise ValueError(
                f"align={align!r} was asked for; rows of attention need keys that correspond one to one: 'end' or 'start'."
            )
        self.keys = keys
        super().__init__(source, positions, align, source_model, batch)
        self.heads = some_heads(heads)

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return (), ("pattern",)

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        super().check_prompts(batch)
        if self.keys == "shared":
            return
        _, alignment = self._pairing.of(batch, range(len(batch)))
        rows = chosen_rows(self.positions, batch, 0, *batch.tokens.shape) & alignment.found
        torn = (rows & ~same_keys(alignment, self._source_batch)).nonzero()
        if len(torn):
            prompt, pos = torn[0].tolist()
            raise SpanError(
                f"PatchAttention: the keys that position {pos} of prompt {batch.prompts[prompt].id!r} sees and those its"
                f" counterpart sees do not correspond one to one (so in {len(torn)} rows). Patch rows before the runs part"
                " (positions='request'), or use keys='shared', which patches the keys both have and renormalises."
            )

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        heads = by_layer(facts.check_heads(self.heads))
        recording = self._recording(
            model, facts, [("pattern", layer) for layer in heads], facts.check_heads(self.heads)
        )
        hooks = self.own_pass(model)
        for layer, chosen in heads.items():
            places = [recording.heads_of(layer).index(head) for head in chosen]
            patterns = recording.activations["pattern", layer][:, places]
            hooks.append((hook_name("pattern", layer), partial(self._patch_pattern, chosen, patterns)))
        return hooks

    def _patch_pattern(
        self,
        heads: list[int],
        recorded: Float[Tensor, "prompt head query key"],
        pattern: Float[Tensor, "prompt head query key"],
    ) -> Tensor | None:
        n_prompts, _, n_queries, n_keys = pattern.shape
        if n_keys > n_queries:
            return None  # generated rows have no counterpart
        if self._batch is None:
            real = self._source_batch.attention_mask.bool().cpu()
            partners = list(range(n_prompts))
            places = torch.where(real, torch.arange(n_keys)[None], -1)
        else:
            assert self._members is not None  # noqa: S101 - bound together with the batch
            partners, alignment = self._pairing.of(self._batch, self._members)
            places = alignment.source
        rows = chosen_rows(self.positions, self._batch, 0, n_prompts, n_queries) & (places >= 0)
        edited = pattern.clone()
        for prompt, partner in enumerate(partners):
            query = rows[prompt].nonzero().flatten()
            key = (places[prompt] >= 0).nonzero().flatten()
            there = recorded[partner][:, places[prompt, query]][:, :, places[prompt, key]].to(pattern)
            seen = key[None] <= query[:, None]
            there = there * seen.to(there)
            if self.keys == "shared":
                there = self._renormalised(there, query, prompt)
            new = pattern.new_zeros(len(heads), len(query), n_keys)
            new[:, :, key.to(new.device)] = there
            head = torch.tensor(heads, device=pattern.device)
            edited[prompt, head[:, None], query.to(pattern.device)[None]] = new
        return edited

    def _renormalised(self, there: Float[Tensor, "head query key"], query: Tensor, prompt: int) -> Tensor:
        mass = there.float().sum(dim=-1, keepdim=True)
        empty = (mass.squeeze(-1) < torch.finfo(torch.float32).tiny).nonzero()
        if len(empty):
            head, row = empty[0].tolist()
            raise EmptySpan(
                f"PatchAttention: head {head} of those patched gives, in the source, no attention at all to keys that"
                f" prompt {prompt} has as well, seen from position {int(query[row])}; there is nothing to renormalise. Leave"
                " that head or those rows out."
            )
        return (there.float() / mass).to(there)


def same_keys(alignment: Alignment, source: SpanBatch) -> Bool[Tensor, "prompt pos"]:
    """Which rows see the same keys as their counterparts: as many, and each the counterpart of one.

    Args:
        alignment: Of rule "end" or "start", row i of the target with row i of the source.
        source: The source prompts.
    """
    found, places = alignment.found, alignment.source
    width = found.shape[1]
    here = torch.arange(width)
    seen = here[None, None] <= here[None, :, None]  # [1, query, key]
    both = seen & found[:, None] & (places[:, None] <= places[:, :, None])
    seen_here = alignment.real.long().cumsum(dim=1)
    seen_there = source.attention_mask.bool().cpu().long().cumsum(dim=1).gather(1, places.clamp(min=0))
    shared = both.sum(dim=-1)
    return found & (shared == seen_here) & (shared == seen_there)
