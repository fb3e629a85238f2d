"""A measured circuit on its model again, whose nodes and edges can be switched off, alone or together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import ReferenceMismatch, StatisticsError
from rim_lens.hooks.base import Component
from rim_lens.lens import Model, tokenizer_of, weights_digest
from rim_lens.measures.circuits.asking import TUNED, TWINS, CircuitSearch, Question
from rim_lens.measures.circuits.cutting import Cutting
from rim_lens.measures.circuits.instead import Instead
from rim_lens.measures.circuits.keeping import Replacements, members
from rim_lens.measures.circuits.nodes import Node
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.circuits.settling import next_word_odds, settled
from rim_lens.measures.circuits.testing import outside, whole
from rim_lens.measures.forced import answer_reading, right_reading
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.readings import Reading
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removal_table import mean_columns
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

Values = Float[np.ndarray, " prompt"]
RIGHT = "reasoning right"


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts of a kind, with what units are replaced by there and how edges are cut."""

    batch: SpanBatch
    families: Sequence[str]
    readings: dict[str, Reading]
    replaced: Replacements
    cutting: Cutting


class CircuitSwitches:
    """A circuit on its model, its nodes and edges to be switched off: how much refusal and reasoning is left then?

    A *node* that is off says what all that is outside the circuit says in `circuit`'s tests: its mean on harmless requests, place
    by place (or a donor's). With every kept node off the score is that of completeness; `alone`, with everything else off,
    that of faithfulness; and `alone` with one node off, that node's minimality.

    An *edge* that is off lets its receiver hear what its sender says in the other run of the contrast; one edge off changes the score
    by the edge's effect. Prompts without another run (twins, reasoning questions) have the harmless mean instead, and there
    edges from spans stay as they are. Several edges together are worked out in the run as it has become, so that
    effects need not add up.

    What it does not show: more than the circuit's own evaluate requests, which whoever switches until something is found has
    chosen by. `selection` records them; test what was selected on others.

    Args:
        model: The model that the circuit was measured on.
        chat: Its chat format.
        circuit: From `circuit`.
        harmful: The requests that it was measured on, select and evaluate side.
        harmless: Their twins.
        reasoning: Questions with checked answers; read by the log-probability of the answer, and by whether it is the likeliest.
        tuned: The tuned model, where the circuit has that contrast.
        contrast: In whose other run senders of edges that are off are heard; the first when None.
        max_rows: Most prompts in one pass.

    Raises:
        ReferenceMismatch: Other weights, requests or nodes than the circuit's.
        StatisticsError: The contrast was not measured.
        RimLensError: As `circuit`.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)
    >>> found = rl.circuit(model, chat, [(0, 5), (1, 1)], [], *requests, search=search)
    >>> switches = rl.CircuitSwitches(model, chat, found, *requests)
    >>> table = switches.read(["L1H1"]).set_index("kind")
    >>> bool(table["after"]["harmful"] < table["full"]["harmful"] - 10)   # the planted reader was refusal
    True
    >>> [node.name for node in found.kept()], switches.selection(["L1H1"]).kept()
    (['L1H1'], [])
    """

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        circuit: Circuit,
        harmful: Sequence[Prompt | str],
        harmless: Sequence[Prompt | str],
        reasoning: Sequence[Prompt | str] = (),
        *,
        tuned: Model | None = None,
        contrast: str | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.model, self.chat, self.circuit = model, chat, circuit
        self.asked = asked_again(model, chat, circuit, harmful, harmless, reasoning, tuned, max_rows)
        self.contrast = self.asked.contrasts[0] if contrast is None else contrast
        if self.contrast not in self.asked.contrasts:
            raise StatisticsError(
                f"the contrast {contrast!r} was asked for; this circuit has {', '.join(self.asked.contrasts)}."
            )
        self._kept = circuit.kept()
        self._edges = {str(edge): edge for edge in self.asked.edges}
        self._nodes = {node.name: node for node in self.asked.nodes}
        self._known: dict[tuple[frozenset[str], bool | None], dict[str, Values]] = {}

    def read(self, off: Iterable[str] = (), *, alone: bool = False) -> pd.DataFrame:
        """Read every kind of prompts with these nodes and edges off.

        Args:
            off: Names of heads and sets of neurons ("L0H5", "and L0"), and of edges ("L0H5 → and L0").
            alone: Everything but the circuit's kept nodes is off as well.

        Returns:
            One row per kind: "harmful", "harmless" (refusal score), and "reasoning" (the same score), "reasoning answers"
            (log-probability of the right answer) and "reasoning right" (share) where there are questions. Columns: kind, unit,
            n; full, after, change (after − full) with its interval over families, none (everything off); share, what stays of
            full − none, on harmful requests.

        Raises:
            StatisticsError: No node or edge bears such a name.
        """
        import pandas as pd

        switched = self.checked(off)
        full, none = self.values((), False), self.values((), None)
        after = self.values(switched, alone)
        rows = []
        for kind, prompts in self._by_kind.items():
            values = after[kind]
            whole = float((full[kind] - none[kind]).mean())
            rows.append(
                {
                    "kind": kind,
                    "unit": prompts.readings[kind].units,
                    "n": len(values),
                    "full": float(full[kind].mean()),
                    "after": float(values.mean()),
                    **mean_columns(
                        "change", values - full[kind], list(prompts.families), self.asked.search.seed
                    ),
                    "none": float(none[kind].mean()),
                    "share": float((values - none[kind]).mean()) / whole
                    if kind == "harmful" and whole
                    else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def checked(self, off: Iterable[str]) -> list[str]:
        """These names, each once, in the order of nodes and edges.

        Raises:
            StatisticsError: No node or edge bears such a name.
        """
        names = set(off)
        there = [*self._nodes, *self._edges]
        if strange := sorted(names - set(there)):
            raise StatisticsError(
                f"{strange[0]!r} was to be switched off; there are the nodes {', '.join(self._nodes)}, and edges such as"
                f" {next(iter(self._edges))!r}."
            )
        return [name for name in there if name in names]

    def values(self, off: Iterable[str], alone: bool | None) -> dict[str, Values]:
        """Numbers prompt by prompt, by kind; `alone` None for everything off."""
        names = frozenset(off)
        key = (names, alone)
        if key not in self._known:
            facts, scope = self.asked.facts, self.asked.search.scope
            nodes = [self._nodes[name] for name in self.checked(names) if name in self._nodes]
            edges = [self._edges[name] for name in self.checked(names) if name in self._edges]
            heads, neurons = members(nodes)
            if alone is None:
                heads, neurons = members(self._kept)
            if alone is not False:
                stay = members([node for node in self._kept if node not in nodes] if alone else [])
                more = outside(whole(facts, members(self._kept), scope), stay)
                heads, neurons = sorted({*heads, *more[0]}), sorted({*neurons, *more[1]})
            found: dict[str, Values] = {}
            for prompts in dict.fromkeys(self._by_kind.values()):
                components: list[Component] = list(prompts.replaced.of(heads, neurons))
                heard = [edge for edge in edges if not self._is_off(edge.receiver, heads, neurons)]
                components = prompts.cutting.components(heard, components)
                found |= {kind: reading(components) for kind, reading in prompts.readings.items()}
            self._known[key] = {kind: found[kind] for kind in self._by_kind}
        return self._known[key]

    def selection(self, off: Iterable[str] = ()) -> Circuit:
        """The circuit without these nodes and edges, to be saved; nothing of it is tested.

        Its `tests` are empty, and its settings count the evaluate requests among those that chose it.
        """
        names = set(self.checked(off))
        nodes, edges = self.circuit.nodes.copy(), self.circuit.edges.copy()
        nodes["kept"] &= ~nodes["name"].isin(names)
        for column in ("edge", "sender", "receiver"):
            edges["in_circuit"] &= ~edges[column].isin(names)
        seen = chosen_by([*self.asked.evaluate.harmful, *self.asked.evaluate.harmless])
        settings = dict(self.circuit.settings)
        for key, values in seen.items():
            settings[key] = sorted({*settings[key], *values})
        settings["switched_off"] = sorted({*settings.get("switched_off", ()), *names})
        return replace(
            self.circuit, nodes=nodes, edges=edges, tests=self.circuit.tests.iloc[:0], settings=settings
        )

    @staticmethod
    def _is_off(node: Node, heads: Sequence[Any], neurons: Sequence[Any]) -> bool:
        units = [*node.heads, *node.neurons]
        return bool(units) and set(units) <= {*(heads if node.kind == "head" else neurons)}

    @cached_property
    def _by_kind(self) -> dict[str, _Prompts]:
        asked, search = self.asked, self.asked.search
        texts = self.circuit.settings["openers"]
        ids = torch.tensor(opener_ids(tokenizer_of(self.model), texts))
        select = settled(self.model, asked.batches["select"][TWINS], max_rows=search.max_rows, what="circuit")
        background = Instead(search.outside, select, seed=search.seed)
        model, batch, instead = asked.runs(self.contrast, "evaluate")
        senders = [*asked.nodes, *asked.spans]
        run = PathRun(model, batch, senders, asked.receivers, instead, texts, max_rows=search.max_rows)
        with_neurons = search.scope == "all" or bool(members(asked.nodes)[1])

        def score(kind: str, on: SpanBatch) -> Reading:
            def read(components: Sequence[Component]) -> Values:
                return next_word_odds(self.model, on, components, ids, search.max_rows)

            return Reading(f"next_word_odds({kind})", "nats", self.model, on, read)

        def prompts(readings: dict[str, Reading], families: Sequence[str], own: bool = False) -> _Prompts:
            on = next(iter(readings.values())).batch
            replaced = Replacements(self.model, asked.facts, on, background, with_neurons)
            return _Prompts(
                on, families, readings, replaced, Cutting(run, on, None if own else replaced.values)
            )

        twins = settled(
            self.model, asked.batches["evaluate"][TWINS], max_rows=search.max_rows, what="circuit"
        )
        found = [
            prompts({"harmful": score("harmful", run.batch)}, asked.families, own=True),
            prompts({"harmless": score("harmless", twins)}, asked.families),
        ]
        if asked.reasoning is not None:
            families = families_of(asked.reasoning.prompts)
            whole = settled(self.model, asked.reasoning, max_rows=search.max_rows, what="circuit")
            found.append(prompts({"reasoning": score("reasoning", whole)}, families))
            both = {
                "reasoning answers": answer_reading(self.model, asked.reasoning, self.chat, search.max_rows),
                RIGHT: right_reading(self.model, asked.reasoning, self.chat, search.max_rows),
            }
            found.append(prompts(both, families))
        return {kind: one for one in found for kind in one.readings}


def asked_again(
    model: Model,
    chat: ChatFormat,
    circuit: Circuit,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str] = (),
    tuned: Model | None = None,
    max_rows: int = MAX_ROWS,
) -> Question:
    """The question that a circuit answers, asked again of its model and requests.

    Raises:
        ReferenceMismatch: These are not the circuit's weights, requests or nodes.
        RimLensError: As `circuit`.
    """
    settings = circuit.settings
    if TUNED not in settings["contrasts"]:
        tuned = None  # of several circuits, some may not have asked about it
    for what, one, digest in (
        ("model", model, settings["weights_digest"]),
        ("tuned model", tuned, settings["tuned_digest"]),
    ):
        if one is not None and weights_digest(one) != digest:
            raise ReferenceMismatch(
                f"the circuit was to be looked at on a {what} of other weights than it was measured on; give the one that"
                " rl.circuit was given."
            )
    nodes = [node for node in circuit.asked() if node.kind in ("head", "neurons")]
    sets: dict[str, list[tuple[int, int]]] = {}
    for node in nodes:
        sets.setdefault(node.name.rpartition(" L")[0], []).extend(node.neurons)
    kept = ("scope", "outside", "n_random", "n_random_senders", "limit", "seed")
    contrasts = [name for name in settings["contrasts"] if name != TUNED or tuned is not None]
    asked = Question(
        model,
        chat,
        [head for node in nodes for head in node.heads],
        {name: neurons for name, neurons in sets.items() if neurons},
        harmful,
        harmless,
        reasoning,
        [node.name for node in circuit.asked() if node.kind == "span"],
        contrasts,
        tuned,
        settings["read_in"],
        CircuitSearch(**{name: settings[name] for name in kept}, max_rows=max_rows),
    )
    here = asked.settings()
    for what, same in (
        ("requests", all(here[key] == settings[key] for key in ("evaluate_digest", "twins_digest"))),
        ("nodes", set(asked.nodes) == set(nodes)),
    ):
        if not same:
            raise ReferenceMismatch(
                f"the circuit was to be looked at with other {what} than it was measured with; give the harmful and harmless"
                " requests that rl.circuit was given, in the same order."
            )
    return asked
