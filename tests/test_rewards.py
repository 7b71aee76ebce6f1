"""Tests of helpers.grpo.rewards: what each reward pays, and what no trick earns."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import recipes
from helpers.data.formats import ask
from helpers.grpo import rewards
from helpers.grpo.answers import is_correct
from tests.rows import to_problems

ROOT = Path(__file__).resolve().parent.parent
CUT = 100  # tokens, in these tests


def pay(text, gold, weights, prompt=""):
    """What a completion earns in all, as the trainer sums it up; a word is a token."""
    functions, numbers = rewards.choose(weights, CUT)
    tokens = [text.split()[:CUT]]
    paid = [
        f(completions=[text], completion_ids=tokens, gold=[gold], prompts=[prompt])[0]
        for f in functions
    ]
    return sum(w * p for w, p in zip(numbers, paid, strict=True) if p is not None)


@pytest.mark.parametrize(
    ("answer", "gold", "paid"),
    [
        ("#### 100", "100", 1.0),
        ("#### 90", "100", 0.5),
        ("#### 89", "100", 0.25),
        ("#### 121", "100", 0.0),
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


def test_a_gold_answer_that_is_no_number_is_not_graded():
    texts, gold = [r"\boxed{x}", "#### 5"], ["$x$", "5"]
    assert rewards.correctness(texts, gold=gold) == [None, 1.0]
    assert rewards.closeness(texts, gold=gold) == [None, 1.0]


def test_importing_the_rewards_loads_nothing_heavy(heavy_modules):
    program = "import helpers.grpo.rewards, sys\nassert 'sympy' not in sys.modules"
    assert heavy_modules(program) == []


# right, wrong, right number in the wrong format, tricks

QUESTION = "Ann has 12 nuts and eats 5 of them.\nHow many nuts are left of her 12?"
PROMPT = ask(QUESTION, "Solve step by step. End with a line like this: #### 42")
ALL = {"correctness": 1.0, "closeness": 0.2, "strict_format": 0.2, "soft_format": 0.1}
ALL |= {"number_present": 0.1, "overlong": 0.2}
RIGHT = "Ann has 12 - 5 = 7 nuts left.\n#### 7"
PROBES = [
    ("right, in the format", RIGHT, 1.6),
    ("right, spelt otherwise", RIGHT + ".00", 1.6),
    ("right, with a unit", RIGHT + " nuts", 1.4),
    ("right, nothing marked", "12 - 5 = 7.", 1.3),
    ("right, in another currency and script", "So\n#### \u20b9\u096d", 1.6),
    ("a range", "It takes 7-8 days.", 0.0),
    ("right, marked twice", RIGHT + "\n#### 7", 1.2),
    ("wrong, in the format", "12 + 5 = 17 nuts.\n#### 17", 0.4),
    ("wrong, nothing marked", "So 17 nuts.", 0.1),
    ("nothing", "", 0.0),
    ("the right number in the working only", "12 - 5 = 7.\nThat is how.", 0.0),
    ("tag spam", "#### " * 20, 0.0),
    ("all answers marked", "\n".join(f"#### {n}" for n in range(20)), 0.0),
    ("all answers boxed", "".join(rf"\boxed{{{n}}}" for n in range(20)), 0.0),
    ("number spam up to the right one", " ".join(map(str, range(8))), 0.0),
    ("number spam after the mark", "So\n#### 7 8 9", 0.0),
    ("two marked answers", "So\n#### 7 or 8", 0.0),
    ("the question", QUESTION, 0.0),
    ("the prompt", "\n".join(m["content"] for m in PROMPT), 0.0),
    ("the question for working", QUESTION + "\n#### 17", 0.2),
]


@pytest.mark.parametrize(("name", "text", "paid"), PROBES)
def test_a_probe_earns_what_it_should(name, text, paid):
    assert pay(text, "7", ALL, PROMPT) == pytest.approx(paid)


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
RIGHT_TEXTS = TEXTS.filter(lambda text: is_correct(text, GOLD, QUESTION))
WRONG_TEXTS = TEXTS.filter(lambda text: not is_correct(text, GOLD, QUESTION))


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
MARKED += [
    r"So \boxed{13}.",
    r"So \boxed{12}.",
    "It is #### 13 nuts.",
    "#### 13",
    "#### 12 or 13",
    "#### 12\n#### 13",
]
BARE = ["It is 12.", "It is 13.", "12", "no idea", "", "It is 12 or 13.", "10 11 12"]
WORDS = st.text(alphabet="ab#$%.,\n -/=\\{}<>", max_size=40)
ADDED = [
    ("{text}\n{junk}", st.sampled_from(MARKED), JUNK, QUESTION),
    ("{junk}\n{text}", st.sampled_from(MARKED[:2]), JUNK, QUESTION),
    ("{text}\n{junk}", st.sampled_from(BARE), WORDS, ""),  # words without a number
]


@pytest.mark.parametrize(("form", "texts", "junks", "prompt"), ADDED)
@given(drawn=st.data(), weights=st.sampled_from(WEIGHTS))
def test_nothing_that_is_added_raises_a_reward(
    form, texts, junks, prompt, drawn, weights
):
    text, junk = drawn.draw(texts), drawn.draw(junks)
    paid = pay(form.format(text=text, junk=junk), GOLD, weights, prompt)
    assert paid <= pay(text, GOLD, weights, prompt) + 1e-9


# every gold answer that there is


GSM8K = os.environ.get("TUNEBOOK_GSM8K", ROOT / "../shared/data/gsm8k/train.jsonl")
OURS = [ROOT / f"data_samples/word_problems/{n}.jsonl" for n in ("train", "test_new")]


@pytest.mark.parametrize("path", [Path(GSM8K), *OURS], ids=lambda path: path.stem)
def test_every_answer_of_a_data_set_earns_all_there_is(path):
    if not path.exists():
        pytest.skip("GSM8K not found: set TUNEBOOK_GSM8K to its train.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    problems = to_problems(rows, str(path))
    columns = {
        "completions": [p["answer"] for p in problems],
        "gold": [p["gold"] for p in problems],
        "prompts": [ask(p["question"], "Solve.") for p in problems],
    }
    assert len(problems) == len(rows)
    for reward in rewards.REWARDS.values():
        assert reward(**columns) == [1.0] * len(problems), reward
