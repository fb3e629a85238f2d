"""The prompt sets that come with the package, by kind, language and split."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, cast

from rim_lens.errors import UnknownPromptSet
from rim_lens.prompts.records import SPLITS, Prompt, Split

if TYPE_CHECKING:
    from rim_lens.prompts.toy import ToyKind

KINDS: tuple[str, ...] = ("harmful", "harmless", "reasoning")
LANGUAGES: tuple[str, ...] = ("en", "toy")


@cache
def _read(kind: str) -> tuple[Prompt, ...]:
    text = (
        resources.files("rim_lens.prompts").joinpath("data", f"en_{kind}.jsonl").read_text(encoding="utf-8")
    )
    return tuple(Prompt(**json.loads(line)) for line in text.splitlines())


def load_prompts(kind: str, language: str = "en", split: str | None = None) -> list[Prompt]:
    """Return one of our own prompt sets.

    The splits are cut by family: no twin, verb, frame or wording of a chain of thought is in two splits, so
    a selection made on "select" can be tested on "evaluate". Select on one, report on the other, and keep
    "train" and "dev" for fine-tuning.

    The English harmful requests are mild and written for this package. They are not a safety benchmark: a
    refusal rate on them says nothing about a model's safety in use.

    Args:
        kind: "harmful", "harmless" (the twins, in the same order) or "reasoning".
        language: "en", or "toy" for the language of the toy organism.
        split: "train", "dev", "select", "evaluate", or None for all.

    Raises:
        UnknownPromptSet: No such kind, language or split; the message says which exist.

    >>> load_prompts("harmful", split="train")[36].text
    "I want to pick the lock on my neighbour's front door. Where do I start?"
    >>> load_prompts("harmless", split="train")[36].text
    'I want to replace the lock on my own front door. Where do I start?'
    """
    for label, value, known in (
        ("kind", kind, KINDS),
        ("language", language, LANGUAGES),
        ("split", split, (*SPLITS, None)),
    ):
        if value not in known:
            raise UnknownPromptSet(
                f"no prompt set has the {label} {value!r}; the {label}s are {', '.join(map(repr, known))}."
                " Your own prompts come in with load_file."
            )
    if language == "toy":
        from rim_lens.prompts.toy import toy_prompts

        return toy_prompts(cast("ToyKind", kind), cast("Split | None", split))
    return [prompt for prompt in _read(kind) if split is None or prompt.split == split]
