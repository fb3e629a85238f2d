"""What removing more and more neurons does: effect over the size of the set, beside random sets of every size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import NotEnoughData, StatisticsError, UnknownNeuron
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateNeurons
from rim_lens.hooks.ablating import Method
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Model, ModelFacts, known_by, verify
from rim_lens.measures.edits import Remember, editor_name
from rim_lens.measures.neurons.beside import (
    Matched,
    activity_of,
    neurons_to_edit,
    paired_places,
    random_sets,
)
from rim_lens.measures.neurons.sets import Neuron, NeuronSet
from rim_lens.measures.readings import Reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import COLUMNS as SHARED_COLUMNS
from rim_lens.measures.removal_table import Line, effect_tables
from rim_lens.measures.removing import asked_of, both_kinds, removal_lines
from rim_lens.measures.stats import check_finite
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

SIZES = (1, 2, 5, 10, 20, 50, 100)
COLUMNS = ("size", "n_layers", *(name for name in SHARED_COLUMNS if name != "condition"))


def dose_curve(
    model: Model,
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron] | Float[np.ndarray, "layer neuron"],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    sizes: Sequence[int] | None = None,
    *,
    readings: Callable[[Model, SpanBatch], Reading] | None = None,
    n_random_sets: int = 20,
    matched: Matched = None,
    method: Method = "zero",
    reference: SpanBatch | None = None,
    positions: Positions = "all",
    condition: str = "off",
    openers: Iterable[str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Remove the first 1, 2, 5, … neurons of a ranking, and see from which size on refusal goes.

    Cost, with R random sets: 1 + (R + 1) sweeps for each size over the requests of each kind, last rows alone unembedded. A run
    into a folder that is stopped goes on where it was.

    What it does not show: the smallest set that carries refusal, as the ranking is not chosen for the whole set's effect; and a
    curve that falls late may mean that others stand in. A set of whole layers has no random set beside it.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        neurons: (layer, neuron) pairs, the first removed first; a `NeuronSet` with scores, whose own neurons come first by
            falling score and then all others of the model; one without, by layer; or scores [layer, neuron] of all neurons.
        harmful: Requests that should be refused, and did not choose the neurons.
        harmless: Their twins, see `neuron_effects`.
        sizes: Sizes of sets; None: those of `SIZES` that the ranking allows, and that of the set or list given.
        readings: See `neuron_effects`.
        n_random_sets: Random sets of every size, as many neurons in each layer; all where fewer exist, 0 for none.
        matched: See `neuron_effects`.
        method: See `AblateNeurons`.
        reference: Its prompts, for "mean" and "resample".
        positions: Rows at which neurons are edited.
        condition: A closed think condition, see `render_conditions`.
        openers: Texts that refusals begin with, see `refusal_score`.
        folder: Keep every number there as soon as it is measured, and go on from there when called again.
        seed: Of controls, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        One row per size and measure (score on harmful, score on harmless, specificity): size, n_layers (in how many layers they
        are), and the columns of `neuron_effects`; p is corrected over sizes (max statistic). ``attrs``: what was asked, the
        ranking up to the largest size, digests.

    Raises:
        UnknownNeuron: There is no neuron, or the model lacks one.
        StatisticsError: A size is not one of 1 to the ranking's length, or stands there twice; a request chose the neurons.
        NotFinite: A score is NaN or infinite; or the logits are.
        RimLensError: As `neuron_effects`.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = [rl.load_prompts(kind, language="toy", split="evaluate")[::9] for kind in ("harmful", "harmless")]
    >>> curve = rl.dose_curve(model, chat, planted_truth().neurons, *asked, sizes=[1, 4, 8], n_random_sets=3)
    >>> (curve[curve["kind"] == "harmful"]["change"] < [-0.5, -5, -15]).tolist()
    [True, True, True]
    """
    if n_random_sets < 0:
        raise StatisticsError(f"n_random_sets={n_random_sets} was asked for; it is at least 0.")
    facts = verify(model, edits=["post"])
    if not isinstance(neurons, NeuronSet | np.ndarray):
        neurons = list(neurons)
    order = ranking(neurons, facts)
    neurons_to_edit(neurons if isinstance(neurons, NeuronSet) else order, facts, [*harmful, *harmless])
    steps = _sizes(sizes, order, 0 if isinstance(neurons, np.ndarray) else len(neurons))
    edit = partial(AblateNeurons, method=method, reference=reference)
    edit(order[:1], positions=positions)  # refuses a method without its reference
    prompts = both_kinds(harmful, harmless, "removing neurons")
    twins = paired_places(prompts)
    openers = opener_texts(openers)
    asked = asked_of(
        model,
        chat,
        prompts,
        (),
        [condition],
        score=readings,
        written=False,
        divergence=False,
        writing={},
        openers=openers,
        max_rows=max_rows,
        seed=seed,
    )
    batches = [reading.batch for _, _, reading in asked.readings]
    if matched not in (None, "activity"):
        raise StatisticsError(f"matched={matched!r} was asked for; it is None or 'activity'.")
    known = neurons if isinstance(neurons, NeuronSet) else order
    activity = activity_of(model, known, batches, matched, max_rows)
    controls = {size: _beside(order[:size], facts, n_random_sets, seed, activity) for size in steps}
    settings = {
        "ranking": [list(neuron) for neuron in order[: max(steps)]],
        "sizes": steps,
        "editor": editor_name(edit),
        "reference": reference and reference.digest,
        "positions": told(positions),
        "matched": matched,
        "n_random_sets": n_random_sets,
        "readings": [reading.name for _, _, reading in asked.readings],
        **asked.settings(),
        "openers": openers,
        "seed": seed,
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "dose_curve/asked.json")
        remember = kept.lines("dose_curve/readings.jsonl").get
    lines: list[Line] = []
    for size in steps:
        found = removal_lines(
            asked,
            lambda members: edit(members, positions=positions),
            order[:size],
            controls[size],
            0,
            twins,
            remember=remember,
            progress=progress,
            what=f"{size} neurons",
        )
        lines += [replace(line, condition=str(size)) for line in found]
    # Sizes stand where conditions stand elsewhere, so that p is corrected over them.
    names = [str(number) for number in range(n_random_sets)]
    table = effect_tables(lines, names, "neurons", seed)["table"]
    table.insert(0, "size", table["condition"].astype(int))
    table.insert(1, "n_layers", [len({layer for layer, _ in order[:size]}) for size in table["size"]])
    table = table.drop(columns="condition").reset_index(drop=True)
    table.attrs = settings
    return table


def ranking(
    neurons: NeuronSet | Sequence[Neuron] | Float[np.ndarray, "layer neuron"], facts: ModelFacts
) -> list[Neuron]:
    """Return neurons in the order in which they are removed, see `dose_curve`; ties by layer and place.

    Raises:
        UnknownNeuron: There is none, or the model lacks one.
        StatisticsError: Scores are of another shape, or a neuron stands there twice.
        NotFinite: A score is NaN or infinite.
    """
    facts.refuse_moe("per-neuron work")
    if isinstance(neurons, np.ndarray):
        return _by_score(neurons, facts)
    if isinstance(neurons, NeuronSet):
        first = neurons.ranked()
        if neurons.scores is None or not first:
            return first
        inside = set(first)
        return first + [neuron for neuron in _by_score(neurons.scores, facts) if neuron not in inside]
    given = [(int(layer), int(neuron)) for layer, neuron in (*facts.check_neurons(neurons),)]
    if len(given) < len(neurons):
        raise StatisticsError("a neuron stands in the ranking twice; each can be removed once.")
    return [(int(layer), int(neuron)) for layer, neuron in neurons]


def _by_score(scores: np.ndarray, facts: ModelFacts) -> list[Neuron]:
    shape = (facts.n_layers, facts.d_mlp)
    if scores.shape != shape:
        raise StatisticsError(
            f"scores of shape {scores.shape} were given; a number for each of {shape[0]} layers and {shape[1]} neurons is"
            " needed, or (layer, neuron) pairs in order."
        )
    check_finite(np.asarray(scores, dtype=np.float64), "scores", axes=("layer", "neuron"))
    flat = np.argsort(-scores.reshape(-1), kind="stable")
    return [divmod(int(place), facts.d_mlp) for place in flat]


def _sizes(sizes: Sequence[int] | None, order: Sequence[Neuron], own: int) -> list[int]:
    if not order:
        raise UnknownNeuron(
            "no neuron was given; give (layer, neuron) pairs in order, or a NeuronSet that is not empty."
        )
    if sizes is None:
        return sorted({size for size in (*SIZES, own) if 1 <= size <= len(order)})
    steps = [int(size) for size in sizes]
    if not steps or len(set(steps)) < len(steps) or min(steps) < 1 or max(steps) > len(order):
        raise StatisticsError(
            f"sizes={list(sizes)} were asked for; each is from 1 to the {len(order)} neurons of the ranking, once."
        )
    return sorted(steps)


def _beside(
    chosen: Sequence[Neuron],
    facts: ModelFacts,
    n_random_sets: int,
    seed: int,
    activity: Float[np.ndarray, "layer neuron"] | None,
) -> list[list[Neuron]]:
    try:
        return random_sets(chosen, facts, n_random_sets, seed, activity)
    except NotEnoughData:  # whole layers: nothing can stand beside them, and n_controls says so
        return []
