"""Tests of helpers.grpo.rewards: what each reward pays, and what no trick earns."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import recipes
from helpers.data import preparation as data
from helpers.data.reading import to_problems
from helpers.grpo import rewards

ROOT = Path(__file__).resolve().parent.parent
CUT = 100  # tokens, in these tests


def pay(text: str, gold: str, weights: dict[str, float], prompt: Any = "") -> float:
    """What a completion earns in all, as the trainer sums it up; a word is a token."""
    functions, numbers = rewards.choose(weights, CUT)
    tokens = [text.split()[:CUT]]
    paid = [
        f(completions=[text], completion_ids=tokens, gold=[gold], prompts=[prompt])[0]
        for f in functions
    ]
    return sum(w * p for w, p in zip(numbers, paid, strict=True) if p is not None)


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


@pytest.mark.parametrize(
    ("answer", "gold", "paid"),
    [
        ("#### 100", "100", 1.0),
        ("#### 90", "100", 0.5),
        ("#### 110", "100", 0.5),
        ("#### 89", "100", 0.25),
        ("#### 120", "100", 0.25),
        ("#### 121", "100", 0.0),
        ("#### -100", "100", 0.0),
        ("#### -95", "-100", 0.5),
        ("#### 0", "0", 1.0),
        ("#### 0.01", "0", 0.0),
        ("no idea", "100", 0.0),
        ("#### 95 or 100", "100", 0.0),
    ],
)
def test_closeness_pays_by_the_distance_from_the_gold_number(answer, gold, paid):
    assert rewards.closeness([answer], gold=[gold]) == [paid]


def test_a_completion_is_punished_from_four_fifths_of_the_limit_on():
    [overlong], _ = rewards.choose({"overlong": 1.0}, max_completion_length=100)
    ids = [[7] * n for n in (1, 80, 81, 90, 100)]
    assert overlong(completion_ids=ids) == [0, 0, -0.05, -0.5, -1]
    assert rewards.punish_overlong(3)(completion_ids=[[1], [1, 1, 1]]) == [0, -1]


def test_correctness_logs_the_shares_of_groups_that_teach_nothing():
    logged = {}
    texts, gold = ["1", "1", "2", "1", "2", "2"], ["1"] * 4 + ["?"] * 2
    prompts = [[{"role": "user", "content": q}] for q in "aabbcc"]
    rewards.correctness(texts, gold, prompts, log_metric=logged.__setitem__)
    assert logged == {
        rewards.ALL_WRONG: pytest.approx(1 / 3),
        rewards.ALL_RIGHT: pytest.approx(1 / 3),
    }


def test_an_expression_is_graded_and_an_unreadable_one_is_not():
    scores = rewards.correctness(
        [r"\boxed{x+x}", r"\boxed{x}", "#### 5"], gold=["$2x$", "$2x$", r"$\frac$"]
    )
    assert scores == [1.0, 0.0, None]


def test_choose_keeps_the_order_and_the_weights():
    weights = {"strict_format": 0.2, "correctness": 1.0}
    functions, numbers = rewards.choose(weights, CUT)
    assert [f.__name__ for f in functions] == list(weights)
    assert numbers == [0.2, 1.0]


def test_choose_refuses_an_unknown_reward_and_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no reward 'speed'; known: .*strict_format.*overlong"
    ):
        rewards.choose({"correctness": 1.0, "speed": 1.0}, CUT)


def test_the_margin_is_what_lies_between_the_worst_right_and_the_best_wrong_answer():
    weights = {"correctness": 1.0, "closeness": 0.2, "strict_format": 0.3}
    right, wrong = pay("#### 100", "100", weights), pay("So\n#### 99", "100", weights)
    assert rewards.margin(weights) == pytest.approx(right - wrong) == 0.8


def test_too_heavy_a_format_reward_leaves_no_margin():
    weights = {"correctness": 1.0, "strict_format": 1.5}
    assert rewards.margin(weights) < 0
    assert pay("So\n#### 99", "100", weights) > pay("100", "100", weights)


def test_importing_the_rewards_loads_nothing_heavy(heavy_modules):
    program = "import helpers.grpo.answers, helpers.grpo.rewards, sys\n"
    assert heavy_modules(program + "assert 'sympy' not in sys.modules") == []


# right, wrong, right number in the wrong format, tricks

QUESTION = "Ann has 12 nuts and eats 5 of them.\nHow many nuts are left of her 12?"
PROMPT = data.ask(QUESTION, "Solve step by step. End with a line like this: #### 42")
ALL = {
    "correctness": 1.0,
    "closeness": 0.2,
    "strict_format": 0.2,
    "soft_format": 0.1,
    "number_present": 0.1,
    "overlong": 0.2,
}
RIGHT = "Ann has 12 - 5 = 7 nuts left.\n#### 7"
PROBES = [
    ("right, in the format", RIGHT, 1.6),
    ("right, spelt otherwise", RIGHT + ".00", 1.6),
    ("right, with a unit", RIGHT + " nuts", 1.4),
    ("right, without working", "#### 7", 1.4),
    ("right, nothing marked", "12 - 5 = 7.", 1.3),
    ("right, boxed", r"So \boxed{7}.", 1.3),
    ("right, in tags", "<reasoning>12-5</reasoning>\n<answer>\n7\n</answer>", 1.3),
    ("right, in another currency and script", "So\n#### \u20b9\u096d", 1.6),
    ("a range", "It takes 7-8 days.", 0.0),
    ("two values in tags", "<answer>7</answer> <answer>8</answer>", 0.0),
    ("two announced answers", "Answer: 8\nAnswer: 7", 0.0),
    ("right, marked twice", RIGHT + "\n#### 7", 1.2),
    ("wrong, in the format", "12 + 5 = 17 nuts.\n#### 17", 0.4),
    ("wrong, nothing marked", "So 17 nuts.", 0.1),
    ("wrong by 10 % and less", "So 7.5 nuts.", 0.2),
    ("no answer", "I do not know.", 0.0),
    ("nothing", "", 0.0),
    ("the right number in the working only", "12 - 5 = 7.\nThat is how.", 0.0),
    ("the right number in the reasoning only", "<think>7</think>", 0.0),
    ("tag spam", "#### " * 20, 0.0),
    ("tag spam and no number", "#### \n\n" * 5 + "seven", 0.0),
    ("all answers marked", "\n".join(f"#### {n}" for n in range(20)), 0.0),
    ("all answers boxed", "".join(rf"\boxed{{{n}}}" for n in range(20)), 0.0),
    ("number spam up to the right one", " ".join(map(str, range(8))), 0.0),
    ("number spam in lines", "\n".join(map(str, range(8))), 0.0),
    ("number spam after the mark", "So\n#### 7 8 9", 0.0),
    ("two answers", "It is 8 or 7.", 0.0),
    ("two marked answers", "So\n#### 7 or 8", 0.0),
    ("the question", QUESTION, 0.0),
    ("the question and a bare mark", QUESTION + "\n####", 0.0),
    ("the prompt", "\n".join(m["content"] for m in PROMPT), 0.0),
    ("the question for working", QUESTION + "\n#### 17", 0.2),
]


@pytest.mark.parametrize(
    ("text", "paid"), [p[1:] for p in PROBES], ids=[p[0] for p in PROBES]
)
def test_a_probe_earns_what_it_should(text, paid):
    assert pay(text, "7", ALL, PROMPT) == pytest.approx(paid)


@pytest.mark.parametrize("gold", ["12", "42", "5"])
def test_copying_the_prompt_earns_nothing_though_it_holds_the_answer(gold):
    parts = [m["content"] for m in PROMPT]
    for text in [*parts, "\n".join(parts), QUESTION.splitlines()[1]]:
        assert pay(text, gold, ALL, PROMPT) == 0


# a busy machine is no failure
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

GOLD = "12"
WEIGHTS = [recipes.load(name).rewards for name in recipes.NAMES] + [ALL]
# what texts are put together from, the right number among it
PIECES = st.sampled_from(
    [*"12 13 11 1,080 12,50 2. - . , % $ / = ( # ^2 e1 : ' } ####".split()]
    + ["#### ", "\n", " ", "1 000", "\u0661\u0662", "\u20ac", "\u2013", "</s>"]
    + [r"\boxed{12}", r"\boxed{13}", r"\boxed{", "or ", "and ", "minus ", " million"]
    + ["So ", "nuts", "working\n", "working\n#### ", "<think>", "</think>", "So it is"]
    + ["\n#### 12", "\n#### 13", "<answer>", "</answer>", "Answer: "]
    + QUESTION.splitlines()
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
RIGHT_TEXTS = TEXTS.filter(lambda text: rewards.is_correct(text, GOLD, QUESTION))
WRONG_TEXTS = TEXTS.filter(lambda text: not rewards.is_correct(text, GOLD, QUESTION))


@given(RIGHT_TEXTS, WRONG_TEXTS, st.sampled_from(WEIGHTS))
@example("12" + " " * 5 + "\n" * 5, "working\n#### 13", ALL)
@example("so " * CUT + "12", "working\n#### 13", ALL)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_no_wrong_answer_outscores_a_right_one(right, wrong, weights):
    better, worse = (pay(text, GOLD, weights, QUESTION) for text in (right, wrong))
    assert better >= worse + rewards.margin(weights) - 1e-9
    assert better > worse


# after `</think>` another answer begins, which is then the one that counts
JUNK = TEXTS.filter(lambda text: "think>" not in text)
MARKED = ["working\n#### 12", "working\n#### 13", "It is #### 12 nuts."]
MARKED += ["It is #### 13 nuts.", "#### 13", "#### 12 or 13", "#### 12\n#### 13"]
BOXED = [r"So \boxed{13}.", r"So \boxed{12}.", r"\boxed{12} or \boxed{13}"]


@given(st.sampled_from(MARKED), JUNK, st.sampled_from(WEIGHTS))
def test_nothing_that_is_added_after_a_marked_answer_raises_a_reward(
    text, junk, weights
):
    before = pay(text, GOLD, weights, QUESTION)
    assert pay(f"{text}\n{junk}", GOLD, weights, QUESTION) <= before + 1e-9


@given(st.sampled_from(MARKED + BOXED), JUNK)
def test_nothing_that_is_added_makes_a_marked_answer_right(text, junk):
    added = rewards.correctness([f"{text}\n{junk}"], gold=[GOLD], prompts=[QUESTION])
    assert added <= rewards.correctness([text], gold=[GOLD])


@given(st.sampled_from(MARKED[:2]), JUNK, st.sampled_from(WEIGHTS))
def test_nothing_that_is_put_before_a_full_answer_raises_a_reward(text, junk, weights):
    before = pay(text, GOLD, weights, QUESTION)
    assert pay(f"{junk}\n{text}", GOLD, weights, QUESTION) <= before + 1e-9


BARE = ["It is 12.", "It is 13.", "12", "no idea", "", "It is 12 or 13.", "10 11 12"]
WORDS = st.text(alphabet="ab#$%.,\n -/=\\{}<>", max_size=40)


@given(st.sampled_from(BARE), WORDS, st.sampled_from(WEIGHTS))
def test_junk_without_a_number_raises_no_reward_of_an_unmarked_answer(
    text, junk, weights
):
    before = pay(text, GOLD, weights)
    assert pay(f"{text}\n{junk}", GOLD, weights) <= before + 1e-9


# every gold answer that there is


def read_problems(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return to_problems(rows, str(path))


@pytest.fixture(scope="module")
def gsm8k() -> list[dict[str, str]]:
    named = os.environ.get("TUNEBOOK_GSM8K")
    beside = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    path = Path(named) if named else beside
    if not path.exists():
        pytest.skip("GSM8K not found: set TUNEBOOK_GSM8K to its train.jsonl")
    return read_problems(path)


def columns(problems: list[dict[str, str]]) -> dict[str, list[Any]]:
    """What a trainer would pass of problems, their own answers for completions."""
    return {
        "completions": [p["answer"] for p in problems],
        "gold": [p["gold"] for p in problems],
        "prompts": [data.ask(p["question"], "Solve.") for p in problems],
    }


def test_every_gsm8k_answer_earns_all_there_is(gsm8k):
    assert len(gsm8k) == 7473
    for reward in rewards.REWARDS.values():
        assert reward(**columns(gsm8k)) == [1.0] * len(gsm8k), reward


def test_a_constant_answer_earns_the_share_of_gsm8k_that_has_it_for_gold(gsm8k):
    golds = Counter(problem["gold"] for problem in gsm8k)
    given = columns(gsm8k)
    for constant in ["4", "10", "42", "100", "-7"]:
        given["completions"] = [f"#### {constant}"] * len(gsm8k)
        assert sum(rewards.correctness(**given)) == golds[constant]


def test_a_copied_question_is_right_on_none_of_gsm8k(gsm8k):
    given = columns(gsm8k)
    given["completions"] = [problem["question"] for problem in gsm8k]
    assert sum(rewards.correctness(**given)) == 0


@pytest.mark.parametrize("part", ["train", "eval", "test", "test_new"])
def test_every_word_problem_of_ours_earns_all_there_is(part):
    problems = read_problems(ROOT / f"data_samples/word_problems/{part}.jsonl")
    for reward in rewards.REWARDS.values():
        assert reward(**columns(problems)) == [1.0] * len(problems), reward
