"""What heads write into the last row for all to see: by how much the refusal log-odds change when that alone is taken out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ImpossibleEdit, UnknownLayer, WrongHookShape
from rim_lens.lens import Head, Model, ModelFacts, model_facts
from rim_lens.measures.ending import LastRow, read_ending, require_close
from rim_lens.measures.probes.fitting import Probe
from rim_lens.measures.refusal.direction import RefusalDirection
from rim_lens.measures.refusal.first_word import Skip
from rim_lens.measures.refusal.rates import families_of

if TYPE_CHECKING:
    import xarray as xr


def direct_effects(
    model: Model,
    batch: SpanBatch,
    heads: Iterable[Head] | None = None,
    direction: Float[Tensor, " d_model"] | RefusalDirection | Probe | None = None,
    layer: int | None = None,
    *,
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = MAX_ROWS,
) -> xr.Dataset:
    """Direct effect of each head on the refusal log-odds, and what it writes along a direction; all heads in one pass.

    The head's own output z W_O (the output bias left out; after the post-norm where the model has one, as Gemma 2 and 3)
    is taken out of the final residual stream at the row that `refusal_score` reads; final norm and unembedding are then
    computed exactly, not linearised, so that the norm's scale moves too. Direct effects of several heads need not add up.

    What it does not show: all that a head does through later layers. A head whose output a later MLP turns into a refusal
    has no direct effect and a large ablation effect; one whose output a later layer takes back has a direct effect and
    no ablation effect (two that stand in for each other show here, and not in single ablations). Only one row is
    looked at: what the head does at earlier tokens is left out. And a head that writes these words for whatever reason
    shows alike: it may be a writer of logits, and the place where refusal is decided another. Confirm by `head_effects`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        heads: (layer, head) pairs; all when None.
        direction: Also project each head's output at that row on this direction, made a unit vector; a vector, what
            `refusal_direction` found, or a probe (``rl.probe(...).probe(condition, layer, place)``).
        layer: The layer whose input the direction was taken from; heads of that layer and later ones come too late for
            it and get NaN. Needed with a vector.
        openers: See `refusal_score`.
        skip: See `refusal_score`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.

    Returns:
        Dataset with ``direct_effect`` (prompt, layer, head), removed − kept in nats as an ablation effect, NaN for heads left
        out; ``baseline`` (prompt), the refusal score; and with a direction ``projection`` (prompt, layer, head), in units of
        the residual stream, positive where the head *writes* along it (so that taking it out does the opposite).

    Raises:
        UnsupportedModel: The final stream is not the sum of what the layers write, or what a layer's heads write is not
            z W_O, as this model normalises or scales it elsewhere.
        UnknownHead: The model lacks one of the heads.
        UnknownLayer: A vector came without its layer, or the model lacks that layer.
        WrongHookShape: The direction is not one vector [d_model].
        ImpossibleEdit: The direction is zero or not finite.
        ConditionError: As `refusal_score`.
        NotFinite: NaN or infinity in the logits.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:4], think="off")
    >>> effect = rl.direct_effects(model, off)["direct_effect"].mean("prompt")
    >>> bool(effect[1, 1] < -10), bool(abs(effect[0, 5]) < 1)  # the reader writes it; the topic head works through the MLP
    (True, True)
    """
    import xarray as xr

    facts = model_facts(model)
    chosen = facts.check_heads(facts.heads() if heads is None else heads)
    unit, below = unit_direction(facts, direction, layer)
    ending = read_ending(
        model,
        facts,
        batch,
        openers,
        skip=skip,
        whitespace=whitespace,
        max_rows=max_rows,
        what="direct_effects",
    )
    last = ending.last

    shape = (len(batch), facts.n_layers, facts.n_heads)
    effect, projection = np.full(shape, np.nan), np.full(shape, np.nan)
    for number in sorted({its_layer for its_layer, _ in chosen}):
        index = [head for its_layer, head in chosen if its_layer == number]
        written = _written(model, facts, last, number)[:, index]
        effect[:, number, index] = ending.effects(written)
        if unit is not None and number < below:
            projection[:, number, index] = (written.double() @ unit).numpy()
    data: dict[str, Any] = {
        "direct_effect": (
            ("prompt", "layer", "head"),
            effect,
            {"units": "nats", "sign": "removed − kept", "row": "the answer's first word"},
        ),
        "baseline": (("prompt",), ending.baseline, {"units": "nats"}),
    }
    if unit is not None:
        data["projection"] = (
            ("prompt", "layer", "head"),
            projection,
            {
                "units": "residual stream",
                "sign": "written along the unit direction",
                "direction_layer": below,
            },
        )
    return xr.Dataset(
        data,
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "family": ("prompt", families_of(batch.prompts)),
            "layer": range(facts.n_layers),
            "head": range(facts.n_heads),
        },
        attrs={"condition": batch.name, "skip": skip},
    )


def _written(
    model: Model, facts: ModelFacts, last: LastRow, layer: int
) -> Float[Tensor, "prompt head d_model"]:
    """What each head of a layer writes into the stream; proven to be all that the layer's attention writes."""
    block = model.blocks[layer]
    weight = block.attn.W_O.detach()
    z = last.kept["z", layer].to(weight)
    with torch.no_grad():
        each = torch.einsum("phd,hdm->phm", z, weight)
        whole = each.sum(dim=1)
        bias = getattr(block.attn, "b_O", None)
        whole = whole if bias is None else whole + bias
        norm = getattr(block, "ln1_post", None)
        if norm is not None:  # what the norm gives with the head, minus what it gives without it
            after = norm(whole[:, None])
            each, whole = after - norm(whole[:, None] - each), after[:, 0]
    require_close(
        whole.float().cpu(),
        last.kept["attn_out", layer],
        facts,
        f"what the heads of layer {layer} write is not z W_O (something stands between them and the residual stream)",
    )
    return each.float().cpu()


def unit_direction(
    facts: ModelFacts, direction: Tensor | RefusalDirection | Probe | None, layer: int | None
) -> tuple[Float[Tensor, " d_model"] | None, int]:
    """A direction as a unit vector, and the layer whose input it was taken from; (None, 0) where there is none.

    Raises:
        UnknownLayer: A vector came without its layer, or the model lacks that layer.
        WrongHookShape: It is not one vector [d_model].
        ImpossibleEdit: It is zero or not finite.
    """
    if direction is None:
        return None, 0
    final = False
    if isinstance(direction, RefusalDirection):
        layer = direction.layer if layer is None else layer
        direction = direction.vector
    elif isinstance(direction, Probe):
        if layer is None and direction.read_by == facts.n_layers:
            layer, final = 0, True  # no layer reads it: no head comes too late
        layer = direction.read_by if layer is None else layer
        direction = torch.from_numpy(direction.direction)
    if layer is None:
        raise UnknownLayer(
            "a direction was given without its layer; pass layer=, the one whose input it was taken from."
        )
    if direction.shape != (facts.d_model,):
        raise WrongHookShape(
            f"a direction of shape {tuple(direction.shape)} was given; this model's stream is {facts.d_model} wide, give one"
            " vector of that length."
        )
    vector = direction.detach().double().cpu()
    norm = float(vector.norm())
    if not (norm > 0 and np.isfinite(norm)):
        raise ImpossibleEdit(f"a direction of norm {norm} was given; it needs a finite length above 0.")
    return vector / norm, facts.n_layers if final else facts.check_layer(layer)
