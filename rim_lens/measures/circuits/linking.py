"""The two halves of the question on one table: what safety neurons do while the model thinks, and what fine-tuning does to edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.errors import NotEnoughData, ReferenceMismatch
from rim_lens.hooks.activations import Pool
from rim_lens.lens import Model, model_facts
from rim_lens.measures.circuits.nodes import Neuron, neuron_nodes
from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.neurons.reading import pooled_activations
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removal_table import mean_columns
from rim_lens.measures.stats import sign_flip_test
from rim_lens.prompts import Prompt
from rim_lens.prompts.records import as_prompts

if TYPE_CHECKING:
    import pandas as pd

WHILE_THINKING = ("off", "careful", "filler", "open")
Values = Float[np.ndarray, " prompt"]


def neurons_in_thought(
    model: Model,
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron],
    requests: Sequence[Prompt | str],
    *,
    conditions: Sequence[str] = WHILE_THINKING,
    tuned: Model | None = None,
    positions: str = "think",
    pool: Pool = "mean",
    max_new_tokens: int = 64,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> pd.DataFrame:
    """Say what a set of neurons does in the think block: left empty, given, filled with filler, or written by the model itself.

    The mean over the neurons of a layer of their activation, pooled over tokens of the block, prompt by prompt; beside each
    condition its difference from the first one on the same requests, and with a tuned model the difference between the two.

    What it does not show: that what the neurons do there matters (edges say that: `circuit`), and, in "open", what of a
    difference between models comes from other words. A mean hides neurons that move against each other.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its chat format.
        neurons: A `NeuronSet` or (layer, neuron) pairs.
        requests: Records or strings, harmful ones as a rule.
        conditions: Of `render_conditions`; the first is what the others are held against. In "open" the model writes first.
        tuned: A tuned model of the same shapes, read in the same conditions.
        positions: Tokens to pool over: a span's name that every condition has.
        pool: "mean", "max" or "last".
        max_new_tokens: Most tokens that the model writes in "open".
        seed: Of intervals and permutations.
        max_rows: Most prompts in one pass.

    Returns:
        A table with one row per layer of the set, model ("base", "tuned") and condition, of node, n_neurons, mean (activation,
        model's units) with its interval; change (− the first condition) with interval and p; from_base (tuned − base) with
        interval and p. p is by sign flips over families, by the max statistic over all rows of its column. NaN where there is
        nothing to compare.

    Raises:
        NotEnoughData: There is no neuron, no condition, or requests of a single family.
        RimLensError: As `pooled_activations`.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model = rl.load_model("planted")
    >>> asked = rl.load_prompts("harmful", language="toy", split="evaluate")[::8]
    >>> table = rl.neurons_in_thought(
    ...     model, rl.ChatFormat.from_model(model), planted_truth().neurons, asked, conditions=("off", "filler")
    ... )
    >>> table["condition"].tolist(), bool(table["mean"][0] > 2 * table["mean"][1])   # they fire at the two tags alone
    (['off', 'filler'], True)
    """
    import pandas as pd

    facts = model_facts(model)
    nodes = neuron_nodes("neurons", facts.check_neurons(neurons))
    prompts = as_prompts(requests)
    families = families_of(prompts)
    if not nodes or not conditions:
        raise NotEnoughData("no neuron or no condition was given; give at least one of each.")
    if len(set(families)) < 2:
        raise NotEnoughData(f"the {len(prompts)} requests are of one family; intervals need two at least.")
    models = {"base": model, **({} if tuned is None else {"tuned": tuned})}
    read: dict[tuple[str, str, str], Values] = {}
    for name, one in models.items():
        for condition in conditions:
            found = pooled_activations(
                one,
                chat,
                prompts,
                think=condition,
                response="own" if condition == "open" else "none",
                pool=pool,
                positions=positions,
                max_new_tokens=max_new_tokens,
                max_rows=max_rows,
            ).transpose("prompt", "layer", "neuron")
            for node in nodes:
                read[node.name, name, condition] = found.values[:, node.layer, list(node.members)].mean(
                    axis=1
                )
    changes = {
        key: values - read[key[0], key[1], conditions[0]]
        for key, values in read.items()
        if key[2] != conditions[0]
    }
    tunings = {
        key: values - read[key[0], "base", key[2]] for key, values in read.items() if key[1] == "tuned"
    }
    p_change, p_tuned = (_p(compared, families, seed) for compared in (changes, tunings))
    rows = []
    for node in nodes:
        for name in models:
            for condition in conditions:
                key = (node.name, name, condition)
                rows.append(
                    {
                        "node": node.name,
                        "n_neurons": len(node.members),
                        "model": name,
                        "condition": condition,
                        "n": len(prompts),
                        **mean_columns("mean", read[key], families, seed),
                        **_compared("change", changes.get(key), p_change.get(key), families, seed),
                        **_compared("from_base", tunings.get(key), p_tuned.get(key), families, seed),
                    }
                )
    return pd.DataFrame(rows)


def compare_circuits(
    base: Circuit, tuned: Circuit, *, contrast: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """Say how each edge differs between two models, request by request: a base and a tuned one, say; or between two conditions.

    Args:
        base: From `circuit`.
        tuned: From `circuit` on another model, or read in another condition, with the same heads, neurons and requests.
        contrast: Of which contrast; the first when None.
        seed: Of intervals and permutations.

    Returns:
        One row per edge, the largest change first: edge, sender, receiver, input; base and tuned (mean effects, nats), change
        (tuned − base) with its interval, p by sign flips over families and the max statistic over all edges; in_base and
        in_tuned, whether it is that circuit's.

    Raises:
        ReferenceMismatch: They are of other requests, nodes or contrasts.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)
    >>> one = rl.circuit(model, chat, [(1, 1)], [], *requests, search=search)
    >>> table = rl.compare_circuits(one, one)
    >>> float(table["change"].abs().max()), float(table["p"].min())
    (0.0, 1.0)
    """
    import pandas as pd

    names = [list(one.effects["contrast"].values) for one in (base, tuned)]
    chosen = str(names[0][0]) if contrast is None else contrast
    for what, same in (
        ("contrasts", all(chosen in one for one in names)),
        ("requests", _same_requests(base, tuned)),
        ("nodes", base.effects["edge"].equals(tuned.effects["edge"]) and base.asked() == tuned.asked()),
    ):
        if not same:
            raise ReferenceMismatch(
                f"two circuits were to be compared and their {what} differ; measure both with the same heads, neurons, requests and"
                " contrasts (gate=False where a tuned model no longer refuses)."
            )
    effects = [
        one.effects["effect"].sel(contrast=chosen).transpose("prompt", "edge").values for one in (base, tuned)
    ]
    families = [str(name) for name in base.effects["family"].values]
    change = effects[1] - effects[0]
    p = np.atleast_1d(np.asarray(sign_flip_test(change, families=families, correction="max", seed=seed).p))
    known = [one.edges[one.edges["contrast"] == chosen].set_index("edge") for one in (base, tuned)]
    rows = []
    for place, name in enumerate(map(str, base.effects["edge"].values)):
        row = known[0].loc[name]
        rows.append(
            {
                "edge": name,
                **{key: str(row[key]) for key in ("sender", "receiver", "input")},
                "base": float(effects[0][:, place].mean()),
                "tuned": float(effects[1][:, place].mean()),
                **mean_columns("change", change[:, place], families, seed),
                "p": float(p[place]),
                "in_base": bool(row["in_circuit"]),
                "in_tuned": bool(known[1].loc[name]["in_circuit"]),
            }
        )
    table = pd.DataFrame(rows)
    order = table["change"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _same_requests(one: Circuit, other: Circuit) -> bool:
    """To the token where both were read in one condition; else by their ids and families."""
    if one.settings["read_in"] == other.settings["read_in"]:
        return bool(one.settings["evaluate_digest"] == other.settings["evaluate_digest"])
    return bool(one.effects["family"].equals(other.effects["family"]))  # labelled by the requests' ids


def _p(
    compared: dict[tuple[str, str, str], Values], families: Sequence[str], seed: int
) -> dict[tuple[str, str, str], float]:
    if not compared:
        return {}
    stacked = np.stack(list(compared.values()), axis=1)
    test = sign_flip_test(stacked, families=list(families), correction="max", seed=seed)
    return dict(zip(compared, np.atleast_1d(np.asarray(test.p)).tolist(), strict=True))


def _compared(
    name: str, values: Values | None, p: float | None, families: Sequence[str], seed: int
) -> dict[str, Any]:
    suffix = f"p_{name}"
    if values is None or p is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high", suffix), float("nan"))
    return {**mean_columns(name, values, families, seed), suffix: p}
