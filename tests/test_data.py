"""Tests of helpers.data: every format in, one form out, bad rows refused in words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import data, runtime
from helpers.config import SYSTEM_PROMPT
from helpers.formats import DataError
from helpers.runs import MissingInput, Run

SAMPLES = runtime.ROOT / "data_samples"
ROWS = [
    {"prompt": "Say hi, twice.", "completion": 'hi "hi"'},
    {"prompt": "Grüße?", "completion": "Zwei\nZeilen 🎉"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes JSON lines and returns the path as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turns(*contents: str, system: str = "") -> data.Messages:
    """Returns user and assistant turns in alternation."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(contents):
        role = ("user", "assistant")[number % 2]
        messages.append({"role": role, "content": content})
    return messages


def problem(question: str, gold: int = 5) -> dict[str, Any]:
    return {"question": question, "answer": f"Working.\n#### {gold}"}


# load_rows


def test_json_lines_are_read(tmp_path: Path) -> None:
    assert data.load_rows(write(tmp_path / "rows.jsonl", ROWS)) == ROWS


def test_a_json_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    assert data.load_rows(str(path)) == ROWS


def test_csv_is_read_with_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert data.load_rows(str(path)) == ROWS


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert data.load_rows(str(path)) == ROWS


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert data.load_rows(write(tmp_path / "rows.jsonl", ROWS), limit=1) == ROWS[:1]


def test_a_limit_above_the_row_count_takes_all(tmp_path: Path) -> None:
    assert data.load_rows(write(tmp_path / "rows.jsonl", ROWS), limit=99) == ROWS


def test_a_path_is_looked_for_in_the_working_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data_samples").mkdir()
    write(tmp_path / "data_samples" / "alpaca.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert data.load_rows("data_samples/alpaca.jsonl") == ROWS


def test_a_path_is_found_in_the_project_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(data.load_rows("data_samples/alpaca.jsonl")) == 12


def test_a_missing_file_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        FileNotFoundError, match=f"no file gone.jsonl .*{runtime.ROOT}.*give a path"
    ):
        data.load_rows("gone.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", ""),
        ("empty.json", "[]"),
        ("empty.csv", ""),
        ("header.csv", "prompt,completion\n"),
    ],
)
def test_a_file_without_rows_is_refused_in_words(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} holds no rows$"):
        data.load_rows(str(tmp_path / name))


def test_a_broken_json_line_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n')
    with pytest.raises(DataError, match="rows.jsonl could not be read: .* in row 1"):
        data.load_rows(str(path))


def test_a_source_that_is_neither_file_nor_hub_name_is_refused() -> None:
    with pytest.raises(DataError, match="'my rows' is neither a .jsonl, .* owner/name"):
        data.load_rows("my rows")


def test_an_unreachable_hub_name_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        DataError, match="^nobody-here/no-such-set:train could .*is the hub reachable"
    ):
        data.load_rows("nobody-here/no-such-set:train")
    assert time.monotonic() - start < 10


# formats

FIRST_OF_FORMAT: list[tuple[str, str, int, data.Messages]] = [
    (
        "openai_messages",
        "openai messages",
        1,
        turns(
            "What is the largest planet of the solar system?",
            "Jupiter. More than a thousand Earths would fit inside it.",
            "And the smallest?",
            "Mercury, which is only a little larger than our Moon.",
            system="You answer questions about astronomy briefly and correctly.",
        ),
    ),
    (
        "sharegpt",
        "sharegpt",
        2,
        turns(
            "What is a palindrome?",
            "A palindrome is a word or sentence that reads the same forwards and "
            'backwards. Short examples are "level", "noon" and "rotor".',
        ),
    ),
    (
        "alpaca",
        "alpaca",
        1,
        turns(
            "Rewrite the sentence in a polite tone.\n\nSend me the report by noon.",
            "Could you please send me the report by noon?",
        ),
    ),
    (
        "dolly",
        "dolly",
        0,
        turns("How many legs does a spider have?", "A spider has eight legs."),
    ),
    (
        "llama2_text",
        "llama-2 text",
        0,
        turns(
            "How can I peel garlic quickly?",
            "Press each clove with the flat side of a knife until the skin cracks. It "
            "then slips off easily.",
        ),
    ),
    (
        "word_problems/train",
        "gsm8k",
        0,
        turns(
            "Bao has read 33 pages of a book with 60 pages. To read the rest in 3 "
            "days, with the same number each day, how many pages a day are needed?",
            "60 - 33 = 27 pages are left.\nBao must read 27 / 3 = 9 pages a day.\n"
            "#### 9",
        ),
    ),
]


@pytest.mark.parametrize(("file", "name", "row", "expected"), FIRST_OF_FORMAT)
def test_a_sample_files_format_is_detected_and_its_rows_converted(
    file: str, name: str, row: int, expected: data.Messages
) -> None:
    rows = data.load_rows(str(SAMPLES / f"{file}.jsonl"))
    conversations, left_out = data.to_conversations(rows)
    assert data.detect_format(rows)[0] == name
    assert conversations[row] == expected
    assert (len(conversations), left_out) == (len(rows), {})


def test_prompt_and_completion_rows_become_one_exchange() -> None:
    assert data.to_conversations(ROWS)[0][0] == turns("Say hi, twice.", 'hi "hi"')


def test_a_dolly_context_follows_the_instruction() -> None:
    row = {"instruction": "When?", "context": "It opens at ten.", "response": "Ten."}
    assert data.to_conversations([row])[0] == [
        turns("When?\n\n### Context:\nIt opens at ten.", "Ten.")
    ]


def test_an_input_that_is_null_adds_nothing() -> None:
    row = {"instruction": "Hi?", "input": None, "output": "Hi."}
    assert data.to_conversations([row])[0] == [turns("Hi?", "Hi.")]


def test_a_sharegpt_system_turn_is_kept_as_such() -> None:
    says = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hi.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in says]}
    assert data.to_conversations([row])[0] == [turns("Hi", "Hi.", system="Be brief.")]


def test_llama2_text_with_a_system_prompt_and_two_turns_is_taken_apart() -> None:
    text = (
        "<s>[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nHi there [/INST] Hello! "
        "</s><s>[INST] Two\nlines? [/INST] Yes,\nhere. </s>"
    )
    assert data.to_conversations([{"text": text}])[0] == [
        turns(
            "Hi there", "Hello!", "Two\nlines?", "Yes,\nhere.",
            system="Be brief.\nBe kind.",
        )
    ]  # fmt: skip


def test_text_that_is_not_llama2_is_refused() -> None:
    with pytest.raises(DataError, match="row 1: unreadable as llama-2 text: .*INST"):
        data.to_conversations([{"text": "Once upon a time."}])


def test_columns_of_no_known_format_are_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="rows have body, title, which .*alpaca: instr"):
        data.detect_format([{"title": "a", "body": "b"}])


def test_the_system_prompt_goes_before_problems() -> None:
    row = problem("How many?")
    assert data.to_conversations([row], "Think.")[0] == [
        turns("How many?", "Working.\n#### 5", system="Think.")
    ]


def test_the_system_prompt_does_not_go_before_other_conversations() -> None:
    assert data.to_conversations(ROWS[:1], "Think.")[0][0][0]["role"] == "user"


def test_problems_are_asked_in_training_as_in_evaluation() -> None:
    trained = data.to_conversations([problem("How many?")], SYSTEM_PROMPT)[0][0]
    assert trained[:-1] == data.ask("How many?", SYSTEM_PROMPT)


def test_a_question_is_asked_without_a_system_turn_when_there_is_no_prompt() -> None:
    assert data.ask("How many?", "") == turns("How many?")


# bad rows


def messages_row(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("assistant", "user"), "turns do not alternate .*: assistant user"),
        (("user", "user", "assistant"), "turns do not alternate"),
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
        data.to_conversations([good, messages_row(*roles)])


def test_turns_in_order_with_a_system_turn_first_are_fine() -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    found = data.to_conversations([messages_row(*roles)])[0][0]
    assert tuple(message["role"] for message in found) == roles


def test_content_that_is_no_text_is_refused() -> None:
    rows = [{"prompt": "2 + 2?", "completion": 4}]
    with pytest.raises(DataError, match="row 1: the content of a.* assistant turn is"):
        data.to_conversations(rows)


def test_a_turn_without_content_is_refused_by_the_missing_field() -> None:
    rows = [{"messages": [{"role": "user"}]}]
    with pytest.raises(DataError, match="row 1: unreadable as openai .*'content'"):
        data.to_conversations(rows)


def test_turns_that_are_no_list_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: unreadable as openai messages: Type"):
        data.to_conversations([{"messages": None}])


def test_only_the_first_three_bad_rows_are_shown_and_all_are_counted() -> None:
    rows = [messages_row("user")] * 5 + [messages_row("user", "assistant")]
    with pytest.raises(DataError) as caught:
        data.to_conversations(rows, source="mine.jsonl")
    message = str(caught.value)
    assert message.startswith("mine.jsonl: 5 of 6 rows cannot be used")
    assert message.count("row ") == 3


def test_empty_answers_are_left_out_and_counted() -> None:
    rows = [
        *ROWS,
        {"prompt": "a", "completion": ""},
        {"prompt": "b", "completion": "\n"},
    ]
    kept, left_out = data.to_conversations(rows)
    assert (len(kept), left_out) == (2, {"empty answer": 2})


def test_duplicates_are_left_out_and_counted() -> None:
    kept, left_out = data.to_conversations([*ROWS, *ROWS, ROWS[0]])
    assert (len(kept), left_out) == (2, {"duplicate": 3})


def test_the_same_question_with_another_answer_is_no_duplicate() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    assert len(data.to_conversations(rows)[0]) == 2


def test_rows_of_which_none_is_left_are_refused() -> None:
    with pytest.raises(DataError, match="no row is left .*'empty answer': 1"):
        data.to_conversations([{"prompt": "a", "completion": " "}])


# problems


def test_a_problem_carries_its_gold_number() -> None:
    rows = [{"id": "p1", "question": "How many?", "answer": "So 1,080.\n#### 1,080"}]
    assert data.to_problems(rows) == [{**rows[0], "gold": "1080"}]


def test_a_problem_without_an_id_gets_one_from_its_question() -> None:
    first, second, again = data.to_problems(
        [problem("How many?"), problem("How few?"), problem("How many?", 6)]
    )
    assert first["id"] == again["id"] != second["id"]


def test_an_answer_without_a_gold_line_is_refused_by_number() -> None:
    rows = [problem("a"), {"question": "b", "answer": "It is 5."}]
    with pytest.raises(DataError, match="1 of 2 rows .*; row 2: answer has no `####"):
        data.to_problems(rows, "mine.jsonl")


def test_a_gold_line_without_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="row 1: answer has no `#### <number>` line"):
        data.to_problems([{"question": "b", "answer": "#### five"}])


def test_a_problem_without_a_question_is_refused() -> None:
    with pytest.raises(DataError, match="row 1: question or answer is missing"):
        data.to_problems([{"question": "", "answer": "#### 5"}])


def test_an_answer_that_is_a_bare_number_is_refused_by_number() -> None:
    with pytest.raises(DataError, match="row 1: question or answer is not text"):
        data.to_problems([{"question": "How many?", "answer": 5}])


# leaks


def test_disjoint_questions_pass() -> None:
    assert data.assert_disjoint(["a", "b"], {"test": ["c"], "eval": ["d"]}) is None


def test_a_leak_is_refused_with_the_set_the_count_and_the_question() -> None:
    with pytest.raises(
        DataError, match="^2 questions of test are in the training .* first: 'How many"
    ):
        data.assert_disjoint(
            ["How many?", "b", "c"], {"eval": ["x"], "test": ["How many?", "y", "c"]}
        )


def test_a_leak_is_found_whatever_the_white_space() -> None:
    with pytest.raises(DataError, match="1 questions of test"):
        data.assert_disjoint(
            ["How  many\nare left? "], {"test": [" How many are left?"]}
        )


# split

SHARES = {"test_chat": 0.1, "eval": 0.05}


def chats(count: int, word: str = "Question") -> list[Any]:
    return [turns(f"{word} {i}?", f"Answer {i}.") for i in range(count)]


def asked(conversations: list[Any]) -> set[str]:
    return {data.questions_of(messages)[0] for messages in conversations}


def test_a_split_has_about_the_shares_that_are_asked_for() -> None:
    parts = data.split(chats(4000), SHARES)
    assert len(parts["test_chat"]) == pytest.approx(400, abs=60)
    assert len(parts["eval"]) == pytest.approx(200, abs=45)
    assert sum(map(len, parts.values())) == 4000


def test_a_split_loses_nothing_and_has_no_question_on_two_sides() -> None:
    parts = data.split(chats(300), SHARES)
    assert set.union(*map(asked, parts.values())) == asked(chats(300))
    assert sum(len(asked(part)) for part in parts.values()) == 300


def test_a_row_keeps_its_side_when_data_are_added() -> None:
    before = data.split(chats(300), SHARES)
    after = data.split(chats(300, "Another") + chats(300), SHARES)
    for name, part in before.items():
        assert asked(part) <= asked(after[name])


def test_the_test_rows_stay_when_the_eval_share_changes() -> None:
    first = data.split(chats(300), SHARES)
    second = data.split(chats(300), {**SHARES, "eval": 0.2})
    assert first["test_chat"] == second["test_chat"]


def test_all_that_ask_the_same_go_to_the_same_side() -> None:
    rows = [turns("Same?", f"Answer {i}.") for i in range(50)]
    rows += [turns("  Same? ", "Answer."), *chats(200)]
    parts = data.split(rows, {"eval": 0.5})
    sides = [name for name, part in parts.items() if "Same?" in asked(part)]
    assert len(sides) == 1
    same = [m for m in parts[sides[0]] if "Same?" in data.questions_of(m)[0]]
    assert len(same) == 51


def test_a_share_of_few_rows_gets_at_least_one() -> None:
    parts = data.split(chats(12), {"test_chat": 0.001, "eval": 0.001})
    assert [len(part) for part in parts.values()] == [10, 1, 1]


def test_the_rows_of_a_small_share_are_those_of_the_smallest_hash() -> None:
    few, many = (
        data.split(chats(12), {"eval": 0.001}),
        data.split(chats(12), {"eval": 0.3}),
    )
    assert asked(few["eval"]) <= asked(many["eval"])


def test_a_split_without_shares_is_all_training() -> None:
    assert data.split(chats(5), {}) == {"train": chats(5)}


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(
        DataError, match="^2 different questions, of which test_chat an"
    ):
        data.split(chats(2), SHARES)


# prepare


def read_all(run: Run) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((run.path / "data").glob("*"))
    return {path.stem: data.read_rows(path) for path in paths}


@pytest.fixture
def own_files(tmp_path: Path) -> dict[str, Any]:
    """A few problems in files, as the fields that a config takes."""

    def source(part: str, count: int) -> str:
        rows = [problem(f"{part} {i}: how many?", i) for i in range(count)]
        return write(tmp_path / f"{part}.jsonl", rows)

    train = source("train", 12)
    return {
        "data__train": [train],
        "data__problems": train,
        "data__eval": source("eval", 6),
        "data__test": source("test", 8),
        "data__test_new": source("test_new", 5),
        "data__train_rows": None,
    }


def test_preparing_writes_five_files_with_the_counts_it_reports(run: Run) -> None:
    report = data.prepare(run)
    found = {name: len(rows) for name, rows in read_all(run).items()}
    assert found == {name: report[name] for name in found}
    # train: 24 rows of the problems, and the two sample files of 12 rows
    assert found == {
        "train": 48, "eval": 4, "problems": 2400, "test": 6, "test_new": 4
    }  # fmt: skip


def test_preparing_writes_its_part_of_the_report(run: Run) -> None:
    report = data.prepare(run)
    assert run.report()["data"] == report
    assert report["sources"]["data_samples/sharegpt.jsonl"] == {
        "format": "sharegpt",
        "rows": 12,
    }


def test_the_prepared_rows_have_the_fields_that_the_next_notebooks_read(
    run: Run,
) -> None:
    data.prepare(run)
    fields = {name: set(rows[0]) for name, rows in read_all(run).items()}
    asked = {"id", "question", "answer", "gold"}
    assert fields == {
        "train": {"id", "messages"},
        "eval": {"id", "messages"},
        "problems": asked,
        "test": asked,
        "test_new": asked,
    }


def test_preparing_twice_gives_the_same_fingerprints_and_bytes(
    run_factory: Callable[..., Run],
) -> None:
    first, second = run_factory(name="first"), run_factory(name="second")
    reports = [data.prepare(first), data.prepare(second)]
    assert reports[0]["fingerprints"] == reports[1]["fingerprints"]
    for path in (first.path / "data").iterdir():
        assert path.read_bytes() == (second.path / "data" / path.name).read_bytes()


def test_another_seed_draws_other_training_rows_and_the_same_test(
    run_factory: Callable[..., Run],
) -> None:
    reports = [data.prepare(run_factory(seed=seed)) for seed in (1, 2)]
    first, second = (report["fingerprints"] for report in reports)
    assert first["train"] != second["train"]
    assert first["test"] == second["test"]


def test_no_held_out_id_or_question_is_in_the_training_rows(run: Run) -> None:
    data.prepare(run)
    parts = read_all(run)
    trained = {row["id"] for row in parts["train"] + parts["problems"]}
    asked = {q for row in parts["train"] for q in data.questions_of(row["messages"])}
    asked |= {row["question"] for row in parts["problems"]}
    for name in ("test", "test_new"):
        assert trained.isdisjoint(row["id"] for row in parts[name])
        assert asked.isdisjoint(row["question"] for row in parts[name])
    assert trained.isdisjoint(row["id"] for row in parts["eval"])


def test_own_files_are_prepared_whole_when_nothing_is_capped(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    uncapped = {f"data__{part}_rows": None for part in ("eval", "test", "test_new")}
    report = data.prepare(run_factory(**own_files, **uncapped))
    names = ("train", "problems", "eval", "test", "test_new")
    assert [report[name] for name in names] == [12, 12, 6, 8, 5]


@pytest.mark.parametrize("part", ["eval", "test", "test_new"])
def test_a_held_out_question_among_the_training_rows_stops_the_preparation(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    tmp_path: Path,
    part: str,
) -> None:
    rows = [problem("fresh?"), problem("train 3:  how many?")]
    own_files[f"data__{part}"] = write(tmp_path / "leaky.jsonl", rows)
    run = run_factory(**own_files)
    with pytest.raises(DataError, match=f"^1 questions of {part} are in the training"):
        data.prepare(run)
    assert not (run.path / "data").exists()


def test_a_test_question_among_chat_rows_stops_the_preparation(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    row = {"messages": turns("test 1: how many?", "Five.", system="Be brief.")}
    own_files["data__train"].append(write(tmp_path / "chat.jsonl", [row]))
    with pytest.raises(DataError, match="1 questions of test are in the training rows"):
        data.prepare(run_factory(**own_files))


def test_a_test_question_among_the_problems_alone_stops_the_preparation(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__problems"] = write(
        tmp_path / "more.jsonl", [problem("fresh?"), problem("test 1: how many?")]
    )
    with pytest.raises(DataError, match="1 questions of test are in the training rows"):
        data.prepare(run_factory(**own_files))


def test_one_source_for_problems_and_eval_is_cut_in_two(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", ROWS)]
    own_files["data__eval"] = own_files["data__problems"]
    run = run_factory(**own_files)
    data.prepare(run)
    parts = read_all(run)
    evaluated = [data.questions_of(row["messages"])[0] for row in parts["eval"]]
    assert evaluated == [f"train {i}: how many?" for i in range(8, 12)]
    assert [row["question"] for row in parts["problems"]] == [
        f"train {i}: how many?" for i in range(8)
    ]


def test_one_source_that_eval_would_take_whole_is_refused(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", ROWS)]
    own_files["data__eval"] = own_files["data__problems"]
    with pytest.raises(DataError, match="has 12 rows .*eval_rows=12 leaves no problem"):
        data.prepare(run_factory(**own_files, data__eval_rows=12))


SHARED = {
    "data__eval": None,
    "data__eval_share": 0.2,
    "data__test_share": 0.3,
    "data__test": None,
    "data__test_new": None,
    "data__test_rows": None,
    "data__eval_rows": None,
}


def test_shares_of_the_training_rows_are_held_out(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    run = run_factory(**{**own_files, **SHARED, "data__problems": None}, stages=["sft"])
    report = data.prepare(run)
    parts = read_all(run)
    assert sorted(parts) == ["eval", "test_chat", "train"]
    assert sum(report[name] for name in parts) == 12
    questions = [
        data.questions_of(r["messages"])[0] for rows in parts.values() for r in rows
    ]
    assert len(set(questions)) == 12


def test_a_question_of_two_sources_is_on_one_side(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    again = [
        {"messages": turns(f"train {i}: how many?", "Some other words.")}
        for i in range(12)
    ]
    own_files["data__train"].append(write(tmp_path / "again.jsonl", again))
    run = run_factory(**{**own_files, **SHARED, "data__problems": None}, stages=["sft"])
    data.prepare(run)
    sides = [
        {data.questions_of(row["messages"])[0] for row in rows}
        for rows in read_all(run).values()
    ]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12


def test_held_out_shares_are_capped_like_other_held_out_sets(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    caps = {"data__eval_share": 0.3, "data__eval_rows": 1, "data__test_rows": 1}
    values = {**own_files, **SHARED, **caps, "data__problems": None}
    report = data.prepare(run_factory(**values, stages=["sft"]))
    assert (report["eval"], report["test_chat"]) == (1, 1)


def test_a_run_of_grpo_alone_has_problems_and_no_conversations(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    values = {**own_files, "data__train": [], "data__eval": None}
    run = run_factory(**values, stages=["grpo"])
    report = data.prepare(run)
    assert sorted(read_all(run)) == ["problems", "test", "test_new"]
    assert "sources" not in report


def test_preparing_takes_away_what_the_config_no_longer_has(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    data.prepare(run_factory(**own_files))
    run = run_factory(**{**own_files, "data__test_new": None})
    data.prepare(run)
    assert sorted(read_all(run)) == ["eval", "problems", "test", "train"]


def test_data_without_a_part_that_the_config_has_is_prepared(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data.prepare(run_factory(**{**own_files, "data__test_new": None}))
    data.ensure_data(run_factory(**own_files))
    assert "preparing it now" in capsys.readouterr().out


def test_bad_rows_of_a_source_are_refused_by_the_sources_name(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.jsonl", [messages_row("user")])
    own_files["data__train"].append(bad)
    with pytest.raises(DataError, match="bad.jsonl: 1 of 1 rows cannot be used"):
        data.prepare(run_factory(**own_files))


def test_missing_data_is_prepared_with_a_word(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data.ensure_data(run)
    assert "01_data_prep makes it): preparing it now" in capsys.readouterr().out
    assert folder == run.require("data/test_new.jsonl").parent


def test_data_that_is_there_is_not_prepared_again(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_factory(**own_files)
    data.prepare(run)
    Path(own_files["data__test"]).unlink()
    data.ensure_data(run)
    assert capsys.readouterr().out == ""


def test_the_data_of_a_run_that_prepared_none_is_missing(run: Run) -> None:
    with pytest.raises(MissingInput, match="run notebook 01_data_prep"):
        run.require("data/train.jsonl")


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"id": "1", "messages": turns("Zoë\u2028?", "a\nb 🎉")}, {"id": "2"}]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    assert data.read_rows(tmp_path / "rows.jsonl") == rows


def test_unusable_rows_are_left_out_and_counted_when_asked() -> None:
    good = {"prompt": "Hi", "completion": "Hello"}
    rows = [good, {"prompt": "Hi", "completion": 5}, {"prompt": "a", "completion": "b"}]
    kept, left_out = data.to_conversations(rows, drop_unusable=True)
    assert len(kept) == 2
    assert left_out == {
        "unusable (row 2: the content of a assistant turn is not text)": 1
    }
