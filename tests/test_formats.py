"""Tests of data.formats: every format in, one form out, told apart with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from helpers.data.formats import LEARNT, Fields, ask, detect_format
from helpers.data.reading import Reader, to_conversations
from helpers.data.sources import load_rows
from helpers.errors import DataError
from helpers.masking.templates import TEMPLATES, render
from tests.rows import ROWS, messages_row, pair, problem, turns

HI = turns("Hi", "Hi.")
BRIEF = turns("Hi", "Hi.", system="Be brief.")


def read(row: Any, **options: Any) -> Any:
    """Returns the messages of one row."""
    return to_conversations([row], **options)[0][0]


def said(**fields: Any) -> dict[str, Any]:
    """Returns a row whose answer has these fields, too."""
    return {"messages": [HI[0], HI[1] | fields]}


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, HI[1]]}


def spelt(who: str, says: str, *names: str) -> list[dict[str, str]]:
    pairs = zip(names, ("Be brief.", "Hi", "Hi."), strict=True)
    return [{who: name, says: text} for name, text in pairs]


def chatml(*pairs: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{who}\n{says}<|im_end|>\n" for who, says in pairs)


# what rows become

LLAMA2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hi. </s>"
DOLLY = {"instruction": "Hi", "response": "Hi."}
ALPACA = {"instruction": "Hi", "input": "", "output": "Hi."}
PARTS = [{"type": "text", "text": "H"}, {"text": "i"}]
FORMER = [*BRIEF[:2], BRIEF[2] | {"weight": 0}, *turns("Hi", "Ho.")]
MANAGER = '[{"role": "manager"}]'
READ: list[tuple[Any, Any]] = [
    (pair("Hi", "Hi."), HI),
    (DOLLY | {"context": ""}, HI),
    (DOLLY | {"context": "At ten."}, turns("Hi\n\n### Context:\nAt ten.", "Hi.")),
    (ALPACA, HI),
    (ALPACA | {"input": None}, HI),
    (ALPACA | {"input": "there"}, turns("Hi\n\nthere", "Hi.")),
    ({"instruction": "Hi", "output": "Hi."}, HI),
    ({"question": "Hi", "answer": "Hi."}, HI),
    ({"text": LLAMA2}, BRIEF),
    ({"text": LLAMA2 + "<s>[INST] So\n? [/INST] No\n. </s>"},
     [*BRIEF, *turns("So\n?", "No\n.")]),
    ({"text": chatml(("user", " a\n\n<b> "), ("assistant", "\tc\n"))},
     turns(" a\n\n<b> ", "\tc\n")),
    ({"conversations": spelt("from", "value", "system", "human", "gpt")}, BRIEF),
    ({"messages": spelt("role", "content", "developer", "User", "MODEL")}, BRIEF),
    ({"messages": json.dumps(BRIEF)}, BRIEF),
    ({"messages": {n: [t[n] for t in BRIEF] for n in ("role", "content")}}, BRIEF),
    ({"messages": [turn | {"from": None, "value": None} for turn in HI]}, HI),
    (said(**{"from": "gpt", "value": "Hi."}), HI),
    ({"prompt": [{"role": "user", "content": PARTS}], "completion": HI[1:]}, HI),
    ({"prompt": json.dumps(BRIEF[:2]), "completion": json.dumps(HI[1:])}, BRIEF),
    ({"prompt": [*BRIEF, *HI[:1]], "completion": "Ho."}, FORMER),
    (pair("Who?", MANAGER), turns("Who?", MANAGER)),
    ({"prompt": "Hi", "completion": True}, turns("Hi", "true")),
    ({"prompt": "Hi", "completion": 0}, turns("Hi", "0")),
    ({"prompt": "Hi", "completion": 10**30}, turns("Hi", "1" + 30 * "0")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), READ)
def test_a_row_becomes_turns_with_a_role_and_a_text(row: Any, messages: Any) -> None:
    assert read(json.loads(json.dumps(row))) == messages


@pytest.mark.parametrize("row", [row for row, messages in READ if messages == HI])
@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_and_history_columns_come_first(row: Any, column: str) -> None:
    for text in ("Be brief.", "", None):
        assert read(row | {column: text}) == turns("Hi", "Hi.", system=text or "")
    history = [["a?", "b"], ["c?", "d"]]
    for value in (history, json.dumps(history)):
        messages = read(row | {"history": value, column: "S"})
        assert messages == turns("a?", "b", "c?", "d", "Hi", "Hi.", system="S")


@pytest.mark.parametrize("mark", LEARNT)
@pytest.mark.parametrize("value", [0, False, 0.0, "0", "False"])
def test_a_turn_that_is_marked_so_is_not_learnt(mark: str, value: Any) -> None:
    row = turns("Hi", "Wrong.", "Again?", "Right.")
    row[0][mark], row[1][mark], row[3][mark] = None, value, "true"
    weights = [message.get("weight") for message in read({"messages": row})]
    assert weights == [None, 0, None, None]


def test_a_chat_that_begins_with_an_answer_or_asks_twice_is_tidied() -> None:
    reader = Reader()
    row = {"messages": [*turns("", "Welcome!")[1:], *turns("Hello."), *HI]}
    assert list(reader.read([(1, row)])) == [turns("Hello.\n\nHi", "Hi.")]
    assert reader.report(1)["adjusted"] == {
        "answer before the first question dropped": 1,
        "questions in a row joined": 1,
    }


# what is refused

CALL = [{"type": "function", "name": "look"}]
NO_TEXT = "the user turn's content is not text"
NO_MARK = "a weight that is neither 0 nor 1: turn 2 has"
REFUSED: list[tuple[Any, str]] = [
    (messages_row("assistant", "user"), "no assistant turn"),
    (messages_row(), "no assistant turn"),
    (messages_row("user", "assistant", "assistant"),
     "turns do not alternate from user to assistant: user assi"),
    (messages_row("user", "system", "assistant"), "turns do not alternate"),
    (messages_row("user", "tool", "assistant"), "role 'tool' is not system, user or"),
    ({"text": chatml(("user", "a"), ("tool", "5"), ("assistant", "b"))},
     "role 'tool' is"),
    *[(asked(x), NO_TEXT) for x in (None, {"a": "b"}, float("nan"), [], ["a", "b"])],
    (asked([{"type": "image_url"}]), "the user turn's content has a part that is not "),
    ({"messages": None}, "messages is not a list of turns: None"),
    ({"messages": 5}, "messages is not a list of turns: 5"),
    ({"messages": "What is it?"}, "messages is text that is not JSON: 'What is it"),
    ({"messages": {"role": ["user"], "content": ["a", "b"]}},
     "messages has no lists of one length"),
    ({"messages": ["Hi"]}, "a turn is not an object: 'Hi'"),
    ({"messages": [{"content": "a"}]}, "a turn has no role or no content: turn 1 has"),
    ({"messages": [{"role": "user"}]}, "a turn has no role or no content: turn 1 has"),
    ({"messages": [HI[0] | {"from": "gpt"}]}, "fields of a turn differ"),
    ({"messages": [HI[0] | {"value": "b"}]}, "fields of a turn differ"),
    *[(said(weight=value), NO_MARK) for value in (0.5, 2, "no", [1])],
    ({"messages": BRIEF, "system": "Be kind."}, "two system prompts: "),
    (pair("Hi") | {"system": "a", "system_prompt": "b"}, "two system prompts: columns"),
    *[(pair("Hi") | {"history": value}, "history is ")
      for value in ("a?", {"a": "b"}, [["a?"]], ["a?", "b"])],
    ({"prompt": str(HI[:1]), "completion": "Yes."}, "prompt is text that is not JSON"),
    (pair("Is it \ud83c?"), r"text with a lone surrogate: '.ud83c'"),
    *[(pair("Hi") | {field: CALL}, f"field '{field}' is not trained on.*data.ignore")
      for field in ("tools", "functions", "tool_calls", "function_call", "thinking")],
    *[(said(**{field: CALL}), f"field '{field}' is not trained on.*data.ignore")
      for field in ("tool_calls", "reasoning_content", "reasoning", "train_detail")],
    *[({"text": text}, "broken markers: .* is no whole turn of llama-2") for text in (
        "<s>[INST] a [INST] b [/INST] c </s>",
        "<s>[INST] <<SYS>> a [/INST] b </s>",
        "<s>[INST] a </s>",
        "[INST] a [/INST] b [INST] c [/INST] d </s>",
        "<s>[INST] a [/INST] b </s> and more",
    )],
    *[({"text": text}, "broken markers: .* is no whole turn of chatml") for text in (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb",
        "<|im_start|>user a<|im_end|>",
        "<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>",
        "Hello " + chatml(("user", "a")),
        chatml(("user", "a"), ("assistant", "b")) + "and more",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_a_row_that_cannot_be_trusted_is_refused_with_its_reason(
    row: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=f"1 of 1 rows .*; row 1: {reason}"):
        to_conversations([row])


def test_an_answer_that_is_marked_as_unwanted_is_not_learnt() -> None:
    rows = [pair("Hi") | {mark: False} for mark in ("label", "weight", "train")]
    kept, left_out = to_conversations([pair("Hi") | {"label": True}, *rows])
    assert (len(kept), left_out["no answer is learnt"]["rows"]) == (1, 3)


@pytest.mark.parametrize("value", [None, "", [], "[]", {}, {"name": None}, " "])
def test_a_field_without_a_value_changes_nothing(value: Any) -> None:
    reader = Reader()
    row = said(tool_calls=value, name=value) | {"tools": value, "x": value}
    assert list(reader.read([(1, row)])) == [HI]
    assert reader.fields.unused == {}


def test_fields_are_ignored_by_choice_and_counted_where_they_are_not_used() -> None:
    fields = Fields(ignore=("tools", "messages.thinking", "label"))
    row = {"messages": [HI[0] | {"name": "Ann"}, HI[1] | {"thinking": "Hm."}]}
    row |= {"tools": CALL, "label": False, "id": 7, "score": 0.5}
    assert list(Reader(fields=fields).read([(1, row)])) == [HI]
    assert fields.unused == {"messages.name": 1, "score": 1}


# detection

LISTED = {"question": "Where?", "answer": "Here.\n#### 1. A list\nof places"}
DETECTED: list[tuple[dict[str, Any], str, str]] = [
    (messages_row("user"), "openai", "messages"),
    ({"conversations": []}, "sharegpt", "conversations"),
    (ALPACA, "alpaca", "input, instruction, output"),
    ({"instruction": "a", "output": "b"}, "wizardlm", "instruction, output"),
    (DOLLY | {"category": "c"}, "dolly", "instruction, response"),
    (ROWS[0], "prompt-completion", "completion, prompt"),
    (problem("How many?"), "gsm8k", "answer, question with #### <number>"),
    (LISTED, "question-answer", "answer, question"),
    ({"text": "[INST] a [/INST] b"}, "llama-2", "text with [INST]"),
    ({"text": chatml(("user", "a"))}, "chatml", "text with <|im_start|>"),
]


@pytest.mark.parametrize(("row", "name", "columns"), DETECTED)
def test_a_format_is_detected_with_its_reason(
    row: dict[str, Any], name: str, columns: str
) -> None:
    assert detect_format([row]) == (name, f"the rows have {columns}")
    assert detect_format([{"text": ""}, row])[0] == name


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"title": "a", "body": "b"}], "the columns body, title fit no .*alpaca: inp"),
        ([{"text": "Once upon a time."}], "the columns text fit .*chatml: text with <"),
        ([["Hi"]], "the rows: the columns of .*'Hi'.* fit no known format"),
        ([DataError("broken JSON")], "broken JSON"),
    ],
)
def test_rows_of_no_known_format_are_refused_with_the_known_ones(
    rows: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        detect_format(rows)


def test_a_format_that_is_asked_for_is_taken_or_refused() -> None:
    row = {**ROWS[0], "instruction": "Say ho.", "response": "ho"}
    assert read(row) == turns("Say ho.", "ho")
    assert read(row, form="prompt-completion") == turns("Say hi, twice.", 'hi "hi"')
    reason = "2 of 2 rows .* as dolly; row 1: no 'instruction': the row has prompt, c"
    with pytest.raises(DataError, match=reason):
        to_conversations(ROWS, form="dolly")
    with pytest.raises(DataError, match="no format 'alpacca'; did you mean 'alpaca'. "):
        to_conversations(ROWS, form="alpacca")


# the system prompt of problems


def test_problems_are_asked_in_training_as_in_evaluation() -> None:
    reader = Reader(system_prompt="Solve it.")
    rows = [problem("a"), {"question": "b", "answer": "Many.\n#### 8:30"}]
    rows.append(problem("c") | {"system": "S"})
    first, second, third = reader.read(enumerate(rows, start=1))
    assert first[:-1] == ask("a", "Solve it.")
    assert (second[0], third[0]["content"]) == (*ask("b", ""), "S")
    assert reader.fields.adjusted == {"no #### number, so no system prompt": 1}


# samples and templates


@pytest.mark.parametrize(
    ("file", "name", "number", "start"),
    [
        ("openai_messages", "openai", 1, "You answer questions about astronomy"),
        ("sharegpt", "sharegpt", 2, "What is a palindrome?"),
        ("alpaca", "alpaca", 1, "Rewrite the sentence in a polite tone.\n\nSend me"),
        ("dolly", "dolly", 0, "How many legs does a spider have?"),
        ("llama2_text", "llama-2", 0, "How can I peel garlic quickly?"),
        ("chatml_text", "chatml", 3, "You are a gardener. Answer in at most two"),
        ("word_problems/train", "gsm8k", 0, "Bao has read 33 pages of a book with"),
    ],
)
def test_every_row_of_a_sample_file_is_read(
    file: str, name: str, number: int, start: str
) -> None:
    rows = load_rows(f"data_samples/{file}.jsonl")
    chats, left_out = to_conversations(rows)
    assert detect_format(rows)[0] == name
    assert (len(chats), left_out) == (len(rows), {})
    assert chats[number][0]["content"].startswith(start)


def test_chatml_and_dolly_rows_come_out_of_their_templates_as_they_went_in(
    tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    # this tokenizer's template adds a system turn where there is none
    rows = load_rows("data_samples/chatml_text.jsonl")
    rows = [row for row in rows if "im_start|>system" in row["text"]]
    rows += [{"text": chatml(("system", ""), ("user", " a "), ("assistant", "b\n"))}]
    texts = [render(tokenizer, messages) for messages in to_conversations(rows)[0]]
    assert texts == [row["text"] for row in rows]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    special["chat_template"] = TEMPLATES["instruction"]
    instruct = make_tokenizer(("<s>", "</s>"), **special)
    blocks = r"### Instruction:\n(.*?)\n\n(?:### Context:\n(.*?)\n\n)?"
    blocks += r"### Response:\n(.*)</s>"
    rows = load_rows("data_samples/dolly.jsonl")
    for row, messages in zip(rows, to_conversations(rows)[0], strict=True):
        parts = re.fullmatch(blocks, render(instruct, messages), re.DOTALL)
        assert parts is not None
        columns = ("instruction", "context", "response")
        assert [part or "" for part in parts.groups()] == [row[n] for n in columns]
