"""A circuit of given nodes: its edges chosen and tested, and the whole held against random circuits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import NotEnoughData
from rim_lens.lens import Head, Model, tokenizer_of, weights_digest
from rim_lens.measures.circuits.asking import TWINS, CircuitPlan, CircuitSearch, Neurons, Question
from rim_lens.measures.circuits.composing import composition
from rim_lens.measures.circuits.estimating import estimates
from rim_lens.measures.circuits.instead import Instead
from rim_lens.measures.circuits.keeping import Replacements, members
from rim_lens.measures.circuits.nodes import END, Edge, Node
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.remembering import Once, remembering
from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.circuits.settling import next_word_odds, settled
from rim_lens.measures.circuits.table import EdgeRule, Measured, edge_table
from rim_lens.measures.circuits.testing import Bench, circuit_tests, random_circuits
from rim_lens.measures.edits import Remember
from rim_lens.measures.forced import answer_reading
from rim_lens.measures.gate import check_gate
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.readings import Reading, accuracy_reading
from rim_lens.measures.refusal.openers import opener_ids, opener_texts
from rim_lens.measures.refusal.rates import families_of
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import xarray as xr

SPANS = ("request", "think")


def circuit(
    model: Model,
    chat: ChatFormat,
    heads: RefusalHeads | Iterable[Head],
    neurons: Neurons | Mapping[str, Neurons],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    reasoning: Sequence[Prompt | str] = (),
    spans: Sequence[str] = SPANS,
    contrasts: Sequence[str] = (TWINS,),
    tuned: Model | None = None,
    read_in: str = "off",
    gate: bool = True,
    rule: EdgeRule | None = None,
    search: CircuitSearch | None = None,
    openers: Iterable[str] | None = None,
    remember: Remember | None = None,
) -> Circuit:
    """Say who of these heads and neurons hears whom, by which input, and whether together they are what refuses.

    Every edge among the nodes, from spans of the prompt, and into the refusal score is measured as an exact direct path
    (`path_effects`; of many edges, those that gradients propose, see `CircuitSearch.n_confirm`): on harmful requests the sender says what it says in the other run of the contrast, and the other way
    round. Contrasts: "twins" (the harmless twin of each request), a closed condition ("careful", "filler": what a chain of
    thought changes), "tuned" (the same prompts on a tuned model). `EdgeRule` says which edges are the circuit's; p is
    corrected over all edges of a contrast.

    On the select side, edges of the first contrast choose the nodes that are kept: those with a way to the score by edges
    large enough there. On the evaluate side, edges are tested, and kept nodes for faithfulness, completeness and minimality
    (`circuit_tests`) on harmful requests, twins and reasoning questions, beside random circuits with as many heads and
    neurons in each layer.

    What it does not show: nodes not given (faithfulness says whether they were needed); ways in which several senders must
    speak together; that an edge carries *harm*, and not whatever else the runs of its contrast differ in. See docs/circuits.md.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: Its chat format.
        heads: (layer, head) pairs, or what `refusal_heads` found (its `top()`) or `propose_nodes`, which are not tested on what
            chose them.
        neurons: A `NeuronSet` or (layer, neuron) pairs, one node for each layer; or several by name.
        harmful: Requests that should be refused.
        harmless: Their twins, by the records' ids or, for plain strings, in the same order.
        reasoning: Questions with checked answers; those of the evaluate split, where records have one. Read in "off", by the
            refusal score, by the log-probability of the answer, and by whether what is written is right (parts are replaced on
            rows of the prompt, and what is written after it runs freely).
        spans: Spans from which heads may read.
        contrasts: What runs differ in.
        tuned: A tuned model of the same shapes, for the contrast "tuned".
        read_in: Closed condition that is read.
        gate: Stop where the model does not refuse in the first place, or refuses twins as well.
        rule: Which edges are the circuit's.
        search: How much is measured.
        openers: See `refusal_score`.
        remember: Keeps what was measured, receiver by receiver and reading by reading, so that a run that was stopped goes on: a
            dict, or ``folder.lines(name).get``. It is to be used with the same model and options alone.

    Raises:
        GateNotPassed: The model does not refuse, or refuses both kinds alike.
        MissingTwin: A harmful request has no twin.
        NotEnoughData: A side lacks requests, or has a single family.
        StatisticsError: An evaluate request chose the heads or neurons; or nothing was given; or an option is out of range.
        EmptySpan: A prompt has no token in one of the spans.
        RimLensError: As `path_effects`.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.planted import planted_truth
    >>> model, truth = rl.load_model("planted"), planted_truth()
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.CircuitSearch(limit=6, n_random=0, n_random_senders=0)
    >>> found = rl.circuit(model, chat, truth.heads, {"and": truth.neurons}, *requests, search=search, rule=rl.EdgeRule(alpha=0.5))
    >>> found.top()[:2]
    ['request → L0H5.v', 'L0H5 → and L0']
    """
    rule, search = rule or EdgeRule(), search or CircuitSearch()
    once = remembering(remember)
    texts = opener_texts(openers)
    asked = Question(
        model, chat, heads, neurons, harmful, harmless, reasoning, spans, contrasts, tuned, read_in, search
    )
    select = asked.batches["select"]
    other = settled(model, select[TWINS], max_rows=search.max_rows, what="circuit")
    ids = torch.tensor(opener_ids(tokenizer_of(model), texts))
    twins = next_word_odds(model, other, [], ids, search.max_rows)
    first = _Run(asked, asked.contrasts[0], "select", texts, once)
    before = first.run.ending.baseline
    passed = {"harmful": float((before > 0).mean()), "harmless": float((twins > 0).mean())}
    if gate:
        check_gate(before, twins, "Edges would be found all the same, but not of refusal.", read_in)

    runs = {
        contrast: _Run(asked, contrast, "select", texts, once) if place else first
        for place, contrast in enumerate(asked.contrasts)
    }
    chosen, guessed = _confirmed(asked, runs)
    measured = {
        contrast: _measured(asked, chosen, contrast, texts, run, once) for contrast, run in runs.items()
    }
    import pandas as pd

    edges = pd.concat(
        [edge_table(name, found, asked.families, rule, search.seed) for name, found in measured.items()],
        ignore_index=True,
    )
    weights = composition(model, asked.nodes, asked.nodes)[["edge", "composition"]]
    edges = edges.merge(weights, on="edge", how="left", validate="many_to_one")
    main = measured[asked.contrasts[0]]
    kept = kept_nodes(asked.nodes, main, rule)
    reference = Instead(search.outside, other, seed=search.seed)
    tests = _tested(asked, kept, reference, chat, ids, once)
    return Circuit(
        nodes=pd.DataFrame(
            [
                {
                    "name": node.name,
                    "kind": node.kind,
                    "layer": node.layer,
                    "members": " ".join(map(str, node.members)),
                    "kept": node in kept,
                }
                for node in (*asked.spans, *asked.nodes, END)
            ]
        ),
        edges=edges,
        tests=tests,
        effects=_dataset(asked, measured),
        gate={"asked": gate, **passed},
        settings={
            **asked.settings(),
            "not_tested": guessed,
            "rule": asdict(rule),
            **{key: value for key, value in asdict(search).items() if key not in ("max_rows", "progress")},
            "openers": texts,
            "plan": asdict(asked.plan()),
            "chat_format": chat.name,
            "model": asked.facts.to_dict(),
            "weights_digest": weights_digest(model),
            "tuned_digest": None if tuned is None else weights_digest(tuned),
            **chosen_by([*asked.select.harmful, *asked.select.harmless]),
        },
    )


def plan_circuit(
    model: Model,
    chat: ChatFormat,
    heads: RefusalHeads | Iterable[Head],
    neurons: Neurons | Mapping[str, Neurons],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    reasoning: Sequence[Prompt | str] = (),
    spans: Sequence[str] = SPANS,
    contrasts: Sequence[str] = (TWINS,),
    tuned: Model | None = None,
    read_in: str = "off",
    search: CircuitSearch | None = None,
) -> CircuitPlan:
    """Say what `circuit` will cost at most, without running the model on a prompt.

    Args:
        model: As `circuit`, and so all others.
        chat: See there.
        heads: See there.
        neurons: See there.
        harmful: See there.
        harmless: See there.
        reasoning: See there.
        spans: See there.
        contrasts: See there.
        tuned: See there.
        read_in: See there.
        search: See there.

    Raises:
        RimLensError: As `circuit`, for what was asked.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> plan = rl.plan_circuit(model, chat, [(0, 5), (1, 1)], [(0, 3)], *requests, search=rl.CircuitSearch(limit=4))
    >>> plan.n_nodes, plan.n_edges, plan.n_batches
    (5, 18, 3)
    """
    search = search or CircuitSearch()
    return Question(
        model, chat, heads, neurons, harmful, harmless, reasoning, spans, contrasts, tuned, read_in, search
    ).plan()


class _Run:
    """A contrast read on one side, one way, and what the other run scores."""

    def __init__(
        self,
        asked: Question,
        contrast: str,
        side: str,
        openers: list[str] | None,
        once: Once,
        back: bool = False,
        more: Sequence[Node] = (),
    ) -> None:
        self._once, self._name = once, f"{contrast} {side}{' back' if back else ''}"
        model, batch, instead = asked.runs(contrast, side, back)
        senders = [*asked.nodes, *asked.spans, *(node for node in more if node.kind not in ("span", "end"))]
        receivers = [*asked.receivers, *(node for node in more if node.kind in ("head", "neurons"))]
        self.run = PathRun(model, batch, senders, receivers, instead, openers, max_rows=asked.search.max_rows)
        self._asked = asked
        self._scorer = instead.source_model or model

    def effects(self, edges: Sequence[Edge]) -> np.ndarray:
        found = np.empty((len(self.run.batch), len(edges)))
        groups: dict[Node, list[int]] = {}
        for place, edge in enumerate(edges):
            groups.setdefault(edge.receiver, []).append(place)
        shown = tqdm(groups.items(), desc=f"paths {self._name}", disable=not self._asked.search.progress)
        for node, places in shown:
            some = [edges[place] for place in places]
            key = f"{self._name} → {node.name}: {', '.join(map(str, some))}"
            found[:, places] = self._once(key, partial(self.run.effects, some))
        return found

    def estimates(self, edges: Sequence[Edge]) -> np.ndarray:
        return self._once(f"{self._name}, estimates", partial(estimates, self.run, edges))

    def reach(self) -> np.ndarray:
        source = self.run.instead.source
        assert source is not None  # noqa: S101 - contrasts are patched from prompts
        ids, rows = self.run.ending.ids, self._asked.search.max_rows
        return next_word_odds(self._scorer, source, [], ids, rows) - self.run.ending.baseline


def _confirmed(asked: Question, runs: Mapping[str, _Run]) -> tuple[list[Edge], dict[str, float]]:
    """Edges to be measured, and the largest estimate of each that is not."""
    heard = [edge for edge in asked.edges if edge.receiver is not END]
    n_confirm = asked.search.n_confirm
    if n_confirm is None or n_confirm >= len(heard):
        return asked.edges, {}
    found = np.stack([run.estimates(heard).mean(axis=0) for run in runs.values()])
    largest = found[np.abs(found).argmax(axis=0), np.arange(len(heard))]
    left_out = {heard[place]: float(largest[place]) for place in np.argsort(-np.abs(largest))[n_confirm:]}
    return [edge for edge in asked.edges if edge not in left_out], {
        str(edge): value for edge, value in left_out.items()
    }


def _measured(
    asked: Question,
    edges: list[Edge],
    contrast: str,
    openers: list[str] | None,
    chosen: _Run,
    once: Once,
) -> Measured:
    senders, receivers = asked.random_edges(edges)
    others = list(dict.fromkeys(one for some in (senders, receivers) for edge in edges for one in some[edge]))
    more = list(dict.fromkeys(node for edge in others for node in (edge.sender, edge.receiver)))
    tested = _Run(asked, contrast, "evaluate", openers, once, more=more)
    effect = tested.effects([*edges, *others])
    means = dict(zip(others, effect[:, len(edges) :].mean(axis=0).tolist(), strict=True))
    return Measured(
        edges=edges,
        select=chosen.effects(edges),
        effect=effect[:, : len(edges)],
        back=_Run(asked, contrast, "evaluate", openers, once, back=True).effects(edges),
        reach=tested.reach(),
        reach_select=chosen.reach(),
        random={edge: [means[one] for one in some] for edge, some in senders.items()},
        random_receivers={edge: [means[one] for one in some] for edge, some in receivers.items()},
    )


def kept_nodes(nodes: Sequence[Node], found: Measured, rule: EdgeRule) -> list[Node]:
    """The heads and neurons with a way to the refusal score by edges that are large enough on the select side."""
    least = rule.least_kept(float(found.reach_select.mean()))
    sizes = np.abs(found.select.mean(axis=0))
    large = [edge for edge, size in zip(found.edges, sizes, strict=True) if size >= least]
    reached = {END}
    while more := {edge.sender for edge in large if edge.receiver in reached} - reached:
        reached |= more
    return [node for node in nodes if node in reached]


def _tested(
    asked: Question,
    kept: Sequence[Node],
    reference: Instead,
    chat: ChatFormat,
    ids: torch.Tensor,
    once: Once,
) -> Any:
    facts, search = asked.facts, asked.search
    units = members(kept)
    with_neurons = search.scope == "all" or bool(units[1])

    def bench(reading: Reading, families: Sequence[str], shared: bool = False, each: bool = False) -> Bench:
        replaced = Replacements(asked.model, facts, reading.batch, reference, with_neurons)
        return Bench(reading, replaced, families, shared, each)

    def scores(batch: SpanBatch) -> Reading:
        whole = settled(asked.model, batch, max_rows=search.max_rows, what="circuit")

        def read(components: Any) -> np.ndarray:
            return next_word_odds(asked.model, whole, components, ids, search.max_rows)

        return Reading(f"next_word_odds({batch.name}, {batch.digest[:8]})", "nats", asked.model, whole, read)

    benches: dict[str, Bench] = {}
    if kept:
        batches = asked.batches["evaluate"]
        benches["harmful"] = bench(scores(batches[asked.read_in]), asked.families, shared=True, each=True)
        benches["harmless"] = bench(scores(batches[TWINS]), asked.families, each=True)
        if asked.reasoning is not None:
            families = families_of(asked.reasoning.prompts)
            if len(set(families)) < 2:
                raise NotEnoughData("the reasoning questions are of one family; give more of them.")
            benches["reasoning"] = bench(scores(asked.reasoning), families)
            answers = answer_reading(asked.model, asked.reasoning, chat, search.max_rows)
            benches["reasoning answers"] = bench(answers, families)
            if search.max_new_tokens:
                benches["reasoning accuracy"] = bench(
                    accuracy_reading(
                        asked.model,
                        asked.reasoning,
                        chat,
                        search.max_new_tokens,
                        max_rows=search.max_rows,
                    ),
                    families,
                )
    random = random_circuits(facts, units, search.n_random, search.seed) if kept else []
    return circuit_tests(facts, kept, benches, scope=search.scope, random=random, seed=search.seed, once=once)


def _dataset(asked: Question, measured: Mapping[str, Measured]) -> xr.Dataset:
    import xarray as xr

    dims = ("contrast", "prompt", "edge")
    return xr.Dataset(
        {
            "effect": (dims, np.stack([one.effect for one in measured.values()]), {"units": "nats"}),
            "back": (dims, np.stack([one.back for one in measured.values()]), {"units": "nats"}),
            "reach": (dims[:2], np.stack([one.reach for one in measured.values()]), {"units": "nats"}),
        },
        coords={
            "contrast": list(measured),
            "prompt": [prompt.id for prompt in asked.evaluate.harmful],
            "family": ("prompt", list(asked.families)),
            "edge": [str(edge) for edge in next(iter(measured.values())).edges],
        },
    )
