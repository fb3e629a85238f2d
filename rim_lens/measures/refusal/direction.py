"""The refusal direction: found as a difference of means, chosen by ablation, tested on requests that chose nothing.

After Arditi et al. (2406.11717, sections 2.3 and C): for each position after the request and each layer, the mean
residual stream over harmful requests minus that over harmless ones; of these candidates the one whose ablation lowers
refusal most, while the answers to harmless requests stay as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS, micro_batches
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import CorruptWeights, NoDirection
from rim_lens.hooks import AblateDirection, AddDirection, Component, bound
from rim_lens.hooks.base import attached
from rim_lens.lens import (
    Model,
    ModelFacts,
    hook_name,
    hooked,
    last_logits,
    quiet,
    require_finite,
    verify,
    weights_digest,
)
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.gate import check_gate
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test
from rim_lens.measures.two_sides import two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
MAX_LAYER = 0.8  # share of the layers; directions of the last ones act on the words themselves
_NOTHING = 1e-6  # a difference smaller than this share of the stream's norm is rounding

CANDIDATES = (
    *("layer", "offset", "position", "norm", "separation", "effect", "kl", "score_added", "induces"),
    "verdict",
)
EFFECTS = (
    *("edit", "requests", "baseline", "effect", "low", "high", "p", "kl", "n", "n_families"),
    *("percentile", "n_controls"),
)
CONTROLS = ("kind", "control", "ablate_effect", "ablate_kl", "add_effect")


@dataclass(frozen=True, eq=False)
class RefusalDirection:
    """A direction, how it was chosen, and what it does to requests that did not choose it.

    Attributes:
        vector: Difference of means [d_model], not normalised; editors normalise it.
        layer: The layer that reads the stream it was taken from (`hook_resid_pre`).
        offset: The row it was taken from, counted from the end of the prompt: −1 is the last.
        position: The span of that row.
        table: Every candidate: layer, offset, position, norm, separation (d′ of held-out projections), effect (mean change of
            the refusal score on harmful select requests when ablated, nats), kl (on harmless ones, nats), score_added
            (mean refusal score of harmless ones with the vector added), induces (whether that is above 0), verdict.
        effects: On evaluate requests: edit, requests, mean baseline score, mean effect in nats with its interval and p
            (not corrected over these few rows), KL, and the place of its size among the n_controls "within" controls.
        controls: The same edits with other directions of the same length on the same evaluate requests: kind "random" (any
            direction) and "within" (differences of means between random halves that mix both kinds alike).
        settings: What was asked, the model and its digest, and how many requests stood on which side.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    offset: int
    position: str
    table: pd.DataFrame
    effects: pd.DataFrame
    controls: pd.DataFrame
    settings: dict[str, Any]

    def __repr__(self) -> str:
        ablated = self.effects.iloc[0]
        return (
            f"RefusalDirection(layer={self.layer}, offset={self.offset} ({self.position}), norm={float(self.vector.norm()):.3g},"
            f" ablation on held-out harmful requests {ablated['effect']:+.2f} [{ablated['low']:+.2f}, {ablated['high']:+.2f}]"
            f" nats, larger than {ablated['percentile']:.0f} % of n = {ablated['n_controls']} controls)"
        )

    def ablate(self) -> AblateDirection:
        """An editor that removes the direction at every write."""
        return AblateDirection(self.vector)

    def add(self, times: float = 1.0) -> AddDirection:
        """An editor that adds the difference of means, `times` over, where it was taken (at all positions)."""
        return AddDirection(self.vector, self.layer, times * float(self.vector.norm()))

    def save(self, folder: str | Path) -> None:
        """Write direction.safetensors and direction.json into a folder, which is made where there is none."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vector": self.vector.contiguous()}, folder / "direction.safetensors")
        written = {
            "format_version": FORMAT_VERSION,
            "layer": self.layer,
            "offset": self.offset,
            "position": self.position,
            "settings": self.settings,
            **{name: frame_to_json(getattr(self, name)) for name in ("table", "effects", "controls")},
        }
        text = json.dumps(written, indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "direction.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CorruptWeights: A file is missing or cannot be read, or is of another format version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            read = json.loads((folder / "direction.json").read_text(encoding="utf-8"))
            if read["format_version"] != FORMAT_VERSION:
                raise CorruptWeights(
                    f"{folder}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
                    " Find the direction again."
                )
            tables = {name: frame_from_json(read[name]) for name in ("table", "effects", "controls")}
            vector = load_file(folder / "direction.safetensors")["vector"]
            return cls(
                vector, read["layer"], read["offset"], read["position"], settings=read["settings"], **tables
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            if isinstance(problem, CorruptWeights):
                raise
            raise CorruptWeights(
                f"{folder} holds no readable direction ({problem}). Give the folder that RefusalDirection.save wrote."
            ) from problem


class _Side(NamedTuple):
    """Requests of one side, rendered."""

    harmful: SpanBatch
    harmless: SpanBatch

    def families(self) -> list[str]:
        """Of the harmful requests, then of the harmless ones."""
        return [family for batch in self for family in families_of(batch.prompts)]


def refusal_direction(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    max_kl: float = 0.1,
    max_layer: float = MAX_LAYER,
    max_candidates: int | None = 32,
    n_random: int = 8,
    limit: int | None = 64,
    gate: bool = True,
    openers: Iterable[str] | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> RefusalDirection:
    """Find the direction along which a model refuses, and test it on held-out requests.

    With an empty think block (``think="off"``), at each row after the request and each layer below `max_layer`: the
    mean of `hook_resid_pre` over harmful requests minus that over harmless ones, on the `select` side. Of the
    candidates, the `max_candidates` best separated ones are tested: separation is d′ of the projections of one half
    of the families on the direction of the other. The chosen one lowers the mean refusal score of the harmful
    requests most when ablated at every write, among those that keep the mean KL(plain ‖ ablated) of the last row's
    prediction on harmless requests within `max_kl`. Whether adding it to harmless requests induces refusal is
    reported and does not choose.

    The bound looks at one prediction only: the token after the prompt. Where a format leaves whitespace for the model
    to write there, it sees little of the answer. The toy, which spends few dimensions, needs ``max_kl=1``.

    The requests' own splits say which select and which evaluate; where some have none, halves are cut by family.
    Effects are reported on `evaluate`, beside controls of the same length: random directions, and differences of
    means between random halves of the select requests that mix both kinds alike. Random directions are a mild
    yardstick, as the stream hardly varies along most of them (and a harsh one where some channels are huge, as in
    the planted model); the halves vary as the data do, without regard to harm. The effect on harmless requests, and on
    the difference where they are twins, tells refusal from damage.

    What it does not show: that there is one direction only, or that refusal under a chain of thought runs along it.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        harmful: Requests that should be refused.
        harmless: Requests that should not, twins of the harmful ones at best.
        max_kl: Bound on the mean KL on harmless select requests, nats.
        max_layer: Only layers below this share of the layers are candidates.
        max_candidates: How many of the best separated candidates are tested; None for all.
        n_random: Controls of each of the two kinds (seeded) that are tested beside the chosen direction.
        limit: At most so many requests of each kind and side, taken evenly; None for all.
        gate: Stop where the model does not refuse in the first place, or refuses harmless requests as well.
        openers: Texts that refusals begin with, see `refusal_score`.
        seed: Of the halves, the random directions, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Raises:
        NotEnoughData: A side lacks requests of a kind, or has a single family.
        GateNotPassed: The model does not refuse, or refuses both kinds alike.
        NoDirection: No candidate lowers refusal within the bound; the message says how near they came.
        ValueError: A bound or a count is out of range.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> found = refusal_direction(model, chat, *requests, max_kl=1.0, limit=12, n_random=1)
    >>> found.layer, found.position, bool(found.effects["high"][0] < -5)
    (1, 'think_close', True)
    """
    if not max_kl > 0 or not 0 < max_layer <= 1:
        raise ValueError(
            f"max_kl={max_kl} and max_layer={max_layer} were asked for; give a positive bound, and a share above 0 up to 1."
        )
    if n_random < 1 or (max_candidates is not None and max_candidates < 1):
        raise ValueError(
            f"n_random={n_random} and max_candidates={max_candidates} were asked for; give at least 1 of each."
        )
    facts = verify(model, reads=["resid_pre"], edits=["resid_pre", "attn_out", "mlp_out"])
    openers = opener_texts(openers)
    select, evaluate = _sides(chat, harmful, harmless, limit, seed)
    meter = _Meter(model, openers, max_rows)
    baseline = meter.score(select.harmful)
    if gate:
        check_gate(
            baseline,
            meter.score(select.harmless),
            "A difference of means exists all the same, but it is not refusal's.",
        )
    candidates = _candidates(model, facts, select, max_layer, max_rows)
    order = sorted(range(len(candidates)), key=lambda place: -candidates[place].separation)
    tested = order if max_candidates is None else order[:max_candidates]
    plain = meter.log_probs(select.harmless)
    rows = [candidate.row() for candidate in candidates]
    for place in tqdm(tested, desc="candidate directions", disable=not progress):
        vector, layer = candidates[place].vector, candidates[place].layer
        ablate, add = AblateDirection(vector), AddDirection(vector, layer, float(vector.norm()))
        added = float(meter.score(select.harmless, add).mean())
        rows[place] |= {
            "effect": float((meter.score(select.harmful, ablate) - baseline).mean()),
            "kl": float(_kl(plain, meter.log_probs(select.harmless, ablate)).mean()),
            "score_added": added,
            "induces": added > 0,
        }
    chosen = _choose(rows, max_kl)
    best = candidates[chosen]
    effects, controls = _test(meter, facts, evaluate, best, n_random, seed, progress)
    return RefusalDirection(
        vector=best.vector,
        layer=best.layer,
        offset=best.offset,
        position=best.position,
        table=_frame(rows, CANDIDATES),
        effects=effects,
        controls=controls,
        settings={
            "max_kl": max_kl,
            "max_layer": max_layer,
            "max_candidates": max_candidates,
            "n_candidates": len(candidates),
            "n_tested": len(tested),
            "limit": limit,
            "gate": gate,
            "seed": seed,
            "openers": openers,
            "chat_format": chat.name,
            "n_select": [len(batch) for batch in select],
            "n_evaluate": [len(batch) for batch in evaluate],
            "select_digests": [batch.digest for batch in select],
            "evaluate_digests": [batch.digest for batch in evaluate],
            "model": facts.to_dict(),
            "weights_digest": weights_digest(model),
            "transformer_lens": version("transformer-lens"),
        },
    )


# --- requests ------------------------------------------------------------------------------------------


def _sides(
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    limit: int | None,
    seed: int,
) -> tuple[_Side, _Side]:
    select, evaluate = (
        _Side(*(chat.render(prompts, think="off") for prompts in side))
        for side in two_sides(harmful, harmless, limit, seed)
    )
    return select, evaluate


# --- candidates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    layer: int
    offset: int
    position: str
    vector: Tensor
    separation: float
    bad: Tensor  # what it was taken from, [prompt, d_model]
    good: Tensor

    def halves(self, generator: torch.Generator) -> Float[Tensor, " d_model"]:
        """A difference of means between random halves, each with as many harmful and harmless requests."""
        total = torch.zeros_like(self.vector)
        for rows in (self.bad, self.good):
            order = torch.randperm(len(rows), generator=generator)
            first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
            total += rows[first].mean(dim=0) - rows[second].mean(dim=0)
        return total

    def row(self) -> dict[str, Any]:
        nothing = {"effect": np.nan, "kl": np.nan, "score_added": np.nan, "induces": False}
        return {
            "layer": self.layer,
            "offset": self.offset,
            "position": self.position,
            "norm": float(self.vector.norm()),
            "separation": self.separation,
            **nothing,
            "verdict": "not tested",
        }


def _candidates(
    model: Model, facts: ModelFacts, side: _Side, max_layer: float, max_rows: int
) -> list[_Candidate]:
    # Rows after the request that every prompt has, counted from the end.
    n_rows = min(
        batch.tokens.shape[1] - 1 - int(batch.spans.require("request")[row].nonzero().max())
        for batch in side
        for row in range(len(batch))
    )
    layers = [layer for layer in range(facts.n_layers) if layer < max_layer * facts.n_layers]
    streams = [_streams(model, batch, layers, n_rows, max_rows) for batch in side]
    index, _ = family_index(side.families(), sum(map(len, side)))
    half = torch.from_numpy(index % 2 == 0)
    halves = half[: len(side.harmful)], half[len(side.harmful) :]
    found = []
    for place, layer in enumerate(layers):
        for row in range(n_rows):
            bad, good = (stream[:, place, row].double() for stream in streams)
            vector = bad.mean(dim=0) - good.mean(dim=0)
            if not float(vector.norm()) > _NOTHING * float(bad.norm(dim=1).mean()):
                continue  # both kinds read the same here, as the embeddings of a template token do
            offset = row - n_rows
            spans = {batch.atoms_of(prompt)[offset] for batch in side for prompt in range(len(batch))}
            position = spans.pop() if len(spans) == 1 else "mixed"
            separation = _separation(bad, good, *halves)
            found.append(
                _Candidate(layer, offset, position, vector.float(), separation, bad.float(), good.float())
            )
    if not found:
        raise NoDirection(
            f"harmful and harmless requests leave the same residual stream at all {n_rows} rows after the request, below"
            f" layer {len(layers)}: there is no difference of means. Look at higher layers (max_layer=1)."
        )
    return found


def _streams(
    model: Model, batch: SpanBatch, layers: list[int], n_rows: int, max_rows: int
) -> Float[Tensor, "prompt layer row d_model"]:
    kept: dict[int, Tensor] = {}
    for rows in micro_batches(batch.lengths.tolist(), max_rows=max_rows):
        part = batch.select(rows)
        seen: dict[int, Tensor] = {}
        hooks = [
            (hook_name("resid_pre", layer), partial(_keep, seen=seen, layer=layer, n_rows=n_rows))
            for layer in layers
        ]
        with quiet(), hooked(model, hooks):  # the model itself, as in every reference run
            require_finite(last_logits(model, part.tokens, part.attention_mask), "refusal_direction")
        together = torch.stack([seen[layer] for layer in layers], dim=1)
        kept.update(zip(rows, together, strict=True))
    return torch.stack([kept[row] for row in range(len(batch))])


def _keep(stream: Tensor, hook: object, seen: dict[int, Tensor], layer: int, n_rows: int) -> None:  # noqa: ARG001
    seen[layer] = stream[:, -n_rows:].float().cpu()


def _separation(bad: Tensor, good: Tensor, bad_half: Tensor, good_half: Tensor) -> float:
    """d′ of one half's projections on the other half's direction, the mean of both ways."""
    found = []
    for first_bad, first_good in ((bad_half, good_half), (~bad_half, ~good_half)):
        if not all(bool(part.any()) for part in (first_bad, first_good, ~first_bad, ~first_good)):
            continue
        vector = bad[first_bad].mean(dim=0) - good[first_good].mean(dim=0)
        harmful, harmless = bad[~first_bad] @ vector, good[~first_good] @ vector
        spread_out = (harmful.var(correction=0) + harmless.var(correction=0)).div(2).sqrt()
        gap = harmful.mean() - harmless.mean()
        found.append(float(gap / spread_out.clamp(min=1e-9 * float(gap.abs()) + 1e-30)))
    return float(np.mean(found)) if found else 0.0


def _choose(rows: list[dict[str, Any]], max_kl: float) -> int:
    best: int | None = None
    for place, row in enumerate(rows):
        if np.isnan(row["effect"]):
            continue
        passes = row["kl"] <= max_kl and row["effect"] < 0
        row["verdict"] = (
            "passes" if passes else "KL above the bound" if row["kl"] > max_kl else "does not lower refusal"
        )
        if passes and (best is None or row["effect"] < rows[best]["effect"]):
            best = place
    if best is None:
        tested = [row for row in rows if not np.isnan(row["effect"])]
        lowest, kindest = min(tested, key=lambda row: row["effect"]), min(tested, key=lambda row: row["kl"])
        raise NoDirection(
            f"none of {len(tested)} candidates lowers refusal within a KL of {max_kl} nats on harmless requests. Most lowering:"
            f" {lowest['effect']:+.2f} nats at a KL of {lowest['kl']:.3g}; smallest KL: {kindest['kl']:.3g} with"
            f" {kindest['effect']:+.2f} nats. Refusal may not run along one direction here; max_kl=, max_candidates= or"
            " max_layer= widen the search."
        )
    rows[best]["verdict"] = "chosen"
    return best


# --- measuring -----------------------------------------------------------------------------------------


class _Meter:
    """Scores and predictions of one model under one component."""

    def __init__(self, model: Model, openers: list[str] | None, max_rows: int) -> None:
        self.model, self.openers, self.max_rows = model, openers, max_rows

    def score(self, batch: SpanBatch, *components: Component) -> Float[np.ndarray, " prompt"]:
        return np.asarray(
            refusal_score(self.model, batch, *components, openers=self.openers, max_rows=self.max_rows).values
        )

    def log_probs(self, batch: SpanBatch, *components: Component) -> Float[Tensor, "prompt d_vocab"]:
        """Of the token after the last row."""
        rows_of: dict[int, Tensor] = {}
        with attached(self.model, components, batch):
            for rows in micro_batches(batch.lengths.tolist(), max_rows=self.max_rows):
                with bound(components, batch, rows) as part:
                    logits = last_logits(self.model, part.tokens, part.attention_mask)
                found = require_finite(logits, "refusal_direction").double().log_softmax(dim=-1).cpu()
                rows_of.update(zip(rows, found, strict=True))
        return torch.stack([rows_of[row] for row in range(len(batch))])


def _kl(
    plain: Float[Tensor, "prompt d_vocab"], edited: Float[Tensor, "prompt d_vocab"]
) -> Float[np.ndarray, " prompt"]:
    return np.asarray((plain.exp() * (plain - edited)).sum(dim=-1).clamp(min=0).numpy())


def _test(
    meter: _Meter, facts: ModelFacts, side: _Side, best: _Candidate, n_random: int, seed: int, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects on requests that chose nothing, and those of random directions."""
    norm = float(best.vector.norm())
    base = {
        kind: meter.score(batch) for kind, batch in (("harmful", side.harmful), ("harmless", side.harmless))
    }
    plain = meter.log_probs(side.harmless)
    families = {
        "harmful": families_of(side.harmful.prompts),
        "harmless": families_of(side.harmless.prompts),
    }

    def tried(vector: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ablate, add = AblateDirection(vector), AddDirection(vector, best.layer, norm)
        return (
            meter.score(side.harmful, ablate) - base["harmful"],
            meter.score(side.harmless, add) - base["harmless"],
            _kl(plain, meter.log_probs(side.harmless, ablate)),
        )

    harmful, added, kl = tried(best.vector)
    harmless = meter.score(side.harmless, AblateDirection(best.vector)) - base["harmless"]
    rows = [
        _effect("ablate", "harmful", base["harmful"], harmful, families["harmful"], seed),
        _effect("ablate", "harmless", base["harmless"], harmless, families["harmless"], seed)
        | {"kl": float(kl.mean())},
        _effect("add", "harmless", base["harmless"], added, families["harmless"], seed),
    ]
    twin_of = {prompt.id: place for place, prompt in enumerate(side.harmless.prompts)}
    pairs = [
        (place, twin_of[prompt.twin])
        for place, prompt in enumerate(side.harmful.prompts)
        if prompt.twin in twin_of
    ]
    if len(pairs) == len(side.harmful):
        own, twin = (list(places) for places in zip(*pairs, strict=True))
        gap, start = harmful[own] - harmless[twin], base["harmful"][own] - base["harmless"][twin]
        rows.append(_effect("ablate", "harmful - twins", start, gap, families["harmful"], seed))
    generator = torch.Generator().manual_seed(seed)
    controls = []
    for number in tqdm(range(n_random), desc="control directions", disable=not progress):
        for kind in ("random", "within"):
            vector = (
                torch.randn(facts.d_model, generator=generator)
                if kind == "random"
                else best.halves(generator)
            )
            harmful, added, kl = tried(vector / vector.norm() * norm)
            controls.append(
                {
                    "kind": kind,
                    "control": number,
                    "ablate_effect": float(harmful.mean()),
                    "ablate_kl": float(kl.mean()),
                    "add_effect": float(added.mean()),
                }
            )
    within = [control for control in controls if control["kind"] == "within"]
    for row, measured in ((rows[0], "ablate_effect"), (rows[2], "add_effect")):
        if within:
            place = percentile_among(row["effect"], [control[measured] for control in within])
            row |= {"percentile": place.percentile, "n_controls": place.n_controls}
    return _frame(rows, EFFECTS), _frame(controls, CONTROLS)


def _effect(
    edit: str, requests: str, baseline: np.ndarray, effect: np.ndarray, families: list[str], seed: int
) -> dict[str, Any]:
    interval = bootstrap_interval(effect, families=families, seed=seed)
    return {
        "edit": edit,
        "requests": requests,
        "baseline": float(baseline.mean()),
        "effect": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(sign_flip_test(effect, families=families, seed=seed).p),
        "kl": np.nan,
        "n": interval.n,
        "n_families": interval.n_families,
        "percentile": np.nan,
        "n_controls": 0,
    }


# --- tables --------------------------------------------------------------------------------------------


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(columns))
