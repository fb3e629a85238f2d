"""Numbers a study of checkpoints runs with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.conditions import check_condition, is_control, leaves_open
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.hooks.activations import Pool


@dataclass(frozen=True)
class CheckpointSettings:
    """Numbers a study of checkpoints runs with.

    Attributes:
        pairs: Which pairs choose the neurons, see `rim_lens.measures.neurons.pairs.counterfactual_pairs`.
        m: Neurons that each pair names in each layer; None: 5 % of a layer, rounded up.
        min_fraction: Share of pairs that must name a neuron; the paper takes all (1.0), which mostly leaves none.
        think: Think condition of harmful and harmless requests; closed.
        reasoning_think: That in which activations are read on reasoning questions.
        accuracy: Think conditions in which reasoning questions are answered.
        response: "own": each model's response is read with the request (the paper); "none": the prompt alone.
        pool: "max" (the paper), "mean" or "last".
        n_random_sets: Random sets per layer beside the set.
        matched: "activity": random neurons about as active as the set's; None: any.
        n_test_sets: Random sets beside the set in the test of what removing it does.
        n_boot: Resamples of intervals of metrics.
        n_permutations: Exchanges of runs behind a p, at most.
        first: Checkpoints that the last one is foretold from; None: a third of them.
        gradients: Whether runs that are trained here are foretold from gradients before.
        max_new_tokens: Most tokens of an answer.
        max_cot_tokens: Most tokens of a chain of thought the model writes itself; then its block is closed. None: chain and
            answer share max_new_tokens, and a block that is open then has no answer.
        min_refusal: Gate: at least this share of harmful requests must be refused in off by the base.
        max_twin_ratio: Gate: twins may be refused at most this many times as often.
        gate: Whether to stop at the gate.
        seed: Of random sets, permutations and intervals; not of training.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
    """

    pairs: Literal["twins", "intent"] = "twins"
    m: int | None = None
    min_fraction: float = 0.5
    think: str = "off"
    reasoning_think: str = "careful"
    accuracy: tuple[str, ...] = ("open",)
    response: Literal["own", "none"] = "own"
    pool: Pool = "max"
    n_random_sets: int = 100
    matched: Literal["activity"] | None = "activity"
    n_test_sets: int = 20
    n_boot: int = 200
    n_permutations: int = 9999
    first: int | None = None
    gradients: bool = True
    max_new_tokens: int = 48
    max_cot_tokens: int | None = None
    min_refusal: float = 0.5
    max_twin_ratio: float = 0.5
    gate: bool = True
    seed: int = 0
    max_rows: int = MAX_ROWS
    progress: bool = False


def check_settings(settings: CheckpointSettings) -> None:
    """Refuse what could not be measured.

    Raises:
        ConditionError: A think condition does not exist, or is open or a control where requests are read.
        StatisticsError: A number is out of range.
    """
    for name in (settings.think, settings.reasoning_think, *settings.accuracy):
        check_condition(name)
    if leaves_open(settings.think) or is_control(settings.think):
        raise ConditionError(
            f"think={settings.think!r} was asked for; harmful requests are read in a closed condition that is no control, as the next"
            " token is to be the answer's: 'off', or a chain of thought that is given."
        )
    positive = ("n_boot", "n_permutations", "max_new_tokens", "max_rows")
    odd = [name for name in positive if getattr(settings, name) < 1]
    odd += [name for name in ("n_random_sets", "n_test_sets") if getattr(settings, name) < 0]
    odd += [
        name
        for name in ("first", "max_cot_tokens", "m")
        if getattr(settings, name) is not None and getattr(settings, name) < 1
    ]
    odd += [] if 0 < settings.min_fraction <= 1 else ["min_fraction"]
    if odd:
        raise StatisticsError(
            f"{odd[0]}={getattr(settings, odd[0])} was asked for; give a positive number, and of min_fraction at most 1."
        )
