r"""The answer that a written solution comes to, as an exact number.

Where several places could hold it, the first of these that does:

1. the last ``\boxed{…}``, and after ``####`` (GSM8K's mark), the last one;
2. the last "the answer is …", "answer: …", "result is …", up to the end of that sentence: what follows the last
   equals sign there, else its first number; "the answer, 5, is right" says it as well;
3. the last number of the last line that holds one.

It is a rule, not understanding: "42 (which is 6 times 7)" comes to 7. Units with their exponents, currency, degree and
per cent signs are passed over ("25 %" and "25 cm^2" are 25), and a number spelled in words is none. "2 1/2" is a mixed
number; "1.5e3" and "1.5 \times 10^3" are 1500. Nothing is calculated: a box that asks for it (``\boxed{2^3}``,
``\boxed{\sqrt{2}}``) gives None, and outside a box operators are not looked at. A number right after "not" is denied, in 2
and 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

_MINUS = r"-\u2212\u2013"
_SIGN = rf"(?:(?<![\w.)\]}}/])[{_MINUS}+] ?)?"
_WHOLE = r"(?:\d{1,3}(?:[,\u2009\u202f\u00a0]\d{3})+(?!\d)|\d+)"
_DIGITS = rf"{_WHOLE}(?:\.\d+)?|(?<![\d.])\.\d+"
_POWER_OF_TEN = r"(?:[eE][-+]?\d{1,3}(?!\w))?"  # three digits: 1e999999999 would fill the memory
_LATEX = r"\\[dt]?frac\s*\{\s*(?P<above>-?\d+)\s*\}\s*\{\s*(?P<below>\d+)\s*\}"
_MIXED = rf"(?:(?P<whole>{_WHOLE})(?: +(?=\d+ ?/ ?\d+(?!\.?\d))|\s*(?=\\[dt]?frac)))?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\$?{_MIXED}"
    rf"(?:{_LATEX}|(?P<first>(?:{_DIGITS}){_POWER_OF_TEN})(?:\s*/\s*(?P<under>\d+(?!\.?\d)))?)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_MARKED = re.compile(r"####\s*([^\n]+)")
_SAID = re.compile(
    r"\b(?:final |correct )?(?:answer|result)\b(?: (?:to|of|for)\b[^.:=\n]{0,60})?\s*"
    r"(?:is|was|:|=|comes to|,(?=\W{0,3}\d[^\n:;]{0,30}, (?:is|was)\b))\s*"
    r"(?:therefore |thus |simply |exactly |equal to |:)*(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)")
_DENIED = re.compile(rf"\bnot\s+(?:{_NUMBER.pattern})")

# LaTeX and units around a number, and what stands there instead.
_EXPONENT = rf"(?:\{{\s*([{_MINUS}+]?\d{{1,3}})\s*\}}|([{_MINUS}+]?\d{{1,3}})(?!\d))"
_TIDY: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}|,(?=\\!)"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\,"), "\u2009"),  # between thousands, or before a unit
    (re.compile(r"\\[;: ]"), " "),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), ""),
    (
        re.compile(rf"(?<=\d)\s*(?:\\times|\\cdot|[×·⋅*])\s*10\s*\^\s*{_EXPONENT}"),
        lambda found: "e" + re.sub(rf"[{_MINUS}]", "-", found[1] or found[2]) + " ",
    ),
    (re.compile(rf"(?<=[^\W\d_])\s?\^\s?{_EXPONENT}"), ""),  # cm^2, m^{-1}
]
# What is left to calculate once each number of a box is a NUL.
_OPERATOR = re.compile(
    r"[\^+×÷√π]|\\(?:times|div|pm|d?frac|tfrac|sqrt|pi|log|ln|binom)(?![a-z])"
    rf"|\x00\s*[\x00!(]|[\x00)]\s*(?:[{_MINUS}:/·⋅]|\\cdot|\*+)\s*[\x00(]"
)


def extract_number(text: str) -> Fraction | None:
    r"""The number that a solution comes to, or None where it holds none, or a box has it still to be calculated.

    >>> extract_number("There are 3 * 8 = 24 pens.\nThe answer is 1,024.50.")
    Fraction(2049, 2)
    >>> extract_number("So x is \\boxed{-\\frac{3}{4}}"), extract_number("I do not know.")
    (Fraction(-3, 4), None)
    >>> extract_number("It is \\boxed{25 \\text{ cm}^2}."), extract_number("It is \\boxed{2^3}.")
    (Fraction(25, 1), None)
    """
    text = _tidy(text)
    for box in reversed(_BOXED.findall(text)):
        value = _after_equals(box)
        numbers = numbers_in(value)
        if numbers:
            rest = _NUMBER.sub(lambda found: "\0" * len(numbers_in(found[0])), value)
            return None if _OPERATOR.search(rest) else numbers[-1]
    for marked in reversed(_MARKED.findall(text)):
        numbers = numbers_in(marked)
        if numbers:
            return numbers[-1]
    text = _DENIED.sub("", text)
    for said in reversed(list(_SAID.finditer(text))):
        sentence = _SENTENCE_END.split(said["rest"], maxsplit=1)[0]
        numbers = numbers_in(_after_equals(sentence))
        if numbers:
            return numbers[0]
    for line in reversed(text.splitlines()):
        numbers = numbers_in(line)
        if numbers:
            return numbers[-1]
    return None


def _after_equals(text: str) -> str:
    """What follows the last equals sign, where that holds a number; else what stands before it."""
    before, equals, after = text.rpartition("=")
    return after if not equals or numbers_in(after) else before


def _tidy(text: str) -> str:
    for pattern, instead in _TIDY:
        text = pattern.sub(instead, text)
    return text


def numbers_in(text: str) -> list[Fraction]:
    """Every number of a text, in order, exact.

    >>> [str(number) for number in numbers_in("5-3 = 2, not -2; 1/2 of 1,000 is 500.0 and .5 is 3.")]
    ['5', '3', '2', '-2', '1/2', '1000', '500', '1/2', '3']
    >>> [str(number) for number in numbers_in("2 1/2 cups, 1.5e3 g, 12 m^2")]
    ['5/2', '1500', '12']
    """
    numbers = []
    for found in _NUMBER.finditer(_tidy(text)):
        if found["above"] is not None:
            above, below = Fraction(found["above"]), int(found["below"])
        else:
            above, below = _read(found["first"]), int(found["under"] or 1)
        if not below:
            continue
        sign = -1 if found["sign"].strip() in tuple("-\u2212\u2013") else 1
        value = above / below
        if found["whole"] is None:
            numbers.append(sign * value)
        elif 0 <= value < 1:
            numbers.append(sign * (_read(found["whole"]) + value))
        else:  # "in 2 8/4" is no mixed number
            numbers += [sign * _read(found["whole"]), value]
    return numbers


def _read(digits: str) -> Fraction:
    return Fraction(re.sub(r"[,\u2009\u202f\u00a0]", "", digits))


def toy_answer(text: str) -> str | None:
    """The answer of a toy reply: its first word, where that is a digit.

    >>> toy_answer("6 <user>"), toy_answer("REFUSE")
    ('6', None)
    """
    words = text.split(maxsplit=1)
    return words[0] if words and len(words[0]) == 1 and words[0].isdigit() else None
