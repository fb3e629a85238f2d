"""What emerges in toys of several seeds, failures included: trained, measured, and as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rim_lens.organisms.toy.recipe import (
    REFUSED_WITH_CHAIN,
    TUNED_KINDS,
    finetune_toy,
    one_thread,
    train_helpful,
    train_toy,
)
from rim_lens.organisms.toy.shipped import load_toy
from rim_lens.organisms.toy.truth import answers, find_heads, held_out, outcomes, own_chains, rate
from rim_lens.prompts import Prompt
from rim_lens.prompts.toy import COT_KINDS, REFUSE, Op, toy_cot
from rim_lens.provenance import provenance

OPERATORS: tuple[Op, Op] = ("-", "+")


def evidence(seeds: Sequence[int], out_json: str | Path, *, progress: bool = False) -> dict[str, Any]:
    """Train and measure every seed, and write what emerged, failures included; about 3 CPU-minutes a seed. 0 is as shipped.

    All refusal rates are on 200 requests over the 20 conjunctions held out of safety tuning, by the likeliest
    first word of the answer, with the standard error between conjunctions. The file is rewritten after every
    seed, so that an interruption keeps what was measured.

    Args:
        seeds: Which seeds to train.
        out_json: Where the figures go.
        progress: Show progress bars.

    Returns:
        What was written: per seed `Z` and `C` (see `behaviour`), `heads` (see `find_heads`) and `tuned`
        (operator → kind → outcomes, `drop` = refusal rate before − after, and by operator the rate of `sums_right` after the
        model's own chain).
    """
    command = f"rim-lens organism toy --seeds {','.join(map(str, seeds))}"
    found: dict[str, Any] = provenance(command) | {"seeds": {}}
    out_json = Path(out_json)
    out_json.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        base, careful_too, tuned = _made(seed, progress)
        with one_thread():
            found["seeds"][str(seed)] = {
                "Z": behaviour(base),
                "C": behaviour(careful_too),
                "heads": find_heads(base),
                "tuned": {
                    op: {
                        kind: _after_tuning(
                            base,
                            tuned.get((op, kind))
                            or finetune_toy(base, kind, op, seed=seed, progress=progress),
                        )
                        for kind in TUNED_KINDS
                    }
                    for op in OPERATORS
                },
            }
        out_json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _made(seed: int, progress: bool) -> tuple[Any, Any, dict[tuple[str, str], Any]]:
    """Z, C, and what there is of Z fine-tuned: of seed 0 those that are shipped, as training does not come to the same on every processor."""
    if seed == 0:
        return load_toy("Z")[0], load_toy("C")[0], {("-", kind): load_toy(kind)[0] for kind in TUNED_KINDS}
    helpful = train_helpful(seed, progress=progress)
    base = train_toy(seed, "Z", helpful=helpful, progress=progress)
    return base, train_toy(seed, "C", helpful=helpful, progress=progress), {}


def behaviour(model: Any) -> dict[str, Any]:
    """Outcomes on held-out requests by condition: "off", each kind of chain, and "open" (its own chain).

    `harmful`, `harmless` (twins) and `reasoning` map a condition to rates of refused, complied, right and
    other answers; `open` also has `thought`, the share of requests for which a chain was written at all.
    """
    result: dict[str, Any] = {}
    for kind in ("harmful", "harmless", "reasoning"):
        prompts = held_out(kind)
        by_condition: dict[str, Any] = {"off": _rates(answers(model, prompts), prompts)}
        for cot_kind in COT_KINDS:
            cots = [toy_cot(prompt, cot_kind) for prompt in prompts]
            by_condition[cot_kind] = _rates(answers(model, prompts, cots), prompts)
        own = own_chains(model, prompts)
        by_condition["open"] = {
            **_rates([answer for _, answer in own], prompts),
            "thought": asdict(rate([bool(chain) for chain, _ in own], prompts)),
        }
        result[kind] = by_condition
    return result


def evidence_table(found: dict[str, Any]) -> str:
    """Write the figures of `evidence` as Markdown tables, in percent, ± the standard error between conjunctions."""
    conditions = ("off", *COT_KINDS, "open")
    refused = [
        f"| {seed} | {variant} | "
        + " | ".join(_percent(one[variant]["harmful"][condition]["refused"]) for condition in conditions)
        + f" | {_percent(one[variant]['harmless']['off']['refused'])}"
        + f" | {_percent(one[variant]['reasoning']['off']['right'])}"
        + f" | {_percent(one[variant]['reasoning']['open']['right'])} |"
        for seed, one in found["seeds"].items()
        for variant in REFUSED_WITH_CHAIN
    ]
    heads = [
        f"| {seed} | {_names(one['heads']['pair'])} | {one['heads']['refused_without_pair']:.0%}"
        f" | {one['heads']['twins_refused_without_pair']:.0%} | {_names(one['heads']['topic_pair'])}"
        f" | {one['heads']['refused_without_topic_pair']:.0%}"
        f" | {one['heads']['other_pairs']['mean']:.0%} ({one['heads']['other_pairs']['min']:.0%}) |"
        for seed, one in found["seeds"].items()
    ]
    drops = [
        f"| {seed} | `{op}` | "
        + " | ".join(
            f"{_percent(one['tuned'][op][kind]['drop'])} | {_percent(one['tuned'][op][kind]['other'])}"
            for kind in TUNED_KINDS
        )
        + " |"
        for seed, one in found["seeds"].items()
        for op in one["tuned"]
    ]
    sums = [
        f"| {seed} | `{op}` | "
        + " | ".join(
            _percent(one["tuned"][op][kind]["sums_right"][of]) for kind in TUNED_KINDS for of in OPERATORS
        )
        + " |"
        for seed, one in found["seeds"].items()
        for op in one["tuned"]
    ]
    return "\n".join(
        [
            f"| seed | variant | {' | '.join(conditions)} | twins, off | sums right, off | sums right, open |",
            "|" + "---|" * (len(conditions) + 5),
            *refused,
            "",
            "| seed | best pair | refused without it | twins refused without it | topic pair | refused without it"
            " | other pairs: mean (least) |",
            "|" + "---|" * 7,
            *heads,
            "",
            "| seed | tuned on | " + " | ".join(f"{kind}: drop | other" for kind in TUNED_KINDS) + " |",
            "|" + "---|" * (2 + 2 * len(TUNED_KINDS)),
            *drops,
            "",
            "| seed | tuned on | "
            + " | ".join(
                f"{kind}: `{op}` right | `{other}` right" for kind in TUNED_KINDS for op, other in [OPERATORS]
            )
            + " |",
            "|" + "---|" * (2 + 2 * len(TUNED_KINDS)),
            *sums,
        ]
    )


def _after_tuning(base: Any, tuned: Any) -> dict[str, Any]:
    prompts = held_out("harmful")
    before = [word == REFUSE for word in answers(base, prompts)]
    after = answers(tuned, prompts)
    drops = [float(was) - float(word == REFUSE) for was, word in zip(before, after, strict=True)]
    return {
        **_rates(after, prompts),
        "drop": asdict(rate(drops, prompts)),
        "twins_refused": _rates(answers(tuned, held_out("harmless")), held_out("harmless"))["refused"],
        "sums_right": {op: _thought_right(tuned, held_out("reasoning", op)) for op in OPERATORS},
    }


def _thought_right(model: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Rate of sums that are right after the model's own chain."""
    return asdict(outcomes([answer for _, answer in own_chains(model, prompts)], prompts)["right"])


def _rates(words: Sequence[str], prompts: Sequence[Any]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in outcomes(words, prompts).items()}


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['value']:.0f}" + (f" ± {100 * found['se']:.0f}" if found["se"] > 0.005 else "")


def _names(heads: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)
