"""Activations of a whole run, kept, so that another run can be patched with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.batching import MAX_TOKENS, micro_batches
from rim_lens.chat.spans import SpanBatch, require_batch
from rim_lens.errors import NotFinite, ReferenceMismatch, UnknownHead, UnknownLayer
from rim_lens.hooks.base import check_vocabulary
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name, hooked, last_logits, quiet, verify
from rim_lens.sharing import agreed, n_processes

_SHAPE = ("n_layers", "n_heads", "d_head", "d_mlp", "d_model")


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Recording:
    """What a model computed on a batch, at chosen sites, on the CPU and in the model's own dtype.

    Memory: prompts × width of the batch × (z: heads × d_head; post: d_mlp; residual and outputs: d_model) numbers for
    each site and layer, padding included; patterns take prompts × named heads × width². For 64 prompts of 200 tokens,
    all z of a model with 30 layers of width 576 take 0.9 GB in float32: name the layers that are needed.

    Attributes:
        batch: The prompts.
        facts: The model that was run.
        activations: By (site, layer), [prompt, pos, ...], 0 on padding; for "pattern" [prompt, head, query, key] of
            the recorded heads of that layer, in the order of `heads`.
        heads: Heads whose patterns are recorded.
    """

    batch: SpanBatch
    facts: ModelFacts
    activations: Mapping[tuple[Site, int], Float[Tensor, "prompt ..."]]
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        n_prompts, width = self.batch.tokens.shape
        for (site, layer), tensor in self.activations.items():
            expected = (
                (n_prompts, len(self.heads_of(layer)), width, width)
                if site == "pattern"
                else (n_prompts, width)
            )
            if tuple(tensor.shape[: len(expected)]) != expected:
                raise ReferenceMismatch(
                    f"the recording of {site!r} in layer {layer} has shape {tuple(tensor.shape)}, but should begin with"
                    f" {expected} for its batch."
                )
            bad = (~tensor.isfinite().flatten(1)).any(dim=1).nonzero().flatten().tolist()
            if bad:
                raise NotFinite(
                    f"the recording of {site!r} in layer {layer} holds NaN or infinity in {len(bad)} of {n_prompts} prompts"
                    f" (first: {self.batch.prompts[bad[0]].id!r}). Load the model in float32, or leave them out."
                )

    def __repr__(self) -> str:
        sites = sorted({site for site, _ in self.activations})
        layers = len({layer for _, layer in self.activations})
        return f"Recording({len(self.batch)} prompts, {', '.join(sites)} of {layers} layers:{self.digest})"

    @cached_property
    def digest(self) -> str:
        """8 hexadecimal digits of the prompts and of every number recorded."""
        what = hashlib.sha256(self.batch.digest.encode())
        for (site, layer), tensor in sorted(self.activations.items(), key=lambda item: item[0]):
            what.update(f"{site}{layer}{tuple(tensor.shape)}{tensor.dtype}".encode())
            what.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        what.update(repr(self.heads).encode())
        return what.hexdigest()[:8]

    def heads_of(self, layer: int) -> list[int]:
        """The heads of a layer whose patterns are recorded, in the order of the tensor."""
        return [head for its_layer, head in self.heads if its_layer == layer]

    def require(
        self, facts: ModelFacts, spots: Iterable[tuple[Site, int]], heads: Iterable[Head] = ()
    ) -> None:
        """Refuse a recording that cannot stand for this model's activations at these (site, layer).

        A recording may be moved to another device, and to a dtype that holds each of its numbers exactly; a
        rounding is refused, as it would be an edit that nobody asked for.

        Raises:
            ReferenceMismatch: The recorded model has other shapes, or a dtype that would have to be rounded; or a
                site, layer or pattern was not recorded.
        """
        require_same_shapes(facts, self.facts)
        missing = [spot for spot in spots if spot not in self.activations]
        lost = [head for head in heads if head not in self.heads]
        if missing or lost:
            first = f"{missing[0]}" if missing else f"the pattern of head {lost[0]}"
            raise ReferenceMismatch(
                f"{first} is needed and was not recorded; the recording holds {sorted(self.activations)}"
                f"{f' and patterns of {list(self.heads)}' if self.heads else ''}. Record it:"
                " rl.record(model, batch, sites, layers, heads)."
            )
        for spot in spots:
            dtype = self.activations[spot].dtype
            if torch.promote_types(dtype, facts.dtype) != facts.dtype and spot[0] != "pattern":
                raise ReferenceMismatch(
                    f"the recording holds {dtype} and the model computes in {facts.dtype}, which would round it. Record"
                    " from a model of the same dtype."
                )


def record(
    model: Model,
    batch: SpanBatch,
    sites: Sequence[Site],
    layers: Iterable[int] | None = None,
    heads: Iterable[Head] = (),
) -> Recording:
    """Run a batch through the model itself, without any rim_lens component, and keep what it computed.

    Prompts of like length run together. See `Recording` for the memory this takes.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts.
        sites: "z", "post", "resid_pre", "resid_post", "attn_out", "mlp_out", "pattern".
        layers: Layers to keep; all when None. Patterns follow `heads` instead.
        heads: (layer, head) whose patterns are kept; those grow with the square of the length, hence by name only.

    Raises:
        UnknownLayer: The model lacks a layer, or none was named.
        UnknownHead: The model lacks a head, or "pattern" was asked for and no head named.
        ReferenceMismatch: The tokens are not of this model's vocabulary.
        NotFinite: An activation is NaN or infinite.
        ModelError: A hook point does not work on this model.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> recording = rl.record(model, off, ["z"], layers=[1])
    >>> recording.activations["z", 1].shape[:2] == off.tokens.shape
    True
    """
    require_batch(batch, "record")
    facts = verify(model, reads=sites)
    check_vocabulary(model, batch, "the batch")
    chosen = list(range(facts.n_layers)) if layers is None else sorted({facts.check_layer(i) for i in layers})
    named = tuple(sorted(facts.check_heads(heads)))
    if not chosen:
        raise UnknownLayer("no layer was named; give at least one, or layers=None for all.")
    if "pattern" in sites and not named:
        raise UnknownHead(
            "'pattern' was asked for and no head named: heads=[(layer, head), ...]. Patterns grow with the square of"
            " the length, so only those asked for are kept."
        )
    kept: dict[tuple[Site, int], Tensor] = {}
    spots: list[tuple[Site, int]] = [(site, i) for site in sites if site != "pattern" for i in chosen]
    if "pattern" in sites:
        spots += [("pattern", layer) for layer in sorted({layer for layer, _ in named})]
    for group in micro_batches(batch.lengths.tolist(), MAX_TOKENS):
        rows = sorted(group)  # in the order of a plain pass, so that one pass gives its very bits
        part = batch.select(rows)
        keepers: list[tuple[str, Callable[..., None]]] = []
        for site, layer in spots:
            picked = [head for its_layer, head in named if its_layer == layer] if site == "pattern" else None
            keep = partial(_keep, kept=kept, spot=(site, layer), whole=batch, rows=rows, heads=picked)
            keepers.append((hook_name(site, layer), keep))
        with quiet(), hooked(model, keepers):
            last_logits(model, part.tokens, part.attention_mask)
    made = Recording(batch, facts, kept, named if "pattern" in sites else ())
    if n_processes() > 1:  # its name is one in all processes, whatever a last bit says
        vars(made)["digest"] = agreed("a recording", lambda: made.digest)
    return made


def require_same_shapes(facts: ModelFacts, source: ModelFacts) -> None:
    """Refuse a source model whose activations have other shapes.

    Raises:
        ReferenceMismatch: Layers, heads or widths differ.
    """
    ours, theirs = ({name: getattr(side, name) for name in _SHAPE} for side in (facts, source))
    if ours != theirs:
        raise ReferenceMismatch(
            f"the source model has {theirs}, this model {ours}: activations of the one have no place in the other."
        )


def _keep(
    activation: Tensor,
    hook: Any,  # noqa: ARG001
    kept: dict[tuple[Site, int], Tensor],
    spot: tuple[Site, int],
    whole: SpanBatch,
    rows: list[int],
    heads: list[int] | None,
) -> None:
    value = activation.detach() if heads is None else activation.detach()[:, heads]
    value = value.cpu()
    real = whole.attention_mask.bool().cpu()[rows]
    n_prompts, width = whole.tokens.shape
    if heads is None:
        n_rows = value.shape[1]
        if spot not in kept:
            kept[spot] = value.new_zeros(n_prompts, width, *value.shape[2:])
        mask = real[:, width - n_rows :].view(len(rows), n_rows, *[1] * (value.ndim - 2))
        kept[spot][rows, width - n_rows :] = value.masked_fill(~mask, 0)
    else:
        n_rows = value.shape[2]
        if spot not in kept:
            kept[spot] = value.new_zeros(n_prompts, len(heads), width, width)
        mask = real[:, None, width - n_rows :, None]
        index = torch.tensor(rows)
        kept[spot][index, :, width - n_rows :, width - n_rows :] = value.masked_fill(~mask, 0)
