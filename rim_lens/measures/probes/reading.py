"""The residual stream at named places of prompts, in one pass, reduced inside the hook."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import NotFinite, SpanError, WrongHookShape
from rim_lens.hooks.base import Component, Edit, attached, bound
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import Model, ModelFacts, Site, hook_name, last_logits
from rim_lens.measures.probes.places import check_places, place_rows, require_place
from rim_lens.measures.refusal.rates import families_of
from rim_lens.sharing import each, row_groups

if TYPE_CHECKING:
    import xarray as xr

Stream = Literal["resid_post", "resid_pre", "attn_out", "mlp_out"]


class StreamAtPlaces(Reader):
    """Mean of the residual stream over the rows of each place; or its projection on a vector per layer and place.

    Only that mean is kept, so that memory does not grow with the length of prompts. A place that a prompt lacks reads 0
    here; `stream_at` names it.

    Args:
        places: Names, see `rim_lens.measures.probes.places.place_rows`.
        site: "resid_post" (default), "resid_pre", "attn_out" or "mlp_out".
        vectors: [layer, place, d_model]; gives ``projection`` (prompt, layer, place) instead of ``residual``.
    """

    def __init__(
        self,
        places: Sequence[str],
        site: Stream = "resid_post",
        vectors: Float[Tensor, "layer place d_model"] | None = None,
    ) -> None:
        super().__init__()
        check_places(places)
        if site not in ("resid_post", "resid_pre", "attn_out", "mlp_out"):
            raise ValueError(
                f"site={site!r} was asked for; there are 'resid_post', 'resid_pre', 'attn_out' and 'mlp_out'."
            )
        self.places = tuple(places)
        self.site: Site = site
        self._vectors = vectors
        self._known: tuple[SpanBatch, Tensor] | None = None

    @property
    def variable(self) -> str:
        """What it gives."""
        return "residual" if self._vectors is None else "projection"

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return (self.site,), ()

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        if batch is not None:
            require_place(batch, self.places)
        dims = {"layer": facts.n_layers, "place": len(self.places)}
        if self._vectors is None:
            dims["d_model"] = facts.d_model
        elif tuple(self._vectors.shape) != (facts.n_layers, len(self.places), facts.d_model):
            raise WrongHookShape(
                f"vectors of shape {tuple(self._vectors.shape)} were given for {facts.n_layers} layers, {len(self.places)}"
                f" places and a width of {facts.d_model}. They were taken from another model, or for other places."
            )
        return [
            Variable(
                self.variable,
                tuple(dims),
                tuple(dims.values()),
                coords={"place": self.places},
                attrs={"hook": self.site, "pool": "mean"},
            )
        ]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [
            (hook_name(self.site, layer), partial(self._reduce, layer)) for layer in range(facts.n_layers)
        ]

    def _reduce(self, layer: int, stream: Float[Tensor, "prompt row d_model"]) -> None:
        weights = self._weights().to(stream.device)
        if weights.shape[::2] != stream.shape[:2]:
            raise WrongHookShape(
                f"the bound batch has {tuple(weights.shape[::2])} prompts and positions, but this pass has"
                f" {tuple(stream.shape[:2])}. Read whole prompts, without a key-value cache."
            )
        at_places = torch.bmm(weights, stream.float())
        if self._vectors is not None:
            at_places = (at_places * self._vectors[layer].to(stream.device)).sum(dim=-1)
        self.keep(self.variable, layer, at_places)

    def _weights(self) -> Float[Tensor, "prompt place pos"]:
        if self._batch is None:
            raise SpanError(
                "StreamAtPlaces does not know the spans. Run it through rl.capture, which binds the batch."
            )
        if self._known is None or self._known[0] is not self._batch:
            self._known = (self._batch, place_rows(self._batch, self.places))
        return self._known[1]


def stream_at(
    model: Model,
    batch: SpanBatch,
    places: Sequence[str],
    *components: Component,
    site: Stream = "resid_post",
    vectors: Float[Tensor, "layer place d_model"] | None = None,
    max_rows: int = MAX_ROWS,
) -> xr.DataArray:
    """Return the residual stream of each prompt at each place, after each layer.

    Prompts × layers × places × d_model numbers in float32 are held (or, with `vectors`, one for each of the first
    three): 200 prompts of a model with 36 layers of width 2560 take 74 MB a place.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts, or what a model wrote (``rl.generate(...).batch``).
        places: Names, see `rim_lens.measures.probes.places.place_rows`.
        *components: Editors active meanwhile.
        site: "resid_post" (default), "resid_pre", "attn_out" or "mlp_out".
        vectors: Keep the dot product with these only.
        max_rows: Most prompts in one pass.

    Returns:
        DataArray (prompt, layer, place[, d_model]) with coordinate ``family``: NaN where a prompt lacks a place. A place that
        every prompt lacks is left out, and named in ``attrs["absent"]``.

    Raises:
        UnknownSpan: A name that means no place.
        EmptySpan: No place has a token in any prompt.
        NotFinite: NaN or infinity in the stream.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:3], think="off")
    >>> found = stream_at(model, off, ["assistant", "think", "cot"])
    >>> dict(found.sizes), found.attrs["absent"]
    ({'prompt': 3, 'layer': 2, 'place': 2, 'd_model': 64}, ['cot'])
    """
    import xarray as xr

    check_places(places)
    present = require_place(batch, places)
    kept = [name for place, name in enumerate(places) if bool(present[:, place].any())]
    index = [list(places).index(name) for name in kept]
    reader = StreamAtPlaces(kept, site, None if vectors is None else vectors[:, index])
    found: np.ndarray | None = None
    groups = row_groups(batch.lengths.tolist(), max_rows=max_rows)

    def read(rows: list[int]) -> np.ndarray:
        with bound([*components, reader], batch, rows) as part:
            last_logits(model, part.tokens, part.attention_mask)
            return reader.collect()[reader.variable].numpy()

    with attached(model, [*components, reader], batch, writes=False):
        for rows, values in zip(groups, each(groups, read, "stream_at"), strict=True):
            if found is None:
                found = np.empty((len(batch), *values.shape[1:]), dtype=np.float32)
            found[rows] = values
    assert found is not None  # noqa: S101 - a batch has a prompt
    bad = (~np.isfinite(found)).reshape(len(batch), -1).any(axis=1).nonzero()[0].tolist()
    if bad:
        raise NotFinite(
            f"the stream at {list(kept)} holds NaN or infinity in {len(bad)} of {len(batch)} prompts (first:"
            f" {batch.prompts[bad[0]].id!r}). Load the model in float32, or leave them out."
        )
    lacking = ~present[:, index].numpy()
    np.moveaxis(found, 2, 1)[lacking] = np.nan
    dims = ("prompt", "layer", "place", "d_model")[: found.ndim]
    return xr.DataArray(
        found,
        dims=dims,
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "layer": list(range(found.shape[1])),
            "place": kept,
            "family": ("prompt", families_of(batch.prompts)),
        },
        name=reader.variable,
        attrs={
            "hook": site,
            "condition": batch.name,
            "absent": [name for name in places if name not in kept],
        },
    )
