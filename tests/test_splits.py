"""Tests of data.splits: a question stays on its side, and is on one side only."""

from __future__ import annotations

import pytest

from helpers.data.preparation import assert_disjoint, place_of, split
from helpers.errors import DataError

# leaks


def test_disjoint_questions_pass() -> None:
    assert assert_disjoint(["a", "b"], {"test": ["c"], "eval": ["d"]}) is None


def test_a_leak_is_refused_with_the_set_the_count_and_the_question() -> None:
    with pytest.raises(
        DataError, match="^2 questions of test are in the training .* first: 'How many"
    ):
        assert_disjoint(
            ["How many?", "b", "c"], {"eval": ["x"], "test": ["How many?", "y", "c"]}
        )


def test_a_leak_is_found_whatever_the_white_space() -> None:
    with pytest.raises(DataError, match="1 questions of test"):
        assert_disjoint(["How  many\nare left? "], {"test": [" How many are left?"]})


# split

SHARES = {"test_chat": 0.1, "eval": 0.05}


def questions(count: int, word: str = "Question") -> list[str]:
    return [f"{word} {i}?" for i in range(count)]


def sides(asked: list[str], shares: dict[str, float]) -> dict[str, list[str]]:
    """Returns the questions of each side."""
    found: dict[str, list[str]] = {}
    names = split(map(place_of, asked), shares)
    for question, name in zip(asked, names, strict=True):
        found.setdefault(name, []).append(question)
    return found


def test_a_split_has_about_the_shares_that_are_asked_for() -> None:
    found = sides(questions(4000), SHARES)
    assert len(found["test_chat"]) == pytest.approx(400, abs=60)
    assert len(found["eval"]) == pytest.approx(200, abs=45)
    assert sum(map(len, found.values())) == 4000


def test_a_row_keeps_its_side_when_data_are_added() -> None:
    before = sides(questions(300), SHARES)
    after = sides(questions(300, "Another") + questions(300), SHARES)
    for name, part in before.items():
        assert set(part) <= set(after[name])


def test_a_row_keeps_its_side_in_another_order() -> None:
    asked = questions(300)
    before, after = sides(asked, SHARES), sides(asked[::-1], SHARES)
    assert {n: sorted(q) for n, q in before.items()} == {
        n: sorted(q) for n, q in after.items()
    }


def test_the_test_rows_stay_when_the_eval_share_changes() -> None:
    first = sides(questions(300), SHARES)
    second = sides(questions(300), {**SHARES, "eval": 0.2})
    assert first["test_chat"] == second["test_chat"]


@pytest.mark.parametrize("shape", ["  Same? ", "Same?\n", "\tSame?", " Same?"])
def test_a_question_in_other_white_space_goes_to_the_same_side(shape: str) -> None:
    found = sides(["Same?", shape, *questions(200)], {"eval": 0.5})
    assert sorted(len({"Same?", shape} & set(part)) for part in found.values()) == [
        0,
        2,
    ]


def test_a_question_in_other_words_may_go_to_another_side() -> None:
    assert place_of("What is a prime?") != place_of("what is a prime")


def test_a_share_of_few_rows_gets_at_least_one() -> None:
    found = sides(questions(12), {"test_chat": 0.001, "eval": 0.001})
    assert {name: len(part) for name, part in found.items()} == {
        "train": 10, "test_chat": 1, "eval": 1
    }  # fmt: skip


def test_all_that_ask_the_same_are_taken_for_a_small_share() -> None:
    asked = [question for question in questions(12) for _ in range(3)]
    assert len(sides(asked, {"eval": 0.001})["eval"]) == 3


def test_the_rows_of_a_small_share_are_those_of_the_lowest_place() -> None:
    few, many = (sides(questions(12), {"eval": share}) for share in (0.001, 0.3))
    assert set(few["eval"]) <= set(many["eval"])


def test_a_split_without_shares_is_all_training() -> None:
    assert split([0.1, 0.9], {}) == ["train", "train"]


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(
        DataError, match="^2 different questions, of which test_chat an"
    ):
        sides(questions(2), SHARES)
