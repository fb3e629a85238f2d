"""docs/heads.md: what the verdicts of `rl.refusal_heads` are worth, where the truth is known and where there is none.

``python -m tests.verdicts`` measures, writes docs/evidence/heads.json, and the page from it. The suite holds the same
claims on a sample (tests/measures/heads/test_refusing.py). Seven CPU-minutes, and four more the first time,
to train toys of other seeds, which are kept under .cache/toy.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rim_lens as rl
from rim_lens.lens import Head, Model, model_facts, wrap_hf
from rim_lens.measures.heads.finding import scorer
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.heads.table import HeadRule, corrected_p
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.stats import proportion_interval
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.host import toy_model, toy_tokenizer
from rim_lens.organisms.toy.recipe import one_thread, train_toy
from rim_lens.prompts import Prompt

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "heads.json"
PAGE = ROOT / "docs" / "heads.md"
TOYS = ROOT / ".cache" / "toy"

N_PLANTED = 24
SCALES = (0.1, 0.2, 0.4, 0.8)
N_RANDOM = 52  # of each scale
N_PERMUTED = 200
TOY_SEEDS = range(6)
UNITS = ("request", "conjunction", "words")

SMALL = rl.HeadSearch(limit=20, n_random_sets=8)
# All 16 heads are tested whatever is found, so that a null needs no search, no attention and no random sets.
LEAST = rl.HeadSearch(limit=20, n_random_sets=1, max_heads=1)

Effects = dict[Head, np.ndarray]


def toy_requests(split: str | None = None) -> tuple[list[Prompt], list[Prompt]]:
    """Harmful requests of the toy language and their twins, in one order."""
    harmful, harmless = (
        rl.load_prompts(kind, language="toy", split=split) for kind in ("harmful", "harmless")
    )
    return harmful, harmless


# --- where the truth is known -----------------------------------------------------------------------


def planted_row(seed: int) -> dict[str, Any]:
    """What one noise seed of `planted` is called."""
    model = rl.load_model(f"planted:{seed}")
    found = rl.refusal_heads(model, rl.ChatFormat.from_model(model), *toy_requests(), search=SMALL)
    truth = planted_truth(seed)
    table = found.table.set_index(["layer", "head"])
    called, true = _called(found), set(truth.heads)
    rest = table.drop(index=[*truth.heads, *truth.decoy_heads, *truth.sink_heads])
    return {
        "seed": seed,
        "precision": len(called & true) / len(called) if called else None,
        "recall": len(called & true) / len(true),
        "decoy": [str(table.loc[head, "verdict"]) for head in truth.decoy_heads],
        "sink": [str(table.loc[head, "verdict"]) for head in truth.sink_heads],
        "others": dict(Counter(map(str, rest["verdict"]))),
        "smallest_true_effect": float(table.loc[list(truth.heads), "effect"].abs().min()),
        "largest_other_effect": float(table.drop(index=list(truth.heads))["effect"].abs().max()),
        "moves_true": [float(table.loc[head, "moves_chain"]) for head in truth.heads],
        "moves_decoy": [float(table.loc[head, "moves_chain"]) for head in truth.decoy_heads],
    }


# --- where there is no refusal ----------------------------------------------------------------------


def random_toy(seed: int, scale: float) -> Model:
    """A model in the toy's shape with random weights, gains of its norms among them."""
    generator = torch.Generator().manual_seed(seed)
    model = toy_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.5, generator=generator)
            else:
                parameter.normal_(std=scale, generator=generator)
    return wrap_hf(model.eval(), toy_tokenizer())


def random_run(seed: int, scale: float) -> RefusalHeads:
    """The whole call on a random model, its gate off."""
    model = random_toy(seed, scale)
    return ungated(model, *toy_requests())


def ungated(model: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> RefusalHeads:
    """The whole call, cut down to what the verdict *refusal* hangs on."""
    chat = rl.ChatFormat.from_model(model)
    return rl.refusal_heads(
        model, chat, harmful, harmless, gate=False, conditions=("off",), contrasts=(), search=LEAST
    )


def random_rows(n_runs: int = N_RANDOM, scales: Sequence[float] = SCALES) -> list[dict[str, Any]]:
    """By scale of the weights: how often any head is called *refusal*, and what another clustering would have said."""
    conjunction = {prompt.id: prompt.family for prompt in toy_requests("evaluate")[0]}
    rows = []
    for scale in scales:
        counts: Counter[str] = Counter()
        sizes = []
        for seed in range(n_runs):
            found = random_run(1000 * round(10 * scale) + seed, scale)
            sizes.append(found.table["effect"].abs().max())
            ids = [str(name) for name in found.effects["harmful_prompt"].values]
            for name, families in (
                ("words", list(found.effects["family"].values)),
                ("conjunction", [conjunction[id_] for id_ in ids]),
            ):
                said = verdicts(*_effects_of(found), families)
                counts[f"refusal_{name}"] += said["refusal"]
                counts[f"p_specific_{name}"] += said["p_specific"] <= 0.05
            counts["refusal"] += "refusal" in set(found.table["verdict"])
        rows.append(
            {
                "scale": scale,
                "n_runs": n_runs,
                "largest_effect": {"median": float(np.median(sizes)), "max": float(np.max(sizes))},
                **{name: int(counts[name]) for name in _COUNTED},
            }
        )
    return rows


_COUNTED = (
    "refusal",
    "refusal_words",
    "p_specific_words",
    "refusal_conjunction",
    "p_specific_conjunction",
)


def verdicts(effects: Effects, twin_effects: Effects, families: Sequence[str]) -> dict[str, Any]:
    """The part of `head_table` that decides on *refusal*, without intervals, and so a hundred times faster.

    Returns:
        heads (called *refusal*), refusal (any), p_specific (the smallest).
    """
    heads, rule = sorted(effects), HeadRule()
    gaps = {head: effects[head] - twin_effects[head] for head in heads}
    columns = {
        name: (values, corrected_p(values, heads, families, least))
        for name, values, least in (
            ("", effects, rule.min_effect),
            ("_twins", twin_effects, rule.min_effect),
            ("_specific", gaps, rule.min_effect * rule.min_specific),
        )
    }
    called = [
        head
        for head in heads
        if rule.verdict(
            {
                "tested": True,
                **{f"p{name}": p[head] for name, (_, p) in columns.items()},
                "effect": effects[head].mean(),
                "effect_twins": twin_effects[head].mean(),
                "specificity": gaps[head].mean(),
            }
        )
        == "refusal"
    ]
    return {"heads": called, "refusal": bool(called), "p_specific": min(columns["_specific"][1].values())}


def toy_of_seed(seed: int, folder: Path = TOYS) -> Model:
    """The toy (Z) of a seed: the shipped one for 0, the others trained once and kept."""
    if seed == 0:
        return rl.load_model("toy")
    from safetensors.torch import load_file, save_file

    path = folder / f"Z-{seed}.safetensors"
    model = toy_model()
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        model = train_toy(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return wrap_hf(model.eval(), toy_tokenizer())


def swaps(
    unit: str, harmful: Sequence[Prompt], twins: Sequence[Prompt], n: int, seed: int
) -> Iterator[np.ndarray]:
    """Which pairs change labels, run by run: drawn for each request, conjunction, or pair of words by itself.

    Of pairs of words there are six, and all 64 ways are gone through.
    """
    labels = {
        "request": [prompt.id for prompt in harmful],
        "conjunction": families_of(harmful),
        "words": families_by_swap(harmful, twins),
    }[unit]
    place, n_labels = np.unique(labels, return_inverse=True)[1], len(set(labels))
    if unit == "words":
        yield from (np.array(way, dtype=bool)[place] for way in product((False, True), repeat=n_labels))
        return
    rng = np.random.default_rng([seed, UNITS.index(unit)])
    yield from (rng.random(n_labels)[place] < 0.5 for _ in range(n))


def with_labels_changed(
    harmful: Sequence[Prompt], twins: Sequence[Prompt], changed: np.ndarray
) -> tuple[list[Prompt], list[Prompt]]:
    """Requests and twins, the words of some pairs exchanged; ids, families and splits stay."""
    pairs = [
        (replace(one, text=other.text), replace(other, text=one.text)) if flip else (one, other)
        for one, other, flip in zip(harmful, twins, changed, strict=True)
    ]
    return [one for one, _ in pairs], [other for _, other in pairs]


def toy_effects(model: Model, harmful: Sequence[Prompt], twins: Sequence[Prompt]) -> tuple[Effects, Effects]:
    """Effect of zeroing each head on each request and on its twin, off."""
    chat = rl.ChatFormat.from_model(model)
    both = []
    for requests in (harmful, twins):
        score = scorer(model, chat.render(list(requests), think="off"))
        base = score([])
        both.append({head: score([head]) - base for head in model_facts(model).heads()})
    return both[0], both[1]


def permuted_row(seed: int, n_runs: int = N_PERMUTED) -> dict[str, Any]:
    """A toy whose labels harmful and twin are exchanged within pairs, in three ways, tested in two."""
    harmful, twins = _paired(*toy_requests("evaluate"))
    effects, twin_effects = toy_effects(toy_of_seed(seed), harmful, twins)
    tests = {"words": families_by_swap(harmful, twins), "conjunction": families_of(harmful)}
    row: dict[str, Any] = {"seed": seed}
    for unit in UNITS:
        counts, n = Counter(dict.fromkeys(tests, 0)), 0
        for changed in swaps(unit, harmful, twins, n_runs, seed):
            now, then = (
                {head: np.where(changed, twin_effects[head], effects[head]) for head in effects},
                {head: np.where(changed, effects[head], twin_effects[head]) for head in effects},
            )
            n += 1
            for name, families in tests.items():
                counts[name] += verdicts(now, then, families)["refusal"]
        row[unit] = {"n_runs": n, **counts}
    return row


# --- what emerges in trained toys -------------------------------------------------------------------


def toy_row(seed: int) -> dict[str, Any]:
    """What `refusal_heads` says of the toy of one seed, with everything at its default."""
    model = toy_of_seed(seed)
    found = rl.refusal_heads(model, rl.ChatFormat.from_model(model), *toy_requests())
    table = found.to_dataframe(masses=True)
    telling = table[(table["effect"].abs() >= 1) | table["found"] | (table["verdict"] == "refusal")]
    ids = [str(name) for name in found.effects["harmful_prompt"].values]
    conjunction = {prompt.id: prompt.family for prompt in toy_requests("evaluate")[0]}
    by_conjunction = verdicts(*_effects_of(found), [conjunction[id_] for id_ in ids])
    shown = (
        *("layer", "head", "verdict", "effect", "effect_low", "effect_high", "p", "effect_twins"),
        *("specificity", "p_specific", "percentile", "moves_chain", "mass_request_off", "mass_think_off"),
        *("mass_cot_careful",),
    )
    return {
        "seed": seed,
        "gate": found.gate,
        "refusal": [list(head) for head in sorted(_called(found))],
        "refusal_by_conjunction": [list(head) for head in by_conjunction["heads"]],
        "found": [list(head) for head in found.found],
        "set": {key: value for key, value in found.set.items() if key != "controls"},
        "verdicts": dict(Counter(map(str, table["verdict"]))),
        "moves_empty": {
            f"{row.layer}.{row.head}": {
                "harmful": row.moves_empty,
                "twins": row.moves_empty_twins,
                "verdict": row.verdict,
            }
            for row in table.itertuples()
            if row.moves_empty >= 0.5
        },
        "heads": json.loads(telling[list(shown)].to_json(orient="records")),
    }


# --- page -------------------------------------------------------------------------------------------


def share(hits: int, n: int) -> str:
    """A share with its 95 % interval.

    >>> share(3, 200)
    '3 of 200: 1.5 % [0.5, 4.3]'
    """
    found = proportion_interval(hits, n)
    return f"{hits} of {n}: {100 * hits / n:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def names(heads: Sequence[Sequence[int]]) -> str:
    """Heads in the page's words."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    return (
        "\n".join(
            [
                "# Heads: what a verdict of `refusal_heads` is worth",
                "",
                f"`{found['command']}`, {found['date']}, TransformerLens {found['versions']['transformer-lens']}, torch"
                f" {found['versions']['torch']} (CPU, one thread). Figures in [evidence/heads.json](evidence/heads.json). Heads are written",
                "layer.head; effects are of zeroing a head, in nats of refusal log-odds.",
                "",
                *_planted_lines(found["planted"]),
                *_null_lines(found["random"], found["permuted"]),
                *_toy_lines(found["toy"]),
            ]
        )
        + "\n"
    )


def _planted_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    n = len(rows)
    exact = sum(row["precision"] == row["recall"] == 1 for row in rows)
    decoys = Counter(verdict for row in rows for verdict in row["decoy"])
    sinks = Counter(verdict for row in rows for verdict in row["sink"])
    others: Counter[str] = Counter()
    for row in rows:
        others.update(row["others"])
    return [
        f"## Where it was planted: {n} noise seeds",
        "",
        "The whole call on `planted:SEED`, gate on, five conditions, 20 requests and their twins on each side. Two heads carry",
        "refusal, one attends as one of these does and moves nothing (decoy), one rests on the first token (sink), twelve are noise.",
        "",
        "| | |",
        "| --- | --- |",
        f"| precision and recall of *refusal* both 1.0 | {exact} of {n} seeds |",
        f"| mean precision, mean recall | {np.mean([row['precision'] or 0 for row in rows]):.3f}, {np.mean([row['recall'] for row in rows]):.3f} |",
        f"| seeds in which a true head was not named | {_listed([row['seed'] for row in rows if row['recall'] < 1])} |",
        f"| the decoy is called | {_told(decoys)} |",
        f"| the sink is called | {_told(sinks)} |",
        f"| the twelve others are called | {_told(others)} |",
        f"| smallest effect of a true head, largest of any other | {min(row['smallest_true_effect'] for row in rows):.1f},"
        f" {max(row['largest_other_effect'] for row in rows):.2f} nats |",
        "",
        "*Positional* among the others is what it says: their attention, noise, happens to make a move on every request. A statistic of",
        "attention alone (the argmax key moves from the words of a chain into the empty block) is, over seeds,"
        f" {_range(rows, 'moves_true', 1)} for the reader 1.1,",
        f"{_range(rows, 'moves_decoy', 0)} for its decoy 1.2, and {_range(rows, 'moves_true', 0)} for the topic head 0.5: it would take the decoy and miss a true head.",
        "",
    ]


def _null_lines(random: Sequence[dict[str, Any]], permuted: Sequence[dict[str, Any]]) -> list[str]:
    n = sum(row["n_runs"] for row in random)
    sums = {name: sum(row[name] for row in random) for name in _COUNTED}
    lines = [
        "## Where there is none: the share of runs in which any head is called *refusal*",
        "",
        "The level is .05, for any of the 16 heads. The gate, which stops all of these, is off. Tests flip signs by family, and families",
        "whose twins swap the same words (`make` for `ban`) are one family (`families_by_swap`): six, not ten, among the toy's requests.",
        "The last columns show what taking the ten conjunctions as independent would give.",
        "",
        f"**Random weights**, norms included, in the toy's shape; the whole call, {n} models.",
        "",
        "| weights' standard deviation | largest effect: median, max (nats) | runs with *refusal* | p_specific ≤ .05 for any head"
        " | by conjunction: *refusal* | by conjunction: p_specific |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in random:
        size = row["largest_effect"]
        lines.append(
            f"| {row['scale']:g} | {size['median']:.2f}, {size['max']:.1f} | {row['refusal']} of {row['n_runs']}"
            f" | {row['p_specific_words']} | {row['refusal_conjunction']} | {row['p_specific_conjunction']} |"
        )
    lines += [
        f"| all | | {share(sums['refusal'], n)} | {share(sums['p_specific_words'], n)}"
        f" | {share(sums['refusal_conjunction'], n)} | {share(sums['p_specific_conjunction'], n)} |",
        "",
        "A random network reacts to particular verbs, so that two conjunctions of one verb lean the same way: that is why the test by",
        "conjunction is off its level. Flipping by swapped words is exact here: to exchange `make` and `ban` everywhere is to",
        "exchange two rows of a random embedding.",
        "",
        f"**Trained toys**, seeds {permuted[0]['seed']} to {permuted[-1]['seed']}, labels *harmful* and *twin* exchanged within pairs: each request by a coin of its own,",
        "each conjunction, or each pair of swapped words (all 64 ways). Effects of heads are measured once and the labels exchanged in",
        "the table, which is the same as exchanging the words of the requests (a test holds the two together).",
        "",
        "| labels exchanged by | runs with *refusal* | worst seed | by conjunction: runs with *refusal* | worst seed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for unit in UNITS:
        n = sum(row[unit]["n_runs"] for row in permuted)
        cells = []
        for test in ("words", "conjunction"):
            worst = max(permuted, key=lambda row: row[unit][test] / row[unit]["n_runs"])
            cells += [
                share(sum(row[unit][test] for row in permuted), n),
                f"{100 * worst[unit][test] / worst[unit]['n_runs']:.1f} % (seed {worst['seed']})",
            ]
        lines.append(f"| {unit} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Exchanging by request or conjunction breaks the tie between conjunctions of one verb, and both tests hold. Exchanging by",
        "words keeps it, and only the test by words holds: its flips are then the very exchanges that were made. That line is no",
        "sample but all 64 ways, and the intervals of this table take runs as independent, which they are within a seed only.",
        "",
        "What it costs: with six families the smallest p is 2 / 2⁶ = .031, and to reach it a head must beat, under every flip, every other",
        "that could matter (those whose effects are too small for any verdict set no bar, `corrected_p`). That a null holds here says",
        "nothing about requests unlike these.",
        "",
    ]


def _toy_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## What emerges in trained toys, failures included",
        "",
        "Everything at its default: 50 requests and their twins on each side. The found set is the one that `find_heads` chose on",
        "select requests; its numbers are on evaluate requests. Percentile: of its effect among random sets with as many heads in each",
        "layer. Refusing is by score: more likely than not.",
        "",
        "| seed | verdict *refusal* | … had conjunctions been independent | found set | effect [95 %] | specificity [95 %] | percentile (sets)"
        " | refusing before → after |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        of = row["set"]
        told = (
            f"{_interval(of['effect'])} | {_interval(of['specificity'])} | {of['percentile']:.0f} ({of['n_controls']})"
            f" | {of['refusing_before']:.0%} → {of['refusing_after']:.0%}"
            if of
            else "– | – | – | –"
        )
        lines.append(
            f"| {row['seed']} | {names(row['refusal'])} | {names(row['refusal_by_conjunction'])} | {names(row['found'])} | {told} |"
        )
    lines += [
        "",
        "Heads whose removal moves refusal by a nat or more, or that were found or named. Attention of the last prompt row: share of",
        "requests on which its argmax moves from the chain into the empty block, mean mass on the request and on the think tags (off),",
        "and on the chain (careful).",
        "",
        "| seed | head | verdict | effect [95 %] | p | on twins | specificity | p_specific | percentile in layer | moves | request | think | chain |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for head in row["heads"]:
            lines.append(
                f"| {row['seed']} | {head['layer']}.{head['head']} | {head['verdict']} | {head['effect']:+.1f} [{head['effect_low']:+.1f},"
                f" {head['effect_high']:+.1f}] | {head['p']:.3f} | {head['effect_twins']:+.1f} | {head['specificity']:+.1f}"
                f" | {head['p_specific']:.3f} | {head['percentile']:.0f} | {head['moves_chain']:.2f} | {head['mass_request_off']:.2f}"
                f" | {head['mass_think_off']:.2f} | {head['mass_cot_careful']:.2f} |"
            )
    moving = (
        "; ".join(
            f"seed {row['seed']}: "
            + ", ".join(
                f"{head} ({of['harmful']:.0%}, on twins {of['twins']:.0%}; *{of['verdict']}*)"
                for head, of in row["moves_empty"].items()
            )
            for row in rows
            if row["moves_empty"]
        )
        or "none in any seed"
    )
    named = [row["seed"] for row in rows if row["refusal"]]
    unnamed = [row["seed"] for row in rows if not row["refusal"]]
    return [
        *lines,
        "",
        f"A head is named in seeds {_listed(named)}, none in {_listed(unnamed)}. Where none is, a set may still do the work (its effect and",
        "percentile say so), or refusal is spread, or six families are too few to say; the toy has no more verbs. An effect of the",
        "opposite sign on twins means that the model then refuses *them* more: the head carries the distinction, not a push",
        "towards refusal.",
        "",
        "The paper's statistic: heads whose argmax moves from the role word (open) into the empty block (off) on half of the harmful",
        f"requests or more: {moving}.",
    ]


def _interval(of: dict[str, float]) -> str:
    return f"{of['estimate']:+.1f} [{of['low']:+.1f}, {of['high']:+.1f}]"


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"*{verdict}* {n}" for verdict, n in counts.most_common())


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def _range(rows: Sequence[dict[str, Any]], key: str, place: int) -> str:
    values = [row[key][place] for row in rows]
    low, high = min(values), max(values)
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _paired(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    twin = {prompt.id: prompt for prompt in harmless}
    return list(harmful), [twin[str(prompt.twin)] for prompt in harmful]


def _called(found: RefusalHeads) -> set[Head]:
    rows = found.table[found.table["verdict"] == "refusal"]
    return {(int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)}


def _effects_of(found: RefusalHeads) -> tuple[Effects, Effects]:
    both = []
    for kind in ("harmful", "harmless"):
        heads = [str(name)[1:].split("H") for name in found.effects[f"{kind}_head"].values]
        values = found.effects[kind].values
        both.append({(int(layer), int(head)): values[:, place] for place, (layer, head) in enumerate(heads)})
    return both[0], both[1]


def main() -> None:
    """Measure, and write evidence and page; what was measured before an interruption is measured again."""
    from rim_lens.provenance import provenance

    with one_thread():
        found = provenance("make evidence-heads", ("numpy", "torch", "transformers", "transformer-lens"))
        found |= {
            "planted": [planted_row(seed) for seed in range(N_PLANTED)],
            "random": random_rows(),
            "permuted": [permuted_row(seed) for seed in TOY_SEEDS],
            "toy": [toy_row(seed) for seed in TOY_SEEDS],
        }
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
