"""Figure 5 of arXiv 2509.00544: where groups of prompts lie on probes once heads are removed, beside random heads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.chat.conditions import Conditions
from rim_lens.folder import write_whole
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.heads import some_heads
from rim_lens.lens import Head, Model, verify, weights_digest
from rim_lens.measures.controls import control_p, percentile_among, random_heads_per_layer
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.probes.ablating import interval_columns
from rim_lens.measures.probes.fitting import Probes, common_places, fit_probes
from rim_lens.measures.probes.groups import Contrast, Groups, check_contrast, grouped
from rim_lens.measures.probes.places import SIX, check_places
from rim_lens.measures.probes.reading import Stream, stream_at
from rim_lens.measures.probes.result import (
    FORMAT_VERSION,
    check_version,
    load_probes,
    reading,
    save_probes,
)
from rim_lens.measures.two_sides import two_sides
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("condition", "group", "layer", "place", "n", "before", "after", "change", "change_low", "change_high"),
    *("random", "random_low", "random_high", "percentile", "p_controls", "n_controls", "state"),
)


@dataclass(frozen=True, eq=False)
class ProbesAfterAblation:
    """Shares above the threshold with heads removed.

    Attributes:
        table: One row per condition, group, layer and place; see `probe_after_ablation`.
        controls: One row per random set as well: control, heads, condition, group, layer, place, after.
        probes: Per condition, the probes, trained on the model as it is.
        reasons: Condition → why no probe was trained there.
        settings: What was asked, the model and its digest.
    """

    table: pd.DataFrame
    controls: pd.DataFrame
    probes: dict[str, Probes]
    reasons: dict[str, str]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return (
            f"ProbesAfterAblation({len(self.settings['heads'])} heads against {self.settings['n_controls']} random sets,"
            f" {len(self.table)} rows{''.join(f'; {name}: {why}' for name, why in self.reasons.items())})"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def save(self, folder: str | Path) -> None:
        """Write probes.safetensors and after_ablation.json into a folder, which is made where there is none."""
        folder = Path(folder)
        written = {
            "format_version": FORMAT_VERSION,
            "probes": save_probes(self.probes, folder),
            "reasons": self.reasons,
            "settings": self.settings,
            "table": frame_to_json(self.table),
            "controls": frame_to_json(self.controls),
        }
        text = json.dumps(written, indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / "after_ablation.json", text)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CorruptWeights: A file is missing or cannot be read, or is of another format version.
        """
        folder = Path(folder)
        with reading(folder, "ProbesAfterAblation"):
            read = json.loads((folder / "after_ablation.json").read_text(encoding="utf-8"))
            check_version(folder, read)
            return cls(
                frame_from_json(read["table"]),
                frame_from_json(read["controls"]),
                load_probes(read["probes"], folder),
                read["reasons"],
                read["settings"],
            )


def probe_after_ablation(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    heads: Iterable[Head],
    *,
    contrast: Contrast = "harmful",
    groups: Contrast | None = None,
    think: Conditions = ("off",),
    places: Sequence[str] = SIX,
    site: Stream = "resid_post",
    n_sets: int = 20,
    limit: int | None = 64,
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> ProbesAfterAblation:
    """Where do groups of prompts lie on probes, once these heads are removed, and once as many random ones are?

    The probes (`fit_probes`) are trained on `select` requests on the model as it is. Then, for each group of `evaluate`
    requests, the share with y·d > τ is read: as it is, with the heads' outputs zeroed at every position, and with random
    sets of as many heads in the same layers. The paper reads so that targeted heads lower the share of fulfilled
    requests that still look refused between the tags (about .6, random heads about .72).

    Groups are formed on the model as it is, and chains of thought that it wrote stay as they are while heads are removed.

    What it does not show: what the model then answers. A head may move the stream across a threshold that nothing reads;
    hold it against refusal scores and generated outcomes without the heads. The percentile is only as fine as the
    number of random sets.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        harmful: Requests; their own splits count, halves are cut by family where there are none.
        harmless: Requests that should be answered.
        heads: (layer, head) pairs to remove together; they should come from other requests than `evaluate`.
        contrast: What the probes are trained on: "harmful" (against harmless) or "refusal" (against fulfilment).
        groups: What the groups are; as `contrast` when None.
        think: Conditions.
        places: See `rim_lens.measures.probes.places.place_rows`.
        site: Hook point, see `rl.probe`.
        n_sets: Random sets at most; all of them where fewer exist.
        limit: At most so many requests of each kind and side; None for all.
        max_new_tokens: Of responses.
        max_cot_tokens: Of self-written chains of thought.
        seed: Of halves, random sets and intervals.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        A `ProbesAfterAblation` whose table has, per condition, group, layer and place: n, before and after (shares), change with
        its interval over families, random (mean share after random sets, with the 2.5 and 97.5 % quantiles of sets),
        percentile of the size of the change among those of the random sets, p_controls (its rank, never finer than they
        allow), n_controls, and state ("measured", or why not).

    Raises:
        UnknownHead: No head was named, or the model lacks one.
        NotEnoughData: A side lacks requests of a kind; or no other set of heads is possible.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> found = rl.probe_after_ablation(
    ...     model, chat, *requests, heads=[(0, 1)], places=["think_close"], limit=8, n_sets=3
    ... )
    >>> found.table[["group", "layer", "before", "n_controls"]].values.tolist()[0]
    ['harmful', 0, 1.0, 3]
    """
    import pandas as pd

    trained_on, read = check_contrast(contrast), check_contrast(groups or contrast)
    check_places(places)
    facts = verify(model, reads=[site], edits=["z"])
    chosen = sorted(facts.check_heads(some_heads(heads)))
    sets = random_heads_per_layer(chosen, facts.n_heads, n_sets, seed)
    sides = two_sides(harmful, harmless, limit, seed)
    select, evaluate = (
        grouped(
            model,
            chat,
            side,
            think,
            responses="refusal" in (contrast, groups),
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_cot_tokens=max_cot_tokens,
            max_rows=max_rows,
        )
        for side in sides
    )
    rows: list[dict[str, Any]] = []
    controls: list[dict[str, Any]] = []
    probes: dict[str, Probes] = {}
    reasons: dict[str, str] = {}
    for name in select:
        why = select[name].lacking(trained_on)
        if why:
            reasons[name] = why
            rows += [
                _blank(name, group, layer, place) | {"state": why}
                for group in read
                for layer in range(facts.n_layers)
                for place in places
            ]
            continue
        train = [
            stream_at(model, select[name].batches[group], places, site=site, max_rows=max_rows)
            for group in trained_on
        ]
        kept = common_places(train[0], train[1], places)
        probes[name] = fit_probes(train[0], train[1], kept, site=site, condition=name)
        for group in read:
            above = _Above(model, probes[name], evaluate[name], group, max_rows)
            found, drawn = _rows(above, chosen, sets, seed, progress)
            rows += found
            controls += drawn
    return ProbesAfterAblation(
        table=pd.DataFrame(rows, columns=list(COLUMNS)),
        controls=pd.DataFrame(
            controls, columns=["control", "heads", "condition", "group", "layer", "place", "after"]
        ),
        probes=probes,
        reasons=reasons,
        settings={
            "heads": [list(head) for head in chosen],
            "contrast": contrast,
            "groups": groups or contrast,
            "think": [think] if isinstance(think, str) else list(think),
            "places": list(places),
            "site": site,
            "n_controls": len(sets),
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "max_cot_tokens": max_cot_tokens,
            "seed": seed,
            "chat_format": chat.name,
            "outcomes": {name: side.outcomes for name, side in evaluate.items() if side.outcomes},
            "model": facts.to_dict(),
            "weights_digest": weights_digest(model),
            "transformer_lens": version("transformer-lens"),
        },
    )


class _Above:
    """Which prompts of a group are above the thresholds, with some heads removed."""

    def __init__(self, model: Model, probes: Probes, groups: Groups, group: str, max_rows: int) -> None:
        self.model, self.probes, self.group, self.max_rows = model, probes, group, max_rows
        self.batch = groups.batches[group]
        self.families = groups.families(group)
        self.vectors = torch.from_numpy(probes.direction).float()

    def __call__(self, heads: Sequence[Head]) -> np.ndarray:
        """[prompt, layer, place]: 1 above, 0 not, NaN where the prompt lacks the place."""
        editors = [AblateHeads(heads)] if heads else []
        scores = (
            stream_at(
                self.model,
                self.batch,
                self.probes.places,
                *editors,
                site=self.probes.site,  # type: ignore[arg-type]
                vectors=self.vectors,
                max_rows=self.max_rows,
            )
            .reindex(place=list(self.probes.places))
            .values
        )
        return np.where(np.isfinite(scores), scores > self.probes.threshold, np.nan)


def _rows(
    above: _Above, heads: Sequence[Head], sets: Sequence[Sequence[Head]], seed: int, progress: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    condition, places = above.probes.condition, above.probes.places
    shape = above.probes.threshold.shape
    cells = [(layer, column) for layer in range(shape[0]) for column in range(shape[1])]
    if not len(above.batch):
        why = f"group empty: 0 {above.group}"
        return [
            _blank(condition, above.group, layer, places[column]) | {"state": why} for layer, column in cells
        ], []
    before, after = above([]), above(heads)
    random = [
        above(control)
        for control in tqdm(sets, desc=f"random sets, {condition}, {above.group}", disable=not progress)
    ]
    rows, controls = [], []
    for layer, column in cells:
        here = (slice(None), layer, column)
        has = np.isfinite(before[here])
        row = _blank(condition, above.group, layer, places[column])
        if not has.any():
            rows.append(row | {"state": "no token there"})
            continue
        if not above.probes.direction[here[1:]].any():
            rows.append(row | {"state": "both classes read the same"})  # nothing is above or below then
            continue
        start = before[here][has]
        families = [family for family, there in zip(above.families, has, strict=True) if there]
        shares = [float(control[here][has].mean()) for control in random]
        changes = [share - float(start.mean()) for share in shares]
        row |= {"n": len(start), "before": float(start.mean()), "after": float(after[here][has].mean())}
        row |= interval_columns("change", after[here][has] - start, families, seed)
        place = percentile_among(row["change"], changes)
        low, high = np.quantile(shares, [0.025, 0.975])
        rows.append(
            row
            | {
                "random": float(np.mean(shares)),
                "random_low": float(low),
                "random_high": float(high),
                "percentile": place.percentile,
                "p_controls": control_p(row["change"], changes),
                "n_controls": place.n_controls,
                "state": "measured",
            }
        )
        controls += [
            {
                "control": number,
                "heads": " ".join(f"{layer_}.{head}" for layer_, head in sets[number]),
                **{"condition": condition, "group": above.group, "layer": layer, "place": places[column]},
                "after": share,
            }
            for number, share in enumerate(shares)
        ]
    return rows, controls


def _blank(condition: str, group: str, layer: int, place: str) -> dict[str, Any]:
    return {
        **dict.fromkeys(COLUMNS, float("nan")),
        **{"condition": condition, "group": group, "layer": layer, "place": place, "n": 0, "n_controls": 0},
    }
