"""Which heads carry refusal: chosen on some requests, tested on others, and held against everything that is not refusal."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.capturing import capture
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.conditions import STANDARD, Conditions
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError, UnknownHead
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateHeads, SpanAttention
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, known_by, model_facts, verify
from rim_lens.measures.controls import control_p, percentile_among, random_heads_per_layer
from rim_lens.measures.edits import Editor, Remember, editor_name
from rim_lens.measures.gate import check_gate
from rim_lens.measures.heads.contrasts import CHAIN, PAPER, Contrast, settled
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.heads.finding import find_heads
from rim_lens.measures.heads.looking import argmax_shift, mass_shift
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.heads.table import HeadRule, head_table
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.readings import Reading, refusal_reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.measures.twins import families_by_swap
from rim_lens.measures.two_sides import Side, paired, two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

KINDS = ("harmful", "harmless")


@dataclass(frozen=True, slots=True)
class HeadSearch:
    """How heads are chosen on the select side, and how much is measured.

    Attributes:
        n_test: Heads tested one by one: half of them for the size of their effect on the select side, the rest for how
            often their attention makes the moves looked for. All candidates where there are no more than that.
        max_heads: Largest set that is looked for, see `find_heads`.
        n_random_sets: Random sets with as many heads in each layer beside the found set; all of them where fewer exist.
        limit: At most so many requests of each kind and side, taken evenly; None for all.
        allow_few: Measure also where the evaluate side has too few families for any p to reach alpha, so that no head can be
            called *refusal* or *general*, whatever it does.
        seed: Of halves, permutations, intervals and random sets.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
    """

    n_test: int = 24
    max_heads: int = 6
    n_random_sets: int = 100
    limit: int | None = 64
    allow_few: bool = False
    seed: int = 0
    max_rows: int = MAX_ROWS
    progress: bool = False


def refusal_heads(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    gate: bool = True,
    conditions: Conditions = STANDARD,
    contrasts: Iterable[Contrast] | None = None,
    read_in: str = "off",
    candidates: Iterable[Head] | None = None,
    also_test: Iterable[Head] = (),
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    rule: HeadRule | None = None,
    search: HeadSearch | None = None,
    openers: Iterable[str] | None = None,
    folder: str | Path | None = None,
) -> RefusalHeads:
    """Find the heads that carry refusal, test them on held-out requests, and say of each what it is.

    On the `select` side every candidate is removed by itself and the change of the refusal score read; the heads with the
    largest effects, and those whose attention makes the moves looked for, go on to the test. On the `evaluate` side each of
    these is removed again, on harmful requests and on their twins, and gets its verdict by a stated rule (`HeadRule`): *refusal*
    needs an effect *and* that it is missing on the twins. Beside each stand the other heads of its layer; beside the set that
    `find_heads` chooses, random sets with as many heads in each layer.

    Attention enters as a hint. The default contrasts are the paper's (section 3: the argmax key of the last prompt row moves
    from the role word, in `open`, into the empty think block, in `off`) and the one from a written chain of thought into
    the empty block. They bring heads to the test and tell positional heads, which move on every request; none of them makes
    a head a refusal head.

    Tests flip signs by family, where families whose twins swap the same words count as one (`families_by_swap`). At
    .05 six of them are needed: with fewer no p comes that low, whatever the effect.

    What it does not show: that the heads act alone or do nothing else; that heads not tested do nothing (two that stand in
    for each other have no effect one by one, see `redundant_pairs`); that refusal under a chain of thought fails *because*
    their attention moved (block or move it and look, see `restoring`); or anything on requests unlike these.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        harmful: Requests that should be refused.
        harmless: Their twins: by the records' `twin` ids or, for plain strings, in the same order.
        gate: Stop where the model does not refuse in the first place, or refuses twins as well.
        conditions: Think conditions in which it is recorded where heads look, see `render_conditions`.
        contrasts: Moves of attention to look for; point them at any pair of spans and conditions. None: the paper's, and
            from the chain of thought into the empty block, as far as their conditions are read.
        read_in: Closed condition in which effects are read.
        candidates: Heads to look among; all when None.
        also_test: Heads that are tested whatever the select side says of them, and corrected for with the others: those of
            the model before fine-tuning, so that `compare_heads` finds the same heads in both.
        editor: What removing means, see `head_effects`; zero ablation as in the paper by default.
        positions: Rows at which heads are edited.
        rule: Thresholds of the verdicts.
        search: How many heads, sets and requests.
        openers: Texts that refusals begin with, see `refusal_score`.
        folder: Keep every number there as soon as it is measured, and go on from there when called again; else all is kept
            in memory.

    Raises:
        MissingTwin: A harmful request has no twin.
        NotEnoughData: A side lacks requests, or has a single family; or the evaluate side has so few that no p comes to
            `rule.alpha`, and nothing could be found.
        UnknownHead: A candidate that the model lacks, or no candidate.
        GateNotPassed: The model does not refuse, or refuses both kinds alike.
        ConditionError: A contrast or `read_in` names a condition that is not read, or an open one.
        StudyFolderError: The folder holds something else.
        ModelError: The model's hooks do not work as needed.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.HeadSearch(limit=10, n_random_sets=3)
    >>> found = rl.refusal_heads(model, chat, *requests, search=search)
    >>> found.top()
    [(0, 5), (1, 1)]
    """
    rule, search = rule or HeadRule(), search or HeadSearch()
    if search.n_test < 1:
        raise StatisticsError(f"n_test={search.n_test} was asked for; test at least one head.")
    facts = verify(model, reads=["pattern", "z"], edits=["z"])
    looked_among = facts.check_heads(sorted(facts.heads() if candidates is None else set(candidates)))
    also = facts.check_heads(sorted(set(also_test)))
    sides = [paired(side) for side in two_sides(harmful, harmless, search.limit, search.seed)]
    names = list(dict.fromkeys((read_in, *conditions)))
    asked: Conditions = {read_in: None, **conditions} if isinstance(conditions, Mapping) else names
    bench = _Bench(model, chat, sides[0], sides[1], asked, editor, positions, openers, search)
    if bench.evaluate["harmful"][read_in].think == "open":
        raise ConditionError(
            f"effects were to be read in {read_in!r}, where the model thinks next and the answer is far; name a closed one."
        )
    if not looked_among:
        raise UnknownHead("candidates=[] was asked for; name at least one head, or None for all.")
    _check_families(bench.families, rule, search.allow_few)
    moves = settled(
        [c for c in (PAPER, CHAIN) if {c.first, c.second} <= set(names)] if contrasts is None else contrasts,
        bench.evaluate["harmful"],
    )
    settings = {
        "gate": gate,
        "read_in": read_in,
        "conditions": names,
        "contrasts": [contrast._asdict() for contrast in moves],
        "editor": editor_name(editor),
        "positions": told(positions),
        "rule": asdict(rule),
        **{key: value for key, value in asdict(search).items() if key not in ("max_rows", "progress")},
        "openers": bench.openers,
        "n_candidates": len(looked_among),
        **({"also_test": [list(head) for head in also]} if also else {}),
        "n_select": len(bench.select["harmful"][read_in]),
        "n_evaluate": len(bench.evaluate["harmful"][read_in]),
        "n_families_evaluate": len(set(bench.families)),
        "select_digest": bench.select["harmful"][read_in].digest,
        "evaluate_digest": bench.evaluate["harmful"][read_in].digest,
        "twins_digests": [side["harmless"][read_in].digest for side in (bench.select, bench.evaluate)],
        "candidates": None if candidates is None else [list(head) for head in looked_among],
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    with ExitStack() as stack:
        kept = ResultFolder(
            folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="rim_lens_heads_"))
        )
        kept.claim(settings, "heads/asked.json")
        # Beside what is asked, and not part of it: `settings` says by digests already which requests these are.
        settings |= chosen_by([*sides[0].harmful, *sides[0].harmless])
        return _measured(bench, kept, moves, looked_among, read_in, gate, rule, settings, also)


def too_few_families(families: Sequence[str], alpha: float) -> str:
    """Say why every head would be called *none* on these evaluate requests, whatever it does; "" where it would not.

    >>> too_few_families(["a", "b", "c", "d", "e", "f"], alpha=0.05)
    ''
    """
    count = len(set(families))
    finest = 2.0 ** (1 - count)
    if finest <= alpha:
        return ""
    return (
        f"the evaluate requests are of {count} families, those whose twins swap the same words counted as one; signs are"
        f" flipped by family, so that no p could come below {finest:.3g}, and alpha is {alpha}"
    )


def _check_families(families: Sequence[str], rule: HeadRule, allow_few: bool) -> None:
    """Refuse, before any pass, requests on which every head would be called *none*, whatever it does."""
    why = too_few_families(families, rule.alpha)
    if len(set(families)) < 2 or (why and not allow_few):
        raise NotEnoughData(
            f"{why}: nothing would be found. Give requests of more families, twins that differ by other words, or a larger alpha."
        )


class _Bench:
    """A model with the prompts of both sides, rendered."""

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        select: Side,
        evaluate: Side,
        conditions: Conditions,
        editor: Editor,
        positions: Positions,
        openers: Iterable[str] | None,
        search: HeadSearch,
    ) -> None:
        self.model, self.editor, self.positions, self.search = model, editor, positions, search
        self.openers = opener_texts(openers)
        self.select, self.evaluate = (
            {
                kind: render_conditions(chat, list(prompts), conditions)
                for kind, prompts in zip(KINDS, side, strict=True)
            }
            for side in (select, evaluate)
        )
        self.families = families_by_swap(evaluate.harmful, evaluate.harmless)

    def reading(self, batch: SpanBatch) -> Reading:
        settings = {} if self.openers is None else {"openers": self.openers}
        return refusal_reading(self.model, batch, max_rows=self.search.max_rows, **settings)

    def effects(self, batch: SpanBatch, sets: Sequence[Any], remember: Remember) -> xr.DataArray:
        return head_effects(
            self.reading(batch),
            sets,
            remember=remember,
            editor=self.editor,
            positions=self.positions,
            progress=self.search.progress,
        )

    def scorer(
        self, batch: SpanBatch, remember: Remember
    ) -> Callable[[Sequence[Head]], Float[np.ndarray, " prompt"]]:
        """Scores with heads removed; the baseline with none."""

        def score(heads: Sequence[Head]) -> Float[np.ndarray, " prompt"]:
            if not heads:
                return self.baseline(batch, remember)
            found = self.effects(batch, [list(heads)], remember)
            return np.asarray(found["baseline"].values + found.values[:, 0])

        return score

    def baseline(self, batch: SpanBatch, remember: Remember) -> Float[np.ndarray, " prompt"]:
        return np.asarray(self.effects(batch, [], remember)["baseline"].values)

    def attention(self, batch: SpanBatch, out: Path) -> xr.Dataset:
        with capture(
            self.model,
            batch,
            SpanAttention(),
            out=out,
            max_rows=self.search.max_rows,
            progress=self.search.progress,
        ) as data:
            return data.load()


def _measured(
    bench: _Bench,
    kept: ResultFolder,
    moves: list[Contrast],
    candidates: Sequence[Head],
    read_in: str,
    gate: bool,
    rule: HeadRule,
    settings: dict[str, Any],
    also_test: Sequence[Head],
) -> RefusalHeads:
    search = bench.search
    on_select = kept.lines("heads/select.jsonl").get
    chosen_on = bench.select["harmful"][read_in]
    before, twins_before = (bench.baseline(bench.select[kind][read_in], on_select) for kind in KINDS)
    passed = {"harmful": float((before > 0).mean()), "harmless": float((twins_before > 0).mean())}
    if gate:
        check_gate(before, twins_before, "Heads would be ranked all the same, but not by refusal.", read_in)

    scan = bench.effects(chosen_on, candidates, on_select)
    means = dict(zip(candidates, scan.mean("prompt").values.tolist(), strict=True))
    found = find_heads(bench.scorer(chosen_on, on_select), candidates, max_heads=search.max_heads)
    seen = {
        name: bench.attention(
            bench.select["harmful"][name], kept.path / "attention" / f"select_harmful_{name}"
        )
        for name in sorted({condition for move in moves for condition in (move.first, move.second)})
    }
    moving = {move.name: _shares(seen, move) for move in moves}
    tested = chosen_for_test(means, list(moving.values()), search.n_test)
    tested = sorted({*tested, *found, *also_test})

    attention = _attention(bench, kept)
    statistics = _statistics(attention, moves)
    on_evaluate = kept.lines("heads/evaluate.jsonl").get
    layers = {layer for layer, _ in tested}
    effects = {
        "harmful": bench.effects(
            bench.evaluate["harmful"][read_in],
            [head for head in model_facts(bench.model).heads() if head[0] in layers],
            on_evaluate,
        ),
        "harmless": bench.effects(bench.evaluate["harmless"][read_in], tested, on_evaluate),
    }
    by_head = {kind: _by_head(found_effects) for kind, found_effects in effects.items()}
    table = head_table(
        by_head["harmful"],
        by_head["harmless"],
        tested,
        bench.families,
        found=found,
        statistics=statistics,
        rule=rule,
        seed=search.seed,
    )
    return RefusalHeads(
        table=table,
        found=tuple(found),
        set=_set_effect(bench, found, read_in, on_evaluate) if found else {},
        scan=_scan(means, moving),
        effects=_effects_dataset(effects, bench.families),
        attention=_mean_masses(attention),
        gate={"asked": gate, **passed},
        settings=settings,
    )


def chosen_for_test(
    means: Mapping[Head, float], moving: Sequence[Mapping[Head, float]], n_test: int
) -> list[Head]:
    """Return the heads that go on to the test: half for the size of their effect, the others for how they move.

    Args:
        means: Mean effect of each candidate on the select side, nats.
        moving: For each contrast, share of select requests on which each head makes the move.
        n_test: How many; all candidates where there are no more.

    >>> chosen_for_test({(0, 0): -3.0, (0, 1): 0.1, (0, 2): 0.2, (0, 3): 0.0}, [{(0, 3): 0.9, (0, 1): 0.0}], 2)
    [(0, 0), (0, 3)]
    """
    candidates = sorted(means)
    if len(candidates) <= n_test:
        return candidates
    by_size = sorted(candidates, key=lambda head: -abs(means[head]))
    chosen = by_size[: n_test - n_test // 2] if moving else by_size[:n_test]
    # Contrasts take turns, so that none of them crowds out another.
    queues = [
        [
            head
            for head in sorted(shares, key=lambda head: -shares[head])
            if shares[head] > 0 and head in means
        ]
        for shares in moving
    ]
    while len(chosen) < n_test and any(queues):
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < n_test:
                chosen.append(queue.pop(0))
    chosen += [head for head in by_size if head not in chosen][: n_test - len(chosen)]
    return sorted(chosen)


def _shares(seen: Mapping[str, xr.Dataset], move: Contrast) -> dict[Head, float]:
    shift = argmax_shift(seen[move.first], seen[move.second], leaves=move.leaves, enters=str(move.enters))
    return _by_head_number(shift.mean("prompt"))


def _by_head_number(values: xr.DataArray) -> dict[Head, float]:
    n_layers, n_heads = values.sizes["layer"], values.sizes["head"]
    array = values.transpose("layer", "head").values
    return {(layer, head): float(array[layer, head]) for layer in range(n_layers) for head in range(n_heads)}


def _attention(bench: _Bench, kept: ResultFolder) -> dict[tuple[str, str], xr.Dataset]:
    return {
        (kind, condition): bench.attention(
            batch, kept.path / "attention" / f"{kind}_{condition.replace(':', '_')}"
        )
        for kind, batches in bench.evaluate.items()
        for condition, batch in batches.items()
    }


def _statistics(attention: Mapping[tuple[str, str], xr.Dataset], moves: Sequence[Contrast]) -> pd.DataFrame:
    """Where heads look, on the evaluate side: one row per head."""
    import pandas as pd

    columns: dict[str, dict[Head, float]] = {}
    per_move = []
    for move in moves:
        shares = {}
        for kind, suffix in (("harmful", ""), ("harmless", "_twins")):
            first, second = attention[kind, move.first], attention[kind, move.second]
            shares[kind] = _by_head_number(
                argmax_shift(first, second, leaves=move.leaves, enters=str(move.enters)).mean("prompt")
            )
            columns[f"moves_{move.name}{suffix}"] = shares[kind]
            columns[f"mass_{move.name}{suffix}"] = _by_head_number(
                mass_shift(second, first, str(move.enters), move.leaves).mean("prompt")
            )
        per_move.append(
            {head: min(shares["harmful"][head], shares["harmless"][head]) for head in shares["harmful"]}
        )
    sinks = [
        _by_head_number(data["attention_mass"].sel(span="sink").mean("prompt")) for data in attention.values()
    ]
    columns["sink"] = {head: min(sink[head] for sink in sinks) for head in sinks[0]}
    columns["moving"] = {
        head: max((shares[head] for shares in per_move), default=0.0) for head in columns["sink"]
    }
    heads = sorted(columns["sink"])
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            **{name: [values[head] for head in heads] for name, values in columns.items()},
        }
    )


def _by_head(effects: xr.DataArray) -> dict[Head, Float[np.ndarray, " prompt"]]:
    return {
        (int(layer), int(head)): effects.values[:, place]
        for place, (layer, head) in enumerate(_heads_of(effects))
    }


def _heads_of(effects: xr.DataArray) -> list[Head]:
    """Heads of single-head sets, by their names."""
    pairs = (str(name)[1:].split("H") for name in effects["set"].values)
    return [(int(layer), int(head)) for layer, head in pairs]


def _set_effect(bench: _Bench, found: list[Head], read_in: str, remember: Remember) -> dict[str, Any]:
    search, families = bench.search, bench.families
    n_heads = model_facts(bench.model).n_heads
    in_layer = Counter(layer for layer, _ in found)
    whole_layers = all(count == n_heads for count in in_layer.values())
    # No other set has as many heads in each layer: there is nothing to hold it against, and that is said.
    controls = (
        [] if whole_layers else random_heads_per_layer(found, n_heads, search.n_random_sets, search.seed)
    )
    on_harmful = bench.effects(bench.evaluate["harmful"][read_in], [found, *controls], remember)
    on_twins = bench.effects(bench.evaluate["harmless"][read_in], [found], remember)
    base, harmful, twins = on_harmful["baseline"].values, on_harmful.values[:, 0], on_twins.values[:, 0]
    sizes = [float(size) for size in on_harmful.values[:, 1:].mean(axis=0)]
    effect, gap = (
        bootstrap_interval(values, families=families, seed=search.seed)
        for values in (harmful, harmful - twins)
    )
    mean = float(effect.estimate)
    return {
        "effect": _numbers(effect),
        "effect_twins": float(twins.mean()),
        "specificity": _numbers(gap),
        "refusing_before": float((base > 0).mean()),
        "refusing_after": float((base + harmful > 0).mean()),
        "controls": [
            {"heads": [list(head) for head in control], "effect": size}
            for control, size in zip(controls, sizes, strict=True)
        ],
        "percentile": percentile_among(mean, sizes).percentile if sizes else None,
        "control_p": control_p(mean, sizes) if sizes else None,
        "n_controls": len(controls),
    }


def _numbers(interval: Any) -> dict[str, float]:
    return {
        "estimate": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "n": interval.n,
    }


def _scan(means: Mapping[Head, float], moving: Mapping[str, Mapping[Head, float]]) -> pd.DataFrame:
    import pandas as pd

    heads = sorted(means)
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            "effect": [means[head] for head in heads],
            **{f"moves_{name}": [shares[head] for head in heads] for name, shares in moving.items()},
        }
    )


def _effects_dataset(effects: Mapping[str, xr.DataArray], families: Sequence[str]) -> xr.Dataset:
    import xarray as xr

    variables: dict[str, Any] = {}
    for kind, found in effects.items():
        prompt, head = f"{kind}_prompt", f"{kind}_head"
        variables[kind] = ((prompt, head), found.values, {"units": "nats", "sign": "edited − baseline"})
        variables[f"{kind}_baseline"] = ((prompt,), found["baseline"].values, {"units": "nats"})
    coords: dict[str, Any] = {}
    for kind, found in effects.items():
        coords[f"{kind}_prompt"] = found["prompt"].values
        coords[f"{kind}_head"] = [str(name) for name in found["set"].values]
    coords["family"] = ("harmful_prompt", list(families))
    return xr.Dataset(variables, coords=coords)


def _mean_masses(attention: Mapping[tuple[str, str], xr.Dataset]) -> xr.Dataset:
    """Mean attention mass (kind, condition, layer, head, span); NaN where a condition has no such span."""
    import xarray as xr

    kinds = list(dict.fromkeys(kind for kind, _ in attention))
    conditions = list(dict.fromkeys(condition for _, condition in attention))
    mass = xr.concat(
        [
            xr.concat(
                [attention[kind, condition]["attention_mass"].mean("prompt") for condition in conditions],
                dim="condition",
                join="outer",
            )
            for kind in kinds
        ],
        dim="kind",
        join="outer",
    )
    return xr.Dataset({"attention_mass": mass.assign_coords(kind=kinds, condition=conditions)})
