"""The formats that rows come in: told apart, and turned into `messages` one by one.

A conversation is a list of `{"role": ..., "content": ...}`, the form that chat
templates take. Many rows are read in `reading`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helpers.errors import DataError, nearest
from helpers.grpo.answers import MARKER, parse_gold

Messages = list[dict[str, Any]]
"""`role` and `content` of each turn; `weight` is 0 where a turn is not learnt."""
Row = dict[str, Any]

ROLES = {
    word: role
    for role, words in {
        "system": "system developer",
        "user": "user human prompter",
        "assistant": "assistant gpt chatgpt bing bard model bot",
    }.items()
    for word in words.split()
}
# 0 or false in one of them: the turn is read, not learnt
LEARNT = ("weight", "train", "training", "loss")
LEARNT_ROW = ("weight", "train")  # the others are columns of measurements, too
MARKS = {"0": False, "0.0": False, "false": False}
MARKS |= {"1": True, "1.0": True, "true": True}
# they change what is learnt, and training renders none of them
REFUSED = ("tool_calls", "function_call", "reasoning_content", "thinking")
REFUSED_OF_ROW = (*REFUSED, "tools", "functions")
REFUSED_OF_TURN = (*REFUSED, "reasoning", "train_detail")
SYSTEM = ("system", "system_prompt", "system_message")
# turns that a table holds as text, in JSON or, to be refused, as Python prints them
TURNS_AS_TEXT = re.compile(
    rf"""\s*\[\s*\{{\s*["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["'].*\]\s*""",
    re.DOTALL,
)
# half of a surrogate pair: it has no place in a file, and tokenizers refuse it
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass
class Fields:
    """What becomes of the columns and fields that a format does not need."""

    ignore: tuple[str, ...] = ()
    """Left out before anything is read."""
    unused: Counter[str] = field(default_factory=Counter)
    """How often a field that says something was not used, by its name."""
    adjusted: Counter[str] = field(default_factory=Counter)
    """How often turns were dropped or joined, by what was done."""

    def strip(self, fields: Row, prefix: str = "") -> Row:
        """Returns the fields that are not to be ignored."""
        return {
            name: value
            for name, value in fields.items()
            if name not in self.ignore and f"{prefix}{name}" not in self.ignore
        }

    def count(self, fields: Row, used: set[str], prefix: str = "") -> None:
        """Counts the fields that say something and are not used."""
        names = [name for name in fields if not is_empty(fields[name])]
        self.unused.update(f"{prefix}{name}" for name in names if name not in used)


def kind_of(value: Any) -> str:
    """Returns what a value is, in JSON's words.

    >>> kind_of(None), kind_of([]), kind_of({}), kind_of("a"), kind_of(float("nan"))
    ('null', 'a list', 'an object', 'text', 'NaN')
    """
    names = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value)) or json.dumps(value, default=repr)


def is_empty(value: Any) -> bool:
    """Returns whether a field says nothing, in JSON or in JSON as text.

    >>> is_empty("[]"), is_empty([{"name": None}]), is_empty(0), is_empty("no")
    (True, True, False, False)
    """
    if isinstance(value, list | dict):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or (
        isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")
    )


def text_of(value: Any, place: str) -> str:
    """Returns a content as text: a list of text parts joined, a number as JSON has it.

    >>> text_of([{"type": "text", "text": "Hi."}], "content"), text_of(True, "content")
    ('Hi.', 'true')

    Raises:
        DataError: it is something else, or holds half a character.
    """
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(p, dict) and {"type", "text"} & set(p) for p in parts):
        kinds = [part.get("type") or "text" for part in parts]
        strange = set(kinds) - {"text", "input_text", "output_text"}
        if strange:
            raise DataError(f"{place} has a part that is not text: {strange.pop()}")
        value = "".join(text_of(part.get("text"), place) for part in parts)
    if isinstance(value, bool | int | float) and value == value:  # not NaN
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{place} is not text: {kind_of(value)}")
    if half := HALF_A_CHARACTER.search(value):
        raise DataError(f"text with half a character, which was cut apart: {half[0]!r}")
    return value


def parse_json(value: Any, place: str) -> Any:
    """Returns a value, and one that is JSON written as text as what the JSON holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"{place} is text that is not JSON: {value[:40]!r}") from None


def parse_turns(value: Any, place: str) -> Any:
    """Returns a value, and turns that are written as text as what they are.

    >>> parse_turns('[{"role": "user", "content": "Hi."}]', "prompt")
    [{'role': 'user', 'content': 'Hi.'}]
    """
    written = isinstance(value, str) and TURNS_AS_TEXT.fullmatch(value)
    return parse_json(value, place) if written else value


def refuse(fields: Row, names: tuple[str, ...]) -> None:
    """Raises DataError for a field that would change what is learnt."""
    for name in names:
        if not is_empty(fields.get(name)):
            raise DataError(
                f"field {name!r} is not trained on: remove it, or name it in "
                "data.ignore to leave it out knowingly"
            )


def read_mark(mark: Any) -> bool | None:
    """Returns whether a mark says that something is learnt, None if it does not say.

    >>> read_mark(0.0), read_mark("True"), read_mark(0.5)
    (False, True, None)
    """
    return MARKS.get(str(mark).lower())


def read_turns(turns: Any, fields: Fields, place: str = "messages") -> Messages:
    """Returns turns spelt `from`/`value` or `role`/`content`, roles in our words.

    They may be a list, JSON as text, or, as `datasets` once stored them, an object
    with a list of each field.

    Raises:
        DataError: turns cannot be read, or have fields that would be lost.
    """
    turns = parse_json(turns, place)
    if isinstance(turns, dict):
        columns = {name: of for name, of in turns.items() if of is not None}
        if all(isinstance(column, list) for column in columns.values()):
            if len({len(column) for column in columns.values()}) > 1:
                raise DataError(f"{place} has lists of different lengths")
            turns = [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
        else:
            turns = [turns]
    if not isinstance(turns, list):
        raise DataError(f"{place} is not a list of turns: {kind_of(turns)}")
    return [
        read_turn(turn, f"turn {number}", fields, place)
        for number, turn in enumerate(turns, start=1)
    ]


def read_turn(turn: Any, name: str, fields: Fields, place: str) -> dict[str, Any]:
    """Returns one turn as a message."""
    if isinstance(turn, DataError):
        raise turn
    if not isinstance(turn, dict):
        raise DataError(f"a turn is not an object: {name} is {kind_of(turn)}")
    turn = fields.strip(turn, f"{place}.")
    word = turn.get("from") or turn.get("role")
    if not isinstance(word, str):
        raise DataError(f"a turn has no role: {name} has {', '.join(turn)}")
    refuse(turn, REFUSED_OF_TURN)
    if "value" not in turn and "content" not in turn:
        raise DataError(f"a turn has no content: {name} has {', '.join(turn)}")
    role, other = (
        ROLES.get(str(text).strip().lower(), text)
        for text in (word, turn.get("role") or word)
    )
    values = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if role != other or values[1:] not in ([], values[:1]):
        raise DataError(f"fields of a turn differ: {name} has {', '.join(turn)}")
    value = values[0] if values else None
    content = text_of(value, f"the {role} turn's content")
    message: dict[str, Any] = {"role": role, "content": content}
    for mark in LEARNT:
        weight = turn.get(mark)
        if weight is None or read_mark(weight):
            continue
        message["weight"] = 0
        if read_mark(weight) is None:
            raise DataError(
                f"a {mark} that is neither 0 nor 1: {name} has {weight!r:.40}; "
                "data.ignore leaves the field out knowingly"
            )
    fields.count(turn, {"from", "role", "value", "content", *LEARNT}, f"{place}.")
    return message


def read_side(value: Any, role: str, fields: Fields, place: str) -> Messages:
    """Returns one side of an exchange: a text, or a list of turns."""
    value = parse_turns(value, place)
    listed = value if isinstance(value, list) else [value]
    if all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in listed):
        return read_turns(value, fields, place)
    return [{"role": role, "content": text_of(value, f"the {role} turn's content")}]


def read_question(column: str, row: Row, fields: Fields) -> Messages:
    """Returns the turns that a row holds in a column, or asks with it.

    A context gets a heading, so that the `instruction` template renders Dolly's three
    blocks, and two where there is none.
    """
    if column in ("messages", "conversations"):
        return read_turns(row[column], fields, column)
    if column != "instruction":
        turns = read_side(row[column], "user", fields, column)
        for turn in turns:  # a prompt's former answers are not learnt
            if turn["role"] == "assistant":
                turn["weight"] = 0
        return turns
    question = text_of(row["instruction"], "instruction")
    for name, heading in (("input", ""), ("context", "### Context:\n")):
        if row.get(name) not in (None, ""):
            question += f"\n\n{heading}{text_of(row[name], name)}"
    return [{"role": "user", "content": question}]


def read_context(row: Row, fields: Fields) -> tuple[str, Messages]:
    """Returns a row's system prompt and former turns, from columns of their own."""
    prompts = [text_of(row[name], name) for name in SYSTEM if row.get(name) is not None]
    if len({text.strip() for text in prompts} - {""}) > 1:
        raise DataError("two system prompts: columns of the row differ")
    history = parse_json(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise DataError(f"history is not a list: {kind_of(history)}")
    turns: Messages = []
    for pair in history:
        if isinstance(pair, dict):
            turns += read_turns([pair], fields, "history")
        elif isinstance(pair, list) and len(pair) == 2:
            turns += exchange(*(text_of(text, "history") for text in pair))
        else:
            raise DataError(f"history is not [question, answer] pairs: {pair!r:.40}")
    return next((text for text in prompts if text.strip()), ""), turns


def begin(system: str, messages: Messages) -> Messages:
    """Returns messages with a system prompt in front, if there is one.

    Raises:
        DataError: the messages have another one.
    """
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() not in ("", system.strip()):
            raise DataError("two system prompts: a column and the first turn differ")
        messages = messages[1:]
    return [{"role": "system", "content": system}, *messages]


def tidy(messages: Messages, fields: Fields) -> Messages:
    """Returns messages that begin with a question and ask once before an answer.

    An answer before the first question is dropped, questions in a row are joined by a
    blank line; both are counted.
    """
    tidied: Messages = []
    for message in messages:
        roles = {turn["role"] for turn in tidied}
        if message["role"] == "assistant" and roles <= {"system"}:
            fields.adjusted["answer before the first question dropped"] += 1
        elif tidied and message["role"] == tidied[-1]["role"] == "user":
            fields.adjusted["questions in a row joined"] += 1
            text = f"{tidied[-1]['content']}\n\n{message['content']}"
            tidied[-1] = tidied[-1] | {"content": text}
        else:
            tidied.append(message)
    return tidied


def exchange(question: str, answer: str) -> Messages:
    """Returns a conversation of one question and its answer."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def from_llama2(text: str) -> Messages:
    """Returns the turns of ready-made `<s>[INST] ... [/INST] ... </s>` text."""
    messages: Messages = []
    for turn in re.split(r"\s*</s>\s*", text.strip()):
        if not turn:
            continue
        parts = re.fullmatch(
            r"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(.*?)\s*<</SYS>>)?\s*(.*?)\s*"
            r"\[/INST\]\s*(.*)",
            turn,
            re.DOTALL,
        )
        if parts is None:
            raise DataError(
                "broken markers: text is not `<s>[INST] ... [/INST] ... </s>`"
            )
        system, question, answer = parts.groups()
        stray = re.search(r"\[/?INST\]|<</?SYS>>", f"{system}{question}{answer}")
        if stray:
            raise DataError(
                f"broken markers: {stray[0]} inside a turn; is </s> missing before it?"
            )
        if system:
            messages.append({"role": "system", "content": system})
        messages += exchange(question, answer)
    return messages


def from_chatml(text: str) -> Messages:
    """Returns the turns of ready-made `<|im_start|>role ... <|im_end|>` text.

    Contents are kept to the letter, so that a ChatML template renders the text again.
    """
    messages: Messages = []
    text, at = text.rstrip(), 0
    turn = re.compile(r"\s*<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
    while at < len(text):
        found = turn.match(text, at)
        if found is None or "<|im_start|>" in found[2]:
            raise DataError(
                f"broken markers: turn {len(messages) + 1} is not `<|im_start|>role`, "
                f"a line break, text and `<|im_end|>`: {text[at : at + 40]!r}"
            )
        role = ROLES.get(found[1], found[1])
        messages.append({"role": role, "content": found[2]})
        at = found.end()
    return messages


class Format(NamedTuple):
    """A form that rows come in."""

    name: str
    columns: tuple[str, ...]
    """Rows of the format have all: first the question (or all turns), last the answer.
    """
    marker: str = ""
    """Stands in the last column of rows of the format."""


# the first that fits is taken
FORMATS = [
    Format("openai", ("messages",)),
    Format("sharegpt", ("conversations",)),
    Format("gsm8k", ("question", "answer"), "#### <number>"),
    Format("question-answer", ("question", "answer")),
    Format("alpaca", ("instruction", "input", "output")),
    Format("wizardlm", ("instruction", "output")),
    Format("dolly", ("instruction", "response")),
    Format("prompt-completion", ("prompt", "completion")),
    Format("llama-2", ("text",), "[INST]"),
    Format("chatml", ("text",), "<|im_start|>"),
]
READY_MADE = {"llama-2": from_llama2, "chatml": from_chatml}


def is_marked(form: Format, row: Row) -> bool:
    """Returns whether a row has a format's marker, if it has one."""
    text = row.get(form.columns[-1])
    if form.name == "gsm8k":
        return isinstance(text, str) and is_solved(text)
    return form.marker in str(text)


def is_solved(answer: str) -> bool:
    """Returns whether an answer ends as GSM8K's do, in a line `#### <number>`.

    >>> is_solved("2 + 3 = 5\\n#### 5"), is_solved("#### 1. Shape\\nIt is round.")
    (True, False)
    """
    final = answer.rpartition(MARKER)[2].strip()
    return "\n" not in final and parse_gold(answer) is not None


def read_row(form: Format, row: Any, fields: Fields) -> Messages:
    """Returns a row of a format as messages.

    Raises:
        DataError: it cannot be read so, or has fields that would be lost.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row is not an object: it is {kind_of(row)}")
    row = fields.strip(row)
    question, answer = form.columns[0], form.columns[-1]
    missing = [name for name in (question, answer) if name not in row]
    if missing:
        raise DataError(f"no {missing[0]!r}: the row has {', '.join(map(str, row))}")
    refuse(row, REFUSED_OF_ROW)
    if any(read_mark(row.get(name)) is False for name in LEARNT_ROW):
        raise DataError("no answer is learnt: the row is marked so")
    if form.name == "prompt-completion" and row.get("label") is False:
        raise DataError(
            "field 'label' is false, which marks an answer that is not wanted: remove "
            "the row, or name the field in data.ignore if it means something else"
        )
    system, messages = read_context(row, fields)
    if form.name in READY_MADE:
        messages += READY_MADE[form.name](text_of(row["text"], "text"))
    else:
        messages += read_question(question, row, fields)
        if answer != question:
            messages += read_side(row[answer], "assistant", fields, answer)
    used = {*form.columns, *SYSTEM, "history"}
    used |= {"input", "context"} if question == "instruction" else set()
    used |= {name for name in LEARNT_ROW if read_mark(row.get(name))}
    fields.count(row, used)
    return tidy(begin(system, messages), fields)


def read_prompt(row: Any, system_prompt: str, fields: Fields) -> Messages:
    """Returns a prompt to answer: of a text, or of a row of any format.

    Args:
        row: a text, or an object with `prompt`, `question`, `instruction`, `messages`
            or `conversations`.
        system_prompt: put before what is no list of turns and has no own.
        fields: counts those that are not used.

    Raises:
        DataError: it is no prompt.
    """
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise DataError(f"it is {kind_of(row)}, not a text or an object")
    columns = ("prompt", "question", "instruction", "messages", "conversations")
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        raise DataError(f"it has {', '.join(map(str, row)) or 'no field'}")
    refuse(row, REFUSED_OF_ROW)
    row = row | {column: parse_turns(row[column], column)}
    more = ("input", "context") if column == "instruction" else ()
    fields.count(row, {column, "id", *more, *SYSTEM, "history"})
    system, messages = read_context(row, fields)
    messages = tidy(
        begin(system, messages + read_question(column, row, fields)), fields
    )
    fault = check_turns(messages)
    if fault or not messages or messages[-1]["role"] != "user":
        raise DataError(fault or "it does not end with the user")
    if not messages[-1]["content"].strip():
        raise DataError("it is empty")
    listed = isinstance(row[column], list) or column in ("messages", "conversations")
    if messages[0]["role"] != "system" and system_prompt and not listed:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def detect_format(rows: list[Any], source: str = "the rows") -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    >>> detect_format([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    ('alpaca', 'the rows have input, instruction, output')

    Raises:
        DataError: the columns fit no known format.
    """
    strange = [row for row in rows if not isinstance(row, dict | DataError)]
    rows = [row for row in rows if isinstance(row, dict)]
    if strange and not rows:
        raise DataError(
            f"{source}: a row is {kind_of(strange[0])}, where an object with named "
            "columns is expected"
        )
    columns = set(map(str, set().union(*rows)))
    described = []
    for form in FORMATS:
        needed = ", ".join(sorted(form.columns))
        needed += f" with {form.marker}" if form.marker else ""
        if set(form.columns) <= columns and any(is_marked(form, row) for row in rows):
            return form.name, f"the rows have {needed}"
        described.append(f"{form.name}: {needed}")
    raise DataError(
        f"{source}: the columns {', '.join(sorted(columns))} fit no known format "
        f"({'; '.join(described)}); rename them to one of these"
    )


def find_format(name: str) -> Format:
    """Returns the format of a name.

    Raises:
        DataError: there is none; the nearest name is given.
    """
    known = {form.name: form for form in FORMATS}
    if name not in known:
        hint = nearest(name, known)
        raise DataError(f"no format {name!r}{hint} (known: {', '.join(known)})")
    return known[name]


def check_turns(messages: Messages) -> str | None:
    """Returns what is wrong with the order of the turns, None when nothing is."""
    roles = [message["role"] for message in messages]
    strange = [role for role in roles if role not in ROLES.values()]
    if strange:
        return f"role {strange[0]!r} is not system, user or assistant"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    return None


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    'no assistant turn'
    """
    fault = check_turns(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if fault or not answers:
        return fault or "no assistant turn"
    if any(not message["content"].strip() for message in answers):
        return "empty answer"
    if all(message.get("weight") == 0 for message in answers):
        return "no answer is learnt"
    return None
