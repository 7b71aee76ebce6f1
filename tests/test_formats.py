"""Tests of helpers.formats: every format in, one form out, told apart with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from helpers import runtime
from helpers.config import SYSTEM_PROMPT
from helpers.data import ask
from helpers.formats import FORMATS, DataError, Messages, detect_format
from helpers.reading import to_conversations
from helpers.sources import load_rows
from helpers.templates import INSTRUCTION_TEMPLATE, render
from tests.rows import ROWS, messages_row, problem, turns

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
        DataError, match="rows have body, title, which .*alpaca: input, in"
    ):
        detect_format([{"title": "a", "body": "b"}])


def test_the_system_prompt_goes_before_problems() -> None:
    row = problem("How many?")
    assert to_conversations([row], "Think.")[0] == [
        turns("How many?", "Working.\n#### 5", system="Think.")
    ]


def test_the_system_prompt_does_not_go_before_other_conversations() -> None:
    assert to_conversations(ROWS[:1], "Think.")[0][0][0]["role"] == "user"


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
    (problem("How many?"), "gsm8k", "the rows have answer, question"),
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
    with pytest.raises(DataError, match=r"rows have text, which .*chatml: text with <"):
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
    with pytest.raises(DataError, match="row 1: unreadable as llama-2: .*(INST|SYS)"):
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
    with pytest.raises(DataError, match=f"row 1: unreadable as chatml: turn {turn} is"):
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
        match="2 of 2 rows cannot be used as dolly; row 1: unreadable as dolly: "
        "no 'instruction'; .*without format= in the source the format is detected",
    ):
        to_conversations(ROWS, form="dolly")
