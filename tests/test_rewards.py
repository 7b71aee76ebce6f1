"""Tests of helpers.rewards: the answer parser and the reward functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import rewards

ROOT = Path(__file__).resolve().parent.parent


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
    ],
)
def test_a_written_number_has_its_exact_value(text, value):
    assert rewards.parse_number(text) == value


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
    assert rewards.parse_number(text) is None


def test_a_number_too_long_for_python_has_no_value():
    assert rewards.parse_number("9" * 5000) is None
    assert rewards.parse_number("1/" + "9" * 5000) is None


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
    assert rewards.parse_gold(answer) == gold


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{7} and then 8." + "\n#### 9", 9),
        ("#### 9\nThat is 3 more than 6.", 9),
        ("#### 1\n#### 2", 2),
        ("####9", 9),
        ("####\n9", 9),
        ("#### -9", -9),
        ("#### \u22129", -9),
        ("#### $1,080.00", 1080),
        ("#### 9 apples", 9),
    ],
)
def test_a_number_after_the_last_marker_wins(text, value):
    assert rewards.extract_answer(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"So \boxed{7}, which is 3 more than 4.", 7),
        (r"First \boxed{6}, then \boxed{7}. Checked 2 times.", 7),
        (r"\boxed{$7$} of 9", 7),
        (r"\boxed{\$7} of 9", 7),
        (r"\boxed{-7} of 9", -7),
        (r"\boxed{ 7 \text{ dollars}} of 9", 7),
        (r"\boxed{7}" + "\n#### no number here, 9", 7),
    ],
)
def test_without_a_marked_number_the_last_box_counts(text, value):
    assert rewards.extract_answer(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So she has 1,080 apples, not 90.", 90),
        ("It costs $1,080.00.", 1080),
        ("The total is **12**.", 12),
        ("#### twelve, that is 12", 12),
        (r"\boxed{x} is 12", 12),
        ("That is 10-5", 5),
        ("A range of 3-4", 4),
        ("10% - 5% = 5%-3", 3),
        ("(10)-5", 5),
        ("x = -5", -5),
        ("x=-5", -5),
        ("(-5)", -5),
        ("2 - 5 = \u22123", -3),
        ("a loss of -$5.", -5),
        ("The answer is...5", 5),
        ("it is .5", Fraction(1, 2)),
        ("1, 2, 3", 3),
        ("24/7 he works 5", 5),
        ("half, or 1/2", Fraction(1, 2)),
    ],
)
def test_without_marker_and_box_the_last_number_counts(text, value):
    assert rewards.extract_answer(text) == value


@pytest.mark.parametrize("text", ["", "none", "####", r"\boxed{x}", "$ - , ."])
def test_a_text_without_digits_gives_no_answer(text):
    assert rewards.extract_answer(text) is None


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
    assert rewards.is_correct(text, gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 3", "2"),
        ("3", "-3"),
        ("12 or 13", "12"),
        ("10 11 12 13 14", "12"),
        ("#### 12 #### 13", "12"),
        ("0.333", "1/3"),
        ("1080", "108"),
        ("no idea", "2"),
    ],
)
def test_another_number_or_none_is_not_correct(text, gold):
    assert not rewards.is_correct(text, gold)


def test_no_answer_is_not_correct_for_a_gold_without_a_number():
    assert not rewards.is_correct("no idea", "?")


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
    assert rewards.has_strict_format(text)


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
    assert not rewards.has_strict_format(text)


def test_correctness_tells_right_wrong_and_ungradable_apart():
    scores = rewards.correctness(["#### 2", "#### 3", "2"], gold=["2", "2", "?"])
    assert scores == [1.0, 0.0, None]


def test_correctness_ignores_the_other_columns_that_a_trainer_passes():
    scores = rewards.correctness(["2"], gold=["2"], prompts=["?"], trainer_state=None)
    assert scores == [1.0]


def test_correctness_refuses_fewer_golds_than_completions():
    with pytest.raises(ValueError, match="shorter"):
        rewards.correctness(["2", "3"], gold=["2"])


def test_every_reward_scores_conversational_completions_like_plain_ones():
    texts = ["1 + 1 = 2\n#### 2", "#### 3", "no idea", "#### 1 #### 2"]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    gold = ["2"] * len(texts)
    for reward in rewards.REWARDS.values():
        assert reward(completions=turns, gold=gold) == reward(
            completions=texts, gold=gold
        )


def test_the_last_message_of_a_conversational_completion_is_scored():
    turns = [
        {"role": "assistant", "content": "#### 1"},
        {"role": "assistant", "content": "#### 2"},
    ]
    assert rewards.correctness([turns], gold=["2"]) == [1.0]


def test_strict_format_scores_one_float_a_completion():
    assert rewards.strict_format(["a\n#### 5", "The answer is 5"]) == [1.0, 0.0]


def test_number_present_pays_for_a_number_but_not_for_marker_spam():
    texts = ["#### 5", "It is 5.", "no idea", "#### 5 #### 6"]
    assert rewards.number_present(texts) == [1.0, 1.0, 0.0, 0.0]


def test_choose_keeps_the_order_and_the_weights():
    weights = {"strict_format": 0.2, "correctness": 1.0}
    functions, numbers = rewards.choose(weights)
    assert [f.__name__ for f in functions] == list(weights)
    assert numbers == [0.2, 1.0]


def test_choose_refuses_an_unknown_reward_and_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no reward 'speed'; known: .*strict_format"):
        rewards.choose({"correctness": 1.0, "speed": 1.0})


def test_importing_the_rewards_does_not_load_torch():
    code = "import sys, helpers.rewards; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0


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
]


@given(cents)
def test_every_spelling_of_a_number_parses_to_it(number):
    for text in spellings(number):
        assert rewards.parse_number(text) == Fraction(number, 100), text


@given(cents, st.sampled_from(CONTEXTS))
def test_a_number_is_right_against_its_gold_in_every_spelling(number, context):
    texts = spellings(number)
    for text in texts:
        assert rewards.is_correct(context.format(text), texts[0])
        assert rewards.is_correct(context.format(texts[0]), text)


@given(cents, cents, st.sampled_from(CONTEXTS))
def test_a_different_number_is_never_right(number, other, context):
    if number == other:
        other += 1
    for text in spellings(number):
        assert not rewards.is_correct(context.format(text), spellings(other)[0])


@given(st.text() | st.text(alphabet="#0123456789,./$%- \n\\boxed{}", max_size=60))
def test_no_text_breaks_the_parsers(text):
    rewards.parse_number(text)
    rewards.parse_gold(text)
    rewards.extract_answer(text)
    rewards.has_strict_format(text)


@given(st.text(alphabet="#0123456789,./$%- \nab", max_size=40))
def test_a_text_in_the_strict_format_always_has_an_answer(text):
    if rewards.has_strict_format("working\n#### " + text):
        assert rewards.extract_answer("working\n#### " + text) is not None


@pytest.fixture(scope="module")
def gsm8k() -> list[str]:
    named = os.environ.get("TUNEBOOK_GSM8K")
    beside = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    path = Path(named) if named else beside
    if not path.exists():
        pytest.skip("GSM8K not found: set TUNEBOOK_GSM8K to its train.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def test_every_gsm8k_answer_is_right_against_its_own_gold(gsm8k):
    golds = [str(rewards.parse_gold(answer)) for answer in gsm8k]
    assert len(golds) > 1000
    assert rewards.correctness(gsm8k, gold=golds) == [1.0] * len(golds)


def test_every_gsm8k_answer_is_in_the_strict_format(gsm8k):
    assert rewards.strict_format(gsm8k) == [1.0] * len(gsm8k)


@pytest.mark.parametrize("constant", ["#### 0", "#### 7", "#### 42", "#### 100"])
def test_a_constant_answer_is_wrong_on_almost_all_of_gsm8k(gsm8k, constant):
    golds = [str(rewards.parse_gold(answer)) for answer in gsm8k]
    scores = rewards.correctness([constant] * len(golds), gold=golds)
    assert sum(scores) / len(scores) < 0.02


def test_not_even_the_commonest_answer_is_right_on_three_percent_of_gsm8k(gsm8k):
    golds = Counter(rewards.parse_gold(answer) for answer in gsm8k)
    assert golds.most_common(1)[0][1] / len(gsm8k) < 0.03


def test_every_sample_problem_is_right_against_itself_and_in_the_strict_format():
    path = ROOT / "data_samples" / "word_problems" / "test.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    golds = [str(rewards.parse_gold(answer)) for answer in answers]
    assert rewards.correctness(answers, gold=golds) == [1.0] * len(answers)
    assert rewards.strict_format(answers) == [1.0] * len(answers)
