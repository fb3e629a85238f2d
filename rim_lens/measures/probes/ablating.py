"""What refusal does without a probe's direction, beside directions that mix both classes alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rim_lens.hooks import AblateDirection
from rim_lens.lens import Model
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.probes.groups import Groups
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.measures.twins import families_by_swap


class Meter:
    """Refusal scores of the closed prompts of one condition, as they are and with directions ablated."""

    def __init__(self, model: Model, groups: Groups, openers: list[str] | None, max_rows: int) -> None:
        self.model, self.groups, self.openers, self.max_rows = model, groups, openers, max_rows
        self.baseline = {kind: self._score(kind) for kind in ("harmful", "harmless")}
        harmful, harmless = (groups.scored[kind].prompts for kind in ("harmful", "harmless"))
        place_of = {prompt.id: place for place, prompt in enumerate(harmless)}
        self.own = [place for place, prompt in enumerate(harmful) if prompt.twin in place_of]
        asked = [harmful[place] for place in self.own]
        self.twins = [place_of[str(prompt.twin)] for prompt in asked]
        self.families_of_pairs = families_by_swap(asked, [harmless[place] for place in self.twins])

    def _score(self, kind: str, *components: AblateDirection) -> np.ndarray:
        batch = self.groups.scored[kind]
        found = refusal_score(self.model, batch, *components, openers=self.openers, max_rows=self.max_rows)
        return np.asarray(found.values)

    def effect(self, direction: np.ndarray, kind: str) -> np.ndarray:
        """Edited − baseline, nats, per prompt."""
        editor = AblateDirection(torch.from_numpy(np.asarray(direction, dtype=np.float32)))
        return self._score(kind, editor) - self.baseline[kind]

    def ablated(
        self, direction: np.ndarray, samples: Sequence[np.ndarray], n_controls: int, seed: int
    ) -> dict[str, Any]:
        """The columns of the table that say what ablating a direction does."""
        harmful, twins = self.effect(direction, "harmful"), self.effect(direction, "harmless")
        families = {kind: families_of(self.groups.scored[kind].prompts) for kind in ("harmful", "harmless")}
        told = {"baseline": float(self.baseline["harmful"].mean())}
        told |= interval_columns("effect", harmful, families["harmful"], seed)
        told |= interval_columns("effect_twins", twins, families["harmless"], seed)
        if self.own:
            beyond = harmful[self.own] - twins[self.twins]
            told |= interval_columns("specificity", beyond, self.families_of_pairs, seed)
        rng = np.random.default_rng(seed)
        controls = [float(self.effect(_halves(samples, rng), "harmful").mean()) for _ in range(n_controls)]
        if controls:
            place = percentile_among(float(harmful.mean()), controls)
            told |= {"percentile": place.percentile, "n_controls": place.n_controls}
        return told


def _halves(samples: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A difference of means between random halves, each with as many samples of both classes."""
    total = np.zeros(samples[0].shape[1])
    for side in samples:
        held = side[np.isfinite(side[:, 0])].astype(np.float64)
        order = rng.permutation(len(held))
        half = len(held) // 2
        total += held[order[half:]].mean(axis=0) - (held[order[:half]].mean(axis=0) if half else 0)
    return total


def interval_columns(name: str, values: np.ndarray, families: Sequence[str], seed: int) -> dict[str, float]:
    """Mean of values with its bootstrap interval over families, as columns; NaN ends with fewer than two."""
    if len(set(families)) < 2:
        nothing = float("nan")
        return {name: float(values.mean()), f"{name}_low": nothing, f"{name}_high": nothing}
    found = bootstrap_interval(values, list(families), seed=seed)
    return {name: float(found.estimate), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}
