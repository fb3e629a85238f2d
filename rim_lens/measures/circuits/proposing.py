"""Which heads and neurons to ask a circuit of: those that a gradient says carry the difference between a request and its twin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, render_conditions
from rim_lens.errors import StatisticsError
from rim_lens.lens import Head, Model, Site, tokenizer_of, verify
from rim_lens.measures.circuits.estimating import score_slopes
from rim_lens.measures.circuits.instead import patched
from rim_lens.measures.circuits.keeping import Replacements
from rim_lens.measures.circuits.settling import settled
from rim_lens.measures.circuits.writing import recorded_spots
from rim_lens.measures.gradients import GRADIENT_ROWS
from rim_lens.measures.heads.held_out import ChosenHeads
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.refusal.openers import opener_ids, opener_texts
from rim_lens.measures.two_sides import paired, two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class ProposedNodes:
    """Heads and neurons to hand to `circuit`; estimated, not tested.

    Attributes:
        heads: The named ones first, then those with the largest estimates. Heads and neurons know the requests that chose them, on
            which no circuit is tested.
        neurons: In few layers.
        head_estimates: Mean over select requests (layer, head), nats: how the score would change with the twin's output.
    """

    heads: ChosenHeads
    neurons: NeuronSet
    head_estimates: xr.DataArray


def propose_nodes(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    n_heads: int = 12,
    n_neurons: int = 128,
    n_neuron_layers: int | None = None,
    heads: Iterable[Head] = (),
    read_in: str = "off",
    limit: int | None = 32,
    seed: int = 0,
    openers: Iterable[str] | None = None,
    max_rows: int = MAX_ROWS,
) -> ProposedNodes:
    """Estimate, for every head and neuron, what the twin's output in its place would do to refusal, and propose the largest.

    The slope of the refusal score at a head's or neuron's output times (its output on the twin − its output), summed over tokens,
    mean over select requests: one forward and one backward pass for all. `circuit` then measures edges exactly, and keeps those
    of these nodes that an effect connects to refusal.

    What it does not show: an effect. See `rim_lens.measures.circuits.estimating` for where slopes mislead.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its chat format.
        harmful: See `circuit`: the same requests, so that the same ones select.
        harmless: Their twins.
        n_heads: Heads in all.
        n_neurons: Neurons in all.
        n_neuron_layers: Layers that neurons may lie in, each one node of a circuit: those with the largest sum of sizes. None: any.
        heads: Heads that are among them whatever their estimate.
        read_in: Closed condition that is read.
        limit: See `CircuitSearch`.
        seed: See `CircuitSearch`.
        openers: See `refusal_score`.
        max_rows: Most prompts in one pass.

    Raises:
        StatisticsError: A number is out of range.
        UnknownHead: The model lacks a named head.
        MissingTwin: A harmful request has no twin.
        RimLensError: As `circuit`.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> found = rl.propose_nodes(model, chat, *requests, n_heads=2, n_neurons=8, limit=12)
    >>> sorted(found.heads), found.neurons.per_layer.tolist()
    ([(0, 5), (1, 1)], [8, 0])
    """
    import xarray as xr

    facts = verify(model, reads=["z", "post"], edits=["z", "post"])
    facts.refuse_moe("per-neuron work")
    layers = facts.n_layers if n_neuron_layers is None else n_neuron_layers
    named = facts.check_heads(heads)
    if not (
        len(named) <= n_heads <= facts.n_layers * facts.n_heads
        and 0 <= n_neurons <= min(layers, facts.n_layers) * facts.d_mlp
        and 0 < layers <= facts.n_layers
    ):
        raise StatisticsError(
            f"{n_heads} heads, {len(named)} of them named, and {n_neurons} neurons of {layers} layers were asked for; the model has"
            f" {facts.n_layers} layers of {facts.n_heads} heads and {facts.d_mlp} neurons."
        )
    select = paired(two_sides(harmful, harmless, limit, seed)[0])
    here, there = (
        settled(
            model,
            render_conditions(chat, side, [read_in])[read_in],
            max_rows=max_rows,
            what="propose_nodes",
        )
        for side in (select.harmful, select.harmless)
    )
    ids = torch.tensor(opener_ids(tokenizer_of(model), opener_texts(openers)))
    sites: tuple[Site, ...] = ("z", "post")
    spots = [(site, layer) for site in sites for layer in range(facts.n_layers)]
    own = recorded_spots(model, here, spots)
    other = Replacements(model, facts, here, patched(there), with_neurons=True)
    slopes = score_slopes(model, facts, here, spots, ids, max_rows=min(max_rows, GRADIENT_ROWS))

    def estimate(site: Site) -> Float[np.ndarray, "layer unit"]:
        found = []
        for layer in range(facts.n_layers):
            change = (other.values[site, layer] - own[site, layer]).nan_to_num(0.0)
            product = slopes[site, layer].double() * change.double()
            product = product.sum(dim=-1) if site == "z" else product
            found.append(product.sum(dim=1).mean(dim=0).numpy())
        return np.stack(found)

    seen = chosen_by([*select.harmful, *select.harmless])
    by_head, by_neuron = estimate("z"), estimate("post")
    ranked = [divmod(int(place), facts.n_heads) for place in np.argsort(-np.abs(by_head), axis=None)]
    chosen = [*named, *(head for head in ranked if head not in set(named))][:n_heads]
    sizes = np.abs(by_neuron)
    some = np.argsort(-sizes.sum(axis=1), kind="stable")[:layers]
    within = np.full_like(sizes, -1.0)
    within[some] = sizes[some]
    places = np.argsort(-within, axis=None, kind="stable")[:n_neurons]
    neurons = NeuronSet.of(
        model,
        [divmod(int(place), facts.d_mlp) for place in places],
        scores=by_neuron,
        made_by={
            "how": "propose_nodes",
            "read_in": read_in,
            "n_neurons": n_neurons,
            "n_neuron_layers": layers,
            **seen,
        },
    )
    table = xr.DataArray(
        by_head,
        dims=("layer", "head"),
        coords={"layer": range(facts.n_layers), "head": range(facts.n_heads)},
        name="head_estimate",
        attrs={"units": "nats", "sign": "estimate of the twin's output − its own"},
    )
    return ProposedNodes(ChosenHeads(chosen, seen), neurons, table)
