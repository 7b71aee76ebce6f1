"""Tests of the sample data in data_samples."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_samples import generate
from helpers.data.reading import to_conversations
from helpers.evaluation import metrics
from helpers.files import read_rows

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "data_samples"
COUNTS = {"train": 2400, "eval": 200, "test": 400, "test_new": 200}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def problems():
    return {
        name: read_rows(SAMPLES / "word_problems" / f"{name}.jsonl") for name in COUNTS
    }


def numbers(row):
    return tuple(re.findall(r"\d+", row["question"]))


def test_the_problems_are_all_different_and_named_by_their_split(problems):
    assert {name: len(part) for name, part in problems.items()} == COUNTS
    for name in ("id", "question"):
        values = {row[name] for part in problems.values() for row in part}
        assert len(values) == sum(COUNTS.values())
    for split, part in problems.items():
        assert all(re.fullmatch(rf"{split}-\d{{5}}", row["id"]) for row in part)


def test_no_template_is_in_train_and_test_new_and_no_numbers_twice_in_another_set(
    problems,
):
    names = {n: {row["template"] for row in part} for n, part in problems.items()}
    assert names["train"] == names["eval"] == names["test"]
    assert names["train"].isdisjoint(names["test_new"])
    assert len(names["train"]) >= 40 and len(names["test_new"]) >= 10
    counts = Counter(row["template"] for row in problems["train"])
    assert set(counts.values()) == {50}
    keys = {
        split: {(row["template"], *sorted(numbers(row))) for row in part}
        for split, part in problems.items()
    }
    assert keys["train"].isdisjoint(keys["eval"] | keys["test"])
    assert keys["eval"].isdisjoint(keys["test"])


def test_generating_again_gives_the_same_bytes_and_another_seed_others(
    tmp_path, problems
):
    generate.generate(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stored = SAMPLES / "word_problems"
    assert written == {path.name: path.read_bytes() for path in stored.iterdir()}
    assert generate.generate(tmp_path, seed=1)["train"] != problems["train"]
    with pytest.raises(ValueError, match="wrong arithm"):
        generate.check({"question": "How many?", "answer": "2 + 3 = 6.\n#### 6"})


def test_the_general_questions_are_different_short_and_checkable():
    rows = read_rows(SAMPLES / "general.jsonl")
    kinds = [row["id"].partition("-")[0] for row in rows]
    assert len(rows) == len({row["question"] for row in rows}) == 200
    assert len({row["id"] for row in rows}) == 200
    assert set(Counter(kinds).values()) == {40}
    assert len(set(kinds[:5])) == 5 and kinds == kinds[:5] * 40  # the first are mixed
    for row in rows:
        answer = row["answer"]
        # an article, as `A`, would be normalised away
        values = metrics.score(f"{answer.capitalize()}.", answer)
        assert values["exact_match"] and len(answer.split()) <= 2, row
        assert row["question"] not in dict(row["history"])
    for answer in ("yes", "no", "Answer with one word."):  # nothing is always right
        right = [metrics.score(answer, row["answer"])["exact_match"] for row in rows]
        assert sum(right) <= 20
    chats, left_out = to_conversations(rows)
    assert not left_out and all(len(chat) == 10 for chat in chats)


def test_no_general_question_is_in_the_other_samples():
    texts = [path.read_text("utf-8") for path in SAMPLES.rglob("*.jsonl")]
    rows = read_rows(SAMPLES / "general.jsonl")
    assert [r["id"] for r in rows if sum(r["question"] in t for t in texts) > 1] == []
