"""One request, and the label everything later hangs on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Split = Literal["train", "dev", "select", "evaluate"]
SPLITS: tuple[Split, ...] = ("train", "dev", "select", "evaluate")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request that is asked and never answered here.

    Attributes:
        id: Unique within its set.
        text: The user's words, as they enter the chat template.
        kind: "harmful", "harmless", "reasoning", or "" where unknown.
        category: Hazard category of a harmful request (its twin bears the same), topic of a maths question.
        family: Requests that share a verb, frame or conjunction; statistics cluster by it and splits keep it whole.
        twin: The id of the minimally different request of the other kind, if there is one.
        intent: A sentence of malicious intent for this category (paper, section 4: counterfactual pairs).
        answer: The checked answer of a reasoning question.
        cot: A worked, careful chain of thought, without think tags.
        split: "train", "dev", "select", "evaluate" or None.
        language: "en", "toy", or a user's own label.
    """

    id: str
    text: str
    kind: str = ""
    category: str = ""
    family: str = ""
    twin: str | None = None
    intent: str | None = None
    answer: str | None = None
    cot: str | None = None
    split: Split | None = None
    language: str = "en"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, without those that are None or empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


PROMPT_FIELDS: tuple[str, ...] = tuple(field.name for field in fields(Prompt))


def as_prompts(requests: Sequence[Prompt | str]) -> list[Prompt]:
    """Turn plain strings into records, and leave records as they are.

    A string becomes a record whose id is its place in the list and whose family is itself, so that
    statistics clustered by family treat each plain string as independent.

    >>> [p.id for p in as_prompts(["Name a fruit.", "Name a tree."])]
    ['0', '1']
    """
    return [
        item if isinstance(item, Prompt) else Prompt(id=str(index), text=item, family=str(index))
        for index, item in enumerate(requests)
    ]


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most so many prompts, taken evenly over a list; twins stay beside each other in lists of one order.

    >>> [prompt.id for prompt in spread(as_prompts(["a", "b", "c", "d", "e"]), 2)]
    ['0', '2']
    """
    if limit is None or len(prompts) <= limit:
        return list(prompts)
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """A digest of records, all that they hold, in their order: 16 hexadecimal digits."""
    told = json.dumps([prompt.to_dict() for prompt in prompts], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
