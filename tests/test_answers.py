"""Tests of helpers.grpo.answers: what an answer is, and which are right."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.grpo import answers, numerals


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1080", 1080),
        ("1,080", 1080),
        ("1080.00", 1080),
        ("1,080.00", 1080),
        ("$1,080", 1080),
        (r"\$1,080", 1080),
        ("1080%", 1080),
        (r"1080\%", 1080),
        ("1,080.", 1080),
        ("5.", 5),
        ("10%.", 10),
        ("  7\n", 7),
        ("007", 7),
        ("0", 0),
        ("-5", -5),
        ("\u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("-1,080.5", Fraction(-2161, 2)),
        ("2.50", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("$.50", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6/8", Fraction(-3, 4)),
        ("1.5/2", Fraction(3, 4)),
        ("12 apples", 12),
        ("12 apples.", 12),
        ("1.5 km", Fraction(3, 2)),
        ("$10.00 per day", 10),
        ("1,000,000", 1000000),
        ("\u20ac1,080", 1080),
        ("12 km/h", 12),
        ("12 m^2", 12),
        ("12 (dollars)", 12),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2 miles", Fraction(-5, 2)),
    ],
)
def test_a_written_number_has_its_exact_value(text, value):
    assert answers.parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "$",
        "-",
        "five",
        "about 12",
        "12 or 13",
        "10-5",
        "12,34",
        "1,0800",
        "1.2.3",
        "1/2/3",
        "5/0",
        "12:30",
        "--5",
        "#### 5",
        "nan",
        "inf",
    ],
)
def test_what_is_no_single_number_has_no_value(text):
    assert answers.parse_number(text) is None


def test_a_number_too_long_for_python_has_no_value():
    assert answers.parse_number("9" * 5000) is None
    assert answers.parse_number("1/" + "9" * 5000) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2 + 3 = 5 nuts.\n#### 5", 5),
        ("One.\n#### 1\nTwo.\n#### 2", 2),
        ("#### 1,080", 1080),
        ("#### -3", -3),
        ("The answer is 5", None),
        ("#### five", None),
        ("####", None),
    ],
)
def test_the_gold_number_stands_after_the_last_marker(answer, gold):
    assert answers.parse_gold(answer) == gold


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 9\nThat is 3 more than 6.", 9),
        ("2 boxes of 4.\n#### 9\nI checked it 3 times.", 9),
        ("#### 9\n#### 9.0", 9),
        (r"So \boxed{9}, which is 3 more than 6." + "\n#### 9", 9),
        (r"#### \boxed{9}", 9),
        ("#### **9**", 9),
        ("#### 4 + 5 = 9", 9),
        ("#### x = 9", 9),
        ("#### 1. Find the price\n#### 2. Add 5\n#### 9", 9),
        ("### Step 2: 4 + 5\n#### 9", 9),
        ("####9", 9),
        ("####\n9", 9),
        ("#### -9", -9),
        ("#### \u22129", -9),
        ("#### $1,080.00", 1080),
        ("#### 9 apples", 9),
    ],
)
def test_a_number_after_the_marker_is_the_answer(text, value):
    assert answers.extract_answer(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"So \boxed{7}, which is 3 more than 4.", 7),
        (r"\boxed{7}, or again \boxed{7.0}. Checked 2 times.", 7),
        (r"\boxed{x = 7} of 9", 7),
        (r"\boxed{1{,}080} of 9", 1080),
        (r"\boxed{1,\!080} of 9", 1080),
        (r"\boxed{\frac{3}{4}} of 9", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}} of 9", Fraction(-3, 4)),
        (r"\boxed{2\frac{1}{2}} of 9", Fraction(5, 2)),
        (r"\boxed{-\frac12} of 9", Fraction(-1, 2)),
        (r"\boxed{\frac123}", None),
        ("\\boxed{2 1\u20442} of 9", Fraction(5, 2)),
        (r"\boxed{50\%} of 9", 50),
        (r"\boxed{$7$} of 9", 7),
        (r"\boxed{\$7} of 9", 7),
        (r"\boxed{-7} of 9", -7),
        (r"\boxed{ 7 \text{ dollars}} of 9", 7),
        (r"\boxed{7}" + "\n#### no number here, 9", 7),
    ],
)
def test_a_boxed_number_is_the_answer(text, value):
    assert answers.extract_answer(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So she has 1,080 apples, not 90.", 90),
        ("It costs $1,080.00.", 1080),
        ("The total is **12**.", 12),
        ("#### twelve, that is 12", 12),
        (r"\boxed{x} is 12", 12),
        ("That is 10-5", 5),
        ("10% - 5% = 5%-3", 3),
        ("(10)-5", 5),
        ("x = -5", -5),
        ("x=-5", -5),
        ("(-5)", -5),
        ("2 - 5 = \u22123", -3),
        ("a loss of -$5.", -5),
        ("The answer is...5", 5),
        ("it is .5", Fraction(1, 2)),
        ("2 and 3 are 5", 5),
        ("12 - 5 = 7 and 7 + 5 = 12", 12),
        ("It takes 12 m^2.", 12),
        ("First 3.\nThen 3 * 4 = 12 apples.\n\n", 12),
        ("<think>3 or 4?</think>\nIt is 4.", 4),
        ("3 or 4?</think>\nIt is 4.", 4),
        ("24/7 he works 5", 5),
        ("half, or 1/2", Fraction(1, 2)),
    ],
)
def test_without_a_mark_the_last_number_of_the_last_line_counts(text, value):
    assert answers.extract_answer(text) == value


@pytest.mark.parametrize("text", ["", "none", "####", r"\boxed{x}", "$ - , ."])
def test_a_text_without_digits_gives_no_answer(text):
    assert answers.extract_answer(text) is None


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("1 + 1 = 2\n#### 2", "2"),
        ("It costs $1,080.00.", "1080"),
        ("It costs 1080 dollars.", "1,080"),
        ("0.50", "1/2"),
        ("-3", "-3.0"),
    ],
)
def test_an_equal_number_is_correct_however_it_is_written(text, gold):
    assert answers.is_correct(text, gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 3", "2"),
        ("3", "-3"),
        ("13", "12"),
        ("0.333", "1/3"),
        ("1080", "108"),
        ("no idea", "2"),
    ],
)
def test_another_number_or_none_is_not_correct(text, gold):
    assert not answers.is_correct(text, gold)


def test_no_answer_is_not_correct_for_a_gold_without_a_number():
    assert not answers.is_correct("no idea", "?")


@pytest.mark.parametrize(
    "text",
    [
        "2 + 3 = 5\n#### 5",
        "2 + 3 = 5\n\n#### 5\n",
        "2 + 3 = 5\r\n#### 5",
        "Working.\n####5",
        "Working.\n#### -5",
        "Working.\n#### $1,080.00",
        "Working.\n#### 5%",
        "Working.\n#### 5.",
    ],
)
def test_working_and_one_final_marked_number_is_the_strict_format(text):
    assert answers.has_strict_format(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("2 + 3 = 5", id="no marker"),
        pytest.param("#### 5", id="no working"),
        pytest.param("\n \n#### 5", id="only white space for working"),
        pytest.param("Working.\n#### 1\n#### 5", id="two markers"),
        pytest.param("Working. #### 1 #### 5", id="two markers in a line"),
        pytest.param("Working.\n######## 5", id="a doubled marker"),
        pytest.param("Working.\n##### 5", id="one # too many"),
        pytest.param("Working. #### 5", id="marker inside a line"),
        pytest.param("Working.\n#### 5\nThat is all.", id="text after it"),
        pytest.param("Working.\n#### 5 apples", id="a unit after it"),
        pytest.param("Working.\n#### 5 6 7", id="number spam"),
        pytest.param("Working.\n#### 5 . % . %", id="mark spam"),
        pytest.param("Working.\n#### five", id="a word for a number"),
        pytest.param("Working.\n#### 5/0", id="no number after all"),
        pytest.param("#### " * 20 + "5", id="marker spam"),
    ],
)
def test_anything_else_is_not_the_strict_format(text):
    assert not answers.has_strict_format(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("#### 12\n#### 13", id="two marked lines"),
        pytest.param("#### 12 #### 13", id="two marks in a line"),
        pytest.param(r"\boxed{12} \boxed{13}", id="two boxes"),
        pytest.param(r"\boxed{12}" + "\n#### 13", id="a box and a marked line"),
        pytest.param("#### 12 or 13", id="a marked choice"),
        pytest.param("#### 12 13", id="two numbers in a marked line"),
        pytest.param("#### 12, 13", id="a marked list"),
        pytest.param("#### 12-13", id="a marked range"),
        pytest.param(r"\boxed{12, 13}", id="a boxed list"),
        pytest.param(r"\boxed{12 \text{ or } 13}", id="a boxed choice"),
        pytest.param("It is 12 or 13 apples.", id="a choice in words"),
        pytest.param("It takes 12-13 days.", id="a range in words"),
        pytest.param("11 12 13", id="numbers in a row"),
        pytest.param("11, 12, and 13", id="a list in words"),
        pytest.param("11\n12\n13", id="numbers under each other"),
        pytest.param("12 of 13.\n#### 12 of 13", id="a share of something"),
    ],
)
def test_whoever_offers_two_values_has_answered_with_none(text):
    assert answers.extract_answer(text) is None
    assert not answers.is_correct(text, "12")
    assert not answers.is_correct(text, "13")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("3 * 4 = 12 apples.\nThen she goes home.", id="a line before"),
        pytest.param("<think>It is 12.</think>", id="only in the reasoning"),
        pytest.param("<think>\n#### 12\n</think>\nDone.", id="marked in the reasoning"),
        pytest.param("<think>So\n#### 12", id="reasoning that never ends"),
        pytest.param("<reasoning>12</reasoning> Done.", id="the other tag"),
    ],
)
def test_a_number_in_the_reasoning_is_no_final_answer(text):
    assert answers.extract_answer(text) is None
    assert not answers.is_correct(text, "12")


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


def test_without_a_prompt_no_line_is_taken_for_a_copy():
    assert answers.own_words(QUESTION + "\r\n", "") == QUESTION + "\r\n"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"So \boxed{2\sqrt{3}}.", r"$\sqrt{12}$"),
        (r"#### $2\sqrt{3}$", r"$2\sqrt{3}$"),
        (r"\boxed{\frac{x+1}{2}}", r"$\frac{x}{2}+\frac{1}{2}$"),
        (r"\boxed{1+x}", "$x+1$"),
        (r"\boxed{(x+1)(x-1)}", "$x^2-1$"),
    ],
)
def test_an_equal_expression_is_correct_however_it_is_written(text, gold):
    assert answers.is_correct(text, gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        pytest.param(r"\boxed{2\sqrt{2}}", r"$\sqrt{12}$", id="another value"),
        pytest.param(r"It is 2\sqrt{3}", r"$2\sqrt{3}$", id="not marked"),
        pytest.param(r"\boxed{x}\boxed{y}", "$x$", id="two of them"),
        pytest.param(r"\boxed{}", "$x$", id="nothing"),
        pytest.param(r"\boxed{9^{9^{9^{9}}}}", "$3x$", id="an endless one"),
        pytest.param(r"\boxed{" + "+x" * 200 + "}", "$200x$", id="a long one"),
        pytest.param(r"<think>\boxed{x}</think>", "$x$", id="in the reasoning"),
        pytest.param(r"\boxed{3 \cdot 4}", "12", id="a sum for a number"),
        pytest.param(r"\boxed{\sqrt{144}}", "12", id="a root for a number"),
    ],
)
def test_another_expression_is_not_correct(text, gold):
    assert not answers.is_correct(text, gold)


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
from helpers import answers, numerals
def grade():
    assert answers.is_correct(r"So \\boxed{\\frac{3}{4}}", "0.75")
thread = threading.Thread(target=grade)
thread.start(); thread.join()
assert not {"math_verify", "sympy"} & set(sys.modules)
"""
    assert heavy_modules(program) == []


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("2 + 3 = 5\n#### 5", True),
        ("#### 5", True),
        ("It is #### 5 nuts.\nThat is all.", True),
        ("#### $1,080.00", True),
        ("It is 5", False),
        ("#### five", False),
        ("#### 5 #### 5", False),
        ("#### 5\n#### 5", False),
        ("######## 5", False),
        ("#### 5 or 6", False),
        ("####\n5", False),
        ("#### 5/0", False),
        (r"It is \boxed{6}." + "\n#### 5", False),
        ("<think>\n#### 5", False),
    ],
)
def test_the_soft_format_is_one_mark_and_a_number_that_ends_its_line(text, held):
    assert answers.has_soft_format(text) == held


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
def test_a_text_in_the_strict_format_always_has_an_answer(text):
    if answers.has_strict_format("working\n#### " + text):
        assert answers.extract_answer("working\n#### " + text) is not None


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 1.000", 1),
        ("#### 1.000.000 \u20ab", 1000000),
        ("#### 1,00,000", 100000),
        ("#### 1.234,5", Fraction(2469, 2)),
        ("#### 12,50 z\u0142", Fraction(25, 2)),
        ("#### 12,50", None),
        ("#### 0,5", Fraction(1, 2)),
        ("#### \u0663\u066b\u0665", Fraction(7, 2)),
        ("#### 10^3", 1000),
        ("#### 10\u00b3 m\u00b3", 1000),
        ("#### 1.5e3", 1500),
        ("#### 2 \u00d7 10\u207b\u00b2", Fraction(1, 50)),
        (r"\boxed{2 \times 10^{3}}", 2000),
        ("#### 2\u00bd", Fraction(5, 2)),
        ("#### $1.5 million", 1500000),
        ("#### 3\u4e07\u5143", 30000),
        ("#### 60\u5343\u7c73", 60),
        ("#### 300 K", 300),
        ("#### Rs. 500\nfor 3 days", 500),
        ("#### kr 12\nfor 3 days", 12),
        ("#### kr 12,50", Fraction(25, 2)),
        ("#### EUR 1,5", Fraction(3, 2)),
        ("#### A 1,2", None),
        ("#### in 1,2", None),
        ("#### US$18/day", 18),
        ("#### \u2705 12\nafter 3 steps", 12),
        ("The answer is $18 per day, for 7 days.", 18),
        ("#### Total: 18 eggs\nThat took 3 steps.", 18),
        ("#### Step 1\nAdd 5.\n#### Step 2\nSo 12 in all.", 12),
        ("#### 12, or 13", None),
        ("#### 12 (or 13)", None),
        ("#### 12 oder 13", None),
        ("<answer>12\n13</answer>", None),
        ("<answer>12</answer> <answer>13</answer>", None),
        ("Answer: 12\nAnswer: 13", None),
        ("The answer is 12.\nIt took 3 days.", 12),
        ("#### Tom: 5\n#### Ann: 7\nSo 12 in all.", 12),
        ("The rest is - 3.", None),
        ("#### 5" + " million" * 400, None),
    ],
)
def test_a_form_of_another_country_has_its_value_or_none(text, value):
    assert answers.extract_answer(text) == value
