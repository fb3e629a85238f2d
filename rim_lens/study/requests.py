"""Which requests a study selects on, and which it tests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rim_lens.errors import MissingTwin, NotEnoughData
from rim_lens.measures.twins import twin_places, with_families
from rim_lens.prompts import Prompt, as_prompts, assign_splits, check_splits, load_prompts, spread
from rim_lens.prompts.records import Split
from rim_lens.prompts.toy import toy_prompts

# Requests as a user gives them.
Given = Sequence[Prompt | str]


@dataclass(frozen=True)
class Requests:
    """The requests of one side of a study: harmful ones, their twins in the same order, and reasoning questions."""

    harmful: tuple[Prompt, ...]
    twins: tuple[Prompt, ...]
    reasoning: tuple[Prompt, ...]

    @property
    def families(self) -> list[str]:
        """Family of each harmful request, which its twin shares."""
        return [prompt.family or prompt.id for prompt in self.harmful]


def requests_by_split(
    language: str,
    harmful: Sequence[Prompt | str] | None,
    harmless: Sequence[Prompt | str] | None,
    reasoning: Sequence[Prompt | str] | None,
    limit: int | None,
) -> dict[Split, Requests]:
    """Return the `select` and `evaluate` requests.

    Given requests keep their own splits; where they have none, halves are cut by family, twins together. Without
    given requests, rim_lens's own sets are used; the toy's reasoning questions take the operator ``-``, which its
    fine-tuned variants were tuned on.

    Args:
        language: "en" or "toy": which of our own sets to use.
        harmful: Harmful requests, or None for our own.
        harmless: Their twins: by the records' `twin` ids, or, for plain strings, in the same order.
        reasoning: Reasoning questions, or None for our own.
        limit: At most so many of each kind and split, taken evenly over the list; None for all.

    Raises:
        MissingTwin: A harmful request has no twin among the harmless.
        NotEnoughData: A split is left without requests, or with a single family.
        ValueError: A family, or a request and its twin, stand on both sides.
    """
    if harmful is None:
        bad, good = load_prompts("harmful", language), load_prompts("harmless", language)
    else:
        bad, good = _paired(as_prompts(harmful), as_prompts(harmless or []))
    if any(prompt.split is None for prompt in bad):
        both = assign_splits([*bad, *good])
        bad, good = both[: len(bad)], both[len(bad) :]
    questions = _questions(language, reasoning)
    twins = {prompt.id: prompt for prompt in good}
    sides: dict[Split, Requests] = {}
    both_sides: tuple[Split, Split] = ("select", "evaluate")
    for split in both_sides:
        chosen = spread([prompt for prompt in bad if prompt.split == split], limit)
        missing = [prompt.id for prompt in chosen if prompt.twin not in twins]
        if missing:
            raise MissingTwin(
                f"harmful request {missing[0]!r} names twin {next(p.twin for p in chosen if p.id == missing[0])!r}, which"
                f" is not among the {len(good)} harmless requests. Every harmful request needs its minimally different"
                " twin: it is what tells refusal from general damage."
            )
        side = Requests(
            harmful=tuple(chosen),
            twins=tuple(twins[str(prompt.twin)] for prompt in chosen),
            reasoning=tuple(spread([q for q in questions if q.split in (split, None)], limit)),
        )
        if len(set(side.families)) < 2:
            raise NotEnoughData(
                f"the {split} side has {len(side.harmful)} harmful requests of {len(set(side.families))} families; a test"
                " over requests needs at least two families on each side."
            )
        sides[split] = side
    check_splits(
        [
            replace(prompt, split=split)
            for split, side in sides.items()
            for prompt in (*side.harmful, *side.twins)
        ]
    )
    return sides


def _paired(bad: list[Prompt], good: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    places = twin_places(bad, good)
    if places is None and len(bad) != len(good):
        raise MissingTwin(
            f"{len(bad)} harmful and {len(good)} harmless requests, and not every harmful one names its twin. Give as"
            " many harmless requests, in the same order, or set the records' twin ids."
        )
    if all(prompt.twin for prompt in bad):
        return bad, with_families(bad, good)
    twins = [good[place] for place in (places or range(len(bad)))]
    return (
        [replace(p, id=f"harmful-{i}", twin=f"harmless-{i}", kind="harmful") for i, p in enumerate(bad)],
        [
            replace(
                p,
                id=f"harmless-{i}",
                twin=f"harmful-{i}",
                kind="harmless",
                family=bad[i].family,
                split=bad[i].split,
            )
            for i, p in enumerate(twins)
        ],
    )


def _questions(language: str, reasoning: Sequence[Prompt | str] | None) -> list[Prompt]:
    if reasoning is not None:
        return as_prompts(reasoning)
    return (
        list(toy_prompts("reasoning", op="-")) if language == "toy" else load_prompts("reasoning", language)
    )
