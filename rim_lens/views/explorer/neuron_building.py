"""What the neuron explorer shows: which neurons training moved, or which answer to what, beside random ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.errors import ConditionError, NotEnoughData
from rim_lens.hooks.activations import Pool
from rim_lens.lens import model_facts
from rim_lens.measures.entanglement.between import random_beside, sides_of
from rim_lens.measures.entanglement.reading import check_comparable
from rim_lens.measures.neurons.beside import neurons_to_edit, random_sets
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.views.explorer.neuron_columns import (
    Columns,
    Effects,
    activations_of_one,
    effects_of,
    known_of_set,
    shifts_between,
)
from rim_lens.views.explorer.neuron_page import Budget, Reading, page_data, places
from rim_lens.views.explorer.neuron_reading import Neuron, Response, Source, read_one, read_two, source_of
from rim_lens.views.explorer.page import MAX_BYTES, ExplorerView, explorer_html, write_explorer

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model
    from rim_lens.prompts import Prompt
    from rim_lens.study.neuron_results import NeuronStudyResult


@dataclass(frozen=True)
class NeuronView(ExplorerView):
    """Everything a page or widget of the neuron explorer holds.

    Attributes:
        data: Plain values: models, columns, scatters, sets, prompts, names of arrays.
        arrays: float32 arrays that `data` names by their place.
        sources: What each model was read on, in memory only.
    """

    sources: tuple[Source, ...] = field(default=(), repr=False)
    of: ClassVar[str] = "neurons"

    def __repr__(self) -> str:
        data = self.data
        drawn = data["n_neurons"] - data["left_out"]
        return f"NeuronView({data['title']}: {drawn} of {data['n_neurons']} neurons; {self.n_bytes / 1e6:.1f} MB)"


def neuron_view(
    model: Model,
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str] = (),
    reasoning: Sequence[Prompt | str] = (),
    *,
    tuned: Model | None = None,
    effects: Any | None = None,
    effect_unit: str = "nats",
    response: Response = "own",
    think: str = "off",
    reasoning_think: str = "careful",
    pool: Pool = "max",
    n_random_sets: int = 100,
    matched: Literal["activity"] | None = "activity",
    n_top: int = 2,
    n_read: int = 1000,
    n_drawn: int = 100_000,
    max_new_tokens: int = 64,
    keep_text: bool = False,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> NeuronView:
    """Measure what the neuron explorer shows.

    With `tuned`, the scatter holds each neuron's own term of δ⁻ (safety drop) against its term of δ⁺ (reasoning rise): their
    means over a set are those of `reciprocal_activation_shift` and of `entanglement`, which reads both models as is done here
    and says what p there is. Without, it holds what neurons do on harmful requests against what they do on others.

    A neuron's place says nothing about what it does; its effect does, where it was tested. Whatever moves the weights moves
    neurons both ways: look at where random neurons stand.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode; the base where there is a tuned one.
        chat: Its format.
        neurons: A `NeuronSet`, or (layer, neuron) pairs. They must have been chosen on other requests.
        harmful: Requests that should be refused.
        harmless: Requests that should be answered, their twins at best.
        reasoning: Reasoning questions; needed with `tuned`.
        tuned: The model after training.
        effects: Of removing single neurons: a mapping from (layer, neuron); a table with columns layer, neuron and effect, or
            of `direct_to_logits`; or a mapping from names to such. What is not there reads "not tested".
        effect_unit: What effects are in.
        response: "own": each model writes its response, and both are read (the paper); "base": both read what the base wrote;
            "none": the prompts alone.
        think: Think condition of harmful and harmless requests.
        reasoning_think: That of the reasoning prompts.
        pool: See `NeuronActivations`.
        n_random_sets: Random sets beside it, with as many neurons in each layer. The first ones can be coloured.
        matched: "activity": about as active; None: the number per layer alone.
        n_top: Of each kind so many prompts, those on which the (base) model's neuron is most active, are shown by token.
        n_read: Of so many neurons at most: those of the set first, then tested ones, a random set, and what moved most. A
            live kernel reads the others.
        n_drawn: So many neurons are drawn at most; what is left out is told, with the box it lies in.
        max_new_tokens: Of a response; 64 at most on harmful requests.
        keep_text: Show what was written to harmful requests in full; else its first words.
        max_bytes: Of the page.
        seed: Of random sets.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Raises:
        NotEnoughData: No neuron, no requests, or nothing to hold them against.
        UnknownNeuron: The model lacks a neuron.
        UnsupportedModel: The MLP is a mixture of experts.
        StatisticsError: A request chose the neurons.
        ReferenceMismatch: The models, or model and set, are of different shapes.
        ConditionError: An unknown condition or response.
        ViewTooLarge: The set alone would not fit in `max_bytes`.

    >>> import rim_lens as rl
    >>> base, tuned = rl.load_model("toy"), rl.load_model("toy:deviate")
    >>> asked = [rl.load_prompts(kind, language="toy", split="evaluate")[:4] for kind in ("harmful", "harmless", "reasoning")]
    >>> view = rl.views.neuron_view(
    ...     base, rl.ChatFormat.from_model(base), [(1, 3), (1, 7)], *asked, tuned=tuned, response="none"
    ... )
    >>> [one["name"] for one in view.data["scatters"]], view.data["n_neurons"]
    (['terms of RAS', 'change of activation'], 512)
    """
    if response not in ("own", "base", "none"):
        raise ConditionError(f"response={response!r} was asked for; there are 'own', 'base' and 'none'.")
    facts = model_facts(model)
    given = neurons if isinstance(neurons, NeuronSet) else list(neurons)
    checked = neurons_to_edit(given, facts, [*harmful, *harmless])
    chosen = given.ranked() if isinstance(given, NeuronSet) else checked
    kinds = {"harmful": harmful, "harmless": harmless, "reasoning": reasoning}
    asked = {kind: prompts for kind, prompts in kinds.items() if len(prompts)}
    _check_kinds(asked, tuned is not None)
    known = effects_of(effects, effect_unit, facts.n_layers, facts.d_mlp)
    shape = (facts.n_layers, facts.d_mlp)
    reading: dict[str, Any] = {
        "pool": pool,
        "max_new_tokens": max_new_tokens,
        "max_rows": max_rows,
        "progress": progress,
    }
    sources: tuple[Source, ...]
    conditions = (response, think, reasoning_think)
    if tuned is not None:
        check_comparable({"model": facts.to_dict()}, {"model": model_facts(tuned).to_dict()})
        before, after = read_two(model, tuned, chat, asked, *conditions, **reading)
        sides = sides_of(before, after)
        sets, _ = random_beside(chosen, sides, shape, n_random_sets, matched, seed)
        sources = (source_of(before, "base"), source_of(after, "tuned"))
        columns = shifts_between(sources, sides, [places(one, facts.d_mlp) for one in (chosen, *sets)])
        models = [model, tuned]
    else:
        source = read_one(model, chat, asked, *conditions, **reading)
        sources, models = (source,), [model]
        activity = np.mean([source.means(kind) for kind in source.pooled], axis=0).reshape(shape)
        sets = random_sets(checked, facts, n_random_sets, seed, activity if matched else None)
        columns = activations_of_one(source)
        if isinstance(given, NeuronSet):
            columns = columns.joined(known_of_set(given))
    return _view(
        sources,
        columns,
        chosen,
        sets,
        known,
        shape,
        Budget(n_top, n_read, n_drawn, max_bytes),
        given,
        Reading(chat, models, keep_text),
    )


def neuron_study_view(
    result: NeuronStudyResult,
    tuned: str | None = None,
    *,
    n_random_sets: int = 100,
    n_drawn: int = 100_000,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> NeuronView:
    """Open a saved study of neurons in the explorer, without any model.

    Of a tuned model the scatter is that of `neuron_view`, on the activations, set, random sets and effects that the study
    kept. Without one it holds what the set was chosen by against how active each neuron is. Activations over tokens are not
    kept by a study; `neuron_view` and `NeuronExplorer` read them.

    Args:
        result: From `rl.load_neuron_study`, or of a run.
        tuned: Name of a tuned model; None: the first whose entanglement is there, if any.
        n_random_sets: Where the study held none beside the set.
        n_drawn: See `neuron_view`.
        max_bytes: Of the page.
        seed: Of random sets, where the study held none.

    Raises:
        NotEnoughData: The study chose no neuron, or did not come that far, or has no such tuned model.
        StudyFolderError: A file of the folder is corrupt.
        ViewTooLarge: The set alone would not fit in `max_bytes`.
    """
    from rim_lens.measures.controls import random_neurons_per_layer
    from rim_lens.measures.entanglement.reading import ModelReading

    found = result.neurons
    if found is None or not len(found):
        raise NotEnoughData(f"the study in {result.path} has no neurons to look at; see its report for why.")
    through = list(result.entanglement)
    if tuned is not None and tuned not in through:
        raise NotEnoughData(
            f"entanglement with {tuned!r} was asked for; the study in {result.path} has it of {', '.join(through) or 'none'}."
        )
    chosen, shape = found.ranked(), (found.n_layers, found.d_mlp)
    effects = effects_of(result.writers, "nats", *shape)
    sources: tuple[Source, ...] = ()
    name = tuned or (through[0] if through else None)
    if name is not None:
        kept = result.path / "tuned" / name / "entanglement"
        before, after = (ModelReading.load(kept / role) for role in ("base", "tuned"))
        entangled = result.entanglement[name]
        sets = [[(int(layer), int(place)) for layer, place in one] for one in entangled.settings["controls"]]
        sources = (source_of(before, "base", str(result.design["model"])), source_of(after, "tuned", name))
        members = [places(one, found.d_mlp) for one in (chosen, *sets)]
        columns = shifts_between(sources, sides_of(before, after), members, entangled)
    else:
        sets = random_neurons_per_layer(chosen, found.d_mlp, n_random_sets, seed, found.activity)
        columns = known_of_set(found)
    title = str(result.design["model"])
    return _view(
        sources, columns, chosen, sets, effects, shape, Budget(0, 0, n_drawn, max_bytes), found, None, title
    )


def neuron_explorer_html(view: NeuronView) -> str:
    """The neuron explorer as a page, complete in itself: no request leaves it, and no token can run or hide.

    Args:
        view: From `neuron_view` or `neuron_study_view`.
    """
    return explorer_html(view)


def write_neuron_explorer(view: NeuronView, path: str | Path) -> Path:
    """Write the neuron explorer's page to a file and return its path.

    Args:
        view: From `neuron_view` or `neuron_study_view`.
        path: Of the page.
    """
    return write_explorer(view, path)


def _view(
    sources: tuple[Source, ...],
    columns: Columns,
    chosen: Sequence[Neuron],
    sets: Sequence[Sequence[Neuron]],
    effects: Effects,
    shape: tuple[int, int],
    budget: Budget,
    given: Any,
    reading: Reading | None,
    name: str = "",
) -> NeuronView:
    if not columns.scatters:
        raise NotEnoughData(
            "there is nothing to draw neurons by: give harmless or reasoning prompts beside the harmful ones, a tuned model, or a"
            " NeuronSet with scores and activity."
        )
    data, arrays = page_data(
        sources, columns, chosen, sets, effects, shape, budget, reading, name, _of_whole_set(given)
    )
    return NeuronView(data, tuple(arrays), sources)


def _of_whole_set(neurons: Any) -> str:
    """What removing the set did, in words."""
    tested = getattr(neurons, "effects", None)
    if tested is None:
        return "The set as a whole: not tested."
    scores = tested.table[tested.table["measure"] == "score"]
    row = scores[scores["kind"] == "harmful"].iloc[0]
    change = f"{row['change']:+.3g}".replace("-", "−")
    return (
        f"The set as a whole: verdict “{tested.verdict}”; removing it changes refusal of harmful requests by {change}"
        f" {row['unit']} ({row['condition']}, n = {row['n']})."
    )


def _check_kinds(asked: Mapping[str, Sequence[Any]], two: bool) -> None:
    wanted = ("harmful", "reasoning") if two else ("harmful",)
    missing = [kind for kind in wanted if kind not in asked]
    if missing:
        raise NotEnoughData(
            f"no {missing[0]} prompt was given; "
            + (
                "what moved on reasoning is held against what moved on safety."
                if two
                else "give requests that should be refused."
            )
        )
