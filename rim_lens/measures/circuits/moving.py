"""Do refusal heads and safety neurons move together while a model is tuned? What each does at every checkpoint, and how the two relate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.capturing import capture
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import NotEnoughData, ReferenceMismatch
from rim_lens.hooks import AblateHeads, AblateNeurons, NeuronActivations, SpanAttention
from rim_lens.lens import Head, Model, model_facts, require_source
from rim_lens.measures.checkpoints.relating import correlations
from rim_lens.measures.circuits.nodes import Neuron
from rim_lens.measures.entanglement.entangling import opened
from rim_lens.measures.heads.held_out import heads_to_ask
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.neurons.beside import neurons_to_edit
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.readings import refusal_reading
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removal_table import mean_columns
from rim_lens.measures.stats import sign_flip_test
from rim_lens.prompts import Prompt
from rim_lens.prompts.records import as_prompts

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("score", "heads_effect", "neurons_effect", "heads_mass", "neurons_activation")
# What is held together where nothing is named: effects, and what each half reads or does.
PAIRS = (("heads_effect", "neurons_effect"), ("heads_mass", "neurons_activation"))
Values = Float[np.ndarray, " prompt"]


def halves_at_checkpoints(
    runs: Mapping[str, Sequence[str | Path | Model]],
    chat: ChatFormat,
    heads: RefusalHeads | Iterable[Head],
    neurons: NeuronSet | Iterable[Neuron],
    requests: Sequence[Prompt | str],
    *,
    base: str | Path | Model,
    steps: Mapping[str, Sequence[int]] | None = None,
    span: str = "request",
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> pd.DataFrame:
    """Say what given heads and neurons do at each checkpoint of fine-tuning runs, and by how much that changed since the base.

    On each model, with thinking off: the refusal score; what zeroing the heads does to it, and zeroing the neurons; the share of the
    last row's attention that the heads give a span; the neurons' mean activation over the think block. Change = checkpoint −
    base, request by request.

    What it does not show: that other heads or neurons took over (the sets are the base's), and why the two change:
    `halves_together` relates them. Effects of removal shrink with the refusal that is there to be removed.

    Args:
        runs: Run → its checkpoints in order, models or what `load_model` reads, each loaded when its turn comes.
        chat: Their chat format.
        heads: (layer, head) pairs, or what `refusal_heads` found on the base.
        neurons: A `NeuronSet` or (layer, neuron) pairs.
        requests: Harmful ones that chose neither.
        base: The model before tuning.
        steps: Run → step of each checkpoint; 1, 2, 3 … when None.
        span: What heads' attention is read on.
        seed: Of intervals and permutations.
        max_rows: Most prompts in one pass.

    Returns:
        One row per run and checkpoint, and one at step 0 per run, the base: run, step, n, and for each of score, heads_effect,
        neurons_effect (nats), heads_mass (0 to 1) and neurons_activation (model's units) its mean, ``…_change`` with
        ``…_change_low``, ``…_change_high`` and ``…_p`` (sign flips over families; max statistic over all checkpoints).

    Raises:
        UnknownModel: A name or folder that `load_model` cannot take; before any is read.
        NotEnoughData: There is no run, a run has no checkpoint, or requests are of one family.
        ReferenceMismatch: `steps` does not fit the runs.
        StatisticsError: A request chose the heads or neurons.

    >>> import rim_lens as rl
    >>> base = rl.load_model("toy")
    >>> asked = rl.load_prompts("harmful", language="toy", split="evaluate")[::8]
    >>> table = rl.halves_at_checkpoints(
    ...     {"deviate": ["toy:deviate"]}, rl.ChatFormat.from_model(base), [(0, 7)], [(0, 3)], asked, base=base
    ... )
    >>> table[["run", "step"]].values.tolist()
    [['deviate', 0], ['deviate', 1]]
    """
    import pandas as pd

    asked = as_prompts(requests)
    families = families_of(asked)
    if not runs or not all(len(run) for run in runs.values()):
        raise NotEnoughData("no run, or a run without a checkpoint, was given; give each at least one.")
    if len(set(families)) < 2:
        raise NotEnoughData(f"the {len(asked)} requests are of one family; intervals need two at least.")
    at = steps or {name: range(1, len(run) + 1) for name, run in runs.items()}
    if {name: len(run) for name, run in runs.items()} != {name: len(run) for name, run in at.items()}:
        raise ReferenceMismatch(
            "steps were given for other runs, or another number of checkpoints; give one each."
        )
    for one in (base, *(one for run in runs.values() for one in run)):
        if isinstance(one, str | Path):
            require_source(one)
    heads = heads_to_ask(heads, asked)
    batch = chat.render(asked, think="off")
    with opened(base) as model:
        facts = model_facts(model)
        chosen = list(facts.check_heads(heads))
        members = neurons_to_edit(neurons if isinstance(neurons, NeuronSet) else list(neurons), facts, asked)
        if not chosen or not members:
            raise NotEnoughData("heads and neurons are held together; give at least one of each.")
        before = _read(model, batch, chosen, members, span, max_rows)
    found: list[tuple[str, int, dict[str, Values]]] = []
    for name, run in runs.items():
        for step, one in zip(at[name], run, strict=True):
            with opened(one) as model:
                found.append((name, int(step), _read(model, batch, chosen, members, span, max_rows)))
    p = {
        what: np.atleast_1d(
            np.asarray(
                sign_flip_test(
                    np.stack([values[what] - before[what] for _, _, values in found], axis=1),
                    families=families,
                    correction="max",
                    seed=seed,
                ).p
            )
        )
        for what in STATISTICS
    }
    rows: list[dict[str, Any]] = []
    for name in runs:
        rows.append({"run": name, "step": 0, "n": len(asked), **_row(before, before, {}, families, seed)})
        rows += [
            {
                "run": name,
                "step": step,
                "n": len(asked),
                **_row(values, before, {what: p[what][place] for what in p}, families, seed),
            }
            for place, (run, step, values) in enumerate(found)
            if run == name
        ]
    return pd.DataFrame(rows)


def halves_together(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    *,
    groups: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate what heads do with what neurons do over checkpoints: pooled, within runs, across runs, and run by run.

    Checkpoints of one run follow each other, so that a correlation within a run has no p; whole runs are exchanged instead, see
    `rim_lens.measures.checkpoints.relating.correlations`, whose columns these are ("metric" of heads, "outcome" of neurons).

    What it does not show: that one moves the other. In a model whose refusal goes away all that carries refusal does less; hold a
    correlation against those of each half with the refusal score, which are given beside.

    Args:
        table: From `halves_at_checkpoints`.
        pairs: (column of heads, column of neurons).
        groups: Run → group (the seed of its base): runs are exchanged within groups.
        kinds: Run → kind of training, for p within kinds.
        units: Run → what chance drew and every kind shares.
        n_permutations: Where there are more ways than that, so many are drawn.
        seed: Of the drawing.

    Raises:
        StatisticsError: There is no such column.
    """
    import pandas as pd

    both = list(dict.fromkeys([*pairs, *((one, "score") for pair in pairs for one in pair)]))
    return pd.concat(
        [
            correlations(
                table,
                one,
                other,
                groups=groups,
                kinds=kinds,
                units=units,
                n_permutations=n_permutations,
                seed=seed,
            )
            for one, other in both
        ],
        ignore_index=True,
    )


def _read(
    model: Model, batch: SpanBatch, heads: list[Head], neurons: list[Neuron], span: str, max_rows: int
) -> dict[str, Values]:
    reading = refusal_reading(model, batch, max_rows=max_rows)
    score = reading()
    data = capture(
        model,
        batch,
        SpanAttention(spans=[span]),
        NeuronActivations(pool="mean", positions="think"),
        max_rows=max_rows,
    )
    mass = data["attention_mass"].transpose("prompt", "layer", "head", "span").values[..., 0]
    activation = data["neuron_activation"].transpose("prompt", "layer", "neuron").values
    return {
        "score": score,
        "heads_effect": reading([AblateHeads(heads)]) - score,
        "neurons_effect": reading([AblateNeurons(neurons)]) - score,
        "heads_mass": np.mean([mass[:, layer, head] for layer, head in heads], axis=0),
        "neurons_activation": np.mean([activation[:, layer, neuron] for layer, neuron in neurons], axis=0),
    }


def _row(
    values: Mapping[str, Values],
    before: Mapping[str, Values],
    p: Mapping[str, float],
    families: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in STATISTICS:
        found[what] = float(values[what].mean())
        found |= mean_columns(f"{what}_change", values[what] - before[what], families, seed)
        found[f"{what}_p"] = float(p.get(what, float("nan")))
    return found
