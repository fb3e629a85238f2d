"""The choices the paper leaves open, all of them: how far the conclusion hangs on which one is taken.

Which tensor of the MLP, pooled how, over a response or without one; how many neurons a pair names, and how many pairs must
agree; prompts averaged before or after δ. None of it is stated in arXiv 2509.00544, and RAS carries the unit of what is
read, so that values of different universes do not compare: their ranks (p, percentile) do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.generation import generate
from rim_lens.hooks.activations import Pool
from rim_lens.lens import Model
from rim_lens.measures.entanglement.between import entangled
from rim_lens.measures.entanglement.entangling import opened
from rim_lens.measures.entanglement.reading import (
    ModelReading,
    Site,
    check_requests,
    read_model,
    write_responses,
)
from rim_lens.measures.entanglement.rises import forms_of, rises_of
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.held_out import chosen_by, refuse_used
from rim_lens.measures.neurons.choosing import chosen
from rim_lens.measures.neurons.pairs import Pair, Pairs, as_pairs
from rim_lens.measures.shift import Average
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

Place = tuple[str, Pool, Site]  # response, pool, tensor: what has to be read anew


def multiverse(
    base: Model | str | Path | Callable[[], Model],
    tuned: Model | str | Path | Callable[[], Model],
    chat: ChatFormat | None,
    pairs: Pairs,
    harmful: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    *,
    pools: Sequence[Pool] = ("max", "mean"),
    sites: Sequence[Site] = ("post", "mlp_out"),
    responses: Sequence[str] = ("own", "none"),
    ms: Sequence[int] = (5, 10, 20),
    min_fractions: Sequence[float] = (1.0, 0.5),
    averages: Sequence[Average] = ("prompts_first", "after"),
    n_sets: int = 100,
    think: str = "off",
    reasoning_think: str = "careful",
    max_new_tokens: int = 64,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Choose neurons and measure their entanglement in every combination of what the paper leaves open.

    Each model is loaded once, and read once for each response, pool and tensor; all else is arithmetic. Neurons are chosen
    anew in each universe, on the pairs, in the base model.

    Args:
        base: A model, a name or folder for `load_model`, or a function without arguments that loads one.
        tuned: The same, after training.
        chat: Their chat format; None: found from the base.
        pairs: (less refused, more refused) pairs that choose the neurons.
        harmful: Requests to measure on; none may have chosen.
        reasoning: Reasoning questions.
        pools: Of "max" (the paper), "mean", "last".
        sites: Of "post" (neurons) and "mlp_out" (channels of the MLP's output).
        responses: Of "own" (each model's own, the paper), "base" (both read the base's) and "none".
        ms: How many neurons of a layer each pair names.
        min_fractions: Share of pairs that must name a neuron; 1.0 is the paper's intersection.
        averages: Of "prompts_first" and "after".
        n_sets: Sets on exchanged labels, and random ones.
        think: Think condition of pairs and harmful requests.
        reasoning_think: That of reasoning prompts.
        max_new_tokens: Of a response; 64 at most on harmful requests.
        folder: Keep readings and table there, and go on from there; None keeps nothing.
        seed: Of the sets.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        One row per universe: response, pool, site, m, min_fraction, average, n_neurons, ras, all (RAS of all neurons), p and
        exchanged (rank among sets on exchanged labels, and their mean), percentile and random (among random sets, matched
        in activity), and reason (why a number is missing: mostly that no neuron was chosen). The attribute ``told`` sums up.
        Universes share their prompts and models: how many of them have a small p is a description, no test.

    Raises:
        StatisticsError: A choice is unknown or empty, or a harmful request chose the neurons.
        NotEnoughData: No pair, or no prompt of a kind.
        ReferenceMismatch: The models do not compare.

    >>> import rim_lens as rl
    >>> from rim_lens.measures.neurons.pairs import counterfactual_pairs
    >>> asked = [rl.load_prompts(kind, language="toy", split="select")[::5] for kind in ("harmful", "harmless")]
    >>> held_out = [rl.load_prompts(kind, language="toy", split="evaluate")[:6] for kind in ("harmful", "reasoning")]
    >>> table = rl.multiverse(
    ...     "toy", "toy:deviate", None, counterfactual_pairs(*asked, kind="twins"), *held_out,
    ...     pools=["max"], sites=["post"], responses=["none"], min_fractions=[0.6], n_sets=20,
    ... )
    >>> table[["m", "average"]].drop_duplicates().shape
    (6, 2)
    """
    choices = {
        "pool": (pools, ("max", "mean", "last")),
        "site": (sites, ("post", "mlp_out")),
        "response": (responses, ("own", "base", "none")),
        "average": (averages, ("prompts_first", "after")),
        "m": (ms, None),
        "min_fraction": (min_fractions, None),
    }
    for name, (given, known) in choices.items():
        strange = [one for one in given if known is not None and one not in known]
        if not len(given) or strange:
            raise StatisticsError(
                f"{name}s {list(given)!r} were asked for; give at least one"
                + (f", of {', '.join(known)}." if known else ".")
            )
    check_requests(harmful, [], reasoning)
    made = as_pairs(pairs)
    forms = forms_of(made)
    refuse_used(chosen_by([*forms["less"], *forms["more"]]), harmful, "neurons")
    places: list[Place] = list(product(responses, pools, sites))
    settings: dict[str, Any] = {
        "think": think,
        "reasoning_think": reasoning_think,
        "max_new_tokens": max_new_tokens,
        "max_rows": max_rows,
        "progress": progress,
    }
    with TemporaryDirectory(prefix="rim_lens_multiverse_") as passing:
        root = Path(passing if folder is None else folder)
        with opened(base) as model:
            chat = chat or ChatFormat.from_model(model)
            words = _words(model, chat, harmful, reasoning, responses, settings)
            before = _readings(model, chat, harmful, reasoning, places, words, root / "base", settings)
            rises = _rises(model, chat, made, places, root / "pairs", settings)
            del model
        with opened(tuned) as model:
            after = _readings(
                model, chat, harmful, reasoning, places, words, root / "tuned", settings, before
            )
            del model
        kept = ResultFolder(root)
        asked = {
            "places": [list(place) for place in places],
            "ms": list(ms),
            "min_fractions": list(min_fractions),
            "averages": list(averages),
            "n_sets": n_sets,
            "seed": seed,
            "base": [before[place].settings for place in places],
            "tuned": [after[place].settings for place in places],
            "pairs": chosen_by([*forms["less"], *forms["more"]]),
        }
        kept.claim(asked, "multiverse.json")
        families = [pair.family or pair.more.id for pair in made]
        lines = kept.once(
            "table.json",
            lambda: frame_to_json(
                _table(before, after, rises, families, ms, min_fractions, averages, n_sets, seed)
            ),
        )
    table = frame_from_json(lines)
    table.attrs["told"] = _told(table)
    return table


def _words(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    responses: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, SpanBatch]:
    """What the base wrote, where both models are to read it."""
    if "base" not in responses:
        return {}
    return write_responses(model, chat, harmful, [], reasoning, **settings)


def _readings(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    places: Sequence[Place],
    words: dict[str, SpanBatch],
    root: Path,
    settings: dict[str, Any],
    against: dict[Place, ModelReading] | None = None,
) -> dict[Place, ModelReading]:
    """One reading per response, pool and tensor; what a model writes itself is written once."""
    own: dict[str, SpanBatch] = {}
    found = {}
    for place in places:
        response, pool, site = place
        if response == "own" and not own:
            own = write_responses(model, chat, harmful, [], reasoning, **settings)
        found[place] = read_model(
            model,
            chat,
            harmful,
            [],
            reasoning,
            folder=root / "-".join(place),
            against=None if against is None else against[place],
            parts=(),
            response={"own": own, "base": words}.get(response, "none"),
            pool=pool,
            site=site,
            **settings,
        )
    return found


def _rises(
    model: Model,
    chat: ChatFormat,
    pairs: Sequence[Pair],
    places: Sequence[Place],
    root: Path,
    settings: dict[str, Any],
) -> dict[Place, np.ndarray]:
    """More refused minus less refused [pair, layer, neuron], in the base; answers are written once for all places."""
    writing = {name: settings[name] for name in ("max_new_tokens", "max_rows", "progress")}
    written: dict[str, SpanBatch] = {}
    if any(response != "none" for response, _, _ in places):
        written = {
            form: generate(model, chat.render(prompts, think=settings["think"]), chat=chat, **writing).batch
            for form, prompts in forms_of(pairs).items()
        }
    found = {}
    for place in places:
        response, pool, site = place
        found[place] = rises_of(
            model,
            chat,
            pairs,
            "none" if response == "none" else written,
            think=settings["think"],
            pool=pool,
            site=site,
            folder=root / "-".join(place),
            **writing,
        )
    return found


def _table(
    before: dict[Place, ModelReading],
    after: dict[Place, ModelReading],
    rises: dict[Place, np.ndarray],
    families: Sequence[str],
    ms: Sequence[int],
    min_fractions: Sequence[float],
    averages: Sequence[Average],
    n_sets: int,
    seed: int,
) -> pd.DataFrame:
    import pandas as pd

    lines = []
    for place, m, share, average in product(before, ms, min_fractions, averages):
        response, pool, site = place
        mask = chosen(rises[place], m, min_fraction=share).mask
        neurons = [(int(layer), int(neuron)) for layer, neuron in np.argwhere(mask)]
        line: dict[str, Any] = {
            "response": response,
            "pool": pool,
            "site": site,
            "m": m,
            "min_fraction": share,
            "average": average,
            "n_neurons": len(neurons),
        }
        names = ("ras", "all", "p", "exchanged", "percentile", "random")
        line |= dict.fromkeys(names, float("nan"))
        line["reason"] = f"no neuron is in the top {m} of {share:.0%} of the pairs"
        if neurons:
            found = entangled(
                before[place],
                after[place],
                neurons,
                difference=rises[place],
                difference_families=families,
                average=average,
                floor=None,
                n_random_sets=n_sets,
                n_boot=1,
                seed=seed,
            )
            row = found.row("ras")
            line |= {name: row[name] for name in names[2:]}
            line |= {"ras": row["value"], "all": found.value("ras", "all"), "reason": row["reason"]}
        lines.append(line)
    return pd.DataFrame(lines)


def _told(table: pd.DataFrame) -> str:
    """The table in a sentence."""
    there = table[table["p"].notna()]
    empty = int((table["n_neurons"] == 0).sum())
    if not len(there):
        return f"None of {len(table)} universes has a p; {empty} chose no neuron."
    small = int((there["p"] <= 0.05).sum())
    p = there["p"]
    return (
        f"{small} of {len(there)} universes with a p have p ≤ .05 (from {p.min():.3g} to {p.max():.3g}, median"
        f" {p.median():.3g}); {empty} of {len(table)} chose no neuron."
    )
