r"""The answer that a written solution comes to, as an exact number.

Where several places could hold it, the first of these that does:

1. the last ``\boxed{…}``, and after ``####`` (GSM8K's mark), the last one;
2. the last "the answer is …", "answer: …", "result is …", up to the end of that sentence: what follows the last
   equals sign there, else its first number;
3. the last number of the last line that holds one.

It is a rule, not understanding: "42 (which is 6 times 7)" comes to 7. Units, currency and per cent signs are passed
over ("25 %" is 25), and a number spelled in words is none.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIGN = r"(?:(?<![\w.)\]}/])[-\u2212\u2013+] ?)?"
_DIGITS = r"(?:\d{1,3}(?:[,\u2009\u202f\u00a0]\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
_LATEX = r"\\[dt]?frac\s*\{\s*(?P<above>-?\d+)\s*\}\s*\{\s*(?P<below>\d+)\s*\}"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\$?(?:{_LATEX}|(?P<first>{_DIGITS})(?:\s*/\s*(?P<under>\d+(?!\.?\d)))?)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"####\s*([^\n]+)")
_SAID = re.compile(
    r"\b(?:final |correct )?(?:answer|result)\b(?: (?:to|of|for)\b[^.:=\n]{0,60})?\s*(?:is|was|:|=|comes to)\s*"
    r"(?:therefore |thus |simply |exactly |equal to |:)*(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)")


def extract_number(text: str) -> Fraction | None:
    r"""The number that a solution comes to, or None where it holds none.

    >>> extract_number("There are 3 * 8 = 24 pens.\nThe answer is 1,024.50.")
    Fraction(2049, 2)
    >>> extract_number("So x is \\boxed{-\\frac{3}{4}}"), extract_number("I do not know.")
    (Fraction(-3, 4), None)
    """
    for pattern in (_BOXED, _MARKED):
        for found in reversed(pattern.findall(text)):
            numbers = numbers_in(found)
            if numbers:
                return numbers[-1]
    for said in reversed(list(_SAID.finditer(text))):
        sentence = _SENTENCE_END.split(said["rest"], maxsplit=1)[0]
        before, equals, after = sentence.rpartition("=")
        numbers = numbers_in(after if equals and numbers_in(after) else before or sentence)
        if numbers:
            return numbers[0]
    for line in reversed(text.splitlines()):
        numbers = numbers_in(line)
        if numbers:
            return numbers[-1]
    return None


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in order, exact.

    >>> [str(number) for number in numbers_in("5-3 = 2, not -2; 1/2 of 1,000 is 500.0 and .5 is 3.")]
    ['5', '3', '2', '-2', '1/2', '1000', '500', '1/2', '3']
    """
    numbers = []
    for found in _NUMBER.finditer(text):
        if found["above"] is not None:
            above, below = Fraction(found["above"]), int(found["below"])
        else:
            above = Fraction(re.sub(r"[,\u2009\u202f\u00a0]", "", found["first"]))
            below = int(found["under"] or 1)
        if not below:
            continue
        negative = found["sign"].strip() in ("-", "\u2212", "\u2013")
        numbers.append((-above if negative else above) / below)
    return numbers


def toy_answer(text: str) -> str | None:
    """The answer of a toy reply: its first word, where that is a digit.

    >>> toy_answer("6 <user>"), toy_answer("REFUSE")
    ('6', None)
    """
    words = text.split(maxsplit=1)
    return words[0] if words and len(words[0]) == 1 and words[0].isdigit() else None
