"""Probes of a model, each with what ablating its direction does to refusal.

Source: arXiv 2509.00544, section 3 (difference-of-means probes at named positions), and 2406.11717 (ablation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.chat.conditions import Conditions
from rim_lens.errors import UnknownSpan
from rim_lens.lens import Model, ModelFacts, model_facts, verify, weights_digest
from rim_lens.measures.probes.ablating import Meter
from rim_lens.measures.probes.fitting import Probes, common_places, fit_probes, taken
from rim_lens.measures.probes.groups import Contrast, Groups, check_contrast, grouped
from rim_lens.measures.probes.places import SIX, check_places
from rim_lens.measures.probes.reading import Stream, stream_at
from rim_lens.measures.probes.result import ProbeResult
from rim_lens.measures.probes.rows import frame, separations, state, without
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.two_sides import two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import xarray as xr

# (layer, place) to ablate; how many, best first; or all
Ablate = int | Literal["all"] | Sequence[tuple[int, str]]


def probe(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    contrast: Contrast = "harmful",
    think: Conditions = ("off",),
    places: Sequence[str] = SIX,
    site: Stream = "resid_post",
    ablate: Ablate = 3,
    n_controls: int = 8,
    min_effect: float = 0.5,
    folds: int = 5,
    limit: int | None = 64,
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    openers: Iterable[str] | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> ProbeResult:
    """Probe the residual stream at named places, and ablate what the probes found.

    In each condition, for each layer and place, a difference-of-means probe (`fit_probes`) is trained on `select` requests
    and held against `evaluate` ones. An AUC of 1 says that the two classes can be told apart there, which is true of
    harmful and harmless requests in nearly every model, also in one that never refuses. So beside it stands what the model
    does without that direction: the refusal score of evaluate requests with it ablated at every write, minus the score
    as it is, on harmful requests and on harmless ones. Where that was not measured, `state` says "not tested".

    Which directions are ablated is chosen by cross-validated AUC on `select` (ties: the wider gap), never by evaluate
    requests. The yardstick are other directions of the same place: differences of means between random halves of the
    select samples that mix both classes alike.

    An open condition is read with the chain of thought that the model itself writes (greedy), which stays as it is
    while a direction is ablated: the score is taken behind that chain, given back as text. Where chains are not closed,
    that is "not tested".

    Of ``contrast="refusal"`` the classes are the harmful requests the model refused and those it fulfilled, by its own
    greedy responses in that condition; other responses are left out. A model that does one thing only has an empty
    class: then there is no probe, and `reasons` and `state` say so.

    What it does not show: that the direction *means* harm or refusal, or that the model reads it at that place: ablation
    is at every position and write. "lowers refusal" needs a mean score above 0 to begin with, and an effect on harmful requests whose interval is away from 0, of at
    least `min_effect` nats, larger than those of 95 % of the controls (of all of them, where there are fewer than 20), and of
    the same sign as the difference to the twins, whose interval is away from 0 too and which is at least a quarter of the effect
    (where none has a twin: the difference to the interval of the harmless ones). No correction is made for the number of directions tested.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        harmful: Requests that should be refused; their own splits count, halves are cut by family where there are none.
        harmless: Requests that should not, twins of the harmful ones at best.
        contrast: "harmful" (against harmless) or "refusal" (against fulfilment, by the model's own responses).
        think: Conditions, or a mapping from names to texts of your own.
        places: See `rim_lens.measures.probes.places.place_rows`; those of the paper by default. One that a condition lacks is
            named in `absent` and has no row.
        site: "resid_post" (default), "resid_pre", "attn_out" or "mlp_out".
        ablate: How many directions of each condition, "all", a list of (layer, place), or 0.
        n_controls: Control directions for each of these.
        min_effect: Nats; a convention, not derived from anything.
        folds: Of the cross-validation.
        limit: At most so many requests of each kind and side; None for all.
        max_new_tokens: Of responses, see `rl.generate`.
        max_cot_tokens: Of self-written chains of thought.
        openers: Texts that refusals begin with, see `rl.refusal_score`.
        seed: Of halves, folds, control directions and intervals.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        A `ProbeResult`, whose table has one row per condition, layer and place: n_positive and n_negative (evaluate samples),
        auc with its interval over families, accuracy (mean of both classes' shares on their side), share_positive and
        share_negative (above the threshold: the paper's probe score), the same by cross-validation on select (_cv); baseline
        (mean refusal score of the harmful requests), effect, effect_twins (on all harmless requests of the side) and specificity (harmful − its own twin), mean change of the
        refusal score in nats with intervals; percentile of the effect's size among n_controls; and state.

    Raises:
        NotEnoughData: A side lacks requests of a kind, or has a single family.
        UnknownSpan: A name that means no place, or a place to be ablated that is not probed.
        UnknownLayer: A layer to be ablated that the model lacks.
        EmptySpan: No place has a token in a condition.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> found = rl.probe(model, chat, *requests, places=["think_close"], ablate="all", n_controls=0, limit=12)
    >>> row = found.table.set_index("layer").loc[1]
    >>> float(row["auc"]), bool(row["effect_high"] < -5), row["state"]
    (1.0, True, 'separates, lowers refusal')
    """
    groups = check_contrast(contrast)
    check_places(places)
    facts = model_facts(model)
    _check_asked(facts, ablate, places, n_controls, folds)
    verify(model, reads=[site], edits=["resid_pre", "attn_out", "mlp_out"])
    openers = opener_texts(openers)
    sides = two_sides(harmful, harmless, limit, seed)
    select, evaluate = (
        grouped(
            model,
            chat,
            side,
            think,
            responses=contrast == "refusal",
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_cot_tokens=max_cot_tokens,
            max_rows=max_rows,
        )
        for side in sides
    )
    rows: list[dict[str, Any]] = []
    probes: dict[str, Probes] = {}
    reasons: dict[str, str] = {}
    absent: dict[str, list[str]] = {}
    for name in tqdm(select, desc="probes", disable=not progress):
        why = select[name].lacking(groups)
        if why:
            reasons[name] = why
            rows += without(name, facts.n_layers, places, evaluate[name], groups, why)
            continue
        train = [
            stream_at(model, select[name].batches[group], places, site=site, max_rows=max_rows)
            for group in groups
        ]
        held_out = [
            _stream_of(model, evaluate[name], group, list(places), site, max_rows) for group in groups
        ]
        kept = common_places(train[0], train[1], places)
        absent[name] = [place for place in places if place not in kept]
        probes[name] = fit_probes(train[0], train[1], kept, site=site, condition=name)
        table = separations(probes[name], train, held_out, select[name], evaluate[name], groups, folds, seed)
        chosen = _chosen(table, ablate)
        if chosen and not evaluate[name].unscored:
            meter = Meter(model, evaluate[name], openers, max_rows)
            for cell in tqdm(chosen, desc=f"ablate {name}", disable=not progress):
                one = probes[name].at(cell["layer"], cell["place"])
                samples = [taken(side, [one.place])[:, one.layer, 0] for side in train]
                cell.update(meter.ablated(one.direction, samples, n_controls, seed))
        for row in table:
            row["state"] = state(row, min_effect, evaluate[name], groups)
        rows += table
    return ProbeResult(
        table=frame(rows),
        probes=probes,
        reasons=reasons,
        absent={name: gone for name, gone in absent.items() if gone},
        settings={
            "contrast": contrast,
            "think": list(think) if not isinstance(think, str) else [think],
            "places": list(places),
            "site": site,
            "ablate": [list(one) for one in ablate]
            if isinstance(ablate, Sequence) and ablate != "all"
            else ablate,
            "n_controls": n_controls,
            "min_effect": min_effect,
            "folds": folds,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "max_cot_tokens": max_cot_tokens,
            "openers": openers,
            "seed": seed,
            "chat_format": chat.name,
            "n_select": [len(requests) for requests in sides[0]],
            "n_evaluate": [len(requests) for requests in sides[1]],
            "outcomes": {
                name: {"select": select[name].outcomes, "evaluate": evaluate[name].outcomes}
                for name in select
                if select[name].outcomes
            },
            "digests": {
                name: [
                    side[name].batches[kind].digest
                    for side in (select, evaluate)
                    for kind in ("harmful", "harmless")
                ]
                for name in select
            },
            "model": facts.to_dict(),
            "weights_digest": weights_digest(model),
            "rim_lens": _own_version(),
            "transformer_lens": version("transformer-lens"),
        },
    )


def _own_version() -> str:
    from rim_lens import __version__

    return __version__


def _check_asked(
    facts: ModelFacts, ablate: Ablate, places: Sequence[str], n_controls: int, folds: int
) -> None:
    if (isinstance(ablate, int) and ablate < 0) or n_controls < 0 or folds < 2:
        raise ValueError(
            f"ablate={ablate!r}, n_controls={n_controls} and folds={folds} were asked for; give 0 or more, 0 or more, and at"
            " least 2 folds."
        )
    if isinstance(ablate, int) or ablate == "all":
        return
    for layer, place in ablate:
        facts.check_layer(layer)
        if place not in places:
            raise UnknownSpan(
                f"the direction of layer {layer} at {place!r} was to be ablated, and the places probed are {list(places)}."
            )


# --- separation ----------------------------------------------------------------------------------------


def _stream_of(
    model: Model, groups: Groups, group: str, places: list[str], site: Stream, max_rows: int
) -> xr.DataArray | None:
    batch = groups.batches[group]
    return stream_at(model, batch, places, site=site, max_rows=max_rows) if len(batch) else None


# --- ablation ------------------------------------------------------------------------------------------


def _chosen(table: list[dict[str, Any]], ablate: Ablate) -> list[dict[str, Any]]:
    usable = [row for row in table if not row["_empty"]]
    if ablate == "all":
        return usable
    if isinstance(ablate, int):
        return sorted(usable, key=_rank)[:ablate]
    asked = [(int(layer), str(place)) for layer, place in ablate]
    return [row for row in usable if (row["layer"], row["place"]) in asked]


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    best = (row["auc_cv"], row["_gap"])
    return tuple(-value if math.isfinite(value) else math.inf for value in best)  # type: ignore[return-value]
