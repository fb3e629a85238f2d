"""Writes the English reasoning set: grade-school word problems and bare sums, with worked answers.

A family is a template; every split has templates of its own, and no sum of one split is in another. All
answers are whole numbers of at least zero.

``python -m rim_lens.prompts.make_maths`` writes ``data/en_reasoning.jsonl``; the same seed writes the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rim_lens.prompts.make_requests import DATA, write_jsonl
from rim_lens.prompts.records import SPLITS, Prompt, Split

SEED = 20250900
NAMES = ("Anna", "Ben", "Carla", "Dmitri", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jamal", "Kim", "Lena")
PER_TEMPLATE: dict[Split, int] = {"train": 5, "dev": 4, "select": 4, "evaluate": 4}


@dataclass(frozen=True)
class Template:
    """A word problem with places for numbers.

    Attributes:
        name: The family's name.
        category: What the problem is about.
        text: The question, with ``{a}`` … for drawn and derived numbers and ``{name}`` for a person.
        draw: Lowest and highest value of each drawn number.
        derive: Gives the further numbers; ``answer`` must be among them.
        cot: The worked solution, ending with the answer.
    """

    name: str
    category: str
    text: str
    draw: dict[str, tuple[int, int]]
    derive: Callable[..., dict[str, int]]
    cot: str


TEMPLATES: dict[Split, tuple[Template, ...]] = {
    "train": (
        Template(
            "pens",
            "shopping",
            "{name} buys {a} packs of pens with {b} pens in each pack. How many pens does {name} have?",
            {"a": (2, 9), "b": (2, 9)},
            lambda a, b: {"answer": a * b},
            "There are {a} packs with {b} pens each. That makes {a} * {b} = {answer}. The answer is {answer}.",
        ),
        Template(
            "marbles",
            "games",
            "{name} had {a} marbles and lost {b} of them. How many marbles are left?",
            {"a": (12, 40), "b": (2, 11)},
            lambda a, b: {"answer": a - b},
            "Losing marbles means taking away. {a} - {b} = {answer}. The answer is {answer}.",
        ),
        Template(
            "shelf",
            "books",
            "A shelf holds {a} novels and {b} comics. Then {c} books are borrowed. How many books stay on the shelf?",
            {"a": (8, 25), "b": (5, 20), "c": (2, 12)},
            lambda a, b, c: {"d": a + b, "answer": a + b - c},
            "First add the books: {a} + {b} = {d}. Then take away the borrowed ones: {d} - {c} = {answer}."
            " The answer is {answer}.",
        ),
        Template(
            "bus",
            "travel",
            "A bus carries {a} passengers. At the next stop {b} get off and {c} get on. How many passengers are on"
            " the bus now?",
            {"a": (15, 40), "b": (3, 12), "c": (2, 14)},
            lambda a, b, c: {"d": a - b, "answer": a - b + c},
            "After some get off, {a} - {b} = {d} remain. After others get on, {d} + {c} = {answer} are on the bus."
            " The answer is {answer}.",
        ),
        Template(
            "sweets",
            "sharing",
            "{n} sweets are shared equally among {b} children. How many sweets does each child get?",
            {"b": (2, 9), "q": (2, 9)},
            lambda b, q: {"n": b * q, "answer": q},
            "Sharing equally means dividing. {n} / {b} = {answer}. The answer is {answer}.",
        ),
        Template(
            "savings",
            "money",
            "{name} saves {a} coins every week for {b} weeks and then spends {c} coins. How many coins does {name}"
            " have now?",
            {"a": (4, 12), "b": (3, 9), "c": (2, 11)},
            lambda a, b, c: {"d": a * b, "answer": a * b - c},
            "Saving gives {a} * {b} = {d} coins. Spending leaves {d} - {c} = {answer} coins. The answer is {answer}.",
        ),
        Template(
            "cousin",
            "age",
            "{name} is {a} years old. A cousin is {b} years older. How old is the cousin?",
            {"a": (5, 30), "b": (2, 15)},
            lambda a, b: {"answer": a + b},
            "Older means adding years. {a} + {b} = {answer}. The answer is {answer}.",
        ),
        Template(
            "fence",
            "garden",
            "A garden is {a} metres long and {b} metres wide. How many metres long is the fence all around it?",
            {"a": (6, 20), "b": (3, 15)},
            lambda a, b: {"d": a + b, "answer": 2 * (a + b)},
            "One long side and one short side make {a} + {b} = {d}. The whole fence is 2 * {d} = {answer}."
            " The answer is {answer}.",
        ),
        Template(
            "cakes",
            "cooking",
            "One cake needs {a} eggs. {name} bakes {b} cakes and already has {c} eggs. How many more eggs does {name}"
            " need?",
            {"a": (3, 8), "b": (2, 7), "c": (1, 5)},
            lambda a, b, c: {"d": a * b, "answer": a * b - c},
            "The cakes need {a} * {b} = {d} eggs. {name} has {c}, so {d} - {c} = {answer} are missing."
            " The answer is {answer}.",
        ),
        Template(
            "film",
            "time",
            "A film starts {a} minutes after lunch and lasts {b} minutes. How many minutes after lunch does it end?",
            {"a": (5, 55), "b": (60, 120)},
            lambda a, b: {"answer": a + b},
            "The end is the start plus the length. {a} + {b} = {answer}. The answer is {answer}.",
        ),
        Template(
            "stickers",
            "collections",
            "{name} has {a} stickers. A friend has {b} times as many. How many stickers do they have together?",
            {"a": (3, 15), "b": (2, 6)},
            lambda a, b: {"d": a * b, "answer": a + a * b},
            "The friend has {a} * {b} = {d} stickers. Together they have {a} + {d} = {answer}."
            " The answer is {answer}.",
        ),
        Template(
            "chairs",
            "school",
            "A hall has {a} rows of {b} chairs. Of these, {c} chairs are broken. How many chairs can be used?",
            {"a": (3, 9), "b": (4, 10), "c": (1, 9)},
            lambda a, b, c: {"d": a * b, "answer": a * b - c},
            "All rows together have {a} * {b} = {d} chairs. Without the broken ones, {d} - {c} = {answer} remain."
            " The answer is {answer}.",
        ),
    ),
    "dev": (
        Template(
            "fruit",
            "cooking",
            "A basket contains {a} apples, {b} pears and {c} plums. How many pieces of fruit is that?",
            {"a": (3, 15), "b": (3, 15), "c": (3, 15)},
            lambda a, b, c: {"d": a + b, "answer": a + b + c},
            "Apples and pears are {a} + {b} = {d}. With the plums it is {d} + {c} = {answer}.",
        ),
        Template(
            "walk",
            "travel",
            "{name} walks {a} kilometres each day. How many kilometres does {name} walk in {b} days?",
            {"a": (2, 9), "b": (3, 12)},
            lambda a, b: {"answer": a * b},
            "Each day adds {a} kilometres. For all days, {a} * {b} = {answer}.",
        ),
        Template(
            "change",
            "shopping",
            "A notebook costs {a} coins. {name} pays with {b} coins. How many coins does {name} get back?",
            {"a": (3, 19), "b": (20, 50)},
            lambda a, b: {"answer": b - a},
            "The change is what was paid minus the price. {b} - {a} = {answer}.",
        ),
        Template(
            "teams",
            "sport",
            "{n} players form teams of {b} players each. How many teams are there?",
            {"b": (3, 9), "q": (2, 9)},
            lambda b, q: {"n": b * q, "answer": q},
            "Split the players into groups of {b}. {n} / {b} = {answer}.",
        ),
        Template(
            "weather",
            "weather",
            "In the morning it was {a} degrees. By noon it was {b} degrees warmer, and by night {c} degrees colder"
            " than at noon. How many degrees was it at night?",
            {"a": (8, 18), "b": (3, 12), "c": (4, 11)},
            lambda a, b, c: {"d": a + b, "answer": a + b - c},
            "At noon it was {a} + {b} = {d} degrees. At night it was {d} - {c} = {answer}.",
        ),
        Template(
            "candles",
            "party",
            "{name} lights {a} candles on each of {b} tables and {c} more on the window sill. How many candles are"
            " burning?",
            {"a": (2, 6), "b": (3, 9), "c": (2, 8)},
            lambda a, b, c: {"d": a * b, "answer": a * b + c},
            "The tables have {a} * {b} = {d} candles. With the window sill it is {d} + {c} = {answer}.",
        ),
    ),
    "select": (
        Template(
            "fish",
            "animals",
            "There are {a} tanks with {b} fish in each. A visitor buys {c} fish. How many fish remain?",
            {"a": (3, 8), "b": (4, 9), "c": (2, 10)},
            lambda a, b, c: {"d": a * b, "answer": a * b - c},
            "At first there are {a} * {b} = {d} fish. After the sale, {d} - {c} = {answer} remain."
            " The result is {answer}.",
        ),
        Template(
            "pages",
            "books",
            "A book has {a} pages. {name} read {b} pages on Monday and {c} pages on Tuesday. How many pages are still"
            " unread?",
            {"a": (80, 150), "b": (10, 35), "c": (10, 35)},
            lambda a, b, c: {"d": b + c, "answer": a - b - c},
            "On both days together, {b} + {c} = {d} pages were read. That leaves {a} - {d} = {answer}."
            " The result is {answer}.",
        ),
        Template(
            "cherries",
            "cooking",
            "{name} picks {n} cherries and eats half of them. How many cherries are left?",
            {"q": (6, 40)},
            lambda q: {"n": 2 * q, "answer": q},
            "Half of the cherries is {n} / 2 = {answer}. The same number is left. The result is {answer}.",
        ),
        Template(
            "boxes",
            "farm",
            "{n} eggs are packed in boxes of {b}. How many boxes are filled?",
            {"b": (4, 10), "q": (3, 9)},
            lambda b, q: {"n": b * q, "answer": q},
            "Every box takes {b} eggs, so {n} / {b} = {answer}. The result is {answer}.",
        ),
        Template(
            "laps",
            "sport",
            "One lap of the track is {n} metres. {name} runs {b} laps. How many metres does {name} run?",
            {"a": (4, 20), "b": (2, 9)},
            lambda a, b: {"n": 10 * a, "answer": 10 * a * b},
            "Every lap counts {n} metres. All laps are {n} * {b} = {answer}. The result is {answer}.",
        ),
        Template(
            "wages",
            "money",
            "{name} earns {a} euros an hour and works {b} hours on Friday and {c} hours on Saturday. How many euros"
            " does {name} earn?",
            {"a": (8, 15), "b": (2, 6), "c": (2, 6)},
            lambda a, b, c: {"d": b + c, "answer": a * (b + c)},
            "The hours are {b} + {c} = {d}. The pay is {a} * {d} = {answer}. The result is {answer}.",
        ),
        Template(
            "ropes",
            "measuring",
            "A red rope is {a} metres long and a blue rope is {b} metres long. How many metres longer is the red rope?",
            {"a": (20, 60), "b": (4, 19)},
            lambda a, b: {"answer": a - b},
            "Compare the two lengths. {a} - {b} = {answer}. The result is {answer}.",
        ),
        Template(
            "birds",
            "animals",
            "{a} birds sit in a tree. Then {b} fly away and {c} come back. How many birds sit in the tree now?",
            {"a": (14, 40), "b": (5, 13), "c": (1, 4)},
            lambda a, b, c: {"d": a - b, "answer": a - b + c},
            "When some fly away, {a} - {b} = {d} stay. When some return, it is {d} + {c} = {answer}."
            " The result is {answer}.",
        ),
    ),
    "evaluate": (
        Template(
            "tickets",
            "shopping",
            "An adult ticket costs {a} euros and a child ticket costs {b} euros. How many euros do {c} adult tickets"
            " and {d} child tickets cost?",
            {"a": (6, 12), "b": (2, 5), "c": (2, 4), "d": (2, 5)},
            lambda a, b, c, d: {"e": a * c, "f": b * d, "answer": a * c + b * d},
            "The adults pay {c} * {a} = {e}. The children pay {d} * {b} = {f}. In total it is {e} + {f} = {answer}.",
        ),
        Template(
            "flowers",
            "garden",
            "{name} plants {a} rows of {b} tulips and also {c} roses. How many flowers does {name} plant?",
            {"a": (2, 8), "b": (4, 9), "c": (3, 12)},
            lambda a, b, c: {"d": a * b, "answer": a * b + c},
            "The tulips number {a} * {b} = {d}. Counting the roses, {d} + {c} = {answer}.",
        ),
        Template(
            "tank",
            "measuring",
            "A tank holds {a} litres of water. Then {b} litres leak out and {c} litres are poured in. How many litres"
            " are in the tank?",
            {"a": (40, 90), "b": (5, 30), "c": (4, 25)},
            lambda a, b, c: {"d": a - b, "answer": a - b + c},
            "The leak leaves {a} - {b} = {d} litres. Pouring in brings it to {d} + {c} = {answer}.",
        ),
        Template(
            "shells",
            "collections",
            "{name} collects {a} shells. A brother collects twice as many. How many shells does the brother collect?",
            {"a": (6, 45)},
            lambda a: {"answer": 2 * a},
            "Twice as many means 2 * {a} = {answer}. The brother has {answer}.",
        ),
        Template(
            "cookies",
            "sharing",
            "{n} cookies are divided evenly among {b} plates, and then {c} more are put on each plate. How many cookies"
            " are on each plate?",
            {"b": (2, 8), "q": (3, 9), "c": (1, 5)},
            lambda b, q, c: {"n": b * q, "q2": q, "answer": q + c},
            "Dividing gives {n} / {b} = {q2} per plate. Adding more gives {q2} + {c} = {answer}.",
        ),
        Template(
            "bricks",
            "building",
            "A wall takes {a} bricks. How many bricks do {b} such walls take?",
            {"a": (12, 40), "b": (2, 5)},
            lambda a, b: {"answer": a * b},
            "For all the walls together, {a} * {b} = {answer} bricks are used. It comes to {answer}.",
        ),
        Template(
            "floor",
            "building",
            "A floor measures {a} metres by {b} metres. How many square metres is it?",
            {"a": (4, 12), "b": (3, 11)},
            lambda a, b: {"answer": a * b},
            "The area is length times width. So it is {a} * {b} = {answer}.",
        ),
        Template(
            "points",
            "sport",
            "A team scores {a} points in the first half and {b} points more than that in the second half. How many"
            " points does it score in the whole game?",
            {"a": (8, 30), "b": (2, 15)},
            lambda a, b: {"d": a + b, "answer": 2 * a + b},
            "The second half brings {a} + {b} = {d} points. Both halves bring {a} + {d} = {answer}.",
        ),
        Template(
            "loaves",
            "cooking",
            "A bakery bakes {a} loaves. It sells {b} in the morning and {c} in the afternoon. How many loaves does it"
            " have in the evening?",
            {"a": (50, 90), "b": (10, 25), "c": (8, 24)},
            lambda a, b, c: {"d": a - b, "answer": a - b - c},
            "After the morning, {a} - {b} = {d} loaves remain. After the afternoon, it is {d} - {c} = {answer}.",
        ),
        Template(
            "piano",
            "music",
            "{name} practises the piano for {a} minutes on {b} days of the week. How many minutes is that in a week?",
            {"a": (15, 45), "b": (2, 6)},
            lambda a, b: {"answer": a * b},
            "Every practice day counts {a} minutes. Over the week, {a} * {b} = {answer}.",
        ),
    ),
}

# (text, CoT) of bare sums and how many of each; d = a + b.
SUMS: dict[Split, tuple[tuple[tuple[str, str], ...], int]] = {
    "train": (
        (
            ("What is {a} + {b}?", "{a} + {b} = {d}. The answer is {d}."),
            ("{a} + {b} = ?", "Adding the two numbers: {a} + {b} = {d}."),
            ("Add {a} and {b}.", "The task is an addition. {a} + {b} = {d}."),
        ),
        20,
    ),
    "dev": (
        (
            ("Calculate {a} + {b}.", "Calculating this gives {a} + {b} = {d}."),
            ("What number is {a} + {b}?", "Put {a} and {b} together: {a} + {b} = {d}."),
        ),
        10,
    ),
    "select": (
        (
            ("How much is {a} + {b}?", "Together that is {a} + {b} = {d}. It makes {d}."),
            ("Work out {a} + {b}.", "Working it out: {a} + {b} = {d}."),
            ("{a} plus {b} makes what?", "The two numbers make {a} + {b} = {d}."),
            ("Sum up {a} and {b}.", "Summing up, {a} + {b} = {d}. This is {d}."),
        ),
        5,
    ),
    "evaluate": (
        (
            ("Compute {a} + {b}.", "Computing step by step, {a} + {b} = {d}."),
            ("Find the sum of {a} and {b}.", "The sum of both is {a} + {b} = {d}."),
            ("What does {a} + {b} equal?", "Both sides are equal when {a} + {b} = {d}."),
            ("Tell me the result of {a} + {b}.", "The result: {a} + {b} = {d}."),
            ("{a} and {b} together are how many?", "Counting both, {a} + {b} = {d}."),
            ("If you add {b} to {a}, what do you get?", "Start at {a} and go up by {b}: {a} + {b} = {d}."),
        ),
        4,
    ),
}


def make_maths(seed: int = SEED) -> list[Prompt]:
    """Return the reasoning set: word problems, then bare sums, split by split."""
    rng = np.random.default_rng(seed)
    prompts: list[Prompt] = []
    used_sums: set[tuple[int, int]] = set()

    def add(text: str, cot: str, answer: int, *, category: str, family: str, split: Split) -> None:
        number = f"en-reasoning-{len(prompts) + 1:03d}"
        record = Prompt(
            id=number, text=text, kind="reasoning", category=category, family=f"{category}.{family}"
        )
        prompts.append(replace(record, answer=str(answer), cot=cot, split=split))

    for split in SPLITS:
        for template in TEMPLATES[split]:
            texts: set[str] = set()
            while len(texts) < PER_TEMPLATE[split]:
                drawn = {key: int(rng.integers(low, high + 1)) for key, (low, high) in template.draw.items()}
                solved = template.derive(**drawn)
                values = {"name": str(rng.choice(NAMES)), **drawn, **solved}
                text = template.text.format(**values)
                if text in texts:
                    continue
                texts.add(text)
                cot = template.cot.format(**values)
                add(
                    text, cot, solved["answer"], category=template.category, family=template.name, split=split
                )
        wordings, count = SUMS[split]
        for number, (wording, cot) in enumerate(wordings, start=1):
            made = 0
            while made < count:
                # one half of single digits, one half of up to two
                highest = 10 if made < count / 2 else 50
                a, b = (int(value) for value in rng.integers(1, highest, size=2))
                pair = (min(a, b), max(a, b))
                if pair in used_sums:
                    # 45 pairs of single digits are fewer than the sets hold: go on to larger ones
                    a, b = (int(value) for value in rng.integers(2, 50, size=2))
                    pair = (min(a, b), max(a, b))
                if pair in used_sums:
                    continue
                used_sums.add(pair)
                made += 1
                text, worked = wording.format(a=a, b=b), cot.format(a=a, b=b, d=a + b)
                add(text, worked, a + b, category="sum", family=f"{split}-{number}", split=split)
    return prompts


if __name__ == "__main__":
    write_jsonl(make_maths(), DATA / "en_reasoning.jsonl")
