"""Tests of data.formats: every format in, one form out, told apart with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from helpers import runtime
from helpers.config import SYSTEM_PROMPT
from helpers.data.formats import (
    FORMATS,
    LEARNT,
    Fields,
    Messages,
    detect_format,
    read_prompt,
    read_turns,
)
from helpers.data.preparation import ask
from helpers.data.preparation import Reader, to_conversations, to_problems
from helpers.data.sources import load_rows
from helpers.errors import DataError
from helpers.masking.templates import INSTRUCTION_TEMPLATE, render
from tests.rows import ROWS, messages_row, pair, problem, turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES = runtime.ROOT / "data_samples"

FIRST_OF_FORMAT: list[tuple[str, str, int, Messages]] = [
    (
        "openai_messages",
        "openai",
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
        "llama-2",
        0,
        turns(
            "How can I peel garlic quickly?",
            "Press each clove with the flat side of a knife until the skin cracks. It "
            "then slips off easily.",
        ),
    ),
    (
        "chatml_text",
        "chatml",
        3,
        turns(
            "My basil looks limp. What now?",
            "Feel the soil: if it is dry, water it from below and give it shade for a "
            "day. If it is wet, let it dry out.",
            system="You are a gardener. Answer in at most two sentences.",
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
    file: str, name: str, row: int, expected: Messages
) -> None:
    rows = load_rows(str(SAMPLES / f"{file}.jsonl"))
    conversations, left_out = to_conversations(rows)
    assert detect_format(rows)[0] == name
    assert conversations[row] == expected
    assert (len(conversations), left_out) == (len(rows), {})


def test_prompt_and_completion_rows_become_one_exchange() -> None:
    assert to_conversations(ROWS)[0][0] == turns("Say hi, twice.", 'hi "hi"')


def test_a_dolly_context_follows_the_instruction() -> None:
    row = {"instruction": "When?", "context": "It opens at ten.", "response": "Ten."}
    assert to_conversations([row])[0] == [
        turns("When?\n\n### Context:\nIt opens at ten.", "Ten.")
    ]


def test_an_input_that_is_null_adds_nothing() -> None:
    row = {"instruction": "Hi?", "input": None, "output": "Hi."}
    assert to_conversations([row])[0] == [turns("Hi?", "Hi.")]


def test_a_sharegpt_system_turn_is_kept_as_such() -> None:
    says = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hi.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in says]}
    assert to_conversations([row])[0] == [turns("Hi", "Hi.", system="Be brief.")]


def test_llama2_text_with_a_system_prompt_and_two_turns_is_taken_apart() -> None:
    text = (
        "<s>[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nHi there [/INST] Hello! "
        "</s><s>[INST] Two\nlines? [/INST] Yes,\nhere. </s>"
    )
    assert to_conversations([{"text": text}])[0] == [
        turns(
            "Hi there", "Hello!", "Two\nlines?", "Yes,\nhere.",
            system="Be brief.\nBe kind.",
        )
    ]  # fmt: skip


def test_columns_of_no_known_format_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        DataError, match="the columns body, title fit no .*alpaca: input, in"
    ):
        detect_format([{"title": "a", "body": "b"}])


def test_the_system_prompt_goes_before_problems() -> None:
    row = problem("How many?")
    assert to_conversations([row], "Think.")[0] == [
        turns("How many?", "Working.\n#### 5", system="Think.")
    ]


def test_the_system_prompt_does_not_go_before_other_conversations() -> None:
    assert to_conversations(ROWS[:1], "Think.")[0][0][0]["role"] == "user"


@pytest.mark.parametrize("more", [[], [problem("How many?")]])
def test_questions_and_answers_are_not_taken_for_maths(more: list[Any]) -> None:
    rows = [{"question": "Where?", "answer": "Here, or in room 5."}, *more]
    assert to_conversations(rows, "Think.")[0][0] == turns(
        "Where?", "Here, or in room 5."
    )


def test_the_system_prompt_does_not_go_before_one_of_the_row() -> None:
    row = problem("How many?") | {"system": "Be brief."}
    assert to_conversations([row], "Think.")[0] == [
        turns("How many?", "Working.\n#### 5", system="Be brief.")
    ]


def test_problems_are_asked_in_training_as_in_evaluation() -> None:
    trained = to_conversations([problem("How many?")], SYSTEM_PROMPT)[0][0]
    assert trained[:-1] == ask("How many?", SYSTEM_PROMPT)


def test_a_question_is_asked_without_a_system_turn_when_there_is_no_prompt() -> None:
    assert ask("How many?", "") == turns("How many?")


# detection


DETECTED: list[tuple[dict[str, Any], str, str]] = [
    (messages_row("user"), "openai", "the rows have messages"),
    ({"conversations": []}, "sharegpt", "the rows have conversations"),
    (
        {"instruction": "a", "input": "", "output": "b"},
        "alpaca",
        "the rows have input, instruction, output",
    ),
    (
        {"instruction": "a", "output": "b"},
        "wizardlm",
        "the rows have instruction, output",
    ),
    (
        {"instruction": "a", "response": "b", "category": "c"},
        "dolly",
        "the rows have instruction, response",
    ),
    (ROWS[0], "prompt-completion", "the rows have completion, prompt"),
    (
        problem("How many?"),
        "gsm8k",
        "the rows have answer, question with #### <number>",
    ),
    (
        {"question": "Where?", "answer": "Here.\n#### 1. A list\nof places"},
        "question-answer",
        "the rows have answer, question",
    ),
    ({"text": "[INST] a [/INST] b"}, "llama-2", "the rows have text with [INST]"),
    (
        {"text": "<|im_start|>user\na<|im_end|>"},
        "chatml",
        "the rows have text with <|im_start|>",
    ),
]


@pytest.mark.parametrize(("row", "name", "why"), DETECTED)
def test_a_format_is_detected_with_its_reason(
    row: dict[str, Any], name: str, why: str
) -> None:
    assert detect_format([row]) == (name, why)


def test_every_known_format_is_among_those_cases() -> None:
    assert {form.name for form in FORMATS} == {name for _, name, _ in DETECTED}


def test_a_marker_in_a_later_row_is_seen() -> None:
    rows = [{"text": "<|im_start|>"}, {"text": "[INST] a [/INST] b"}]
    assert detect_format(rows)[0] == "llama-2"


def test_text_without_markers_is_refused() -> None:
    with pytest.raises(DataError, match=r"the columns text fit .*chatml: text with <"):
        detect_format([{"text": "Once upon a time."}])


# spellings


@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize(
    ("who", "says", "names"),
    [
        ("from", "value", ("human", "gpt")),
        ("from", "value", ("user", "assistant")),
        ("role", "content", ("user", "assistant")),
        ("role", "content", ("human", "gpt")),
    ],
)
def test_turns_are_read_in_either_spelling(
    column: str, who: str, says: str, names: tuple[str, str]
) -> None:
    pairs = [("system", "Be brief."), (names[0], "Hi"), (names[1], "Hi.")]
    row = {column: [{who: name, says: text} for name, text in pairs]}
    assert to_conversations([row])[0] == [turns("Hi", "Hi.", system="Be brief.")]


def test_a_turn_whose_other_spelling_is_null_is_read() -> None:
    given = {"role": None, "content": None}
    row = {
        "conversations": [
            {"from": "human", "value": "Hi", **given},
            {"from": "gpt", "value": "Hi.", **given},
        ]
    }
    assert to_conversations([row])[0] == [turns("Hi", "Hi.")]


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("system System developer DEVELOPER", "system"),
        ("user User human Human prompter", "user"),
        ("assistant Assistant gpt GPT chatgpt bing bard model bot", "assistant"),
    ],
)
def test_a_role_is_told_in_any_of_its_names(words: str, role: str) -> None:
    for word in words.split():
        turns_in = [{"role": word, "content": "a"}]
        assert read_turns(turns_in, Fields()) == [{"role": role, "content": "a"}]


def as_json(row: Any) -> Any:
    return json.dumps(row)


def as_lists(row: Any) -> Any:
    return {name: [turn[name] for turn in row] for name in row[0]}


def in_parts(row: Any) -> Any:
    for turn in row:
        half = len(turn["content"]) // 2
        texts = turn["content"][:half], turn["content"][half:]
        turn["content"] = [{"type": "text", "text": text} for text in texts]
    return row


@pytest.mark.parametrize("shape", [as_json, as_lists, in_parts])
def test_turns_are_read_in_other_shapes(shape: Callable[[Any], Any]) -> None:
    messages = turns("Hi", "Hi.", "And?", "No.", system="Be brief.")
    row = {"messages": shape(json.loads(json.dumps(messages)))}
    assert to_conversations([row])[0] == [messages]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("What is it?", "messages is text that is not JSON: 'What is it"),
        ({"role": ["user"], "content": ["a", "b"]}, "messages has lists of different"),
        (
            [{"role": "user", "content": "a"}, None],
            "a turn is not an object: turn 2 is",
        ),
        (["Hi"], "a turn is not an object: turn 1 is text"),
        ([{"content": "a"}], "a turn has no role: turn 1 has content"),
        (5, "messages is not a list of turns: 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "the user turn's content has a part that is not text: image_url",
        ),
    ],
)
def test_turns_in_no_known_shape_are_refused_in_words(
    messages: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=f"row 1: {reason}"):
        to_conversations([{"messages": messages}])


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (4, "4"), (0, "0"), (2.5, "2.5"), (10**30, "1" + 30 * "0")],
)
def test_a_value_that_is_no_text_is_learnt_as_json_writes_it(
    value: Any, text: str
) -> None:
    row = {"prompt": "2 + 2?", "completion": value}
    assert to_conversations([row])[0] == [turns("2 + 2?", text)]


def test_prompt_and_completion_may_be_lists_of_turns() -> None:
    said = turns("Hi", "Hi.", "And?", system="Be brief.")
    row = {"prompt": said, "completion": turns("", "No.")[1:]}
    first = {"role": "assistant", "content": "Hi.", "weight": 0}  # it is the prompt's
    (messages,) = to_conversations([row])[0]
    assert messages == [*said[:2], first, *said[3:], *row["completion"]]
    row = {"prompt": said[:2], "completion": "Hi."}
    assert to_conversations([row])[0] == [turns("Hi", "Hi.", system="Be brief.")]


def test_an_answer_before_the_first_question_is_dropped_and_counted() -> None:
    reader = Reader()
    row = {"messages": [*turns("", "Welcome!", "Hi", "Hi.")[1:]]}
    assert list(reader.read([(1, row)])) == [turns("Hi", "Hi.")]
    assert reader.fields.adjusted == {"answer before the first question dropped": 1}


def test_questions_in_a_row_are_joined_and_counted() -> None:
    reader = Reader()
    row = {"messages": [*turns("Hello."), *turns("Hi?", "Hi.")]}
    assert list(reader.read([(1, row)])) == [turns("Hello.\n\nHi?", "Hi.")]
    assert reader.report(1)["adjusted"] == {"questions in a row joined": 1}


# fields beside question and answer


EXCHANGES: list[dict[str, Any]] = [
    {"messages": turns("Hi", "Hi.")},
    {"conversations": turns("Hi", "Hi.")},
    {"instruction": "Hi", "input": "", "output": "Hi."},
    {"instruction": "Hi", "response": "Hi."},
    {"question": "Hi", "answer": "Hi."},
    {"prompt": "Hi", "completion": "Hi."},
]


@pytest.mark.parametrize("row", EXCHANGES)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_turn(row: dict[str, Any], column: str) -> None:
    for text in ("Be brief.", "", None):
        found = to_conversations([row | {column: text}])[0]
        assert found == [turns("Hi", "Hi.", system=text or "")]


@pytest.mark.parametrize("row", EXCHANGES)
@pytest.mark.parametrize("shape", [list, json.dumps])
def test_a_history_comes_before_the_question(
    row: dict[str, Any], shape: Callable[[Any], Any]
) -> None:
    row = row | {"history": shape([["a?", "b"], ["c?", "d"]]), "system": "Be brief."}
    assert to_conversations([row])[0] == [
        turns("a?", "b", "c?", "d", "Hi", "Hi.", system="Be brief.")
    ]


@pytest.mark.parametrize("history", ["a?", {"a": "b"}, [["a?"]], ["a?", "b"]])
def test_a_history_in_another_shape_is_refused(history: Any) -> None:
    with pytest.raises(DataError, match="row 1: history is "):
        to_conversations([EXCHANGES[0] | {"history": history}])


def test_two_system_prompts_that_differ_are_refused() -> None:
    row = {"messages": turns("Hi", "Hi.", system="Be brief."), "system": "Be kind."}
    with pytest.raises(DataError, match="row 1: two system prompts: a column and"):
        to_conversations([row])
    row["system"] = "Be brief."
    assert to_conversations([row])[0] == [row["messages"]]


@pytest.mark.parametrize("mark", LEARNT)
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_a_turn_that_is_marked_so_is_not_learnt(mark: str, value: Any) -> None:
    messages = turns("Hi", "Wrong.", "Again?", "Right.")
    row = json.loads(json.dumps(messages))
    row[1][mark], row[3][mark] = value, 1
    row[0][mark] = None
    messages[1]["weight"] = 0
    assert to_conversations([{"messages": row}])[0] == [messages]


@pytest.mark.parametrize("value", [0.5, 2, "no", [1]])
def test_another_weight_is_refused(value: Any) -> None:
    row = {"messages": turns("Hi", "Hi.")}
    row["messages"][1]["weight"] = value
    with pytest.raises(DataError, match="a weight that is neither 0 nor 1: turn 2 has"):
        to_conversations([row])


def test_a_conversation_of_which_no_answer_is_learnt_is_left_out_and_counted() -> None:
    row = {"messages": turns("Hi", "Wrong.")}
    row["messages"][1]["weight"] = 0
    left_out = to_conversations([EXCHANGES[0], row])[1]
    assert left_out["no answer is learnt"]["rows"] == 1


CALL = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
HARMFUL = [
    ("reasoning_content", "Let me see."), ("thinking", "Hm."), ("tool_calls", CALL),
    ("function_call", {"name": "look"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [("row", *pair) for pair in [*HARMFUL, ("tools", CALL), ("functions", CALL)]]
    + [("turn", *pair) for pair in [*HARMFUL, ("reasoning", "Hm.")]],
)
def test_a_field_that_changes_what_is_learnt_is_refused_dropped_or_ignored(
    place: str, field: str, value: Any
) -> None:
    good = {"messages": turns("Hi", "Hi.")}
    bad: dict[str, Any] = {"messages": turns("Ho", "Ho.")}
    (bad if place == "row" else bad["messages"][1])[field] = value
    with pytest.raises(DataError, match=f"row 2: field '{field}' .*data.ignore.*drop_"):
        to_conversations([good, bad])
    kept, left_out = to_conversations([good, bad], drop_unusable=True)
    assert kept == [turns("Hi", "Hi.")]
    assert [part["rows"] for part in left_out.values()] == [1]
    assert field in next(iter(left_out))
    kept, _ = to_conversations([good, bad], fields=Fields(ignore=(field,)))
    assert kept == [turns("Hi", "Hi."), turns("Ho", "Ho.")]


@pytest.mark.parametrize("value", [None, "", [], "[]", {}, {"name": None}, " "])
def test_a_field_that_says_nothing_changes_nothing(value: Any) -> None:
    reader = Reader()
    row: dict[str, Any] = {"messages": turns("Hi", "Hi."), "tools": value, "x": value}
    row["messages"][1] |= {"tool_calls": value, "name": value}
    assert list(reader.read([(1, row)])) == [turns("Hi", "Hi.")]
    assert reader.fields.unused == {}


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "observation"])
def test_a_tool_turn_is_refused_by_its_role(role: str) -> None:
    row = {"messages": turns("Hi", "Hi.", "4")}
    row["messages"][2]["role"] = role
    with pytest.raises(DataError, match=f"row 1: role '{role}' is not system, user or"):
        to_conversations([row])


@pytest.mark.parametrize("row", EXCHANGES)
def test_fields_that_are_not_used_are_counted_by_name(row: dict[str, Any]) -> None:
    reader = Reader()
    row = json.loads(json.dumps(row)) | {"id": 7, "source": "x", "score": 0.5}
    expected = {"id": 2, "source": 2, "score": 2}
    for column in {"messages", "conversations"} & set(row):
        row[column][0]["name"] = "Ann"
        expected[f"{column}.name"] = 2
    list(reader.read([(1, row), (2, row | {"id": 8, "other": "Ho."})]))
    expected["other"] = 1
    assert reader.report(1)["unused"] == expected


def test_dolly_rows_come_back_from_the_instruction_template(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer(
        ("<s>", "</s>"), bos_token="<s>", eos_token="</s>",
        chat_template=INSTRUCTION_TEMPLATE,
    )  # fmt: skip
    rows = load_rows("data_samples/dolly.jsonl")
    blocks = re.compile(
        r"### Instruction:\n(.*?)\n\n(?:### Context:\n(.*?)\n\n)?"
        r"### Response:\n(.*)</s>",
        re.DOTALL,
    )
    for row, messages in zip(rows, to_conversations(rows)[0], strict=True):
        found = blocks.fullmatch(render(tokenizer, messages))
        assert found is not None
        assert (found[1], found[2] or "", found[3]) == (
            row["instruction"], row["context"], row["response"]
        )  # fmt: skip


# ready-made text


@pytest.mark.parametrize(
    "text",
    [
        "[INST] a [/INST] b [INST] c [/INST] d </s>",
        "<s>[INST] a [INST] b [/INST] c </s>",
        "<s>[INST] <<SYS>> a [/INST] b </s>",
        "<s>[INST] a </s>",
        "<s>[INST] a [/INST] b </s> and more",
    ],
)
def test_broken_llama2_markers_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="row 1: broken markers: .*(INST|SYS)"):
        to_conversations([{"text": text}])


def chatml(*pairs: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{who}\n{says}<|im_end|>\n" for who, says in pairs)


def test_chatml_contents_are_kept_to_the_letter() -> None:
    text = chatml(("user", " a\n\n<b> "), ("assistant", "\tc\n"))
    assert to_conversations([{"text": text}])[0] == [turns(" a\n\n<b> ", "\tc\n")]


def test_chatml_rows_come_out_of_a_chatml_template_as_they_went_in(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # this tokenizer's template adds a system turn where there is none
    rows = load_rows("data_samples/chatml_text.jsonl")
    rows = [row for row in rows if "im_start|>system" in row["text"]]
    rows += [{"text": chatml(("system", ""), ("user", " a "), ("assistant", "b\n"))}]
    for messages, row in zip(to_conversations(rows)[0], rows, strict=True):
        assert render(tokenizer, messages) == row["text"]


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb", 2),
        ("<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>", 1),
        ("<|im_start|>user a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>", 1),
        ("<|im_start|>\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>", 1),
        (chatml(("user", "a"), ("assistant", "b")) + "<|im_end|>", 3),
        ("Hello " + chatml(("user", "a"), ("assistant", "b")), 1),
        (chatml(("user", "a"), ("assistant", "b")) + "and more", 3),
        (chatml(("user", "a")) + "<|im_start|>assistant\n", 2),
    ],
)
def test_broken_chatml_markers_are_refused_by_the_turn(text: str, turn: int) -> None:
    with pytest.raises(DataError, match=f"row 1: broken markers: turn {turn} is"):
        to_conversations([{"text": text}])


def test_a_tool_turn_in_chatml_is_refused_by_its_role() -> None:
    text = chatml(("user", "a"), ("tool", "5"), ("assistant", "b"))
    with pytest.raises(DataError, match="row 1: role 'tool' is not system, user or"):
        to_conversations([{"text": text}])


# a format that is asked for


def test_a_format_that_is_asked_for_is_taken() -> None:
    row = {**ROWS[0], "instruction": "Say ho.", "response": "ho"}
    assert to_conversations([row])[0] == [turns("Say ho.", "ho")]
    asked = to_conversations([row], form="prompt-completion")[0]
    assert asked == [turns("Say hi, twice.", 'hi "hi"')]


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="no format 'alpacca'; did you mean 'alpaca'. "):
        to_conversations(ROWS, form="alpacca")


def test_rows_that_do_not_fit_the_format_asked_for_are_refused_with_the_remedy() -> (
    None
):
    with pytest.raises(
        DataError,
        match="2 of 2 rows cannot be used as dolly; row 1: no 'instruction': the row "
        "has prompt, comp.*without format in the source the format is detected",
    ):
        to_conversations(ROWS, form="dolly")


@pytest.mark.parametrize("value", [0.0, "0", "False", False])
def test_a_weight_is_read_however_a_table_writes_it(value: Any) -> None:
    row = {"messages": turns("Hi", "Wrong.", "Again?", "Right.")}
    row["messages"][1]["weight"] = value
    row["messages"][3]["train"] = "true"
    ((_, wrong, _, right),), _ = to_conversations([row])
    assert wrong["weight"] == 0 and "weight" not in right


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": "0"}])
def test_a_row_marked_as_not_learnt_is_left_out_and_counted(mark: Any) -> None:
    reader = Reader()
    rows = [pair("a") | mark, pair("b") | {"weight": 1}, pair("c") | {"weight": None}]
    assert len(list(reader.read(enumerate(rows, start=1)))) == 2
    assert reader.left_out["no answer is learnt"]["rows"] == 1
    assert not reader.fields.unused


def test_a_completion_that_is_labelled_as_not_wanted_is_refused() -> None:
    rows = [pair("a") | {"label": False}, pair("b") | {"label": True}]
    with pytest.raises(DataError, match="row 1: field 'label' is false"):
        to_conversations(rows)
    kept, _ = to_conversations(rows, fields=Fields(ignore=("label",)))
    assert len(kept) == 2


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "gpt", "role": "user", "value": "Hi."},
        {"role": "assistant", "value": "Hi.", "content": "Ho."},
    ],
)
def test_a_turn_whose_fields_contradict_each_other_is_refused(turn: Any) -> None:
    with pytest.raises(DataError, match="fields of a turn differ: turn 2 has"):
        to_conversations([{"messages": [*turns("Hi"), turn]}])


def test_a_turn_may_say_the_same_in_both_spellings() -> None:
    turn = {"from": "gpt", "role": "assistant", "value": "Hi.", "content": "Hi."}
    kept, _ = to_conversations([{"messages": [*turns("Hi"), turn]}])
    assert kept == [turns("Hi", "Hi.")]


def test_two_system_columns_that_differ_are_refused() -> None:
    row = pair("Hi") | {"system": "Be kind.", "system_prompt": "Be rude."}
    with pytest.raises(DataError, match="two system prompts: columns"):
        to_conversations([row])


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_takes_the_place_of_an_empty_system_turn(column: str) -> None:
    row = {column: "Be kind.", "messages": turns("Hi", "Yes.")}
    row["messages"].insert(0, {"role": "system", "content": ""})
    kept, _ = to_conversations([row])
    assert kept == [turns("Hi", "Yes.", system="Be kind.")]


def test_weights_of_parts_of_an_answer_are_refused() -> None:
    row = {"messages": turns("Hi", "Yes.")}
    row["messages"][1]["train_detail"] = [{"begin_offset": 0, "train": False}]
    with pytest.raises(DataError, match="field 'train_detail' is not trained on"):
        to_conversations([row])


def test_rows_that_are_lists_are_named_as_such() -> None:
    with pytest.raises(DataError, match="mine: a row is a list, where an object"):
        detect_format([turns("Hi", "Yes.")], "mine")


def test_a_list_of_turns_in_place_of_a_text_is_named_as_a_list() -> None:
    with pytest.raises(DataError, match="question is not text: a list"):
        to_problems([{"question": turns("How many?"), "answer": "5"}])


def test_rows_among_problems_that_end_in_no_number_are_counted() -> None:
    reader = Reader(system_prompt="Solve it.")
    rows = [problem("a"), {"question": "b", "answer": "Many.\n#### 8:30"}]
    first, second = reader.read(enumerate(rows, start=1))
    assert (first[0]["role"], second[0]["role"]) == ("system", "user")
    assert reader.fields.adjusted == {"no #### number, so no system prompt": 1}


def test_turns_in_a_cell_of_a_table_are_turns() -> None:
    prompt, answer = turns("Hi", system="Be kind."), {"from": "gpt", "value": "Yes."}
    row = {"prompt": json.dumps(prompt, indent=1), "completion": json.dumps([answer])}
    assert to_conversations([row])[0] == [turns("Hi", "Yes.", system="Be kind.")]
    assert read_prompt(row, "Another.", Fields()) == prompt
    with pytest.raises(DataError, match="prompt is text that is not JSON"):
        to_conversations([{"prompt": str(prompt), "completion": "Yes."}])


def test_json_that_holds_no_turns_is_an_answer() -> None:
    text = '[{"role": "manager", "name": "Ann"}]'
    assert to_conversations([pair("Who?", text)])[0] == [turns("Who?", text)]
