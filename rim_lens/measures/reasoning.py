"""Whether a model still gets its sums right: accuracy of generated answers, in every think condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rim_lens.errors import AnswerError
from rim_lens.generation import Generation
from rim_lens.measures.answers import extract_number, numbers_in, toy_answer
from rim_lens.measures.refusal.rates import families_of, share_interval
from rim_lens.prompts.records import Prompt

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Accuracy:
    """A share of right answers with its interval, and every row behind it.

    Attributes:
        value: Share between 0 and 1. An answer that holds no number is wrong.
        low: Lower end of the 95 % interval (`share_interval`: over families where questions come in families).
        high: Upper end.
        n: Questions.
        n_families: Independent units behind them.
        n_unanswered: Answers from which nothing could be read, an answer that was never begun among them.
        n_refused: Answers that refuse; wrong, and not for lack of reasoning.
        n_unfinished: Rows whose think block is still open, or was closed by force.
        rows: One row per question: prompt, family, condition, expected, found, correct, outcome, ending,
            closed_by_force.
    """

    value: float
    low: float
    high: float
    n: int
    n_families: int
    n_unanswered: int
    n_refused: int
    n_unfinished: int
    rows: pd.DataFrame

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n}, {self.n_unanswered} unanswered)"


def reasoning_accuracy(
    generation: Generation,
    prompts: Sequence[Prompt] | None = None,
    *,
    extract: Callable[[str], Any] | None = None,
    seed: int = 0,
) -> Accuracy:
    """Share of questions whose generated answer is the checked one.

    Compared is what stands after the think block, exactly (0.5 equals 1/2, 3 does not equal 3.001); an answer that
    stands inside the block only does not count, as nobody was told it. Numbers are read by the rules of
    `rim_lens.measures.answers`; the toy answers with one digit. Works alike with thinking off, after a given chain of
    thought and after a self-written one.

    What it does not show: that the chain of thought was used. A given careful chain holds the answer, so that a right
    answer after it may be copied; hold it against off, filler and unrelated.

    Args:
        generation: What the model wrote to reasoning questions.
        prompts: Records with the checked answers, found by id; None: those of the generation itself.
        extract: Reads an answer's value in another way; applied to the checked answer as well, compared with ``==``.
        seed: Of the bootstrap.

    Raises:
        AnswerError: A question has no checked answer, or not a number where numbers are compared.
        NotEnoughData: No question.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = rl.load_prompts("reasoning", language="toy", split="select")[:6]
    >>> print(reasoning_accuracy(rl.generate(model, chat.render(asked), max_new_tokens=2)))
    1.00 [0.34, 1.00] (n = 6, 0 unanswered)
    """
    import pandas as pd

    batch = generation.batch
    given = {prompt.id: prompt for prompt in prompts or ()}
    records = [given.get(prompt.id, prompt) for prompt in batch.prompts]
    rows: list[dict[str, Any]] = []
    for row, record in enumerate(records):
        toy = record.language == "toy" or batch.format == "toy"
        read = extract or (toy_answer if toy else extract_number)
        expected = _expected(record, read, numeric=extract is None and not toy)
        found = read(batch.answers[row])
        rows.append(
            {
                "prompt": record.id,
                "family": record.family or record.id,
                "condition": batch.name,
                "expected": str(expected),
                "found": None if found is None else str(found),
                "correct": found is not None and bool(found == expected),
                "outcome": generation.outcome[row],
                "ending": generation.ending[row],
                "closed_by_force": generation.closed_by_force[row],
            }
        )
    table = pd.DataFrame(rows)
    share = share_interval([line["correct"] for line in rows], families_of(records), seed=seed)
    unfinished = [
        not done or forced
        for done, forced in zip(batch.finished_thinking, generation.closed_by_force, strict=True)
    ]
    return Accuracy(
        value=float(share.estimate),
        low=float(share.low),
        high=float(share.high),
        n=share.n,
        n_families=share.n_families,
        n_unanswered=sum(line["found"] is None for line in rows),
        n_refused=generation.outcome.count("refuse"),
        n_unfinished=sum(unfinished),
        rows=table,
    )


def _expected(record: Prompt, read: Callable[[str], Any], numeric: bool) -> Any:
    if record.answer is None:
        raise AnswerError(
            f"question {record.id!r} has no checked answer; set Prompt.answer, or pass prompts= with answers."
        )
    expected = read(record.answer)
    if expected is None or (numeric and len(numbers_in(record.answer)) != 1):
        raise AnswerError(
            f"the checked answer of question {record.id!r} is {record.answer!r}, which is not one number; pass extract= to"
            " compare answers of another kind."
        )
    return expected
