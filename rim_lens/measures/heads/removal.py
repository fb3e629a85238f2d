"""What `removal_effects` found, as tables that are kept and read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rim_lens.measures.effect_tables import EffectTables


@dataclass(frozen=True, eq=False, repr=False)
class RemovalEffects(EffectTables):
    """What removing a set of heads does, beside random sets with as many heads in each layer.

    Attributes:
        table: One row per measure, kind of prompts and think condition; see `removal_effects`.
        sets: One row per random set and row of the table: control (number), heads, measure, kind, condition, change.
        rows: One row per prompt and row of the table: measure, kind, condition, prompt, family, before, after.
        settings: What was asked, what was used as neutral text, digests of prompts and weights.
    """

    file: ClassVar[str] = "removal.json"
