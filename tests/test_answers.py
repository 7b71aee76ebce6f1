"""Tests of helpers.grpo.answers: what an answer is, and which are right."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.grpo import answers

TABLE = json.loads(Path(__file__).with_name("answers.json").read_text("utf-8"))


CASES = [
    pytest.param(function, text, values, id=f"{rule}: {text[:40]!r}")
    for function, rules in TABLE.items()
    for rule, rows in rules.items()
    for text, *values in rows
]


@pytest.mark.parametrize(("function", "text", "values"), CASES)
def test_a_text_is_read_as_in_the_table(function, text, values):
    *gold, expected = values
    if isinstance(expected, str):
        expected = Fraction(expected)
    assert getattr(answers, function)(text, *gold) == expected


QUESTION = "Ann has 12 nuts and eats 5 of them.\nHow many nuts are left of her 12?"
INSTRUCTION = "Solve step by step. End with a line like this: #### 42"


@pytest.mark.parametrize(
    ("text", "gold", "prompt", "right"),
    [
        (QUESTION, "12", "", True),
        (QUESTION, "12", f"Solve this. {QUESTION}", False),
        ("  How many nuts are left  of her 12?", "12", QUESTION, False),
        (f"{QUESTION}\n12 - 5 = 7\n#### 7", "7", QUESTION, True),
        (INSTRUCTION, "42", INSTRUCTION, False),
        ("42", "42", INSTRUCTION, True),  # short, though the prompt holds it
        ("It is #### 42", "42", f"{INSTRUCTION}\nIt is #### 42", True),
    ],
)
def test_what_is_copied_from_the_prompt_is_no_answer(text, gold, prompt, right):
    assert answers.is_correct(text, gold, prompt) is right


REPEATED = ["#### ", "1 ", "1, ", "1 or ", r"\boxed{", " ", "(", "=", "a\n", "100 "]
REPEATED += ["<think>", "</think>", "#### 5 a ", "1,", "1.", "a1", "10^", "$ "]
REPEATED += ["- ", "* ", "<answer>", "answer is ", "#### a: ", "x = ", "5 k", "\u00b2"]
REPEATED += ["\u0661", r"\frac{1}{", "1 and 1/", "<|", "minus ", "1:", "_", "\u5143"]
LONG = [piece * 4000 + end for piece in REPEATED for end in ["", "!", "5"]]
LONG += ["#### 5" + piece * 20000 + "!" for piece in [" ", " a", "(", "-", "9", "\n"]]


@pytest.mark.parametrize("text", LONG)
def test_no_long_text_keeps_the_parser_busy(text):
    started = time.process_time()
    answers.is_correct(text, "5", prompt="How many are 2 and 3?")
    answers.has_strict_format(text)
    answers.has_soft_format(text)
    assert time.process_time() - started < 5


# a busy machine is no failure
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@given(st.text() | st.text(alphabet="#0123456789,./$%- \n\\boxed{}", max_size=60))
def test_no_text_breaks_the_parsers(text):
    answers.parse_number(text)
    answers.parse_gold(text)
    answers.extract_answer(text)
    answers.has_strict_format(text)


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
LINES = ["It is {}.", "{}", "2 + 3\nSo we have {} in all", "= {}</s>"]
LINES += ["\u7b54\u6848\u662f{}\u3002"]


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
        folded = answers.clean(unit)
        assume(not answers.SCALE.match(folded) and not answers.BROKEN.match(folded))
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


FORMS = ["{}:{}", "{}-{}", "{}\u2013{}", "{}~{}", "{}..{}", "{}h{}", "{}'{}", "{}_{}"]
FORMS += ["{}:{}:{}", "{}/{}/{}", "{}.{}.{}", "{}-{}-{}", "{} or {}", "{}\uff1a{}"]
FORMS += ["{}\u221a{}", "{} hours and {} minutes", "{}ft {}in", "\u00b1{}", "\u221a{}"]
FORMS += ["{}\u03c0", "{}^n", "{}{}^", "{} and a half", "{} million {} thousand"]
FORMS += ["{}\u20ac-{}\u20ac"]


@given(
    st.lists(st.integers(1, 3000), min_size=3, max_size=3, unique=True).map(sorted),
    st.sampled_from(FORMS),
    st.sampled_from(["", "\u20ac", " \u5143", " days", "%"]),
    st.sampled_from(MARKS[:-2] + LINES[:3]),
)
@settings(max_examples=600)
def test_a_part_of_a_time_a_range_or_a_date_is_no_answer(parts, form, unit, around):
    answer = answers.extract_answer(around.format(form.format(*parts) + unit))
    assert answer not in parts
