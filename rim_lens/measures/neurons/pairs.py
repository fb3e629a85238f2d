"""Counterfactual pairs: the same request twice, once in a form that the model refuses more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rim_lens.errors import MissingTwin, NotEnoughData, StatisticsError
from rim_lens.measures.two_sides import Side, named, paired
from rim_lens.prompts import Prompt, assign_splits, check_splits, with_intent

Kind = Literal["intent", "neutral", "twins"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two forms of one request.

    Attributes:
        less: The form refused less (the paper's D), or the one held against it in a control.
        more: The form refused more (the paper's D̃).
        kind: "intent", "neutral" (the length control: neither is meant to be refused more), "twins" or "own".
    """

    less: Prompt
    more: Prompt
    kind: str = "own"

    @property
    def family(self) -> str:
        """What pairs are clustered by: the family of the more refused form."""
        return self.more.family


Pairs = Sequence[Pair | tuple[Prompt | str, Prompt | str]]


class PairSides(NamedTuple):
    """Pairs that choose, and pairs that neither choose nor share anything with those that do."""

    select: list[Pair]
    evaluate: list[Pair]


def counterfactual_pairs(
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str] | None = None,
    kind: Kind = "intent",
) -> list[Pair]:
    """Make pairs of requests.

    - "intent" (the paper): a request, and the same with a sentence of malicious intent. The second is longer, and a maximum
      over tokens grows with length: hold it against
    - "neutral": the same request with a neutral sentence of as many words.
    - "twins": the harmless twin, and the request. Of nearly one length, and the two differ in harm itself; in a language
      without sentences of intent (the toy's) they are what there is.

    Whether a model really refuses one side more is for `safety_neurons` to check.

    Args:
        harmful: Records; with an intent, for "intent" and "neutral".
        harmless: Their twins, for "twins": by the records' ids, or in the same order where nobody names any.
        kind: Which pairs.

    Raises:
        NotEnoughData: No request.
        MissingIntent: A record has no sentence of intent.
        MissingTwin: "twins" without harmless requests, or a request without its twin.
        StatisticsError: An unknown kind.

    >>> asked = [Prompt("1", "How do I bribe a clerk?", intent="I want money.")]
    >>> pair = counterfactual_pairs(asked)[0]
    >>> pair.less.text, pair.more.text
    ('How do I bribe a clerk?', 'How do I bribe a clerk? I want money.')
    """
    if kind not in ("intent", "neutral", "twins"):
        raise StatisticsError(
            f"pairs of kind {kind!r} were asked for; there are 'intent', 'neutral' and 'twins'."
        )
    records = named(harmful, "harmful")
    if not records:
        raise NotEnoughData("no request was given to make pairs of; give at least one.")
    if kind == "twins":
        if not harmless:
            raise MissingTwin(
                "pairs of twins were asked for and no harmless requests given; pass the twins as well."
            )
        side = paired(Side(records, named(harmless, "harmless")))
        if len(side.harmful) != len(side.harmless):
            raise MissingTwin(
                f"{len(side.harmful)} harmful and {len(side.harmless)} harmless requests were given, and their records"
                " name no twins; give as many of both, in one order."
            )
        return [Pair(twin, request, kind) for request, twin in zip(*side, strict=True)]
    longer = with_intent(records, neutral=kind == "neutral")
    return [Pair(request, more, kind) for request, more in zip(records, longer, strict=True)]


def as_pairs(pairs: Pairs) -> list[Pair]:
    """Return pairs as records: (less refused, more refused) of records or plain strings, or made ones as they are.

    Raises:
        NotEnoughData: No pair.
        StatisticsError: Something is no pair, its two forms are in different splits or in the same words, or an id stands twice
            on one side.

    >>> as_pairs([("Ban a bomb.", "Make a bomb.")])[0].more.id
    'pair-0-more'
    """
    made: list[Pair] = []
    for number, item in enumerate(pairs):
        if isinstance(item, Pair):
            made.append(item)
            continue
        both = list(item) if isinstance(item, Sequence) and not isinstance(item, str) else []
        if len(both) != 2 or not all(isinstance(form, Prompt | str) for form in both):
            raise StatisticsError(
                f"pair {number} is {item!r:.80}; give (less refused, more refused), two records or strings."
            )
        less, more = (
            form
            if isinstance(form, Prompt)
            else Prompt(f"pair-{number}-{side}", form, family=f"pair-{number}")
            for form, side in zip(both, ("less", "more"), strict=True)
        )
        made.append(Pair(less, more))
    if not made:
        raise NotEnoughData("no pair was given; make some with rl.counterfactual_pairs(harmful, harmless).")
    for number, pair in enumerate(made):
        if pair.less.split != pair.more.split:
            raise StatisticsError(
                f"pair {number} stands in two splits: {pair.less.id!r} is {pair.less.split!r} and {pair.more.id!r} is"
                f" {pair.more.split!r}. A pair is on one side; give both the same split, or none."
            )
        if pair.less.text == pair.more.text:
            raise StatisticsError(
                f"both forms of pair {number} ({pair.more.id!r}) have the same words; nothing could differ between them."
            )
    for name, ids in (("less", [p.less.id for p in made]), ("more", [p.more.id for p in made])):
        twice = [one for one, count in Counter(ids).items() if count > 1]
        if twice:
            raise StatisticsError(
                f"{len(twice)} ids stand twice on the {name} refused side (first: {twice[0]!r}); each request takes part once."
            )
    return made


def pair_sides(pairs: Iterable[Pair], halves: bool, seed: int = 0) -> PairSides:
    """Return the pairs that choose and those kept for the test.

    Pairs with a split choose where it is "select" and test where it is "evaluate"; "train" and "dev", which a model may have
    been tuned on, do neither. Those without one are cut into halves by family, or all choose.

    Args:
        pairs: From `as_pairs`.
        halves: Cut pairs without a split into halves; otherwise they all choose, and other requests must test.
        seed: Of the halves.

    Raises:
        NotEnoughData: No pair is left to choose by, or families are too few for halves.
        ValueError: A family or the same words stand in two splits.
    """
    given = list(pairs)
    if any(pair.more.split is None for pair in given):
        given = _cut(given, seed) if halves else [_at(pair, "select") for pair in given]
    sides = PairSides(*([p for p in given if p.more.split == split] for split in ("select", "evaluate")))
    if not sides.select:
        found = sorted({str(pair.more.split) for pair in given})
        raise NotEnoughData(
            f"no pair is of the select split (found: {', '.join(found)}), and only those choose neurons. Give records of"
            " rl.load_prompts(..., split='select') too, or records without splits."
        )
    check_splits(_members([*sides.select, *sides.evaluate]))
    return sides


def _members(pairs: Sequence[Pair]) -> list[Prompt]:
    """Every record of these pairs once."""
    return list({prompt.id: prompt for pair in pairs for prompt in (pair.less, pair.more)}.values())


def _cut(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    # Linked as twins, both forms of a pair fall to one side, with all that shares a family or words with either.
    linked = {pair.less.id: pair.less for pair in pairs}
    linked |= {pair.more.id: replace(pair.more, twin=pair.less.id) for pair in pairs}
    split = {prompt.id: prompt.split for prompt in assign_splits(list(linked.values()), seed=seed)}
    return [
        Pair(
            replace(pair.less, split=split[pair.less.id]),
            replace(pair.more, split=split[pair.more.id]),
            pair.kind,
        )
        for pair in pairs
    ]


def _at(pair: Pair, split: Literal["select"]) -> Pair:
    side = pair.more.split or split
    return Pair(replace(pair.less, split=side), replace(pair.more, split=side), pair.kind)
