"""What heads write into the last row for all to see: by how much the refusal log-odds change when that alone is taken out.

A head's output is a vector in the residual stream. Taken out of the final stream, with the final norm and the unembedding
computed anew, it leaves a change that no later layer has had a hand in: the head's *direct* effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ImpossibleEdit, UnknownLayer, UnsupportedModel, WrongHookShape
from rim_lens.hooks.base import Component, Edit, attached
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name, model_facts, require_eval, tokenizer_of
from rim_lens.measures.probes.fitting import Probe
from rim_lens.measures.refusal.direction import RefusalDirection
from rim_lens.measures.refusal.first_word import Skip, check_answer_is_next, first_words_of
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.refusal.score import check_skip, log_odds

if TYPE_CHECKING:
    import xarray as xr

_MOST_LOGITS = 2**25  # numbers of one unembedding, 128 MiB in float32


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

    check_skip(skip)
    check_answer_is_next(batch, "direct_effects")
    require_eval(model)
    facts = model_facts(model)
    chosen = facts.check_heads(facts.heads() if heads is None else heads)
    unit, below = _unit(facts, direction, layer)
    ids = torch.tensor(opener_ids(tokenizer_of(model), openers))
    last = _LastRow()
    baseline = np.empty(len(batch))
    logits = torch.empty(len(batch), facts.d_vocab)
    with attached(model, [last], batch, writes=skip == "forced"):
        words = first_words_of(
            model, batch, [last], skip=skip, whitespace=whitespace, max_rows=max_rows, what="direct_effects"
        )
        for word in words:
            baseline[word.rows] = log_odds(word.logits, ids)
            logits[word.rows] = word.logits.float()
    _require_close(
        last.kept["stream", facts.n_layers - 1],
        last.kept["sum", 0],
        facts,
        "the final residual stream is not the sum of what the layers write into it (a multiplier, or a norm between layers)",
    )
    kept = _unembedded(model, last.kept["stream", facts.n_layers - 1].to(facts.dtype))
    _require_close(
        kept, logits, facts, "the logits are not final norm and unembedding of the residual stream alone"
    )

    shape = (len(batch), facts.n_layers, facts.n_heads)
    effect, projection = np.full(shape, np.nan), np.full(shape, np.nan)
    for number in sorted({its_layer for its_layer, _ in chosen}):
        index = [head for its_layer, head in chosen if its_layer == number]
        written = _written(model, facts, last, number)[:, index]
        effect[:, number, index] = (
            _without(model, facts, last, written, ids) - log_odds(kept, ids).numpy()[:, None]
        )
        if unit is not None and number < below:
            projection[:, number, index] = (written.double() @ unit).numpy()
    data: dict[str, Any] = {
        "direct_effect": (
            ("prompt", "layer", "head"),
            effect,
            {"units": "nats", "sign": "removed − kept", "row": "the answer's first word"},
        ),
        "baseline": (("prompt",), baseline, {"units": "nats"}),
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


class _LastRow(Component):
    """Keeps, for each prompt, what stood in the last row of the last pass that read it: the row of its first word.

    Attributes:
        kept: By (what, layer), [prompt, ...] in float32: "z" and "attn_out" of each layer, the final "stream", and the
            "sum" of all that was written into it.
    """

    reads: ClassVar[tuple[Site, ...]] = ("z", "attn_out", "mlp_out", "resid_pre", "resid_post")

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, int], Tensor] = {}
        self._total = 0

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        self._total = len(batch)

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        hooks: list[tuple[str, Edit]] = [(hook_name("resid_pre", 0), partial(self._keep, "sum", 0))]
        for layer in range(facts.n_layers):
            hooks += [
                (hook_name("z", layer), partial(self._keep, "z", layer)),
                (hook_name("attn_out", layer), partial(self._add_and_keep, layer)),
                (hook_name("mlp_out", layer), self._add),
            ]
        last = facts.n_layers - 1
        return [*hooks, (hook_name("resid_post", last), partial(self._keep, "stream", last))]

    def _keep(self, what: str, layer: int, tensor: Tensor) -> None:
        row = tensor[:, -1].detach().float().cpu()
        place = self.kept.setdefault((what, layer), torch.zeros(self._total, *row.shape[1:]))
        place[self._members] = row

    def _add(self, tensor: Tensor) -> None:
        self.kept["sum", 0][self._members] += tensor[:, -1].detach().float().cpu()

    def _add_and_keep(self, layer: int, tensor: Tensor) -> None:
        self._keep("attn_out", layer, tensor)
        self._add(tensor)


def _written(
    model: Model, facts: ModelFacts, last: _LastRow, layer: int
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
    _require_close(
        whole.float().cpu(),
        last.kept["attn_out", layer],
        facts,
        f"what the heads of layer {layer} write is not z W_O (something stands between them and the residual stream)",
    )
    return each.float().cpu()


def _without(
    model: Model,
    facts: ModelFacts,
    last: _LastRow,
    written: Float[Tensor, "prompt head d_model"],
    ids: Tensor,
) -> Float[np.ndarray, "prompt head"]:
    stream = (last.kept["stream", facts.n_layers - 1][:, None] - written).flatten(0, 1).to(facts.dtype)
    rows = max(1, _MOST_LOGITS // facts.d_vocab)
    scores = [
        log_odds(_unembedded(model, stream[start : start + rows]), ids)
        for start in range(0, len(stream), rows)
    ]
    return torch.cat(scores).view(written.shape[:2]).numpy()


def _unembedded(model: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    with torch.no_grad():
        device = model.blocks[-1].attn.W_O.device
        logits = model.unembed(model.ln_final(stream[:, None].to(device)))[:, 0].float().cpu()
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0  # Gemma 2; "none" is None, 0 or -1
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _require_close(found: Tensor, expected: Tensor, facts: ModelFacts, otherwise: str) -> None:
    """Refuse a model in which a sum does not come out to the precision of its weights."""
    allowed = max(1e-4, 16 * torch.finfo(facts.dtype).eps) * float(expected.abs().max())
    error = float((found - expected).abs().max())
    if not error <= allowed:
        raise UnsupportedModel(
            f"direct effects were asked for, but in this {facts.architecture or 'model'} {otherwise}: they differ by"
            f" {error:.3g}. Use exact ablations (rl.head_effects) instead."
        )


def _unit(
    facts: ModelFacts, direction: Tensor | RefusalDirection | Probe | None, layer: int | None
) -> tuple[Float[Tensor, " d_model"] | None, int]:
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
