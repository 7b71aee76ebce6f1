"""Tests of helpers.grpo.answers: what an answer is, and which are right."""

from __future__ import annotations

import json
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.grpo import answers, numerals

TABLE = json.loads(Path(__file__).with_name("answers.json").read_text("utf-8"))


def cases(*functions: str) -> list[Any]:
    """The table's cases of some functions: the function, its text, what it returns."""
    return [
        pytest.param(getattr(answers, function), *case, id=f"{rule}: {case[0][:40]!r}")
        for function in functions
        for rule, rows in TABLE[function].items()
        for case in rows
    ]


@pytest.mark.parametrize(
    ("read", "text", "value"), cases("parse_number", "parse_gold", "extract_answer")
)
def test_a_text_has_the_value_of_the_table(read, text, value):
    assert read(text) == (value and Fraction(value))


@pytest.mark.parametrize(("grade", "text", "gold", "right"), cases("is_correct"))
def test_an_answer_is_right_or_wrong_as_in_the_table(grade, text, gold, right):
    assert grade(text, gold) is right


@pytest.mark.parametrize(
    ("has", "text", "format"), cases("has_strict_format", "has_soft_format")
)
def test_a_text_has_the_format_of_the_table(has, text, format):
    assert has(text) is format


def test_a_number_too_long_for_python_has_no_value():
    assert answers.parse_number("9" * 5000) is None
    assert answers.parse_number("1/" + "9" * 5000) is None


QUESTION = "Ann has 12 nuts and eats 5 of them.\nHow many nuts are left of her 12?"


def test_a_copied_question_is_no_answer_though_it_ends_in_the_right_number():
    assert answers.is_correct(QUESTION, "12")
    assert not answers.is_correct(QUESTION, "12", prompt=f"Solve this. {QUESTION}")
    again = "  How many nuts are left  of her 12?"
    assert not answers.is_correct(again, "12", prompt=QUESTION)


def test_a_copied_instruction_is_no_answer():
    prompt = "Solve step by step. End with a line like this: #### 42"
    assert not answers.is_correct(prompt, "42", prompt=prompt)


@pytest.mark.parametrize("text", ["42", "#### 42", "It is #### 42"])
def test_a_short_right_answer_counts_though_the_prompt_holds_it(text):
    prompt = "End with a line like this: #### 42\nIt is 42. It is #### 42"
    assert answers.is_correct(text, "42", prompt=prompt)


def test_an_answer_after_the_copied_question_counts():
    text = f"{QUESTION}\n12 - 5 = 7\n#### 7"
    assert answers.is_correct(text, "7", prompt=QUESTION)


@pytest.mark.parametrize("gold", ["x+1", "about 12", "$", "$$", "a $5 b"])
def test_words_and_bare_letters_are_no_gold_answer(gold):
    assert answers.parse_number(gold) is None
    assert answers.parse_expression(gold) is None


def test_an_expression_is_refused_outside_the_main_thread():
    caught = []

    def grade():
        try:
            answers.is_correct(r"\boxed{x}", "$x$")
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert "in the main thread only" in caught[0]


def test_numbers_are_graded_in_any_thread_without_a_library(heavy_modules):
    program = """
import sys, threading
from helpers.grpo import answers
def grade():
    assert answers.is_correct(r"So \\boxed{\\frac{3}{4}}", "0.75")
thread = threading.Thread(target=grade)
thread.start(); thread.join()
assert not {"math_verify", "sympy"} & set(sys.modules)
"""
    assert heavy_modules(program) == []


@pytest.mark.parametrize(
    "text",
    [
        *(piece * 4000 for piece in ["#### ", "1 ", "1, ", "1 or ", r"\boxed{", " "]),
        *(
            piece * 4000
            for piece in ["<think>", "</think>", "#### 5 a ", "a\n", "(", "="]
        ),
        *("#### 5" + piece * 20000 + "!" for piece in [" ", " a", "(", "-", "9", "\n"]),
        *(
            piece * 4000 + end
            for piece in ["100 ", "1,", "1.", "a1", "10^", "5 x 10^", "$ ", "- ", "* "]
            + ["<answer>", "answer is ", "#### a: ", "x = ", "5 k", "\u00b2", "\u0661"]
            + [r"\frac{1}{", "1 and 1/", "<|", "minus ", "1:", "_", "\u5143", "5, a "]
            for end in ["", "!", "5"]
        ),
    ],
)
def test_no_long_text_keeps_the_parser_busy(text):
    started = time.process_time()
    answers.is_correct(text, "5", prompt="How many are 2 and 3?")
    answers.has_strict_format(text)
    answers.has_soft_format(text)
    assert time.process_time() - started < 5


# a busy machine is no failure
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

cents = st.integers(min_value=-(10**11), max_value=10**11)


def spellings(number: int) -> list[str]:
    """Write a number of hundredths in the ways that people and models do."""
    sign, whole, rest = "-" * (number < 0), abs(number) // 100, abs(number) % 100
    plain, grouped = f"{whole}.{rest:02}", f"{whole:,}.{rest:02}"
    texts = [plain, grouped, f"${grouped}", f"{plain}0", f"{grouped}%"]
    if rest % 10 == 0:
        texts.append(f"{whole}.{rest // 10}")
    if rest == 0:
        texts += [f"{whole}", f"{whole:,}", f"${whole:,}", f"{whole:,}%"]
    texts = [sign + text for text in texts]
    return [*texts, f"{number}/100", texts[1].replace("-", "\u2212")]


CONTEXTS = [
    "{}",
    "{}.",
    "The answer is {}.",
    "4 + 4 = 8 in all.\n#### {}",
    "#### {}.",
    "Out of 99: \\boxed{{{}}}, as 9 said.",
    "<think>99 or 98</think>\n\n{}",
]


@given(cents)
def test_every_spelling_of_a_number_parses_to_it(number):
    for text in spellings(number):
        assert answers.parse_number(text) == Fraction(number, 100), text


@given(cents, st.sampled_from(CONTEXTS))
def test_a_number_is_right_against_its_gold_in_every_spelling(number, context):
    texts = spellings(number)
    for text in texts:
        assert answers.is_correct(context.format(text), texts[0])
        assert answers.is_correct(context.format(texts[0]), text)


@given(cents, cents, st.sampled_from(CONTEXTS))
def test_a_different_number_is_never_right(number, other, context):
    if number == other:
        other += 1
    for text in spellings(number):
        assert not answers.is_correct(context.format(text), spellings(other)[0])


@given(st.text() | st.text(alphabet="#0123456789,./$%- \n\\boxed{}", max_size=60))
def test_no_text_breaks_the_parsers(text):
    answers.parse_number(text)
    answers.parse_gold(text)
    answers.extract_answer(text)
    answers.has_strict_format(text)


@given(st.text(alphabet="#0123456789,./$%- \nab", max_size=40))
def test_a_text_in_the_strict_format_is_in_the_soft_one(text):
    if answers.has_strict_format("working\n#### " + text):
        assert answers.has_soft_format("working\n#### " + text)


# two laws, over any script: number form x currency or unit x sign x surroundings

DIGITS = ["0123456789", "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669"]
DIGITS += ["".join(chr(zero + n) for n in range(10)) for zero in (0x966, 0xE50, 0xFF10)]
# what parts thousands, and the decimal signs that go with it
SEPARATORS = [("", "."), (",", "."), (" ", "."), (" ", ","), ("\u00a0", ",")]
SEPARATORS += [("\u2009", "."), ("\u202f", ","), ("'", "."), ("\u2019", ".")]
SIGNS = {"": 1, "+": 1, "-": -1, "\u2212": -1, "\u2013": -1, "\uff0d": -1, "minus ": -1}
currencies = st.characters(categories=["Sc"])
letters = st.text(st.characters(categories=["Lu", "Ll", "Lo"]), min_size=2, max_size=6)
symbols = st.sampled_from(["%", "\u00b0C", "m\u00b2", "m^2", "\u33a1", "km/h"])
MARKS = [
    "#### {}",
    "So\n#### {}.\nI checked it 3 times.",
    "#### **{}**",
    "#### {}<|im_end|>",
    "#### {}</s>\n99",
    "#### {}, as 2 and 3 make 5",
    "#### {} (rounded from 17.6)",
    r"It is \boxed{{{}}} of 99",
    r"#### \({}\)",
    "<think>98</think>\n<answer>\n{}\n</answer>",
    "<answer>{}</answer> in 3 steps",
    "**Answer:** {}\n\n---",
    "The answer is {}.\nThat took 3 steps.",
]
LINES = [
    "It is {}.",
    "{}",
    "2 + 3\nSo we have {} in all",
    "\u7b54\u6848\u662f{}\u3002",
    "= {}</s>",
]


@st.composite
def written_numbers(draw):
    """A number as people anywhere write it, and its value."""
    whole, cents = draw(st.integers(0, 10**9)), draw(st.integers(0, 99))
    separator, point = draw(st.sampled_from(SEPARATORS))
    text = f"{whole:,}".replace(",", separator)
    # a comma is decimal only where other groups stand before it
    if cents and (point == "." or whole >= 1000):
        text += f"{point}{cents:02}"
    else:
        cents = 0
    text = text.translate(str.maketrans(DIGITS[0], draw(st.sampled_from(DIGITS))))
    sign = draw(st.sampled_from(sorted(SIGNS)))
    place = draw(
        st.sampled_from(["none", "before", "inside", "after", "unit", "symbol"])
    )
    if place in ("before", "inside"):
        money = draw(currencies) + draw(st.sampled_from(["", " "]))
        if sign == "minus ":
            sign = "-"
        text = money + sign + text if place == "inside" else sign + money + text
    else:
        kinds = {"none": st.just(""), "after": currencies, "unit": letters}
        unit = draw(st.sampled_from(["", " "])) + draw(kinds.get(place, symbols))
        folded = numerals.clean(unit)
        assume(not numerals.SCALE.match(folded) and not numerals.BROKEN.match(folded))
        text = sign + text + unit
    return text, SIGNS[sign] * (whole + Fraction(cents, 100))


@given(written_numbers(), st.sampled_from(MARKS))
@settings(max_examples=400)
def test_a_marked_line_that_holds_one_number_gives_it(number, surroundings):
    text, value = number
    assert answers.extract_answer(surroundings.format(text)) == value


@given(written_numbers(), st.sampled_from(MARKS + LINES))
@settings(max_examples=400)
def test_a_part_of_a_number_is_never_given_for_the_whole(number, surroundings):
    text, value = number
    assert answers.extract_answer(surroundings.format(text)) in (value, None)


@given(
    st.lists(st.integers(1, 3000), min_size=3, max_size=3, unique=True).map(sorted),
    st.sampled_from(
        [
            "{}:{}",
            "{}-{}",
            "{}\u2013{}",
            "{}~{}",
            "{}..{}",
            "{}h{}",
            "{}'{}",
            "{}:{}:{}",
        ]
        + [
            "{}/{}/{}",
            "{}.{}.{}",
            "{}-{}-{}",
            "{} or {}",
            "{}\u20ac-{}\u20ac",
            "{}\u221a{}",
        ]
        + [
            "{}_{}",
            "{} hours and {} minutes",
            "{}ft {}in",
            "\u00b1{}",
            "\u221a{}",
            "{}\u03c0",
        ]
        + ["{}^n", "{}{}^", "{} and a half", "{} million {} thousand", "{}\uff1a{}"]
    ),
    st.sampled_from(["", "\u20ac", " \u5143", " days", "%"]),
    st.sampled_from(MARKS[:-2] + LINES[:3]),
)
@settings(max_examples=600)
def test_a_part_of_a_time_a_range_or_a_date_is_no_answer(parts, form, unit, around):
    answer = answers.extract_answer(around.format(form.format(*parts) + unit))
    assert answer not in parts
