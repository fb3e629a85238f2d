"""What removing the found heads does, whether editing them restores refusal, and which heads a tuned model rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rim_lens.chat.conditions import controls_of, is_control, leaves_open
from rim_lens.lens import Model
from rim_lens.measures.frames import frame_to_json
from rim_lens.measures.heads.refusing import refusal_heads
from rim_lens.measures.heads.removing import removal_effects
from rim_lens.measures.heads.restoring import restoring
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.study.stages import Bench, both_sides, comparable, search_of, written

MOST_SETS = 20  # random sets beside the found one
WRITTEN_SETS = 2  # of these, whose answers are written as well


def run_removing(bench: Bench, found: RefusalHeads) -> None:
    """Remove the found heads, and edit them under chains of thought, on the evaluate side; nothing without `comparable` ones."""
    removable = comparable(found)
    settings = bench.settings
    given: dict[str, Any] = {
        "n_random_sets": n_sets(bench),
        "n_written": WRITTEN_SETS,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "max_rows": settings.max_rows,
        "progress": settings.progress,
    }
    asked = (list(bench.evaluate.harmful), list(bench.evaluate.twins))
    if removable and not bench.folder.has("removal/removal.json"):
        removal_effects(
            bench.model,
            bench.chat,
            found,
            *asked,
            list(bench.evaluate.reasoning),
            conditions=settings.conditions,
            folder=bench.folder.path,
            **given,
        ).save(bench.folder.path / "removal")

    def restored() -> dict[str, Any]:
        return {
            condition: frame_to_json(
                restoring(
                    bench.model,
                    bench.chat,
                    found,
                    *asked,
                    condition=condition,
                    folder=bench.folder.path / "restoring" / written(condition),
                    **given,
                )
            )
            for condition in (restored_in(bench) if removable else ())
        }

    bench.folder.once("restoring/tables.json", restored)


def restored_in(bench: Bench) -> list[str]:
    """Given chains of thought under which refusal may be restored, each followed by its first control."""
    names = bench.settings.conditions
    own = [name for name in names if name != "off" and not leaves_open(name) and not is_control(name)]
    return list(
        dict.fromkeys(
            name for thought in own for name in (thought, *controls_of(thought)[:1]) if name in names
        )
    )


def n_sets(bench: Bench) -> int:
    """Random sets of heads beside the found one, at most."""
    return min(MOST_SETS, bench.settings.n_random_sets)


def run_comparing(bench: Bench, base: RefusalHeads, name: str, model: Model) -> None:
    """Find and test the heads of a tuned model on the same requests, those that were tested in the base among them."""
    folder = bench.folder.path / "tuned" / name
    if (folder / "heads" / "heads.json").exists():
        return
    tested = base.table[base.table["tested"]]
    refusal_heads(
        model,
        bench.chat,
        *both_sides(bench),
        gate=False,  # a tuned model may have lost its refusal: that is what is asked
        conditions=bench.settings.conditions,
        search=search_of(bench),
        also_test=[
            (int(layer), int(head)) for layer, head in zip(tested["layer"], tested["head"], strict=True)
        ],
        folder=folder,
    ).save(folder / "heads")


def compared(bench: Bench, names: Sequence[str]) -> None:
    """Note that the heads of these models are there, beside those noted before."""
    before = bench.folder.once("tuned/compared.json", list)
    if not set(names) <= set(before):
        bench.folder.write("tuned/compared.json", list(dict.fromkeys([*before, *names])))
