"""What refusal hangs on, as one page: one direction of the stream, and single sentences of a chain of thought."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.conditions import CONTROLS, render_conditions
from rim_lens.chat.sentences import Split, cot_sentences, split_sentences
from rim_lens.lens import Model
from rim_lens.measures.pages import markdown_table, page_paths, plain, told_versions, write_json
from rim_lens.measures.refusal.direction import RefusalDirection, refusal_direction
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.sentences import sentence_effects
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.measures.two_sides import two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

WHOLE = "all"
_SHOWN = 10  # candidates on the page; all are in the JSON

ROWS = ("kind", "condition", "prompt", "family", "part", "n_tokens", "score", "effect", "log_kl")
SENTENCES = (
    *("kind", "condition", "part", "n_tokens", "score", "effect", "low", "high", "refuses", "then", "log_kl"),
    *("n", "n_families"),
)
CONTRASTS = ("compared", "part", "difference", "low", "high", "n", "n_families")


@dataclass(frozen=True, eq=False)
class RefusalCauses:
    """A refusal direction beside its controls, and what refusal owes to each sentence of given chains of thought.

    Attributes:
        direction: See `refusal_direction`.
        rows: One row per request, condition and part of its chain of thought ("1", "2" …, or "all" of it): tokens of the part,
            refusal score as it is (nats), its change when attention to the part is suppressed, and the mean log KL of what
            the parts after it predict (NaN for the last part, and for all).
        sentences: Means of `rows` with an interval over families, and the share that refuses before and then.
        contrasts: The same requests in two conditions, or requests and their twins: difference of the changes.
        example: Sentences of the careful chain to the first harmless request.
    """

    direction: RefusalDirection
    rows: pd.DataFrame
    sentences: pd.DataFrame
    contrasts: pd.DataFrame
    example: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the direction's vector, as plain values for JSON; NaN becomes None."""
        found = self.direction
        tables = {"candidates": found.table, "effects": found.effects, "controls": found.controls}
        facts = found.settings["model"]  # whose name may be a folder of this machine
        tables |= {"sentences": self.sentences, "contrasts": self.contrasts, "rows": self.rows}
        return {
            "layer": found.layer,
            "offset": found.offset,
            "position": found.position,
            "settings": found.settings | {"model": facts | {"name": Path(facts["name"]).name}},
            "example": list(self.example),
            **{name: [plain(line) for line in table.to_dict("records")] for name, table in tables.items()},
        }

    def to_markdown(self, title: str, head: str = "") -> str:
        """The page.

        Args:
            title: First heading.
            head: What stands under it: command, date, model.
        """
        parts = (f"# {title}", head, *self._direction(), *self._sentences())
        return "\n\n".join(part for part in parts if part) + "\n"

    def _direction(self) -> list[str]:
        found, settings = self.direction, self.direction.settings
        tested = found.table[found.table["verdict"] != "not tested"]
        passing = int(tested["verdict"].isin(["passes", "chosen"]).sum())
        chosen = (
            f"Chosen on {settings['n_select'][0]} harmful and {settings['n_select'][1]} harmless requests of `select`: layer"
            f" {found.layer}, row {found.offset} of the prompt (in {found.position}). Of {settings['n_candidates']} candidates (layers"
            f" below {settings['max_layer']:.0%} × rows after the request) the {settings['n_tested']} best separated were tested;"
            f" {passing} lower refusal within a KL of {settings['max_kl']} nats on harmless requests, and the chosen one lowers it"
            " most. The rest is measured on `evaluate`."
        )
        effects: list[list[object]] = [
            ["Edit", "Requests", "n", "score before", "change, nats", "KL", 'larger than, of "within"']
        ]
        for line in found.effects.to_dict("records"):
            place = (
                "–"
                if math.isnan(line["percentile"])
                else f"{line['percentile']:.0f} % of {line['n_controls']}"
            )
            kl = "–" if math.isnan(line["kl"]) else f"{line['kl']:.3f}"
            effects.append(
                [
                    line["edit"],
                    line["requests"],
                    line["n"],
                    f"{line['baseline']:+.1f}",
                    _interval(line, "effect"),
                    kl,
                    place,
                ]
            )
        best = tested.sort_values("effect").head(_SHOWN)
        candidates: list[list[object]] = [
            [
                "Layer",
                "Row",
                "Span",
                "d′",
                "ablated, nats",
                "KL",
                "score of harmless with it added",
                "Verdict",
            ]
        ]
        candidates += [
            [
                line["layer"],
                line["offset"],
                line["position"],
                f"{line['separation']:.1f}",
                f"{line['effect']:+.1f}",
                f"{line['kl']:.3f}",
                f"{line['score_added']:+.1f}",
                line["verdict"],
            ]
            for line in best.to_dict("records")
        ]
        return [
            "## One direction",
            _READ_DIRECTION,
            chosen,
            markdown_table(effects),
            "### What other directions do",
            self._controls(),
            *self._verdicts(),
            f"### The {len(best)} candidates of the {len(tested)} tested that lower refusal most",
            markdown_table(candidates),
        ]

    def _controls(self) -> str:
        lines: list[list[object]] = [
            [
                "Controls",
                "n",
                "ablated, harmful: median [5 %, 95 %]",
                "most lowering",
                "KL: median, largest",
                "added, harmless: median [5 %, 95 %]",
            ]
        ]
        for kind, part in self.direction.controls.groupby("kind", sort=False):
            ablated, added = part["ablate_effect"], part["add_effect"]
            lines.append(
                [
                    kind,
                    len(part),
                    _spread(ablated),
                    f"{ablated.min():+.1f}",
                    f"{part['ablate_kl'].median():.3f}, {part['ablate_kl'].max():.3f}",
                    _spread(added),
                ]
            )
        return markdown_table(lines)

    def _verdicts(self) -> list[str]:
        """What the controls say, counted."""
        effects = self.direction.effects
        own = {(line["edit"], line["requests"]): line["effect"] for line in effects.to_dict("records")}
        bound = self.direction.settings["max_kl"]
        kl = float(effects["kl"].dropna().iloc[0])
        held = "also within" if kl <= bound else "**above**"
        said = [
            f"- On the held-out harmless requests the KL of the ablation is {kl:.3f} nats, {held} the bound of {bound} within which"
            " it was chosen on others."
        ]
        for kind, part in self.direction.controls.groupby("kind", sort=False):
            lower = part[part["ablate_effect"] <= own["ablate", "harmful"]]
            within = int((lower["ablate_kl"] <= bound).sum())
            more = int((part["add_effect"] >= own["add", "harmless"]).sum())
            kept = f" ({within} of them within the bound of KL)" if len(lower) else ""
            said.append(
                f'- Of {len(part)} "{kind}" controls, **{len(lower)}** lower refusal at least as much when ablated{kept},'
                f" and **{more}** raise it at least as much when added. So many controls cannot tell a rank finer than 1 in"
                f" {len(part) + 1}."
            )
        return ["\n".join(said)]

    def _sentences(self) -> list[str]:
        example = "; ".join(f"{place} “{text}”" for place, text in enumerate(self.example, start=1))
        lines = [
            "## Single sentences of a given chain of thought",
            _READ_SENTENCES,
            f"Sentences of a careful chain, for instance: {example}.",
            *self._moves(),
        ]
        for kind in self.sentences["kind"].unique():
            table: list[list[object]] = [
                [
                    "Condition",
                    "Part",
                    "n",
                    "tokens",
                    "score before",
                    "change, nats",
                    "refuses before → then",
                    "log KL of later parts",
                ]
            ]
            for line in self.sentences[self.sentences["kind"] == kind].to_dict("records"):
                table.append(
                    [
                        line["condition"],
                        line["part"],
                        line["n"],
                        f"{line['n_tokens']:.1f}",
                        f"{line['score']:+.1f}",
                        _interval(line, "effect"),
                        f"{line['refuses']:.2f} → {line['then']:.2f}",
                        "–" if math.isnan(line["log_kl"]) else f"{line['log_kl']:.1f}",
                    ]
                )
            lines += [f"### {kind}", markdown_table(table)]
        return [*lines, "### The same part in two conditions, and on twins", self._compared()]

    def _moves(self) -> list[str]:
        """Which sentences of the careful chain move refusal of harmful requests, and whether more than controls do."""
        ours = self.sentences[
            (self.sentences["kind"] == "harmful") & (self.sentences["condition"] == "careful")
        ]
        gaps = self.contrasts.set_index(["compared", "part"])
        said = []
        for line in ours.to_dict("records"):
            part = "The whole chain" if line["part"] == WHOLE else f"Sentence {line['part']}"
            beyond = [
                f"{_interval(gaps.loc[name, line['part']], 'difference')} against the same part of {control}"
                for control in CONTROLS
                if (name := f"harmful: careful − {control}", line["part"]) in gaps.index
            ]
            said.append(
                f"- **{part}**, suppressed: {_interval(line, 'effect')} nats on harmful requests (refuses {line['refuses']:.2f} →"
                f" {line['then']:.2f}); {', '.join(beyond)}."
            )
        return ["\n".join(said)]

    def _compared(self) -> str:
        compared: list[list[object]] = [["Compared", "Part", "n", "difference of the changes, nats"]]
        compared += [
            [line["compared"], line["part"], line["n"], _interval(line, "difference")]
            for line in self.contrasts.to_dict("records")
        ]
        return markdown_table(compared)


_READ_DIRECTION = """The difference of the mean residual stream over harmful and harmless requests, think block empty (Arditi et al., \
arXiv 2406.11717). *Ablate* removes it at every write; *add* adds it once, where it was taken. Changes are of the refusal score \
(log-odds of refusal openers at the first word, nats), with a 95 % interval over request families (not corrected over rows). Two \
kinds of controls have the same length: *random* ones are any directions, and a mild yardstick; *within* ones are differences of \
means between random halves that mix harmful and harmless requests alike, so that they vary as the data do, without regard to harm. \
The direction was the best of those tested and no control was chosen by what it does, which favours the direction, if only on the \
requests that chose. A direction found is not the only one."""

_READ_SENTENCES = """Every row after a part of the chain loses sight of it, in all heads of all layers, the text staying as it is; \
the change of the refusal score at the answer is *suppressed − as it is*, with a 95 % interval over request families (not corrected \
over rows): above zero, the part kept the model from refusing. *all* hides the whole chain. Controls (filler, unrelated) have the \
tokens of the careful chain and are cut at words where its sentences end, so that parts are alike in size and place. *log KL* is how much \
what comes after the part, within the chain, is predicted otherwise (natural logarithm of nats)."""


def refusal_causes(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    limit: int | None = 24,
    n_controls: int = 30,
    max_candidates: int | None = 32,
    max_kl: float = 0.1,
    split: Split = split_sentences,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> RefusalCauses:
    """Find the refusal direction, and suppress each sentence of careful chains of thought and of their controls.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The format.
        harmful: Requests of both splits; `select` chooses the direction, `evaluate` is what is reported. Halves are cut by
            family where there are none, see `two_sides`.
        harmless: Their twins.
        limit: At most so many requests of each kind and split; None for all.
        n_controls: Control directions of each of the two kinds.
        max_candidates: Candidate directions that are tested; None for all.
        max_kl: Bound on the KL on harmless requests, nats.
        split: How a chain of thought is cut into sentences.
        seed: Of controls, halves and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
        say: Told of each step.

    Raises:
        GateNotPassed: The model does not refuse, or refuses both kinds alike.
        NoDirection: No candidate lowers refusal within the bound.
        NotEnoughData: Too few requests or families on a side.
    """
    import pandas as pd

    tell = say or (lambda _: None)
    tell(f"direction: at most {max_candidates or 'all'} candidates, {n_controls} controls of each kind")
    direction = refusal_direction(
        model,
        chat,
        harmful,
        harmless,
        max_kl=max_kl,
        max_candidates=max_candidates,
        n_random=n_controls,
        limit=limit,
        seed=seed,
        max_rows=max_rows,
        progress=progress,
    )
    lines: list[dict[str, Any]] = []
    example: tuple[str, ...] = ()
    _, evaluate = two_sides(harmful, harmless, limit, seed)  # those that the direction was not chosen on
    for kind, asked in (("harmful", evaluate.harmful), ("harmless", evaluate.harmless)):
        batches = render_conditions(chat, asked, ("careful", *CONTROLS), seed=seed)
        sizes = part_sizes(chat, batches["careful"], split)
        example = cot_sentences(chat, batches["careful"].select([0]), split).texts[0]
        for name, batch in batches.items():
            tell(f"sentences, {kind}, {name}: {len(batch)} requests")
            own = split if name == "careful" else None
            lines += _lines(model, chat, kind, batch, own, sizes, max_rows)
    rows = pd.DataFrame(lines, columns=list(ROWS))
    return RefusalCauses(
        direction=direction,
        rows=rows,
        sentences=pd.DataFrame(_summary(rows, seed), columns=list(SENTENCES)),
        contrasts=pd.DataFrame(_contrasts(rows, harmful, seed), columns=list(CONTRASTS)),
        example=example,
    )


def part_sizes(chat: ChatFormat, batch: SpanBatch, split: Split = split_sentences) -> list[list[int]]:
    """Tokens of each sentence of each row's chain of thought."""
    found = cot_sentences(chat, batch, split)
    return [
        [int((found.index[row] == part).sum()) for part in range(len(texts))]
        for row, texts in enumerate(found.texts)
    ]


def cut_like(text: str, chat: ChatFormat, sizes: Sequence[int]) -> list[str]:
    """Cut a text at words into pieces of as nearly as many tokens as given; fewer where it has fewer words.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> cut_like("3 4 > 0 6 > 6", ChatFormat.from_tokenizer(toy_tokenizer()), [2, 5])
    ['3 4 ', '> 0 6 > 6']
    """
    starts = [word.start() for word in re.finditer(r"\S+", text)][1:]
    counts = [chat.count_tokens(text[:start].rstrip()) for start in starts]
    cuts = [0]
    for target in np.cumsum(sizes)[:-1].tolist():
        later = [place for place, start in enumerate(starts) if start > cuts[-1]]
        if not later:
            break
        cuts.append(starts[min(later, key=lambda place: abs(counts[place] - target))])
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _lines(
    model: Model,
    chat: ChatFormat,
    kind: str,
    batch: SpanBatch,
    split: Split | None,
    sizes: list[list[int]],
    max_rows: int,
) -> list[dict[str, Any]]:
    whole = sentence_effects(model, batch, chat=chat, split=lambda text: [text], max_rows=max_rows)
    families = families_of(batch.prompts)
    lines = []
    for row, prompt in enumerate(batch.prompts):
        own = split or partial(cut_like, chat=chat, sizes=sizes[row])
        parts = sentence_effects(model, batch.select([row]), chat=chat, split=own, max_rows=max_rows)
        head: dict[str, Any] = {
            "kind": kind,
            "condition": batch.name,
            "prompt": prompt.id,
            "family": families[row],
        }
        head["score"] = float(whole["refusal_score"][row])
        for part in range(parts.sizes["suppressed"]):
            later = parts["log_kl"].values[0, part]
            later = later[~np.isnan(later)]
            lines.append(
                {
                    **head,
                    "part": str(part + 1),
                    "n_tokens": int(parts["n_tokens"][0, part]),
                    "effect": float(parts["refusal_effect"][0, part]),
                    "log_kl": float(later.mean()) if len(later) else math.nan,
                }
            )
        lines.append(
            {
                **head,
                "part": WHOLE,
                "n_tokens": int(whole["n_tokens"][row, 0]),
                "effect": float(whole["refusal_effect"][row, 0]),
                "log_kl": math.nan,
            }
        )
    return lines


def _summary(rows: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    lines = []
    for (kind, condition), here in rows.groupby(["kind", "condition"], sort=False):
        for part in _parts(here):
            found = here[here["part"] == part]
            lines.append(
                {
                    "kind": kind,
                    "condition": condition,
                    "part": part,
                    "n_tokens": float(found["n_tokens"].mean()),
                    "score": float(found["score"].mean()),
                    **_over_families(found["effect"].to_numpy(), found["family"].tolist(), seed, "effect"),
                    "refuses": float((found["score"] > 0).mean()),
                    "then": float((found["score"] + found["effect"] > 0).mean()),
                    "log_kl": float(found["log_kl"].mean()),
                }
            )
    return lines


def _contrasts(rows: pd.DataFrame, harmful: Sequence[Prompt], seed: int) -> list[dict[str, Any]]:
    """Careful against each control on the same requests; harmful requests against their twins."""
    effect = rows.set_index(["condition", "part", "prompt"])["effect"]
    family = dict(zip(rows["prompt"], rows["family"], strict=True))
    parts = _parts(rows[rows["condition"] == "careful"])
    lines = []

    def compare(told: str, pairs: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
        """Pairs of (condition, request)."""
        for part in parts:
            both = [
                (one, other)
                for one, other in pairs
                if (one[0], part, one[1]) in effect.index and (other[0], part, other[1]) in effect.index
            ]
            if not both:
                continue
            gap = np.array(
                [effect[one[0], part, one[1]] - effect[other[0], part, other[1]] for one, other in both]
            )
            names = [family[one[1]] for one, _ in both]
            lines.append({"compared": told, "part": part, **_over_families(gap, names, seed, "difference")})

    for kind in rows["kind"].unique():
        asked = rows[rows["kind"] == kind]["prompt"].unique()
        for control in CONTROLS:
            compare(f"{kind}: careful − {control}", [(("careful", name), (control, name)) for name in asked])
    for condition in ("careful", *CONTROLS):
        twins = [(prompt.id, str(prompt.twin)) for prompt in harmful]
        compare(
            f"{condition}: harmful − twins", [((condition, one), (condition, other)) for one, other in twins]
        )
    return lines


def _parts(rows: pd.DataFrame) -> list[str]:
    numbered = sorted({part for part in rows["part"] if part != WHOLE}, key=int)
    return [*numbered, WHOLE]


def _over_families(values: np.ndarray, families: list[str], seed: int, name: str) -> dict[str, Any]:
    if len(set(families)) < 2:
        return {name: float(values.mean()), "low": math.nan, "high": math.nan, "n": len(values)} | {
            "n_families": len(set(families))
        }
    found = bootstrap_interval(values, families=families, seed=seed)
    return {
        name: float(found.estimate),
        "low": float(found.low),
        "high": float(found.high),
        "n": found.n,
        "n_families": found.n_families,
    }


def _interval(line: Mapping[Any, Any], name: str) -> str:
    told = f"{line[name]:+.2f}"
    return told if math.isnan(line["low"]) else f"{told} [{line['low']:+.2f}, {line['high']:+.2f}]"


def _spread(values: pd.Series) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def write_causes(
    found: RefusalCauses, folder: str | Path, name: str, origin: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write Markdown and JSON beside each other; return where.

    Args:
        found: What was measured.
        folder: Made where it is missing.
        name: The model's name, also in the files' names.
        origin: See `rim_lens.provenance.provenance`.
    """
    markdown, data = page_paths(folder, "direction", name)
    counts = found.direction.settings["n_evaluate"]
    head = (
        f"{told_versions(origin)} {counts[0]} harmful and {counts[1]} harmless requests of the split evaluate. Every number:"
        f" [{data.name}]({data.name})."
    )
    markdown.write_text(
        found.to_markdown(f"What refusal hangs on: {name}", head),
        encoding="utf-8",
    )
    write_json(data, {**origin, "model": name, **found.to_dict()})
    return markdown, data
