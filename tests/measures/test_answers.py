"""What number a written solution comes to: a table of texts, and every checked answer of our own sets."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rim_lens as rl
from rim_lens.measures.answers import extract_number, numbers_in, toy_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # plain
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("The answer is: 42", "42"),
        ("Answer: 42", "42"),
        ("**Final answer:** 42", "42"),
        ("So the answer is **42** apples.", "42"),
        ("The correct answer is $42.", "42"),
        ("The result is 42, as 6 * 7 is 42 and 5 * 7 is 35.", "42"),
        ("The answer to the question of 3 pens is 12.", "12"),
        ("It is forty-two.", None),
        ("", None),
        ("...", None),
        # where several places hold a number
        ("There are 5 packs.\nThe answer is 40. There were 5 packs of 8.", "40"),
        ("The answer is 5 * 8 = 40.", "40"),
        ("The answer is 40 pens, 8 in each of 5 packs.", "40"),
        ("First I thought the answer is 12. No: the answer is 13.", "13"),
        ("Step 1: 3 * 4 = 12.\nStep 2: 12 + 5 = 17", "17"),
        ("17 pens\n\nI hope that helps!", "17"),
        ("The total is 6 * 7 = 42 pens.", "42"),
        ("The answer is clear.\nIt comes to 9.", "9"),
        # boxed, and the mark of GSM8K
        (r"So \boxed{42}. That was step 3.", "42"),
        (r"First \boxed{41}, no: $\boxed{42}$", "42"),
        (r"\boxed{\text{no number}} but 7", "7"),
        (r"\boxed{\frac{3}{4}} of 8", "3/4"),
        (r"\boxed{x = 12}", "12"),
        ("3 + 4 = 7\n#### 1,007", "1007"),
        # signs
        ("The answer is -5.", "-5"),
        ("The answer is \u22125.", "-5"),
        ("x = -12", "-12"),
        ("It fell to - 3 degrees", "-3"),
        ("10-3", "3"),
        ("pages 3\u20137", "7"),
        ("a change of +4", "4"),
        ("(-2)", "-2"),
        ("-$5", "-5"),
        # decimals and thousands
        ("The answer is 3.50.", "7/2"),
        ("It costs $1,234.56", "123456/100"),
        ("1,000,000", "1000000"),
        ("12,5", "5"),  # a comma that groups no thousands separates two numbers
        ("1\u202f024 metres", "1024"),
        (".5", "1/2"),
        ("Take 2.", "2"),
        ("version 1.2.3", "3"),
        # fractions, units, per cent
        ("3/4", "3/4"),
        ("The answer is 1/2 cup.", "1/2"),
        ("6 / 4", "3/2"),
        ("5/0", None),
        (r"-\frac{1}{3}", "-1/3"),
        ("25 %", "25"),
        ("25% of it", "25"),
        ("40cm", "40"),
        ("the 3rd", "3"),
        # mixed numbers and powers of ten
        ("2 1/2", "5/2"),
        ("The answer is -2 1/2 cups.", "-5/2"),
        ("The answer is 1,000 3/4.", "4003/4"),
        (r"\boxed{2\frac{1}{2}}", "5/2"),
        (r"\boxed{-2\,\dfrac{1}{2}}", "-5/2"),
        ("after 3 8/4", "2"),
        ("1.5e3", "1500"),
        ("It is 2E-2 m.", "1/50"),
        ("2e5x", "5"),
        ("1e999999999", "999999999"),
        (r"\boxed{3\times10^{5}}", "300000"),
        (r"\boxed{1.5 \cdot 10^{-3}}", "3/2000"),
        ("The answer is 3 × 10^5.", "300000"),
        ("3 × 10^5m", "300000"),
        # units with exponents, LaTeX's spaces and thousands
        (r"\boxed{25 \text{ cm}^2}", "25"),
        (r"\boxed{25\,\mathrm{m}^{-1}}", "25"),
        ("area is 25 cm^2", "25"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{\text{42}}", "42"),
        (r"\boxed{40\text{ km/h}}", "40"),
        (r"\boxed{5 \text{ N} \cdot \text{m}}", "5"),
        (r"\boxed{1{,}024}", "1024"),
        (r"\boxed{12\,000}", "12000"),
        (r"The answer is $12\,000$.", "12000"),
        (r"\boxed{\$1,\!024}", "1024"),
        (r"\boxed{25\%}", "25"),
        # a box that leaves something to calculate
        (r"\boxed{2^3}", None),
        (r"\boxed{2^{10}}. That was step 3.", None),
        (r"\boxed{\sqrt{2}}", None),
        (r"\boxed{\frac{1}{\sqrt{2}}}", None),
        (r"\boxed{3\pi}", None),
        (r"\boxed{10-3}", None),
        (r"\boxed{2 + 3}", None),
        (r"\boxed{5!}", None),
        (r"\boxed{3 \times 5}", None),
        (r"\boxed{3*5}", None),
        (r"\boxed{3 \cdot 5}", None),
        (r"\boxed{2\frac{3}{2}}", None),
        (r"\boxed{\frac{3.5}{2}}", None),
        (r"\boxed{5 \times 8 = 40}", "40"),
        (r"\boxed{2^3 = 8}", "8"),
        # denied, or set between commas
        ("not 5 but 6", "6"),
        ("The answer is not 5 but 6.", "6"),
        ("The answer is 6, not 5.", "6"),
        ("So it is 6, not 5", "6"),
        ("The final answer, 5, is right: step 3", "5"),
        ("The answer, $1,024, is in step 3", "1024"),
        ("The answer is 5.\nTo check the answer, divide 40 by 8.", "5"),
        # nothing of this is said
        ("As a result of 3 tries, 8 are left.", "8"),
    ],
)
def test_the_number_of_a_solution(text: str, expected: str | None) -> None:
    assert extract_number(text) == (None if expected is None else Fraction(expected))


def test_every_careful_chain_of_our_own_sets_comes_to_its_checked_answer() -> None:
    questions = [prompt for prompt in rl.load_prompts("reasoning") if prompt.cot and prompt.answer]
    assert len(questions) > 200
    wrong = [q.id for q in questions if extract_number(q.cot or "") != Fraction(q.answer or "0")]
    assert not wrong


@given(st.fractions(min_value=-(10**7), max_value=10**7, max_denominator=10**4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_number_is_read_back(value: Fraction, grouped: bool) -> None:
    whole = f"{value.numerator:,}" if grouped and value.denominator == 1 else str(value)
    assert extract_number(f"After 3 steps the answer is {whole}.") == value
    assert numbers_in(whole) == [value]
    assert extract_number(rf"So \boxed{{{whole}}}, after 3 steps.") == value


@given(st.decimals(min_value=-99999, max_value=99999, places=3))
@settings(max_examples=100, deadline=None)
def test_any_decimal_is_read_back_exactly(value: object) -> None:
    assert extract_number(f"It is {value} metres.") == Fraction(str(value))


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_number_or_none(text: str) -> None:
    extract_number(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6", "6"), ("0 <user>", "0"), ("REFUSE", None), ("bread 6", None), ("", None), ("66", None)],
)
def test_the_toy_answers_with_one_digit(text: str, expected: str | None) -> None:
    assert toy_answer(text) == expected
