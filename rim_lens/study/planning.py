"""What a study will cost, counted before any compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rim_lens.batching import MAX_TOKENS
from rim_lens.chat.conditions import is_control, leaves_open
from rim_lens.lens import Model, model_facts
from rim_lens.measures.heads.contrasts import CHAIN, PAPER
from rim_lens.measures.heads.refusing import too_few_families
from rim_lens.measures.heads.table import HeadRule
from rim_lens.measures.probes.groups import CONTRASTS
from rim_lens.measures.twins import families_by_swap
from rim_lens.study import removing
from rim_lens.study.probing import n_sets, probed_conditions, with_thoughts
from rim_lens.study.removing import WRITTEN_SETS
from rim_lens.study.stages import ROWS_SHOWN, Bench
from rim_lens.study.statistics import FILE as STATISTICS
from rim_lens.study.statistics import MOST_PAIRED

if TYPE_CHECKING:
    import pandas as pd

MLP_WIDTHS = 8
MEAN_COT = 40  # tokens a given CoT adds, about; only for the estimate
HOOK_SECONDS = 4e-4  # overhead of one hooked layer in one pass, about


@dataclass(frozen=True)
class Step:
    """One stage of a study.

    Attributes:
        stage: Its name.
        what: What it measures, in words.
        rows: Prompts read or written, all conditions and edits together.
        passes: Forward passes (batches).
        tokens: Tokens in those.
        files: What it writes.
        at_most: Whether the numbers are an upper bound, because the stage may end early.
    """

    stage: str
    what: str
    rows: int
    passes: int
    tokens: int
    files: str
    at_most: bool = False


@dataclass(frozen=True)
class Counted:
    """Makes steps of rows: prompts of one length, so many at most in a pass, and so many new tokens where answers are written."""

    max_rows: int
    length: int
    new: int

    def reading(
        self, stage: str, what: str, rows: int, sets: int, files: str, extra: int = 0, at_most: bool = False
    ) -> Step:
        """Rows read once for each of the sets (conditions, edits); `extra` tokens longer."""
        tokens = rows * sets * (self.length + extra)
        return Step(stage, what, rows * sets, self._batches(rows) * sets, tokens, files, at_most)

    def writing(self, stage: str, what: str, rows: int, sets: int, files: str) -> Step:
        """Answers to rows written once for each of the sets."""
        tokens = rows * sets * (self.length + self.new)
        return Step(stage, what, rows * sets, self._batches(rows) * sets * self.new, tokens, files, True)

    def _batches(self, rows: int) -> int:
        return -(-rows // self.max_rows)


@dataclass(frozen=True)
class Plan:
    """The cost of a study, stage by stage.

    Attributes:
        steps: The stages, in order.
        seconds: Estimated time of all on this machine: floating-point work at the speed of a matrix product
            just timed, and hook overhead. It says whether to wait or to come back, and no more.
        memory: Bytes on the model's device, about: its weights, what the largest pass holds, and the cache of a generation.
        facts: The model's.
        notes: What the study will not be able to tell, and why.
    """

    steps: tuple[Step, ...]
    seconds: float
    memory: float
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per stage."""
        import pandas as pd

        return pd.DataFrame([vars(step) for step in self.steps])

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "seconds": self.seconds,
            "memory": self.memory,
            "steps": [vars(step) for step in self.steps],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = f"{'stage':<10} {'rows':>7} {'passes':>8} {'tokens':>10}  what"
        lines = [
            f"{step.stage:<10} {step.rows:>7} {('≤ ' if step.at_most else '') + str(step.passes):>8} {step.tokens:>10}  "
            f"{step.what} → {step.files}"
            for step in self.steps
        ]
        return "\n".join(
            [
                head,
                *lines,
                f"about {_duration(self.seconds)} in all, and {self.memory / 1e9:.1f} GB",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def make_plan(bench: Bench, n_tuned: int, parts: Sequence[str], of_neurons: Sequence[Step]) -> Plan:
    """Count rows, forward passes and tokens of every stage, and estimate the time. Runs no model.

    Args:
        bench: What is worked on.
        n_tuned: Number of tuned models.
        parts: What is measured, see `Study`.
        of_neurons: The steps of its study of neurons, where that is a part.
    """
    facts, settings = model_facts(bench.model), bench.settings
    n_select, n_evaluate = len(bench.select.harmful), len(bench.evaluate.harmful)
    off = bench.render(bench.evaluate.harmful[:8], "off")
    length = round(float(off.lengths.float().mean()))
    cot = 7 if bench.chat.name == "toy" else MEAN_COT
    new = settings.max_new_tokens

    counted = Counted(settings.max_rows, length, new)
    reading, writing = counted.reading, counted.writing
    conditions = settings.conditions
    n_heads, top = facts.n_layers * facts.n_heads, settings.max_heads
    trials = 1 + n_heads + (top - 1) * 16 + 2 * top
    tested = min(n_heads, settings.n_test + top)
    layers = min(tested, facts.n_layers)
    compared = {
        name
        for move in (PAPER, CHAIN)
        if {move.first, move.second} <= set(conditions)
        for name in (move.first, move.second)
    }
    steps = [
        writing("gate", "does it refuse harmful requests, and only these?", n_select, 2, "gate.json"),
        reading(
            "attention",
            "mass of each head on each span",
            n_evaluate,
            2 * len(conditions),
            "attention/*/capture.nc",
            cot,
        ),
        reading(
            "scores",
            "refusal log-odds, closed conditions",
            n_evaluate,
            2 * len(bench.closed),
            "scores/*.json",
            cot,
        ),
        writing(
            "outcomes", "what it writes, all conditions", n_evaluate, 2 * len(conditions), "outcomes/*.json"
        ),
        reading("heads", "ablation on the select side", n_select, trials, "heads/select.jsonl", at_most=True),
        reading(
            "heads",
            "where heads look, select side",
            n_select,
            1 + len(compared),
            "attention/select_*/capture.nc",
            cot,
        ),
        reading(
            "heads",
            "test on the evaluate side, random sets per layer",
            n_evaluate,
            2 + layers * facts.n_heads + tested + 2 + settings.n_random_sets,
            "heads/evaluate.jsonl, heads/heads.json",
            at_most=True,
        ),
        writing("heads", "what it writes without them, thinking off", n_evaluate, 2, "outcomes/*.json"),
        reading(
            "heads", "their attention, key by key", ROWS_SHOWN, len(conditions), "heads/rows.json", cot, True
        ),
    ]
    if "statistics" in parts:
        pairs = MOST_PAIRED * (MOST_PAIRED + 1) // 2
        steps += [
            reading("statistics", "direct effects, attention within chains", n_evaluate, 3, STATISTICS, cot),
            reading("statistics", "gradients, and back", n_select, 3, STATISTICS, at_most=True),
            reading(
                "statistics",
                "pairs of heads removed",
                n_evaluate,
                1 + pairs,
                "statistics/pairs.jsonl",
                at_most=True,
            ),
        ]
    if "removing" in parts:
        steps += _removal_steps(bench, reading, writing, cot)
    if "comparing" in parts:
        steps += [
            reading(
                "comparing",
                "ablation on the select side",
                n_select,
                trials * n_tuned,
                "tuned/*",
                at_most=True,
            ),
            reading(
                "comparing",
                "where heads look, both sides",
                max(n_select, n_evaluate),
                (1 + len(compared) + 2 * len(conditions)) * n_tuned,
                "tuned/*/attention",
                cot,
            ),
            reading(
                "comparing",
                "test on the evaluate side, the base's heads among them",
                n_evaluate,
                (2 + n_heads + min(n_heads, 2 * tested) + 2 + settings.n_random_sets) * n_tuned,
                "tuned/*/heads",
                at_most=True,
            ),
        ]
    if "probes" in parts:
        steps += _probe_steps(bench, reading, writing, cot)
    if n_tuned and "neurons" in parts:
        steps.append(
            writing("neurons", "refusal of the tuned models", n_evaluate, 2 * n_tuned, "outcomes/*.json")
        )
    steps += [replace(step, stage="neurons", files="neurons/*") for step in of_neurons]
    memory = memory_of(bench.model, max_rows=settings.max_rows, length=length + max(cot, new))
    if n_tuned:  # each stands beside the base
        memory += sum(one.numel() * one.element_size() for one in bench.model.parameters())
    return estimated(bench.model, steps, memory, _notes(bench))


def estimated(model: Model, steps: Sequence[Step], memory: float, notes: tuple[str, ...] = ()) -> Plan:
    """A plan of these steps, with the time they take on this machine, about."""
    facts = model_facts(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 2.0 * parameters * sum(step.tokens for step in steps)
    overhead = sum(step.passes for step in steps) * facts.n_layers * HOOK_SECONDS * 4
    seconds = flops / _flops_per_second(facts.device, facts.dtype) + overhead
    return Plan(tuple(steps), seconds, memory, facts.to_dict(), notes)


def memory_of(model: Model, *, max_rows: int, length: int) -> float:
    """Bytes that reading and writing prompts of a length take, about.

    Weights; eight times the width of the MLP for each token of the largest pass (measured on Qwen3-4B's layers, see
    docs/qwen3-4b.md); attention of one layer, in the weights' dtype and in float32; and the key-value cache.
    """
    facts = model_facts(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = torch.finfo(facts.dtype).bits // 8
    return weights + memory_beside(facts, size, max_rows=max_rows, length=length)


def memory_beside(facts: Any, size: int, *, max_rows: int, length: int) -> float:
    """The same without weights, of any that has a model's numbers of layers, heads and widths; `size` bytes a number."""
    rows = max(1, min(max_rows, MAX_TOKENS // length))
    tokens = rows * length
    pattern = tokens * length * facts.n_heads * (size + 4)
    cache = tokens * facts.n_layers * 2 * facts.n_key_value_heads * facts.d_head * size
    return float(MLP_WIDTHS * tokens * facts.d_mlp * size + pattern + cache)


def _notes(bench: Bench) -> tuple[str, ...]:
    families = families_by_swap(bench.evaluate.harmful, bench.evaluate.twins)
    few = too_few_families(families, HeadRule().alpha)
    return (f"no head can get a verdict: {few}. Everything else is measured.",) if few else ()


def _removal_steps(
    bench: Bench, reading: Callable[..., Step], writing: Callable[..., Step], cot: int
) -> list[Step]:
    """Scores beside all random sets, what is written beside a few; then the same three edits under chains of thought."""
    n_evaluate, n_reasoning = len(bench.evaluate.harmful), len(bench.evaluate.reasoning)
    few, many = 2 + WRITTEN_SETS, 2 + removing.n_sets(bench)
    asked = [name for name in bench.settings.conditions if not is_control(name)]
    answered = sum(not leaves_open(name) for name in asked)
    n_restored = len(removing.restored_in(bench))
    edited = 2 + 3 * (1 + removing.n_sets(bench))
    return [
        writing(
            "removing",
            "what it writes without them",
            n_evaluate,
            2 * few * len(bench.settings.conditions),
            "removal/*",
        ),
        writing("removing", "questions answered without them", n_reasoning, few * len(asked), "removal/*"),
        reading(
            "removing",
            "refusal scores without them",
            n_evaluate,
            2 * many * len(bench.closed),
            "removal/*",
            cot,
            True,
        ),
        reading(
            "removing",
            "answers and neutral text without them",
            max(n_reasoning, n_evaluate),
            many * (answered + 2),
            "removal/*",
            cot,
            True,
        ),
        reading(
            "removing",
            "block, move, patch under chains of thought: scores",
            n_evaluate,
            2 * (edited + 1) * n_restored,
            "restoring/*",
            cot,
            True,
        ),
        writing(
            "removing",
            "block, move, patch under chains of thought: replies",
            n_evaluate,
            2 * (2 + 3 * (1 + WRITTEN_SETS)) * n_restored,
            "restoring/*",
        ),
    ]


def _probe_steps(
    bench: Bench, reading: Callable[..., Step], writing: Callable[..., Step], cot: int
) -> list[Step]:
    """Probes are read on both sides and kinds, and refusal with each ablated direction on the evaluate side."""
    settings = bench.settings
    larger = max(len(bench.select.harmful), len(bench.evaluate.harmful))
    probed = [(contrast, name) for contrast in CONTRASTS for name in probed_conditions(bench, contrast)]
    ablated = 2 + settings.n_probed * (2 + settings.n_probe_controls)
    # An open chain of thought is written first, for every kind and side; refusals for the harmful ones.
    generated = sum(4 if leaves_open(name) else 2 * (contrast == "refusal") for contrast, name in probed)
    return [
        writing("probes", "chains of thought and refusals that probes are sorted by", larger, generated, "–"),
        reading(
            "probes",
            "probes by layer and place, and refusal without their directions",
            larger,
            len(probed) * (4 + ablated),
            "probes/*/*",
            cot,
            True,
        ),
        reading(
            "probes",
            "probes with the found heads and with random sets removed",
            larger,
            2 + 2 * (2 + n_sets(bench)),
            "probes/without_heads",
            at_most=True,
        ),
        reading(
            "probes",
            "a probe along chains of thought",
            larger,
            2 * len(with_thoughts(bench)),
            "probes/cliff.json",
            cot,
            True,
        ),
    ]


def _flops_per_second(device: torch.device, dtype: torch.dtype, size: int = 512) -> float:
    """The fastest of a few matrix products: others that share the machine only ever make one slower."""
    generator = torch.Generator().manual_seed(0)
    product = matrix = torch.randn(size, size, generator=generator).to(device=device, dtype=dtype)
    spent = []
    for _ in range(6):
        start = time.perf_counter()
        product = (product @ matrix).clamp(-1, 1)
        float(product.sum())  # waits for an accelerator
        spent.append(time.perf_counter() - start)
    return 2 * size**3 / min(spent)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
