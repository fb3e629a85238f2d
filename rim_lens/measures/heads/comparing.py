"""Whether the heads that carry refusal in one model carry it in a fine-tuned one: the two tables side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.errors import ConditionError, NotEnoughData, ReferenceMismatch
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.kept import read_result, require_columns, with_nan, without_nan, write_result
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMAT_VERSION = 1
FILE = "compared_heads.json"
SAME = (
    "evaluate_digest",
    "read_in",
    "editor",
    "positions",
    "openers",
    "chat_format",
    "rule",
)


@dataclass(frozen=True, eq=False)
class HeadComparison:
    """Heads of two models, matched.

    Attributes:
        table: One row per head that was tested in both, see `compare_heads`.
        baseline: Mean refusal score of the harmful requests and of their twins in base and tuned (nats), and the change of
            each with its 95 % interval.
        correlation: Spearman's rank correlation of the heads' mean effects on harmful requests in both models, with low
            and high (bootstrap over families) and the number of heads; NaN with fewer than three heads.
        untested: Heads that were tested in one of the models alone: {"base": [...], "tuned": [...]}.
        settings: What both share, digests of both models' weights, and n, the number of pairs of requests and twins.
    """

    table: pd.DataFrame
    baseline: dict[str, dict[str, float]]
    correlation: dict[str, float]
    untested: dict[str, list[list[int]]]
    settings: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def __repr__(self) -> str:
        value = self.correlation
        return (
            f"HeadComparison({len(self.table)} heads, rank correlation of effects {value['value']:.2f}"
            f" [{value['low']:.2f}, {value['high']:.2f}])"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.table.to_html(index=False, float_format='{:.3g}'.format)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON; NaN becomes None."""
        return {
            "format_version": FORMAT_VERSION,
            "table": frame_to_json(self.table),
            "baseline": {kind: without_nan(values) for kind, values in self.baseline.items()},
            "correlation": without_nan(self.correlation),
            "untested": self.untested,
            "settings": self.settings,
        }

    def save(self, folder: str | Path) -> None:
        """Write compared_heads.json into a folder, which is made where there is none."""
        write_result(folder, FILE, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> HeadComparison:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, holds something else, or is of another format version.
        """

        def made(read: dict[str, Any]) -> HeadComparison:
            table = frame_from_json(read["table"])
            require_columns(table, ("layer", "head", "verdict_base", "verdict_tuned", "change"))
            return cls(
                table=table,
                baseline={kind: with_nan(values) for kind, values in read["baseline"].items()},
                correlation=with_nan(read["correlation"]),
                untested=read["untested"],
                settings=read["settings"],
            )

        return read_result(folder, FILE, FORMAT_VERSION, made, "HeadComparison.save")


def compare_heads(base: RefusalHeads, tuned: RefusalHeads, *, seed: int = 0) -> HeadComparison:
    """Hold the heads of a tuned model against those of the model it came from, head by head, on the same requests.

    Heads are matched by (layer, head); only those that were tested in both are compared. Each model's own select side
    chooses which it tests, so measure the tuned one with the base's heads as well, or the loss of a head goes unseen::

        base = rl.refusal_heads(model, chat, harmful, harmless)
        tested = base.table[base.table["tested"]][["layer", "head"]].itertuples(index=False, name=None)
        tuned = rl.refusal_heads(other, chat, harmful, harmless, also_test=tested, gate=False)

    What it does not show: *why* an effect changed. A model that refuses less has less refusal to lose, so that every
    effect shrinks towards 0 without any head having changed its part: look at `baseline` first. The verdict of the
    tuned model is by its own baseline; where that does not refuse, none says anything. Nor is another head of the same
    effect the same head: what it reads may differ.

    Args:
        base: What `refusal_heads` found in the model before.
        tuned: The same after fine-tuning: same requests, editor, rows and reading.
        seed: Of the permutations and the bootstrap.

    Returns:
        A `HeadComparison`. Columns of its table: layer, head; verdict_base and verdict_tuned; for effect, effect_twins and
        specificity the mean in base and tuned, for effect with its 95 % interval in each (effect_base_low, …); change, change_twins and change_specificity (tuned − base, paired by
        request) with their 95 % intervals over families and p (sign flips over families, max-statistic over the heads of
        this table); and every column about attention that both tables have (`moves_…`, `mass_…`, sink), with `_base` and
        `_tuned`. Largest change first.

    Raises:
        ConditionError: One is no `RefusalHeads`.
        ReferenceMismatch: The two were measured on other requests, with another editor, rows or reading, or have
            other numbers of layers and heads.
        NotEnoughData: No head was tested in both; or requests of a single family.
    """
    import pandas as pd

    _require_same(base, tuned)
    tested = {name: _tested(found) for name, found in (("base", base), ("tuned", tuned))}
    heads = [head for head in tested["base"] if head in tested["tuned"]]
    if not heads:
        raise NotEnoughData(
            "no head was tested in both models; measure the tuned one with also_test= the heads tested in the base."
        )
    families = [str(family) for family in base.effects["family"].values]
    if family_index(families, len(families))[1] < 2:
        raise NotEnoughData("the requests are of one family; an interval over families needs at least two.")
    names = [f"L{layer}H{head}" for layer, head in heads]
    effects = {
        (model, kind): found.effects[kind].sel({f"{kind}_head": names}).values
        for model, found in (("base", base), ("tuned", tuned))
        for kind in ("harmful", "harmless")
    }
    gaps = {model: effects[model, "harmful"] - effects[model, "harmless"] for model in ("base", "tuned")}
    differences = {
        "change": effects["tuned", "harmful"] - effects["base", "harmful"],
        "change_twins": effects["tuned", "harmless"] - effects["base", "harmless"],
        "change_specificity": gaps["tuned"] - gaps["base"],
    }
    columns: dict[str, Any] = {"layer": [layer for layer, _ in heads], "head": [head for _, head in heads]}
    rows = {
        name: found.table.set_index(["layer", "head"]).loc[heads]
        for name, found in (("base", base), ("tuned", tuned))
    }
    for model, its in rows.items():
        columns[f"verdict_{model}"] = its["verdict"].to_list()
    for measure, of in (
        ("effect", lambda model: effects[model, "harmful"]),
        ("effect_twins", lambda model: effects[model, "harmless"]),
        ("specificity", lambda model: gaps[model]),
    ):
        columns |= {f"{measure}_{model}": of(model).mean(axis=0) for model in ("base", "tuned")}
    for model in ("base", "tuned"):
        interval = bootstrap_interval(effects[model, "harmful"], families, seed=seed)
        columns |= {f"effect_{model}_low": interval.low, f"effect_{model}_high": interval.high}
    for name, values in differences.items():
        columns |= _changed(name, values, families, seed)
    shared = [
        name
        for name in rows["base"].columns
        if name in rows["tuned"].columns and (name == "sink" or name.startswith(("moves_", "mass_")))
    ]
    for name in shared:
        columns |= {f"{name}_{model}": its[name].to_list() for model, its in rows.items()}
    table = pd.DataFrame(columns)
    order = table["change"].abs().sort_values(ascending=False, kind="stable").index
    return HeadComparison(
        table=table.loc[order].reset_index(drop=True),
        baseline={
            kind: _baseline(base.effects, tuned.effects, kind, families, seed)
            for kind in ("harmful", "harmless")
        },
        correlation=_correlation(effects["base", "harmful"], effects["tuned", "harmful"], families, seed),
        untested={name: [list(head) for head in its if head not in heads] for name, its in tested.items()},
        settings={
            **{name: base.settings[name] for name in SAME},
            "weights_digest": {
                "base": base.settings["weights_digest"],
                "tuned": tuned.settings["weights_digest"],
            },
            "n": len(families),
            "seed": seed,
        },
    )


def _require_same(base: RefusalHeads, tuned: RefusalHeads) -> None:
    for found in (base, tuned):
        if not isinstance(found, RefusalHeads):
            raise ConditionError(
                f"compare_heads compares two tables of heads, and was given a {type(found).__name__}. Measure both models first:"
                " rl.refusal_heads(model, harmful, harmless), or load what was saved: rl.RefusalHeads.load(folder)."
            )
    for name in SAME:
        first, second = base.settings.get(name), tuned.settings.get(name)
        if first != second:
            raise ReferenceMismatch(
                f"the two tables cannot be compared: {name} is {first!r} in the base and {second!r} in the tuned model. Measure"
                " both with the same requests and settings."
            )
    for name in ("n_layers", "n_heads"):
        first, second = base.settings["model"][name], tuned.settings["model"][name]
        if first != second:
            raise ReferenceMismatch(
                f"the base has {name}={first} and the tuned model {second}; heads are matched by layer and number, so give"
                " models of the same shapes."
            )
    first, second = (found.settings["twins_digests"][-1] for found in (base, tuned))
    if first != second:
        raise ReferenceMismatch(
            f"the two tables cannot be compared: twins of the evaluate side have the digest {first} in the base and {second} in the"
            " tuned model, so they are other words. Measure both with the same requests."
        )
    for prompts in ("harmful_prompt", "harmless_prompt"):
        if base.effects[prompts].values.tolist() != tuned.effects[prompts].values.tolist():
            raise ReferenceMismatch(
                f"the two tables name other requests ({prompts.removesuffix('_prompt')}), or in another order. Measure both with"
                " the same records."
            )


def _tested(found: RefusalHeads) -> list[tuple[int, int]]:
    rows = found.table[found.table["tested"]]
    return sorted((int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True))


def _changed(
    name: str, values: Float[np.ndarray, "prompt head"], families: Sequence[str], seed: int
) -> dict[str, Any]:
    interval = bootstrap_interval(values, families, seed=seed)
    test = sign_flip_test(values, families=families, correction="max", seed=seed)
    return {
        name: interval.estimate,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        name.replace("change", "p"): test.p,
    }


def _baseline(
    base: xr.Dataset, tuned: xr.Dataset, kind: str, families: Sequence[str], seed: int
) -> dict[str, float]:
    before, after = (data[f"{kind}_baseline"].values for data in (base, tuned))
    change = bootstrap_interval(after - before, families, seed=seed)
    return {
        "base": float(before.mean()),
        "tuned": float(after.mean()),
        "change": float(change.estimate),
        "low": float(change.low),
        "high": float(change.high),
    }


def _correlation(
    base: Float[np.ndarray, "prompt head"],
    tuned: Float[np.ndarray, "prompt head"],
    families: Sequence[str],
    seed: int,
) -> dict[str, float]:
    n_heads = base.shape[1]
    if n_heads < 3:
        nothing = float("nan")
        return {"value": nothing, "low": nothing, "high": nothing, "n_heads": n_heads}
    both = np.concatenate([base, tuned], axis=1)

    def statistic(rows: np.ndarray) -> float:
        means = rows.mean(axis=0)
        return rank_correlation(means[:n_heads], means[n_heads:])

    found = bootstrap_interval(both, families, statistic, seed=seed)
    return {
        "value": float(found.estimate),
        "low": float(found.low),
        "high": float(found.high),
        "n_heads": n_heads,
    }


def rank_correlation(first: Float[np.ndarray, " head"], second: Float[np.ndarray, " head"]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is all ties.

    >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([-1.0, 5.0, 7.0])), 6)
    1.0
    """
    ranks = [_ranks(values) - (len(values) + 1) / 2 for values in (first, second)]
    norm = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / norm if norm > 0 else float("nan")


def _ranks(values: Float[np.ndarray, " head"]) -> Float[np.ndarray, " head"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
