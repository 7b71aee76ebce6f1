"""Tells the formats that rows come in apart, and turns a row into `messages`.

What cannot be read is a `DataError`, whose reason stands before the first colon.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helpers.errors import DataError, nearest
from helpers.grpo.answers import MARKER, parse_gold, parse_number

Messages = list[dict[str, Any]]
"""`role` and `content` of each turn; `weight` is 0 where a turn is not learnt."""
Row = dict[str, Any]

ROLES = dict.fromkeys(["system", "developer"], "system")
ROLES |= dict.fromkeys(["user", "human", "prompter"], "user")
ROLES |= dict.fromkeys("assistant gpt chatgpt bing bard model bot".split(), "assistant")
# 0 or false in one of them: the turn is read, not learnt
LEARNT = ("weight", "train", "training", "loss")
LEARNT_ROW = ("weight", "train")  # the others are columns of measurements, too
MARKS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
# they change what is learnt, and training renders none of them
REFUSED = ("tool_calls", "function_call", "reasoning_content", "thinking")
REFUSED_OF_ROW = (*REFUSED, "tools", "functions")
REFUSED_OF_TURN = (*REFUSED, "reasoning", "train_detail")
SYSTEM = ("system", "system_prompt", "system_message")
CHATS = ("messages", "conversations")
TEXT_PARTS = ("text", "input_text", "output_text")
# a cell of a table that holds turns, in JSON or, to be refused, as Python prints them
TURNS_AS_TEXT = re.compile(
    rf"""\s*\[\s*\{{\s*["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["'].*\]\s*""",
    re.DOTALL,
)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# ready-made text: a turn, its shape in words, and what must not stand inside it
READY_MADE = {
    "llama-2": (
        r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(?P<system>.*?)\s*<</SYS>>)?\s*"
        r"(?P<user>.*?)\s*\[/INST\]\s*(?P<assistant>.*?)\s*(?:</s>|$)",
        "`<s>[INST] ... [/INST] ... </s>`",
        r"\[/?INST\]|<</?SYS>>",
    ),
    "chatml": (
        r"\s*<\|im_start\|>(?P<role>\w+)\n(?P<content>.*?)<\|im_end\|>",
        "`<|im_start|>role`, a line break, text and `<|im_end|>`",
        r"<\|im_start\|>",
    ),
}


@dataclass
class Fields:
    """Counts the columns and fields that a format does not need."""

    ignore: tuple[str, ...] = ()  # left out before anything is read
    unused: Counter[str] = field(default_factory=Counter)
    adjusted: Counter[str] = field(default_factory=Counter)  # turns dropped or joined

    def strip(self, fields: Row, prefix: str = "") -> Row:
        """Returns the fields that are not to be ignored."""
        ignore = set(self.ignore)
        return {n: v for n, v in fields.items() if not {n, prefix + n} & ignore}

    def count(self, fields: Row, used: set[str], prefix: str = "") -> None:
        """Counts the fields that have a value and are not used."""
        names = [n for n in fields if n not in used and not is_empty(fields[n])]
        self.unused.update(f"{prefix}{name}" for name in names)


class Format(NamedTuple):
    """A format that rows come in."""

    name: str
    columns: tuple[str, ...]  # first the question (or all turns), last the answer
    marker: str = ""  # stands in the last column

    def fits(self, row: Row) -> bool:
        """Returns whether the last column has the marker, if there is one."""
        text = row.get(self.columns[-1])
        if self.name == "gsm8k":
            return isinstance(text, str) and is_solved(text)
        return self.marker in str(text)


# the first that fits is taken
FORMATS = {
    form.name: form
    for form in [
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
}


def find_format(name: str) -> Format:
    """Returns the format of a name; DataError names the nearest where there is none."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"no format {name!r}{nearest(name, FORMATS)} (known: {known})")
    return FORMATS[name]


def detect_format(rows: list[Any], source: str = "the rows") -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    >>> detect_format([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    ('alpaca', 'the rows have input, instruction, output')

    Raises:
        DataError: the columns fit no known format.
    """
    tables = [row for row in rows if isinstance(row, dict)]
    others = [row for row in rows if not isinstance(row, dict | DataError)]
    if others and not tables:
        kind = kind_of(others[0])
        raise DataError(f"{source}: a row is {kind}, expected an object with columns")
    columns = set(map(str, set().union(*tables)))
    expected = []
    for form in FORMATS.values():
        needed = ", ".join(sorted(form.columns))
        needed += f" with {form.marker}" if form.marker else ""
        if set(form.columns) <= columns and any(map(form.fits, tables)):
            return form.name, f"the rows have {needed}"
        expected.append(f"{form.name}: {needed}")
    raise DataError(
        f"{source}: the columns {', '.join(sorted(columns))} fit no known format "
        f"({'; '.join(expected)}); rename them to one of these"
    )


def is_solved(answer: str) -> bool:
    """Returns whether an answer ends as GSM8K's do, in a line `#### <number>`.

    >>> is_solved("2 + 3 = 5\\n#### 5"), is_solved("#### 1. Shape\\nIt is round.")
    (True, False)
    """
    final = answer.rpartition(MARKER)[2].strip()
    return "\n" not in final and parse_gold(answer) is not None


# values


def kind_of(value: Any) -> str:
    """Returns what a value is, in JSON's words."""
    names = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value)) or json.dumps(value, default=repr)


def to_object(row: Any) -> Row:
    """Returns a row that is an object."""
    if not isinstance(row, dict):
        raise DataError(f"a row is not an object: it is {kind_of(row)}")
    return row


def names_of(row: Row) -> str:
    """Returns the names of a row's fields."""
    return ", ".join(map(str, row))


def is_empty(value: Any) -> bool:
    """Returns whether a field has no value, as JSON or as JSON in a text.

    >>> is_empty("[]"), is_empty([{"name": None}]), is_empty(0), is_empty("no")
    (True, True, False, False)
    """
    if isinstance(value, list | dict):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    blank = ("", "[]", "{}", "null")
    return value is None or (isinstance(value, str) and value.strip() in blank)


def text_of(value: Any, place: str) -> str:
    """Returns a content as text: a list of text parts joined, a number as JSON has it.

    >>> text_of([{"type": "text", "text": "Hi."}], "content"), text_of(True, "content")
    ('Hi.', 'true')
    """
    parts = value if isinstance(value, list) else []
    if parts and all(isinstance(p, dict) and {"type", "text"} & set(p) for p in parts):
        for part in parts:
            if (part.get("type") or "text") not in TEXT_PARTS:
                raise DataError(f"{place} has a part that is not text: {part['type']}")
        value = "".join(text_of(part.get("text"), place) for part in parts)
    if isinstance(value, bool | int | float) and value == value:  # not NaN
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{place} is not text: {kind_of(value)}")
    if half := LONE_SURROGATE.search(value):
        raise DataError(f"text with a lone surrogate: {half[0]!r}")
    return value


def parse_json(value: Any, place: str) -> Any:
    """Returns a value; of JSON that is written as text what it holds."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"{place} is text that is not JSON: {value[:40]!r}") from None


def refuse(fields: Row, names: tuple[str, ...]) -> None:
    """Raises DataError for a field that would change what is learnt."""
    for name in names:
        if not is_empty(fields.get(name)):
            raise DataError(
                f"field {name!r} is not trained on: remove it, or name it in "
                "data.ignore to leave it out knowingly"
            )


def read_mark(mark: Any) -> bool | None:
    """Returns whether something marked so is learnt; None for no mark at all."""
    return MARKS.get(str(mark).lower())


# turns


def read_turns(turns: Any, fields: Fields, place: str = "messages") -> Messages:
    """Returns turns spelt `from`/`value` or `role`/`content`, with our roles.

    They may be a list, JSON in a text, or an object with a list of each field.
    """
    turns = parse_json(turns, place)
    if isinstance(turns, dict):
        lists = {name: of for name, of in turns.items() if of is not None}
        if not all(isinstance(values, list) for values in lists.values()):
            lists = {name: [value] for name, value in turns.items()}
        if len(set(map(len, lists.values()))) > 1:
            raise DataError(f"{place} has lists of different lengths")
        rows = zip(*lists.values(), strict=True)
        turns = [dict(zip(lists, row, strict=True)) for row in rows]
    if not isinstance(turns, list):
        raise DataError(f"{place} is not a list of turns: {kind_of(turns)}")
    return [read_turn(turn, n, fields, f"{place}.") for n, turn in enumerate(turns, 1)]


def read_turn(turn: Any, number: int, fields: Fields, prefix: str) -> dict[str, Any]:
    """Returns one turn as a message."""
    if isinstance(turn, DataError):
        raise turn
    if not isinstance(turn, dict):
        kind = kind_of(turn)
        raise DataError(f"a turn is not an object: turn {number} is {kind}")
    turn = fields.strip(turn, prefix)
    names = f"turn {number} has {names_of(turn)}"
    words = [turn[key] for key in ("from", "role") if turn.get(key)]
    if not words or not isinstance(words[0], str):
        raise DataError(f"a turn has no role: {names}")
    refuse(turn, REFUSED_OF_TURN)
    if not {"value", "content"} & set(turn):
        raise DataError(f"a turn has no content: {names}")
    role, *roles = [ROLES.get(str(word).strip().lower(), word) for word in words]
    values = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if roles not in ([], [role]) or values[1:] not in ([], values[:1]):
        raise DataError(f"fields of a turn differ: {names}")
    content = text_of(values[0] if values else None, f"the {role} turn's content")
    message: dict[str, Any] = {"role": role, "content": content}
    for mark in LEARNT:
        value = turn.get(mark)
        if value is not None and read_mark(value) is None:
            raise DataError(
                f"a {mark} that is neither 0 nor 1: turn {number} has {value!r:.40}; "
                "data.ignore leaves the field out knowingly"
            )
        if read_mark(value) is False:
            message["weight"] = 0
    fields.count(turn, {"from", "role", "value", "content", *LEARNT}, prefix)
    return message


def read_side(value: Any, role: str, fields: Fields, place: str) -> Messages:
    """Returns one side of an exchange: a text, or a list of turns."""
    if isinstance(value, str) and TURNS_AS_TEXT.fullmatch(value):
        value = parse_json(value, place)
    turns = value if isinstance(value, list) else [value]
    if all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns):
        return read_turns(value, fields, place)
    return [{"role": role, "content": text_of(value, f"the {role} turn's content")}]


def read_ready_made(name: str, text: str) -> Messages:
    """Returns the turns of text with the markers of Llama 2 or ChatML.

    Contents of ChatML are kept to the letter, so that a template renders them again.
    """
    messages: Messages = []
    pattern, shape, stray = READY_MADE[name]
    text, at = text.rstrip(), 0
    while at < len(text):
        turn = re.compile(pattern, re.DOTALL).match(text, at)
        if turn is None or any(re.search(stray, part or "") for part in turn.groups()):
            number, start = len(messages) + 1, text[at : at + 40]
            raise DataError(f"broken markers: turn {number} is not {shape}: {start!r}")
        parts = turn.groupdict()
        if "role" in parts:
            parts = {ROLES.get(parts["role"], parts["role"]): parts["content"]}
        elif not parts["system"]:
            del parts["system"]
        messages += [{"role": role, "content": says} for role, says in parts.items()]
        at = turn.end()
    return messages


# rows


def read_context(row: Row, fields: Fields) -> tuple[str, Messages]:
    """Returns a row's system prompt and former turns, from columns of their own."""
    prompts = [text_of(row[name], name) for name in SYSTEM if row.get(name) is not None]
    prompts = [text for text in prompts if text.strip()]
    if len({text.strip() for text in prompts}) > 1:
        raise DataError("two system prompts: columns of the row differ")
    history = parse_json(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise DataError(f"history is not a list: {kind_of(history)}")
    turns: Messages = []
    for pair in history:
        if isinstance(pair, dict):
            turns += read_turns([pair], fields, "history")
        elif isinstance(pair, list) and len(pair) == 2:
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append({"role": role, "content": text_of(text, "history")})
        else:
            raise DataError(f"history is not [question, answer] pairs: {pair!r:.40}")
    return "".join(prompts[:1]), turns


def read_columns(row: Row, columns: tuple[str, ...], fields: Fields) -> Messages:
    """Returns the turns of a row: its context, its question, and its answer."""
    refuse(row, REFUSED_OF_ROW)
    system, messages = read_context(row, fields)
    question, answer = columns[0], columns[-1]
    used = {*columns, *SYSTEM, "history"}
    if question in CHATS:
        messages += read_turns(row[question], fields, question)
    elif question == "instruction":
        # a context gets a heading: the `instruction` template has Dolly's three blocks
        text = text_of(row[question], question)
        for name, heading in (("input", ""), ("context", "### Context:\n")):
            used.add(name)
            if row.get(name) not in (None, ""):
                text += f"\n\n{heading}{text_of(row[name], name)}"
        messages.append({"role": "user", "content": text})
    else:
        for turn in read_side(row[question], "user", fields, question):
            # a prompt's former answers are not learnt
            mark = {"weight": 0} if turn["role"] == "assistant" else {}
            messages.append(turn | mark)
    if answer != question:
        messages += read_side(row[answer], "assistant", fields, answer)
    fields.count(row, used)
    return tidy(system, messages, fields)


def tidy(system: str, turns: Messages, fields: Fields) -> Messages:
    """Returns turns after a system prompt, with one question before each answer.

    An answer before the first question is dropped, questions in a row are joined by a
    blank line; both are counted.
    """
    if system and turns and turns[0]["role"] == "system":
        if turns[0]["content"].strip() not in ("", system.strip()):
            raise DataError("two system prompts: a column and the first turn differ")
        turns = turns[1:]
    messages: Messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if turn["role"] == "assistant" and {m["role"] for m in messages} <= {"system"}:
            fields.adjusted["answer before the first question dropped"] += 1
        elif messages and turn["role"] == messages[-1]["role"] == "user":
            fields.adjusted["questions in a row joined"] += 1
            text = f"{messages[-1]['content']}\n\n{turn['content']}"
            messages[-1] = messages[-1] | {"content": text}
        else:
            messages.append(turn)
    return messages


def read_row(form: Format, row: Any, fields: Fields) -> Messages:
    """Returns a row of a format as messages.

    Raises:
        DataError: it cannot be read so, or has fields that would be lost.
    """
    row = fields.strip(to_object(row))
    for name in (form.columns[0], form.columns[-1]):
        if name not in row:
            raise DataError(f"no {name!r}: the row has {names_of(row)}")
    if form.name == "prompt-completion" and row.get("label") is False:
        raise DataError(
            "field 'label' is false, which marks an answer that is not wanted: remove "
            "the row, or name the field in data.ignore if it means something else"
        )
    for mark in LEARNT_ROW:
        if read_mark(row.get(mark)) is False:
            raise DataError("no answer is learnt: the row is marked so")
        if read_mark(row.get(mark)):
            del row[mark]
    if form.name not in READY_MADE:
        return read_columns(row, form.columns, fields)
    turns = read_ready_made(form.name, text_of(row.pop("text"), "text"))
    return read_columns(row | {"messages": turns}, ("messages",), fields)


def read_prompt(row: Any, system_prompt: str, fields: Fields) -> Messages:
    """Returns a prompt to answer: of a text, or of a row of any format.

    Args:
        row: a text, or an object with `prompt`, `question`, `instruction`, `messages`
            or `conversations`.
        system_prompt: put before a text that has no other.
        fields: counts those that are not used.

    Raises:
        DataError: it is no prompt.
    """
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise DataError(f"it is {kind_of(row)}, not a text or an object")
    columns = ("prompt", "question", "instruction", *CHATS)
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        raise DataError(f"it has {names_of(row) or 'no field'}")
    row = {name: value for name, value in row.items() if name != "id"}
    messages = read_columns(row, (column,), fields)
    fault = check_turns(messages)
    if fault or not messages or messages[-1]["role"] != "user":
        raise DataError(fault or "it does not end with the user")
    if not messages[-1]["content"].strip():
        raise DataError("it is empty")
    text = isinstance(row[column], str) and not TURNS_AS_TEXT.fullmatch(row[column])
    alone = column not in CHATS and (text or not isinstance(row[column], list | str))
    if messages[0]["role"] != "system" and system_prompt and alone:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def read_problem(row: Any, fields: Fields) -> Row:
    """Returns a row as a problem, `{"id", "question", "answer", "gold"}`.

    Raises:
        DataError: it has no question, or no gold answer.
    """
    row = fields.strip(to_object(row))
    if is_empty(row.get("question")) or is_empty(row.get("answer")):
        names = names_of(row)
        raise DataError(f"question or answer is missing: the row has {names}")
    question = text_of(row["question"], "question")
    answer = text_of(row["answer"], "answer")
    if MARKER not in answer and parse_number(answer.strip()) is not None:
        answer = f"{MARKER} {answer.strip()}"
    gold = parse_gold(answer)
    if gold is None:
        raise DataError(
            f"no gold number: the answer ends in {answer[-40:]!r}; a line "
            f"`{MARKER} <number>` or a number alone is expected"
        )
    fields.count(row, {"id", "question", "answer"})
    key = str(row.get("id") or "")
    return {"id": key, "question": question, "answer": answer, "gold": str(gold)}


def check_turns(messages: Messages) -> str | None:
    """Returns what is wrong with the order of the turns, None when nothing is."""
    roles = [message["role"] for message in messages]
    for role in roles:
        if role not in ROLES.values():
            return f"role {role!r} is not system, user or assistant"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    return None


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    'no assistant turn'
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if fault := check_turns(messages):
        return fault
    if not answers:
        return "no assistant turn"
    if any(not message["content"].strip() for message in answers):
        return "empty answer"
    marks = {message.get("weight") for message in answers}
    return "no answer is learnt" if marks == {0} else None
