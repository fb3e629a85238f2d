"""Refusal brought back to a tuned model by activations of its base, put into a set of neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import PatchNeurons, Recording, record
from rim_lens.hooks.positions import Positions, told
from rim_lens.hooks.recording import require_same_shapes
from rim_lens.lens import Model, ModelFacts, verify, weights_digest
from rim_lens.measures.edits import Remember, measured
from rim_lens.measures.entanglement.entangling import opened
from rim_lens.measures.neurons.beside import (
    Matched,
    activity_of,
    neurons_to_edit,
    paired_places,
    random_sets,
    set_name,
)
from rim_lens.measures.neurons.sets import Neuron, NeuronSet
from rim_lens.measures.readings import Reading, refusal_reading, refused_reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import DIFFERENCE
from rim_lens.measures.removing import both_kinds
from rim_lens.measures.restored import COLUMNS as SHARED_COLUMNS
from rim_lens.measures.restored import Edited, Values, edited_by, minus_twins, restored_lines
from rim_lens.measures.twins import witnesses
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {"off": "base", "baseline": "tuned", "edited": "patched"}
COLUMNS = tuple(_NAMES.get(name, name) for name in SHARED_COLUMNS if name not in ("edit", "state"))


def restore_by_neurons(
    base: Model | str | Path | Callable[[], Model],
    tuned: Model | str | Path | Callable[[], Model],
    chat: ChatFormat,
    neurons: NeuronSet | Iterable[Neuron],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    condition: str = "off",
    text: str | Sequence[str] | None = None,
    positions: Positions = "all",
    n_random_sets: int = 100,
    matched: Matched = None,
    written: bool = False,
    n_written: int = 3,
    max_new_tokens: int = 64,
    openers: Iterable[str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Put the base model's activations into these neurons of the tuned model, and see how much of the lost refusal returns.

    If training took refusal away by changing what these neurons do, their old activations bring it back, and those of random
    neurons of the same layers do not (2406.14144 patches so; there anew at each written token, here the prompt's rows alone).
    Twins stand beside: an edit that raises every score alike, or makes the model refuse harmless requests, restores nothing.

    Cost: on the base model, one sweep over the requests of each kind for its scores and one to record. On the tuned model, with
    R random sets, R + 2 sweeps over each kind, last rows alone unembedded; with `written`, n_written + 2 generations on it and
    one on the base. Memory: the recording, `Recording`, of the layers in question; and of one model where names or functions are
    given. A run into a folder that is stopped goes on where it was.

    What it does not show: that these neurons' *weights* were changed. They may read what an earlier layer now writes otherwise,
    and whatever the base had in them is put back, harm or not. Nor that nothing else would restore it.

    Args:
        base: The model before training: a model, a name for `load_model`, or a function that gives one.
        tuned: The model after.
        chat: The chat format of both.
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        harmful: Requests that should be refused, and did not choose the neurons.
        harmless: Their twins, see `neuron_effects`.
        condition: A closed think condition, see `render_conditions`.
        text: A chain of thought of your own, called `condition`: one for all requests, or one each.
        positions: Rows that are patched: "all" (of the prompt), "prompt_last", or a span.
        n_random_sets: Random sets at most, as many neurons in each layer; all where fewer exist, 0 for none.
        matched: "activity": random neurons about as active, by the set's own `activity` or on these requests in the base model.
        written: Whether replies are generated and judged too.
        n_written: For how many random sets what is written is measured.
        max_new_tokens: See `generate`.
        openers: Texts that refusals begin with, see `refusal_score`.
        folder: Keep every number there as soon as it is measured, and go on from there when called again.
        seed: Of controls, chains of thought, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        One row per kind (harmful, harmless) and measure ("score", nats; "refuse", share of replies), and one of measure
        "specificity" (score of each harmful request minus that of its twin, where twins are known): condition, n, n_families;
        base, tuned and patched (means); effect (patched − tuned, paired, bootstrap over families); p (sign flips over families, where
        twins are known over those whose twins swap other words); restored, (patched − tuned) / (base − tuned) of the means,
        with its interval, NaN where the loss base − tuned is not shown to be above 0 by its own interval; random (mean effect
        of the same edit on random sets, with quantiles), percentile, p_controls, n_controls. ``attrs``: what was asked, the
        sets, digests.

    Raises:
        UnknownNeuron: There is no neuron, or the models lack one.
        UnsupportedModel: The MLP is a mixture of experts.
        ReferenceMismatch: The two models are of different shapes or vocabularies, or the set of another shape.
        ConditionError: The condition is open, or unknown.
        StatisticsError: A request chose the neurons, or a number is out of range.
        MissingTwin: Twins are named, and some are not there.
        NotEnoughData: There are no requests of a kind, or of one family only; or no other set of neurons is possible.
        NotFinite: NaN or infinity in activations or logits.
        StudyFolderError: The folder holds something else.
        ModelError: The models' hooks do not work as needed.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> base = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(base)
    >>> asked = [rl.load_prompts(kind, language="toy", split="evaluate")[::9] for kind in ("harmful", "harmless")]
    >>> table = rl.restore_by_neurons(base, base, chat, planted_truth().neurons, *asked, n_random_sets=2)
    >>> bool(table["effect"].abs().max() < 1e-3), int(table["restored"].count())  # nothing was lost, so that nothing returns
    (True, 0)
    """
    if n_written < 0 or max_new_tokens < 1 or n_random_sets < 0:
        raise StatisticsError(
            f"n_random_sets={n_random_sets}, n_written={n_written} and max_new_tokens={max_new_tokens} were asked for; the last"
            " is at least 1, the others 0."
        )
    if not isinstance(neurons, NeuronSet):
        neurons = list(neurons)
    asked = both_kinds(harmful, harmless, "restoring by neurons")
    places = paired_places(asked)
    batches = {
        kind: render_conditions(chat, prompts, {condition: text} if text else [condition], seed=seed)[
            condition
        ]
        for kind, prompts in asked.items()
    }
    if batches["harmful"].think == "open":
        raise ConditionError(
            f"restoring was asked for in {condition!r}, which is open: the next token there is no answer's. Name a closed"
            " condition, such as 'off' or 'careful'."
        )
    openers = opener_texts(openers)
    scoring = {} if openers is None else {"openers": openers}

    def readings(model: Model) -> dict[tuple[str, str], Reading]:
        found = {}
        for kind, batch in batches.items():
            found[kind, "score"] = refusal_reading(model, batch, max_rows=max_rows, **scoring)
            if written:
                found[kind, "refuse"] = refused_reading(model, batch, chat, max_new_tokens, max_rows=max_rows)
        return found

    with opened(base) as model:
        facts = verify(model, reads=["post"])
        chosen = neurons_to_edit(neurons, facts, [*harmful, *harmless])
        controls = random_sets(chosen, facts, n_random_sets, seed)
        if not isinstance(tuned, str | Path) and hasattr(tuned, "hook_dict"):
            _tuned_facts(tuned, facts)  # refuses before any pass
        if matched is not None:
            activity = activity_of(model, neurons, list(batches.values()), matched, max_rows)
            controls = random_sets(chosen, facts, n_random_sets, seed, activity)
        settings: dict[str, Any] = {
            "neurons": [list(neuron) for neuron in chosen],
            "set": set_name(chosen),
            "condition": condition,
            "positions": told(positions),
            "matched": matched,
            "controls": [[list(neuron) for neuron in control] for control in controls],
            "written": written,
            "n_written": min(n_written, len(controls)),
            "max_new_tokens": max_new_tokens,
            "openers": openers,
            "seed": seed,
            "digests": {kind: batch.digest for kind, batch in batches.items()},
            "chat_format": chat.name,
            "base": facts.to_dict(),
            "base_digest": weights_digest(model),
        }
        remember: dict[str, Remember] = {"base": {}, "tuned": {}}
        if folder is not None:
            kept = ResultFolder(folder)
            kept.claim(settings, "restore_by_neurons/asked.json")
            remember["base"] = kept.lines("restore_by_neurons/base.jsonl").get
        levels = {what: measured(its, [], remember["base"]) for what, its in readings(model).items()}
        layers = sorted({layer for layer, _ in chosen})
        recorded = {kind: record(model, batch, ["post"], layers) for kind, batch in batches.items()}
        del model

    with opened(tuned) as model:
        theirs = _tuned_facts(model, facts)
        settings |= {"tuned": theirs.to_dict(), "tuned_digest": weights_digest(model)}
        if folder is not None:
            # Beside the base's part of what is asked: the tuned model is opened when the base is gone.
            kept.claim({"tuned_digest": settings["tuned_digest"]}, "restore_by_neurons/tuned.json")
            remember["tuned"] = kept.lines("restore_by_neurons/tuned.jsonl").get
        found: dict[tuple[str, str], tuple[Values, Values, dict[str, Edited]]] = {}
        for (kind, measure), reading in readings(model).items():
            sets = controls if measure == "score" else controls[:n_written]
            make = _patch(recorded[kind], positions)
            found[kind, measure] = (
                levels[kind, measure],
                measured(reading, [], remember["tuned"]),
                {
                    "patch": edited_by(
                        reading, make, chosen, sets, remember["tuned"], f"patch {kind}", progress
                    )
                },
            )
        del model
    return _table(found, asked, batches["harmful"], places, settings)


def _tuned_facts(model: Model, base: ModelFacts) -> ModelFacts:
    facts = verify(model, edits=["post"])
    require_same_shapes(base, facts)
    return facts


def _patch(recorded: Recording, positions: Positions) -> Callable[[Sequence[Neuron]], PatchNeurons]:
    return lambda members: PatchNeurons(members, recorded, positions)


def _table(
    found: dict[tuple[str, str], tuple[Values, Values, dict[str, Edited]]],
    asked: dict[str, list[Prompt]],
    batch: SpanBatch,
    places: Sequence[int] | None,
    settings: dict[str, Any],
) -> pd.DataFrame:
    import pandas as pd

    seed = settings["seed"]
    lines = []
    families = witnesses(asked["harmful"], asked["harmless"], enumerate(places or ()))
    for (kind, measure), numbers in found.items():
        lines += restored_lines(*numbers, families[kind], kind, measure, seed)
    if places is not None:
        difference = minus_twins(found["harmful", "score"], found["harmless", "score"], places)
        lines += restored_lines(*difference, families["harmful"], DIFFERENCE, "specificity", seed)
    table = pd.DataFrame(lines, columns=list(SHARED_COLUMNS)).drop(columns=["edit", "state"])
    table["condition"] = batch.name
    table = table.rename(columns=_NAMES)
    table.attrs = settings
    return table
