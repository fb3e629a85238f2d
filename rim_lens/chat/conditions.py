"""Think conditions by name, rendered: the same requests with thinking off, open, or after given words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rim_lens.chat.asking import KINDS_OF_COT, one_per_row
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ConditionError
from rim_lens.prompts.cots import SELF_STATEMENTS, control_texts, cot_texts, statement_texts
from rim_lens.prompts.records import Prompt, as_prompts

if TYPE_CHECKING:
    from rim_lens.chat.chat_format import ChatFormat

CONTROLS = ("filler", "unrelated")
STANDARD = ("off", "careful", *CONTROLS, "open")
STATEMENT, BEGUN = "statement", "begun"

# Names, or names with a text of one's own (None: what the name stands for)
Conditions = Sequence[str] | Mapping[str, str | Sequence[str] | None]


def condition_names() -> tuple[str, ...]:
    """Every condition that has a meaning of its own.

    >>> condition_names()[:4]
    ('off', 'open', 'careful', 'confirm')
    """
    statements = [f"{kind}:{form}" for form in (STATEMENT, BEGUN) for kind in SELF_STATEMENTS]
    controls = [f"{control}:{name}" for name in statements for control in CONTROLS]
    return ("off", "open", *KINDS_OF_COT, *statements, *controls)


def render_conditions(
    chat: ChatFormat,
    requests: Sequence[Prompt | str],
    conditions: Conditions = STANDARD,
    *,
    system: str | None = None,
    seed: int = 0,
    tolerance: int = 0,
) -> dict[str, SpanBatch]:
    """Render requests in several think conditions.

    ========================  ================================================================================
    off                       an empty think block, closed
    open                      the model writes its own chain of thought
    careful … unrelated       a written chain of thought of that kind (`rim_lens.prompts.cots`), closed; filler and
                              unrelated have exactly as many tokens as careful
    confirm:statement         the paper's one-line self-statement as the whole chain of thought, closed
    confirm:begun             the same statement at the beginning of the block, which stays open: the model goes on
                              thinking from there (arXiv 2509.00544 injects the pattern so)
    filler:confirm:statement  filler, or unrelated, of exactly as many tokens as that statement; likewise ``:begun``
    filler:mine               filler, or unrelated, of exactly as many tokens as a text of your own called "mine"
    ========================  ================================================================================

    Statements exist for careful (the control among them), confirm, deviate and heuristic.

    Args:
        chat: The format.
        requests: Records or strings.
        conditions: Names; or a mapping from names to texts of your own, one for all requests or one each, given as a
            closed chain of thought (None: what the name stands for).
        system: System words.
        seed: Which words and sentences are drawn.
        tolerance: How many tokens filler and unrelated may differ from what they match.

    Returns:
        Name → batch, labelled with the name, in the order asked for.

    Raises:
        ConditionError: An unknown name, one given twice, or a text of your own under a name that means something else.
        CotError: No text of the wanted length was found.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> from rim_lens.chat import ChatFormat
    >>> from rim_lens.prompts import load_prompts
    >>> chat = ChatFormat.from_tokenizer(toy_tokenizer())
    >>> asked = load_prompts("harmful", language="toy", split="select")[:1]
    >>> for name, batch in render_conditions(chat, asked, ("off", "deviate", "deviate:begun")).items():
    ...     print(f"{name:14}", batch.texts[0].partition("<assistant> ")[2])
    off            <think> </think>
    deviate        <think> SKIP 6 4 6 SKIP > 2 </think>
    deviate:begun  <think> SKIP
    """
    if isinstance(conditions, str):
        conditions = (conditions,)
    given = dict(conditions) if isinstance(conditions, Mapping) else dict.fromkeys(conditions)
    if not isinstance(conditions, Mapping) and len(given) < len(conditions):
        raise ConditionError(f"a condition was named twice in {list(conditions)}; name each once.")
    prompts = as_prompts(requests)
    own = {name: one_per_row(text, len(prompts), name) for name, text in given.items() if text is not None}
    for name in given:
        check_condition(name, tuple(own))
    batches = {}
    for name, text in given.items():
        control, _, matched = name.partition(":")
        if control in CONTROLS and matched in own:
            words = control_texts(prompts, own[matched], control, chat.count_tokens, seed, tolerance)
            batches[name] = chat.render(prompts, think=words, system=system, label=name)
            continue
        if text is not None:
            batches[name] = chat.render(prompts, think=text, system=system, label=name)
            continue
        if name in ("off", "open"):
            batches[name] = chat.render(prompts, think=name, system=system, label=name)
            continue
        *controls, kind, form = name.split(":") if ":" in name else (name, "")
        if form:
            words = statement_texts(prompts, kind, chat.count_tokens, seed, tolerance, *controls)
        else:
            words = cot_texts(prompts, kind, chat.count_tokens, seed, tolerance)
        if form == BEGUN:
            batches[name] = chat.render(prompts, think="open", begin=words, system=system, label=name)
        else:
            batches[name] = chat.render(prompts, think=words, system=system, label=name)
    return batches


def check_condition(name: str, own: Sequence[str] = ()) -> None:
    """Refuse a name that stands for no condition, or for two.

    Args:
        name: The name.
        own: Names of texts of the user's own.

    Raises:
        ConditionError: It does.
    """
    if name in own and (name in condition_names() or ":" in name):
        raise ConditionError(
            f"a text of your own was called {name!r}, which {'has a meaning already' if name in condition_names() else 'holds a colon'};"
            " give it another name, so that no table mixes them up."
        )
    control, _, matched = name.partition(":")
    if name not in (*own, *condition_names()) and not (control in CONTROLS and matched in own):
        raise ConditionError(
            f"no think condition is called {name!r}; there are {', '.join(condition_names())}. A text of your own goes in"
            " as a mapping: conditions={'mine': text}."
        )


def with_controls(
    conditions: Sequence[str], own: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Conditions with off first and the controls that each of them needs, and which of these were added.

    Args:
        conditions: Names.
        own: Which of them are texts of the user's own.

    >>> with_controls(["careful", "filler"])
    (('off', 'careful', 'filler', 'unrelated'), ('off', 'unrelated'))
    """
    needed = [control for name in conditions for control in controls_of(name, own)]
    if not needed:
        needed = list(CONTROLS)
    whole = tuple(dict.fromkeys(("off", *conditions, *needed)))
    return whole, tuple(name for name in whole if name not in conditions)


def controls_of(name: str, own: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the filler and the unrelated control that a condition is held against; none for off and for a control.

    Those of a statement, and of a text of the user's own, have its length, and are left open where it is. Every other
    condition has those of a careful chain of thought: confirm, deviate and heuristic come near that length, and a
    self-written chain (open) has a length of its own.

    >>> controls_of("confirm:begun"), controls_of("open")
    (('filler:confirm:begun', 'unrelated:confirm:begun'), ('filler', 'unrelated'))
    """
    first, *rest = name.split(":")
    if name == "off" or is_control(name):
        return ()
    if name in own:
        return tuple(f"{control}:{name}" for control in CONTROLS)
    if rest and rest[-1] in (STATEMENT, BEGUN) and first in SELF_STATEMENTS:
        return tuple(f"{control}:{name}" for control in CONTROLS)
    return CONTROLS


def is_control(name: str) -> bool:
    """Whether a condition is a filler or an unrelated control."""
    return name.partition(":")[0] in CONTROLS


def leaves_open(name: str) -> bool:
    """Whether the model goes on thinking after the prompt, so that its next token is not the answer's.

    >>> leaves_open("open"), leaves_open("confirm:begun"), leaves_open("confirm:statement")
    (True, True, False)
    """
    return name == "open" or name.endswith(f":{BEGUN}")
