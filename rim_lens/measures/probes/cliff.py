"""A probe along every position of a chain of thought, and its drop where the block is closed.

Source: "Refusal cliff" (arXiv 2510.06036): the refusal score of a linear probe stays high along the chain of thought and
falls at its last tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.hooks.base import Component
from rim_lens.lens import Model, model_facts
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.probes.ablating import interval_columns
from rim_lens.measures.probes.fitting import Probe
from rim_lens.measures.probes.places import place_present
from rim_lens.measures.probes.reading import stream_at
from rim_lens.measures.refusal.rates import families_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Cliff:
    """A probe's margin along chains of thought.

    Attributes:
        curve: One row per point: share of the chain (0 its first token, 1 its last), margin (mean over requests) with low and
            high (over families), and share_above (of the threshold).
        drop: One row: plateau (mean margin over the chain's tokens), end (margin at the closing place), drop = end − plateau,
            with intervals; p_fall, the share of requests whose margin falls there.
        per_request: One row per request: prompt, family, n_tokens, plateau, end, drop.
        left_out: Ids of requests without a chain of thought or without a closing tag.
        settings: Probe, condition and what was asked.
    """

    curve: pd.DataFrame
    drop: pd.DataFrame
    per_request: pd.DataFrame
    left_out: tuple[str, ...]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        found = self.drop.iloc[0]
        return (
            f"Cliff({self.settings['condition']}, layer {self.settings['layer']}, n = {len(self.per_request)}: plateau"
            f" {found['plateau']:+.2f}, end {found['end']:+.2f}, drop {found['drop']:+.2f}"
            f" [{found['drop_low']:+.2f}, {found['drop_high']:+.2f}])"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the curve."""
        return self.curve.copy()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN becomes None."""
        return {
            **{name: frame_to_json(getattr(self, name)) for name in ("curve", "drop", "per_request")},
            "left_out": list(self.left_out),
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` gave."""
        curve, drop, per_request = (frame_from_json(told[name]) for name in ("curve", "drop", "per_request"))
        return cls(curve, drop, per_request, tuple(told["left_out"]), dict(told["settings"]))


def refusal_cliff(
    model: Model,
    batch: SpanBatch,
    probe: Probe,
    *components: Component,
    n_points: int = 21,
    end: str = "think_close:last",
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> Cliff:
    """Read a probe at every token of chains of thought, on a scale of length from 0 to 1.

    Margins are +1 at the mean of the probe's positive training class and −1 at that of its negative one. Between tokens the
    curve is interpolated, so that chains of unequal length can be averaged. Use it on given chains
    (``chat.render(requests, think=texts)``) and on self-written ones (``rl.generate(...).batch``).

    What it does not show: that refusal follows the margin. A probe from one place may mean something else at another: the
    curve of harmless requests, and the effect of ablating the direction (`rl.probe`), belong beside it. And a
    drop at the closing tag may be a drop at any tag: compare with a filler of the same length.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts with chains of thought. Those without one, or without a closing tag, are left out and named.
        probe: ``rl.probe(...).probe(condition, layer, place)``.
        *components: Editors active meanwhile.
        n_points: Points of the curve.
        end: Place held against the plateau; "prompt_last" is the row of a given chain that produces the answer.
        seed: Of the intervals.
        max_rows: Most prompts in one pass.

    Raises:
        ConditionError: No prompt has a chain of thought that is closed.
        NotEnoughData: The probe's direction is zero.
        StatisticsError: The probe is of another model's width or depth, or fewer than two points were asked for.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> found = rl.probe(model, chat, *requests, places=["think_close"], ablate=0, limit=12)
    >>> careful = chat.render(requests[0][:12], think=chat.cots(requests[0][:12], "careful"), label="careful")
    >>> cliff = rl.refusal_cliff(model, careful, found.probe("off", 1, "think_close"), n_points=5)
    >>> cliff.curve["share"].tolist(), len(cliff.per_request)
    ([0.0, 0.25, 0.5, 0.75, 1.0], 12)
    """
    import pandas as pd

    facts = model_facts(model)
    if n_points < 2:
        raise StatisticsError(f"n_points={n_points} was asked for; a curve needs at least 2.")
    if probe.direction.shape != (facts.d_model,) or probe.layer >= facts.n_layers:
        raise StatisticsError(
            f"the probe reads layer {probe.layer} at a width of {len(probe.direction)}; this model has {facts.n_layers} layers of"
            f" width {facts.d_model}. It was trained on another model."
        )
    probe.margin(0.0)  # refuses a direction that is none, before any pass
    usable = place_present(batch, ["cot", end]).all(dim=1)
    rows = usable.nonzero().flatten().tolist()
    if not rows:
        raise ConditionError(
            f"none of {len(batch)} prompts ({batch.name!r}) has both a chain of thought and a token at {end!r}. Render given"
            " chains (think=texts), or generate with close_unfinished=True."
        )
    part = batch.select(rows)
    shares = [point / (n_points - 1) for point in range(n_points)]
    points = [f"cot@{share:.6f}" for share in shares]
    places = [*points, "cot", end]
    vectors = torch.zeros(facts.n_layers, len(places), facts.d_model)
    vectors[probe.layer] = torch.from_numpy(np.asarray(probe.direction, dtype=np.float32))
    found = stream_at(model, part, places, *components, site=probe.site, vectors=vectors, max_rows=max_rows)  # type: ignore[arg-type]
    margins = probe.margin(found.isel(layer=probe.layer).values)
    families = families_of(part.prompts)
    curve = [
        {"share": share}
        | interval_columns("margin", margins[:, place], families, seed)
        | {"share_above": float((margins[:, place] > 0).mean())}
        for place, share in enumerate(shares)
    ]
    plateau, last = margins[:, n_points], margins[:, n_points + 1]
    drop = {
        **interval_columns("plateau", plateau, families, seed),
        **interval_columns("end", last, families, seed),
        **interval_columns("drop", last - plateau, families, seed),
        "p_fall": float((last < plateau).mean()),
    }
    return Cliff(
        curve=pd.DataFrame(curve),
        drop=pd.DataFrame([drop]),
        per_request=pd.DataFrame(
            {
                "prompt": [prompt.id for prompt in part.prompts],
                "family": families,
                "n_tokens": part.spans["cot"].sum(dim=1).tolist(),
                "plateau": plateau,
                "end": last,
                "drop": last - plateau,
            }
        ),
        left_out=tuple(
            prompt.id for prompt, has in zip(batch.prompts, usable.tolist(), strict=True) if not has
        ),
        settings={
            "condition": batch.name,
            "layer": probe.layer,
            "place": probe.place,
            "trained_in": probe.condition,
            "site": probe.site,
            "n_points": n_points,
            "end": end,
            "components": [repr(component) for component in components],
            "seed": seed,
        },
    )
