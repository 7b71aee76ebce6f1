"""Tests of data.reading: rows are filtered in words, bad ones refused by number."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.data.preparation import Reader, to_conversations, to_problems
from helpers.errors import DataError
from tests.rows import ROWS, messages_row, pair, problem

# bad rows


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("assistant", "user"), "no assistant turn"),
        (("user", "assistant", "assistant"), "turns do not alternate"),
        (("user", "system", "assistant"), "turns do not .*: user system assist"),
        (("user", "tool", "assistant"), "role 'tool' is not system, user or assist"),
        (("system", "user"), "no assistant turn"),
        ((), "no assistant turn"),
    ],
)
def test_turns_in_a_wrong_order_are_refused(
    roles: tuple[str, ...], reason: str
) -> None:
    good = messages_row("user", "assistant")
    with pytest.raises(DataError, match=f"1 of 2 rows .*; row 2: {reason}"):
        to_conversations([good, messages_row(*roles)])


def test_turns_in_order_with_a_system_turn_first_are_fine() -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    found = to_conversations([messages_row(*roles)])[0][0]
    assert tuple(message["role"] for message in found) == roles


@pytest.mark.parametrize("value", [None, {"a": "b"}, float("nan"), [], ["a", "b"]])
def test_content_that_is_no_text_is_refused(value: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": value}]}]
    with pytest.raises(DataError, match="row 1: the user turn's content is not text"):
        to_conversations(rows)


def test_a_turn_without_content_is_refused_by_the_fields_it_has() -> None:
    rows = [{"messages": [{"role": "user"}]}]
    with pytest.raises(DataError, match="row 1: a turn has no content: turn 1 has rol"):
        to_conversations(rows)


def test_turns_that_are_no_list_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: messages is not a list of turns: null"):
        to_conversations([{"messages": None}])


def test_only_the_first_three_bad_rows_are_shown_and_all_are_counted() -> None:
    rows = [messages_row("user")] * 5 + [messages_row("user", "assistant")]
    with pytest.raises(DataError) as caught:
        to_conversations(rows, source="mine.jsonl")
    message = str(caught.value)
    assert message.startswith("mine.jsonl: 5 of 6 rows cannot be used")
    assert message.count("row ") == 3


def test_empty_answers_are_left_out_and_counted() -> None:
    rows = [
        *ROWS,
        {"prompt": "a", "completion": ""},
        {"prompt": "b", "completion": "\n"},
    ]
    kept, left_out = to_conversations(rows)
    assert len(kept) == 2
    assert left_out == {
        "empty answer": {
            "rows": 2,
            "examples": ["row 3: empty answer", "row 4: empty answer"],
        }
    }


def test_duplicates_are_left_out_and_counted() -> None:
    kept, left_out = to_conversations([*ROWS, *ROWS, ROWS[0]])
    assert len(kept) == 2
    assert left_out == {
        "duplicate": {
            "rows": 3,
            "examples": [
                "row 3: Say hi, twice.", "row 4: Grüße?", "row 5: Say hi, twice."
            ],
        }
    }  # fmt: skip


def test_the_same_question_with_another_answer_is_no_duplicate() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    assert len(to_conversations(rows)[0]) == 2


def test_rows_of_which_none_is_left_are_refused() -> None:
    with pytest.raises(
        DataError, match="^the rows: no row is left of 1 .1 empty answer.: row 1"
    ):
        to_conversations([{"prompt": "a", "completion": " "}])


def test_over_long_conversations_are_left_out_with_their_length() -> None:
    rows = [pair("a", "b" * 10), pair("long?", "c" * 1234), pair("e", "f" * 9)]
    kept, left_out = to_conversations(rows, max_chars=11)
    assert [m[0]["content"] for m in kept] == ["a", "e"]
    assert left_out == {
        "over-long": {"rows": 1, "examples": ["row 2: 1,239 characters: long?"]}
    }


def test_a_broken_order_is_counted_with_examples_when_bad_rows_may_be_dropped() -> None:
    broken = messages_row("user", "assistant", "assistant")
    rows = [messages_row("user", "assistant"), *[broken] * 5, messages_row("user")]
    kept, left_out = to_conversations(rows, drop_unusable=True)
    order = "turns do not alternate from user to assistant"
    assert len(kept) == 1
    assert left_out[order]["rows"] == 5
    assert left_out[order]["examples"] == [
        f"row {n}: {order}: user assistant assistant" for n in (2, 3, 4)
    ]
    assert left_out["no assistant turn"]["rows"] == 1


def test_rows_of_another_form_are_counted_when_bad_rows_may_be_dropped() -> None:
    rows = [*ROWS, {"title": "a"}, {"prompt": "b", "completion": None}, "c"]
    kept, left_out = to_conversations(rows, drop_unusable=True)
    assert len(kept) == 2
    assert left_out == {
        "no 'prompt'": {
            "rows": 1, "examples": ["row 3: no 'prompt': the row has title"]
        },
        "the assistant turn's content is not text": {
            "rows": 1,
            "examples": ["row 4: the assistant turn's content is not text: null"],
        },
        "a row is not an object": {
            "rows": 1, "examples": ["row 5: a row is not an object: it is text"]
        },
    }  # fmt: skip


def test_rows_that_the_source_could_not_read_are_refused_or_counted() -> None:
    rows = [*ROWS, DataError("broken JSON: what")]
    with pytest.raises(DataError, match="row 3: broken JSON: what"):
        to_conversations(rows)
    kept, left_out = to_conversations(rows, drop_unusable=True)
    assert (len(kept), left_out["broken JSON"]["rows"]) == (2, 1)
    with pytest.raises(DataError, match="^mine.jsonl, row 1: broken JSON"):
        to_conversations([DataError("broken JSON")], source="mine.jsonl")


def test_half_a_character_is_named_and_refused_or_left_out() -> None:
    cut_apart = {"prompt": "Is it \ud83c?", "completion": "Yes."}
    reason = "text with a lone surrogate"
    with pytest.raises(DataError, match=f"1 of 3 rows .* row 3: {reason}: '.ud83c'"):
        to_conversations([*ROWS, cut_apart])
    kept, left_out = to_conversations([*ROWS, cut_apart], drop_unusable=True)
    assert len(kept) == 2
    assert left_out[reason]["rows"] == 1


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="^mine.jsonl holds no rows$"):
        to_conversations([], source="mine.jsonl")


def test_a_reader_says_how_the_format_was_found_and_what_it_kept() -> None:
    reader = Reader("mine")
    list(reader.read(enumerate([*ROWS, ROWS[0]], start=1)))
    assert (reader.form, reader.why) == (
        "prompt-completion", "the rows have completion, prompt"
    )  # fmt: skip
    assert (reader.rows, reader.kept) == (3, 2)


def test_bad_rows_are_refused_by_the_numbers_that_come_with_them() -> None:
    rows = [(17, pair("a")), (40, {"prompt": "b", "completion": None})]
    with pytest.raises(DataError, match="; row 40: the assistant turn"):
        list(Reader().read(iter(rows)))


def test_a_reader_knows_the_duplicates_of_another_source() -> None:
    first = Reader()
    list(first.read(enumerate(ROWS, start=1)))
    second = Reader(seen=first.seen)
    assert len(list(second.read(enumerate([*ROWS, pair("New?")], start=1)))) == 1
    assert second.left_out["duplicate"]["rows"] == 2


def test_reading_keeps_no_row_in_memory() -> None:
    def rows(count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((i, pair(f"Question {i}?", "so " * 1000)) for i in range(count))

    peaks = []
    for count in (200, 2000):
        tracemalloc.start()
        for _ in Reader().read(rows(count)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 2,000 rows are 6 MB of text; their hashes are a tenth of a kilobyte each
    assert peaks[1] - peaks[0] < 0.5e6


# problems


def test_a_problem_carries_its_gold_number() -> None:
    rows = [{"id": "p1", "question": "How many?", "answer": "So 1,080.\n#### 1,080"}]
    assert to_problems(rows) == [{**rows[0], "gold": "1080"}]


def test_a_problem_without_an_id_gets_one_from_its_question() -> None:
    first, second, again = to_problems(
        [problem("How many?"), problem("How few?"), problem("How many?")]
    )
    assert first["id"] == again["id"] != second["id"]


def test_an_answer_without_a_gold_number_is_refused_by_row_and_shown() -> None:
    rows = [problem("a"), {"question": "b", "answer": "It is late.\n#### 8:30"}]
    with pytest.raises(DataError, match=r"1 of 2 rows .*; row 2: no gold .*#### 8:30'"):
        to_problems(rows, "mine.jsonl")


@pytest.mark.parametrize("answer", ["#### five", "Many.", True])
def test_a_gold_answer_without_a_number_is_refused(answer: Any) -> None:
    with pytest.raises(
        DataError, match="row 1: no gold number: .*`#### <number>` or a"
    ):
        to_problems([{"question": "b", "answer": answer}])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "", "answer": "#### 5"},
        {"question": "How many?", "answer": None},
        {"question": "How many?", "solution": "5"},
    ],
)
def test_a_problem_without_question_or_answer_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match="row 1: question or answer is missing: the row has question"
    ):
        to_problems([row])


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("2", "2"), (" 1,080\n", "1080"), (0, "0"), (2.5, "5/2"), ("-3", "-3")],
)
def test_a_number_alone_is_a_gold_answer(answer: Any, gold: str) -> None:
    (row,) = to_problems([{"question": "How many?", "answer": answer}])
    assert row["gold"] == gold
    # written as GSM8K writes it, so that examples and other judges read it too
    assert row["answer"] == f"#### {str(answer).strip()}"


def test_bad_problems_are_counted_when_bad_rows_may_be_dropped() -> None:
    rows = [problem("a"), {"question": "b", "answer": "#### 8:30"}, "c", problem("d")]
    reader = Reader(drop_unusable=True)
    kept = list(reader.problems(enumerate(rows, start=1)))
    assert [row["question"] for row in kept] == ["a", "d"]
    counts = {reason: part["rows"] for reason, part in reader.left_out.items()}
    assert counts == {"no gold number": 1, "a row is not an object": 1}


def test_problems_of_which_none_is_left_are_refused() -> None:
    reader = Reader("mine", drop_unusable=True)
    with pytest.raises(DataError, match="^mine: no row is left of 1 .1 no gold number"):
        list(reader.problems([(1, {"question": "b", "answer": "Many."})]))


def test_columns_of_problems_that_are_not_used_are_counted() -> None:
    reader = Reader()
    list(reader.problems([(1, problem("a") | {"system": "Be brief.", "id": "x"})]))
    assert reader.fields.unused == {"system": 1}


def test_two_gold_answers_to_one_question_are_refused_by_row() -> None:
    with pytest.raises(DataError, match="row 2: two gold answers .*: 6 and 5: a"):
        to_problems([problem("a", 5), problem("a", 6), problem("b", 6)])
    assert len(to_problems([problem("a", 5), problem("a", 5)])) == 2


def test_two_problems_never_share_an_id() -> None:
    rows = to_problems([problem("a") | {"id": 1}, problem("b") | {"id": 1}])
    assert rows[0]["id"] == "1" != rows[1]["id"]


def test_a_blank_question_is_missing() -> None:
    with pytest.raises(DataError, match="question or answer is missing"):
        to_problems([problem("  ")])
