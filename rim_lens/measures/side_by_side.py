"""Every measure of refusal on the same requests, side by side: where they agree, and where the naive one lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.conditions import STANDARD, render_conditions
from rim_lens.errors import ConditionError
from rim_lens.generation import Generation, generate
from rim_lens.lens import Model, model_facts
from rim_lens.measures.pages import markdown_table, page_paths, plain, told_versions, write_json
from rim_lens.measures.refusal.agreeing import agreement
from rim_lens.measures.refusal.prefixes import refusal_prefix_score
from rim_lens.measures.refusal.rates import families_of, share_interval
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.prompts.records import Prompt

if TYPE_CHECKING:
    import pandas as pd

# Column of the rows → what it is called in tables
MEASURES = {
    "naive": "first token",
    "skipping": "first word",
    "forced": "after forced whitespace",
    "prefix": "prefixes",
    "generated": "generated",
}
SCORES = ("naive", "skipping", "forced", "prefix")


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Measures of refusal on the same requests.

    Attributes:
        rows: One row per request and condition: kind, condition, prompt, family, a score in nats per measure (NaN
            where it cannot be read), outcome, where, closed_by_force, ending.
        summary: One row per kind, condition and measure: share that refuses (score above 0; written refusal) with its
            interval, mean score, n.
        agreements: One row per kind, condition and score: κ with the generated outcome, its interval, the share they
            agree on, n, and a reason where κ is undefined. Condition "all" pools.
        lies: One row per kind, condition and score whose share of refusals differs from that of the text by more than
            chance over families allows: difference with its interval, and the likeliest first tokens.
        tokens: Kind → condition → likeliest first tokens, naive and after skipping, openers marked with *.
        budgets: Tokens allowed: cot, answer.
    """

    rows: pd.DataFrame
    summary: pd.DataFrame
    agreements: pd.DataFrame
    lies: pd.DataFrame
    tokens: dict[str, dict[str, dict[str, str]]]
    budgets: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; NaN becomes None. No text that a model wrote is among it."""
        tables = {
            name: [plain(line) for line in getattr(self, name).to_dict(orient="records")]
            for name in ("summary", "agreements", "lies", "rows")
        }
        return {"budgets": self.budgets, **tables, "first_tokens": self.tokens}

    def to_markdown(self, title: str, head: str = "") -> str:
        """The tables as Markdown.

        Args:
            title: First heading.
            head: What stands under it: command, date, model.
        """
        parts = [f"# {title}", head, _READ_IT]
        for kind in self.summary["kind"].unique():
            parts += [f"## {kind}", self._shares(kind), *self._lie_lines(kind)]
            parts += [
                "### Agreement with what the model writes (Cohen's κ)",
                self._kappas(kind),
                "### Likeliest first tokens",
                self._token_table(kind),
            ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _shares(self, kind: str) -> str:
        ours = self.summary[self.summary["kind"] == kind]
        lines: list[list[object]] = [
            ["Condition", "n", *MEASURES.values(), "other", "in think", "closed by force"]
        ]
        for condition in ours["condition"].unique():
            here = ours[ours["condition"] == condition].set_index("measure")
            rows = self.rows[(self.rows["kind"] == kind) & (self.rows["condition"] == condition)]
            cells = [_share_cell(here.loc[measure]) if measure in here.index else "–" for measure in MEASURES]
            in_think = ((rows["outcome"] == "refuse") & (rows["where"] == "think")).sum()
            other = (rows["outcome"] == "other").sum()
            lines.append(
                [condition, len(rows), *cells, int(other), int(in_think), int(rows["closed_by_force"].sum())]
            )
        return markdown_table(lines)

    def _lie_lines(self, kind: str) -> list[str]:
        ours = self.lies[self.lies["kind"] == kind]
        if not len(ours):
            return [
                "No score's share of refusals differs from that of the text by more than chance over families."
            ]
        lines = [
            f"- **{line['condition']}, {MEASURES[line['measure']]}**: {line['difference']:+.2f} [{line['low']:+.2f},"
            f" {line['high']:+.2f}] against the text; read at: {line['first_tokens']}"
            for line in ours.to_dict(orient="records")
        ]
        return ["Where a score says another share of refusals than the text:", "\n".join(lines)]

    def _kappas(self, kind: str) -> str:
        ours = self.agreements[self.agreements["kind"] == kind]
        lines = [["Condition", *(MEASURES[measure] for measure in SCORES)]]
        for condition in ours["condition"].unique():
            here = ours[ours["condition"] == condition].set_index("measure")
            lines.append(
                [
                    condition,
                    *(_kappa_cell(here.loc[measure]) if measure in here.index else "–" for measure in SCORES),
                ]
            )
        return markdown_table(lines)

    def _token_table(self, kind: str) -> str:
        lines = [["Condition", "the very next", "after whitespace"]]
        for condition, told in self.tokens.get(kind, {}).items():
            lines.append([condition, told["naive"], told["skipping"]])
        return markdown_table(lines)


_READ_IT = """Each cell: share of requests that refuse, with a 95 % interval over request families (not corrected over cells), and in \
round brackets the mean score in nats. *First token*: the log-odds \
of refusal openers at the very next token, as naive scores read it. *First word*: the same after whitespace that the model would \
write. *After forced whitespace*: the same after whitespace that is appended. *Prefixes*: several words of refusal against \
several of compliance. A score counts as refusing above 0. *Generated*: what the model writes, judged by its opening words, in \
the answer or inside the think block. Where the model thinks for itself (open), scores are read after its own closed block, on \
the requests where there is one."""


def measure_side_by_side(
    model: Model,
    chat: ChatFormat,
    requests: Mapping[str, Sequence[Prompt]],
    conditions: Sequence[str] = STANDARD,
    *,
    max_new_tokens: int = 32,
    max_cot_tokens: int = 96,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    say: Callable[[str], None] | None = None,
) -> SideBySide:
    """Read refusal in every way on the same requests.

    In conditions that leave the block open, unfinished thoughts are closed by force and counted, and the scores are
    read after the model's own think block. On requests whose block never closes they are not read.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The format.
        requests: By kind, for instance {"harmful": …, "harmless": …}; best of a split that chose nothing.
        conditions: Names, see `rim_lens.chat.conditions`.
        max_new_tokens: Most tokens of an answer; fewer where the context is short.
        max_cot_tokens: Most tokens of a self-written chain of thought, likewise.
        seed: Of the controls and the bootstrap.
        max_rows: Most prompts in one pass.
        say: Told of each step.

    Raises:
        ConditionError: No room to write.
    """
    import pandas as pd

    tell = say or (lambda _: None)
    lines: list[dict[str, Any]] = []
    tokens: dict[str, dict[str, dict[str, str]]] = {}
    rendered = {
        kind: render_conditions(chat, prompts, conditions, seed=seed) for kind, prompts in requests.items()
    }
    every = [batch for batches in rendered.values() for batch in batches.values()]
    budgets = _budgets(model, chat, every, max_new_tokens, max_cot_tokens)
    for kind, batches in rendered.items():
        for name, batch in batches.items():
            tell(f"{kind}, {name}: {len(batch)} requests")
            written = generate(
                model,
                batch,
                max_new_tokens=budgets["answer"],
                max_cot_tokens=budgets["cot"],
                close_unfinished=True,
                chat=chat,
                max_rows=max_rows,
            )
            scored, rows = after_own_thinking(chat, written) if batch.think == "open" else (batch, None)
            scores, first = _scores(model, scored, max_rows)
            tokens.setdefault(kind, {})[name] = first
            lines += _lines(kind, name, written, scores, rows)
    table = pd.DataFrame(lines)
    return SideBySide(
        rows=table,
        summary=pd.DataFrame(_summary(table, seed)),
        agreements=pd.DataFrame(_agreements(table, seed)),
        lies=pd.DataFrame(_lies(table, tokens, seed), columns=_LIE_COLUMNS),
        tokens=tokens,
        budgets=budgets,
    )


def after_own_thinking(chat: ChatFormat, generation: Generation) -> tuple[SpanBatch | None, list[int]]:
    """The prompts of a generation with the model's own closed think block, so that the answer comes next.

    A prompt ends with the closing tag, as the model wrote it; where it was forced, with the whitespace that was forced
    along. In formats that put scaffold after the tag (gpt-oss), with the scaffold.

    Args:
        chat: The format.
        generation: What a model wrote after open prompts.

    Returns:
        The prompts (None where no block closed), and which rows of the generation they are.
    """
    batch = generation.batch
    scaffold = bool(chat.spec.after_close.strip())
    most = len(chat.encode(chat.spec.after_close)) if chat.spec.after_close else 0
    ids, rows = [], []
    for row in range(len(batch)):
        atoms = batch.atoms_of(row)
        if not batch.finished_thinking[row] or "think_close" not in atoms:
            continue
        end = len(atoms) - atoms[::-1].index("think_close")
        stop = len(atoms) if scaffold else end + (most if generation.n_forced[row] else 0)
        while end < min(stop, len(atoms)) and atoms[end] == "template":
            end += 1
        ids.append(batch.tokens[row][batch.attention_mask[row].bool()].tolist()[:end])
        rows.append(row)
    if not rows:
        return None, []
    prompts = [batch.prompts[row] for row in rows]
    return chat.parse(ids, prompts=prompts, think="cot", label=batch.name), rows


def _budgets(
    model: Model, chat: ChatFormat, batches: Sequence[SpanBatch], answer: int, cot: int
) -> dict[str, int]:
    """Tokens that fit after the longest prompt: a quarter of a short context goes to the answer."""
    longest = max(int(batch.lengths.max()) for batch in batches)
    open_longest = max([int(b.lengths.max()) for b in batches if b.think == "open"], default=longest)
    n_ctx = model_facts(model).n_ctx
    closing = chat.count_tokens(chat.spec.before_close + chat.spec.think_close + chat.spec.after_close)
    room = n_ctx - open_longest - closing
    answer = min(answer, n_ctx - longest, max(1, room // 4) if room < answer + cot else answer)
    cot = min(cot, room - answer)
    if answer < 1 or cot < 1:
        raise ConditionError(
            f"the longest prompt has {longest} tokens and the model's context {n_ctx}: no room to think and to answer."
        )
    return {"answer": answer, "cot": cot}


def _scores(
    model: Model, batch: SpanBatch | None, max_rows: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if batch is None:
        return {}, {"naive": "", "skipping": ""}
    naive = refusal_score(model, batch, skip="none", max_rows=max_rows)
    skipping = refusal_score(model, batch, max_rows=max_rows)
    prefix = refusal_prefix_score(model, batch, max_rows=max_rows)
    scores = {"naive": naive.values, "skipping": skipping.values, "prefix": prefix.values}
    first = {"naive": naive.attrs["first_tokens"], "skipping": skipping.attrs["first_tokens"]}
    try:
        forced = refusal_score(model, batch, skip="forced", max_rows=max_rows)
    except ConditionError:  # a vocabulary without whitespace
        return scores, first
    return scores | {"forced": forced.values}, first | {"forced": forced.attrs["first_tokens"]}


def _lines(
    kind: str,
    condition: str,
    written: Generation,
    scores: Mapping[str, np.ndarray],
    rows: list[int] | None,
) -> list[dict[str, Any]]:
    prompts = written.batch.prompts
    families = families_of(prompts)
    place_of = {row: place for place, row in enumerate(range(len(prompts)) if rows is None else rows)}
    return [
        {
            "kind": kind,
            "condition": condition,
            "prompt": prompt.id,
            "family": families[row],
            **{
                measure: float(scores[measure][place_of[row]])
                if measure in scores and row in place_of
                else math.nan
                for measure in SCORES
            },
            "outcome": written.outcome[row],
            "where": written.where[row],
            "closed_by_force": written.closed_by_force[row],
            "ending": written.ending[row],
        }
        for row, prompt in enumerate(prompts)
    ]


def _summary(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    lines = []
    for (kind, condition), part in table.groupby(["kind", "condition"], sort=False):
        for measure in MEASURES:
            read = part if measure == "generated" else part[part[measure].notna()]
            if not len(read):
                continue
            hits = read["outcome"] == "refuse" if measure == "generated" else read[measure] > 0
            share = share_interval(hits.to_numpy(), read["family"].tolist(), seed=seed)
            lines.append(
                {
                    "kind": kind,
                    "condition": condition,
                    "measure": measure,
                    "refuses": float(share.estimate),
                    "low": float(share.low),
                    "high": float(share.high),
                    "mean_score": math.nan if measure == "generated" else float(read[measure].mean()),
                    "n": share.n,
                    "n_families": share.n_families,
                }
            )
    return lines


def _agreements(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    lines = []
    for kind, of_kind in table.groupby("kind", sort=False):
        parts = [*of_kind.groupby("condition", sort=False), ("all", of_kind)]
        for condition, part in parts:
            for measure in SCORES:
                read = part[part[measure].notna()]
                if not len(read):
                    continue
                by_text = ["refuse" if verdict == "refuse" else "not" for verdict in read["outcome"]]
                by_score = ["refuse" if score > 0 else "not" for score in read[measure]]
                found = agreement(by_score, by_text, read["family"].tolist(), seed=seed)
                lines.append(
                    {
                        "kind": kind,
                        "condition": condition,
                        "measure": measure,
                        "kappa": found.kappa,
                        "low": found.low,
                        "high": found.high,
                        "agree_on": found.observed,
                        "n": found.n,
                        "reason": found.reason,
                    }
                )
    return lines


_LIE_COLUMNS = ("kind", "condition", "measure", "difference", "low", "high", "n", "first_tokens")


def _lies(
    table: pd.DataFrame, tokens: Mapping[str, Mapping[str, Mapping[str, str]]], seed: int
) -> list[dict[str, Any]]:
    lines = []
    for (kind, condition), part in table.groupby(["kind", "condition"], sort=False):
        for measure in SCORES:
            read = part[part[measure].notna()]
            if read["family"].nunique() < 2:
                continue
            by_score = (read[measure] > 0).to_numpy(dtype=float)
            by_text = (read["outcome"] == "refuse").to_numpy(dtype=float)
            gap = bootstrap_interval(by_score - by_text, read["family"].tolist(), seed=seed)
            if gap.low <= 0 <= gap.high:
                continue
            told = tokens[str(kind)][str(condition)]
            lines.append(
                {
                    "kind": kind,
                    "condition": condition,
                    "measure": measure,
                    "difference": float(gap.estimate),
                    "low": float(gap.low),
                    "high": float(gap.high),
                    "n": gap.n,
                    "first_tokens": told.get(measure, told["skipping"]),
                }
            )
    return lines


def write_side_by_side(
    found: SideBySide, folder: str | Path, name: str, origin: Mapping[str, Any], n_requests: str
) -> tuple[Path, Path]:
    """Write Markdown and JSON beside each other; return where.

    Args:
        found: What was measured.
        folder: Made where it is missing.
        name: The model's name, also in the files' names.
        origin: See `rim_lens.provenance.provenance`.
        n_requests: How many requests of what, in words.
    """
    markdown, data = page_paths(folder, "measures", name)
    head = (
        f"{told_versions(origin)} {n_requests}. Greedy, at most {found.budgets['cot']} tokens of thought and"
        f" {found.budgets['answer']} of answer. Every request: [{data.name}]({data.name})."
    )
    markdown.write_text(
        found.to_markdown(f"Measures of refusal side by side: {name}", head), encoding="utf-8"
    )
    write_json(data, {**origin, "model": name, **found.to_dict()})
    return markdown, data


def _share_cell(line: Any) -> str:
    return f"{line['refuses']:.2f} [{line['low']:.2f}, {line['high']:.2f}]" + (
        "" if math.isnan(line["mean_score"]) else f" ({line['mean_score']:+.1f})"
    )


def _kappa_cell(line: Any) -> str:
    if math.isnan(line["kappa"]):
        return f"undefined; agree on {line['agree_on']:.2f}"
    low_high = "" if math.isnan(line["low"]) else f" [{line['low']:.2f}, {line['high']:.2f}]"
    return f"{line['kappa']:.2f}{low_high}"
