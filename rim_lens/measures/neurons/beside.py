"""Which neurons are meant, checked against model and requests, and the random sets that they are held against."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from rim_lens.capturing import capture
from rim_lens.chat import SpanBatch
from rim_lens.errors import NotEnoughData, ReferenceMismatch, StatisticsError, UnknownNeuron
from rim_lens.hooks import NeuronActivations
from rim_lens.lens import Model, ModelFacts
from rim_lens.measures.controls import random_neurons_per_layer
from rim_lens.measures.held_out import refuse_used
from rim_lens.measures.neurons.sets import Neuron, NeuronSet
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removal_table import shuffled
from rim_lens.measures.twins import families_by_swap, twin_places
from rim_lens.prompts import Prompt

Matched = Literal["activity"] | None
_NAMED = 6  # so many neurons are named one by one


def set_name(neurons: Iterable[Neuron]) -> str:
    """A set of neurons in words, whatever their order; a large one by its size and a digest.

    >>> set_name([(2, 0), (1, 57)])
    'L1N57+L2N0'
    """
    members = sorted(set(neurons))
    if len(members) <= _NAMED:
        return "+".join(f"L{layer}N{neuron}" for layer, neuron in members)
    digest = hashlib.sha256(repr(members).encode()).hexdigest()[:8]
    return f"{len(members)} neurons in {len({layer for layer, _ in members})} layers:{digest}"


def neurons_to_edit(
    neurons: NeuronSet | Iterable[Neuron], facts: ModelFacts, requests: Sequence[Prompt | str]
) -> list[Neuron]:
    """Return the neurons that are meant, checked against the model and against what chose them.

    Args:
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        facts: The model's.
        requests: Those that the edit is to be tested on.

    Raises:
        UnknownNeuron: There is none, or the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts.
        ReferenceMismatch: The set is of a model of another shape.
        StatisticsError: Some request, or its family, chose the neurons.
    """
    facts.refuse_moe("per-neuron work")
    if isinstance(neurons, NeuronSet):
        require_shape(neurons, facts)
        if "select_texts" in neurons.made_by:
            refuse_used({"select_families": [], **neurons.made_by}, requests, "neurons")
    chosen = facts.check_neurons(list(neurons))
    if not chosen:
        raise UnknownNeuron(
            "no neuron was given; give (layer, neuron) pairs, or a NeuronSet that is not empty."
        )
    return chosen


def require_shape(neurons: NeuronSet, facts: ModelFacts) -> None:
    """Refuse a set of a model of another shape.

    Raises:
        ReferenceMismatch: Layers or neurons per layer differ.
    """
    if (neurons.n_layers, neurons.d_mlp) != (facts.n_layers, facts.d_mlp):
        raise ReferenceMismatch(
            f"this set is of a model of {neurons.n_layers} layers of {neurons.d_mlp} neurons, and the model given has"
            f" {facts.n_layers} of {facts.d_mlp}; choose neurons of this model, or give (layer, neuron) pairs."
        )


def random_sets(
    chosen: Sequence[Neuron],
    facts: ModelFacts,
    n_random_sets: int,
    seed: int,
    activity: Float[np.ndarray, "layer neuron"] | None = None,
) -> list[list[Neuron]]:
    """Random sets with as many neurons in each layer, in random order; none where 0 are asked for.

    Raises:
        StatisticsError: A negative number is asked for.
        NotEnoughData: The set takes whole layers, so that there is no other.
    """
    if n_random_sets == 0:
        return []
    return shuffled(random_neurons_per_layer(chosen, facts.d_mlp, n_random_sets, seed, activity), seed)


def activity_of(
    model: Model,
    neurons: NeuronSet | Iterable[Neuron],
    batches: Sequence[SpanBatch],
    matched: Matched,
    max_rows: int,
) -> Float[np.ndarray, "layer neuron"] | None:
    """What random sets are matched by: the set's own activity, or the mean of max-pooled activations over these prompts.

    Raises:
        StatisticsError: Another kind of matching was asked for.
    """
    if matched is None:
        return None
    if matched != "activity":
        raise StatisticsError(f"matched={matched!r} was asked for; it is None or 'activity'.")
    if isinstance(neurons, NeuronSet) and neurons.activity is not None:
        return neurons.activity
    means = []
    for batch in batches:
        with capture(model, batch, NeuronActivations(pool="max"), max_rows=max_rows) as data:
            means.append(data["neuron_activation"].mean("prompt").transpose("layer", "neuron").values)
    return np.asarray(np.mean(means, axis=0), dtype=np.float64)


def paired_places(prompts: dict[str, list[Prompt]]) -> list[int] | None:
    """For each harmful request, the place of its twin; None where nobody names twins and none can be told by order.

    Raises:
        MissingTwin: See `twin_places`.
        NotEnoughData: Requests of a kind, or pairs, are of one family.
    """
    places = twin_places(prompts["harmful"], prompts["harmless"])
    groups = {kind: families_of(asked) for kind, asked in prompts.items()}
    for kind, families in groups.items():
        if len(set(families)) < 2:
            raise NotEnoughData(
                f"the {len(families)} {kind} requests are of {len(set(families))} family; effects are tested over families, and"
                " at least two are needed. Give requests of more families."
            )
    if places is not None:
        twins = [prompts["harmless"][place] for place in places]
        if len(set(families_by_swap(prompts["harmful"], twins))) < 2:
            raise NotEnoughData(
                "all harmful requests differ from their twins by one swap of words, so that they are one witness, however many"
                " families they are of. Give twins that differ by other words."
            )
    return places
