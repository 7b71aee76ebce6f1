"""Tests of data.formats: every format in, one form out, told apart with a reason."""

import json

import pytest

from helpers.data.formats import ask, detect_format
from helpers.data.reading import LEARNT, Reader, to_conversations
from helpers.errors import DataError
from tests.rows import ROWS, messages_row, pair, problem, turns

HI = turns("Hi", "Hi.")
BRIEF = turns("Hi", "Hi.", system="Be brief.")


def read(row, **options):
    """Returns the messages of one row."""
    return to_conversations([row], **options)[0][0]


def said(**fields):
    """Returns a row whose answer has these fields, too."""
    return {"messages": [HI[0], HI[1] | fields]}


def asked(content):
    return {"messages": [{"role": "user", "content": content}, HI[1]]}


def spelt(who, says, *names):
    pairs = zip(names, ("Be brief.", "Hi", "Hi."), strict=True)
    return [{who: name, says: text} for name, text in pairs]


def chatml(*pairs):
    return "".join(f"<|im_start|>{who}\n{says}<|im_end|>\n" for who, says in pairs)


LLAMA2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hi. </s>"
DOLLY = {"instruction": "Hi", "response": "Hi."}
ALPACA = {"instruction": "Hi", "input": "", "output": "Hi."}
PARTS = [{"type": "text", "text": "H"}, {"text": "i"}]
FORMER = [*BRIEF[:2], BRIEF[2] | {"weight": 0}, *turns("Hi", "Ho.")]
MANAGER = '[{"role": "manager"}]'
READ = [
    (pair("Hi", "Hi."), HI),
    (DOLLY | {"context": "At ten."}, turns("Hi\n\n### Context:\nAt ten.", "Hi.")),
    (ALPACA, HI),
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
    ({"messages": [turn | {"from": None, "value": None} for turn in HI]}, HI),
    ({"prompt": [{"role": "user", "content": PARTS}], "completion": HI[1:]}, HI),
    ({"prompt": json.dumps(BRIEF[:2]), "completion": json.dumps(HI[1:])}, BRIEF),
    ({"prompt": [*BRIEF, *HI[:1]], "completion": "Ho."}, FORMER),
    (pair("Who?", MANAGER), turns("Who?", MANAGER)),
    ({"prompt": "Hi", "completion": True}, turns("Hi", "true")),
    ({"prompt": "Hi", "completion": 10**30}, turns("Hi", "1" + 30 * "0")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), READ)
def test_a_row_becomes_turns_with_a_role_and_a_text(row, messages):
    assert read(json.loads(json.dumps(row))) == messages


@pytest.mark.parametrize("row", [row for row, messages in READ if messages == HI])
@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_and_history_columns_come_first(row, column):
    for text in ("Be brief.", "", None):
        assert read(row | {column: text}) == turns("Hi", "Hi.", system=text or "")
    history = [["a?", "b"], ["c?", "d"]]
    messages = read(row | {"history": history, column: "S"})
    assert messages == turns("a?", "b", "c?", "d", "Hi", "Hi.", system="S")


@pytest.mark.parametrize("mark", LEARNT)
@pytest.mark.parametrize("value", [0, False, 0.0, "0", "False"])
def test_a_turn_that_is_marked_so_is_not_learnt(mark, value):
    row = turns("Hi", "Wrong.", "Again?", "Right.")
    row[0][mark], row[1][mark], row[3][mark] = None, value, "true"
    weights = [message.get("weight") for message in read({"messages": row})]
    assert weights == [None, 0, None, None]


def test_an_answer_before_the_first_question_is_dropped_and_counted():
    reader = Reader()
    row = {"messages": [*turns("", "Welcome!")[1:], *HI]}
    assert list(reader.read([(1, row)])) == [HI]
    assert reader.adjusted == {"answer before the first question dropped": 1}


CALL = [{"type": "function", "name": "look"}]
NO_TEXT = "the user turn is not text"
NO_MARK = "a mark that is neither 0 nor 1: .*'weight'"
ONE_EACH = "a turn needs one role and one content: "
REFUSED = [
    (messages_row("assistant", "user"), "no assistant turn"),
    (messages_row("user", "assistant", "assistant"), "turns do not .*: user assistant"),
    (messages_row("user", "system", "assistant"), "turns do not alternate"),
    (messages_row("user", "tool", "assistant"), "role 'tool' is not system, user or"),
    *[(asked(x), NO_TEXT) for x in ({"a": "b"}, float("nan"), [], ["a", "b"])],
    *[(asked([{"type": kind, "text": "a"}]), NO_TEXT) for kind in ("image", "thought")],
    (messages_row("user", "user", "assistant"), "turns do not alternate"),
    ({"messages": None}, "messages is not a list of turns: None"),
    ({"messages": "What is it?"}, "messages is text that is not JSON: What is it"),
    ({"messages": {"role": ["user"], "content": ["a"]}}, "messages is not a list of t"),
    ({"messages": ["Hi"]}, "a row or turn is not an object: 'Hi'"),
    (asked(None), ONE_EACH),
    ({"messages": [{"content": "a"}]}, ONE_EACH),
    ({"messages": [HI[0] | {"from": "gpt"}]}, ONE_EACH),
    ({"messages": [HI[0] | {"value": "b"}]}, ONE_EACH),
    *[(said(weight=value), NO_MARK) for value in (0.5, 2, "no", [1])],
    ({"messages": BRIEF, "system": "Be kind."}, "turns do not .*: system system user"),
    *[(pair("Hi") | {"history": value}, "history is ")
      for value in ("a?", {"a": "b"}, [["a?"]], ["a?", "b"])],
    ({"prompt": str(HI[:1]), "completion": "Yes."}, "prompt is text that is not JSON"),
    (pair("Is it \ud83c?"), r"the user turn is not text: 'Is it .ud83c"),
    *[(pair("Hi") | {field: CALL}, f"field '{field}' is not trained on.*data.ignore")
      for field in ("tools", "functions", "tool_calls", "function_call", "thinking")],
    *[(said(**{field: CALL}), f"field '{field}' is not trained on.*data.ignore")
      for field in ("tool_calls", "reasoning_content", "reasoning", "train_detail")],
    *[({"text": text}, "broken markers: .* is no whole turn of llama-2") for text in (
        "<s>[INST] a [INST] b [/INST] c </s>",
        "<s>[INST] <<SYS>> a [/INST] b </s>",
        "[INST] a [/INST] b [INST] c [/INST] d </s>",
        "<s>[INST] a [/INST] b </s> and more",
    )],
    *[({"text": text}, "broken markers: .* is no whole turn of chatml") for text in (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb",
        "<|im_start|>user\na\n<|im_start|>assistant\nb<|im_end|>",
        "Hello " + chatml(("user", "a")),
        chatml(("user", "a"), ("assistant", "b")) + "and more",
    )],
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_a_row_that_cannot_be_trusted_is_refused_with_its_reason(row, reason):
    with pytest.raises(DataError, match=f"1 of 1 rows .*; row 1: {reason}"):
        to_conversations([row])


def test_an_answer_that_is_marked_as_unwanted_is_not_learnt():
    rows = [pair("Hi") | {mark: False} for mark in ("label", "weight", "train")]
    kept, left_out = to_conversations([pair("Hi") | {"label": True}, *rows])
    assert (len(kept), left_out["no answer is learnt"]["rows"]) == (1, 3)


@pytest.mark.parametrize("value", [None, "", [], "[]", {}, {"name": None}, " "])
def test_a_field_without_a_value_changes_nothing(value):
    reader = Reader()
    row = said(tool_calls=value, name=value) | {"tools": value, "x": value}
    assert list(reader.read([(1, row)])) == [HI]
    assert reader.unused == {}


def test_fields_are_ignored_by_choice_and_counted_where_they_are_not_used():
    reader = Reader(ignore=("tools", "thinking", "label"))
    row = {"messages": [HI[0] | {"name": "Ann"}, HI[1] | {"thinking": "Hm."}]}
    row |= {"tools": CALL, "label": False, "id": 7, "score": 0.5}
    assert list(reader.read([(1, row)])) == [HI]
    assert reader.unused == {"name": 1, "score": 1}


LISTED = {"question": "Where?", "answer": "Here.\n#### 1. A list\nof places"}
DETECTED = [
    (messages_row("user"), "openai", "messages"),
    (ALPACA, "alpaca", "input, instruction, output"),
    (DOLLY | {"category": "c"}, "dolly", "instruction, response"),
    (problem("How many?"), "gsm8k", "answer, question with #### <number>"),
    (LISTED, "question-answer", "answer, question"),
    ({"text": "[INST] a [/INST] b"}, "llama-2", "text with [INST]"),
    ({"text": chatml(("user", "a"))}, "chatml", "text with <|im_start|>"),
]


@pytest.mark.parametrize(("row", "name", "columns"), DETECTED)
def test_a_format_is_detected_with_its_reason(row, name, columns):
    assert detect_format([row]) == (name, f"the rows have {columns}")
    assert detect_format([{"text": ""}, row])[0] == name


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"title": "a", "body": "b"}], "the columns body, title fit no .*alpaca: inp"),
        ([{"text": "Once upon a time."}], "the columns text fit .*chatml: text with <"),
        ([["Hi"]], "the rows: rows like .*'Hi'.* fit no known format"),
        ([DataError("broken JSON")], "broken JSON"),
    ],
)
def test_rows_of_no_known_format_are_refused_with_the_known_ones(rows, reason):
    with pytest.raises(DataError, match=reason):
        detect_format(rows)


def test_a_format_that_is_asked_for_is_taken_or_refused():
    row = {**ROWS[0], "instruction": "Say ho.", "response": "ho"}
    assert read(row) == turns("Say ho.", "ho")
    assert read(row, form="prompt-completion") == turns("Say hi, twice.", 'hi "hi"')
    reason = "2 of 2 rows .* as dolly; row 1: no 'instruction': the row has prompt, c"
    with pytest.raises(DataError, match=reason):
        to_conversations(ROWS, form="dolly")
    with pytest.raises(DataError, match="no format 'alpacca'; did you mean 'alpaca'"):
        to_conversations(ROWS, form="alpacca")


def test_problems_are_asked_in_training_as_in_evaluation():
    reader = Reader(system_prompt="Solve it.")
    rows = [problem("a"), {"question": "b", "answer": "Many.\n#### 8:30"}]
    rows.append(problem("c") | {"system": "S"})
    first, second, third = reader.read(enumerate(rows, start=1))
    assert first[:-1] == ask("a", "Solve it.")
    assert (second[0], third[0]["content"]) == (*ask("b", ""), "S")
    assert reader.adjusted == {"no #### number, so no system prompt": 1}
