"""Tells the formats that rows come in apart, and turns a row into `messages`.

What cannot be read is a `DataError`, whose reason stands before the first colon.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from helpers.errors import DataError, nearest
from helpers.grpo.answers import MARKER, parse_gold, parse_number

log = logging.getLogger(__name__)
Messages = list[dict[str, Any]]  # turns: `role`, `content`, `weight` 0 if not learnt
Row = dict[str, Any]

ROLES = dict.fromkeys(["system", "developer"], "system")
ROLES |= dict.fromkeys(["user", "human", "prompter"], "user")
ROLES |= dict.fromkeys("assistant gpt chatgpt bing bard model bot".split(), "assistant")
# 0 or false in one of them: the turn is read, not learnt
LEARNT = ("weight", "train", "training", "loss")
MARKS = dict.fromkeys(["0", "0.0", "false"], False)
MARKS |= dict.fromkeys(["1", "1.0", "true", "none"], True)
# they change what is learnt, and training renders none of them
REFUSED = "tools functions tool_calls function_call reasoning_content thinking".split()
REFUSED_OF_TURN = [*REFUSED, "reasoning", "train_detail"]
SYSTEM = ("system", "system_prompt", "system_message")
CHATS = ("messages", "conversations")
# a cell of a table that holds turns, in JSON or, to be refused, as Python prints them
TURNS_AS_TEXT = re.compile(
    rf"""\s*\[\s*\{{\s*["'](role|from)["']\s*:\s*["']({"|".join(ROLES)})["']"""
)
PART = r"(?:(?!\[/?INST\]|<</?SYS>>).)*?"  # of a Llama 2 turn: text without a marker
# the whole turns of ready-made text
READY_MADE = {
    "llama-2": re.compile(
        rf"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(?P<system>{PART})\s*<</SYS>>)?\s*"
        rf"(?P<user>{PART})\s*\[/INST\]\s*(?P<assistant>{PART})\s*(?:</s>|$)",
        re.DOTALL,
    ),
    "chatml": re.compile(
        r"<\|im_start\|>(?P<role>\w+)\n"
        r"(?P<content>(?:(?!<\|im_start\|>).)*?)<\|im_end\|>",
        re.DOTALL,
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
        names = (n for n in fields if n not in used and not is_empty(fields[n]))
        self.unused.update(prefix + name for name in names)

    def report(self, source: str) -> None:
        """Names the unused fields and changed turns of a source in the log."""
        for title, counts in (("unused", self.unused), ("adjusted", self.adjusted)):
            if counts:
                listed = ", ".join(f"{name} ({n:,})" for name, n in counts.items())
                log.info("%s: %s: %s", source, title, listed)


# names and columns: first the question (or all turns), last the answer; the first that
# fits is taken
FORMATS = {
    "openai": ["messages"],
    "sharegpt": ["conversations"],
    "gsm8k": ["question", "answer"],
    "question-answer": ["question", "answer"],
    "alpaca": ["instruction", "input", "output"],
    "wizardlm": ["instruction", "output"],
    "dolly": ["instruction", "response"],
    "prompt-completion": ["prompt", "completion"],
    "llama-2": ["text"],
    "chatml": ["text"],
}
MARKERS = {"gsm8k": "#### <number>", "llama-2": "[INST]", "chatml": "<|im_start|>"}


def find_format(name: str) -> list[str]:
    """Returns the columns of a format; DataError names the nearest if there is none."""
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"no format {name!r}{nearest(name, FORMATS)} (known: {known})")
    return FORMATS[name]


def detect_format(rows: list[Any], source: str = "the rows") -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    Args:
        rows: the first few are enough.
        source: what they are called in messages.

    Raises:
        DataError: the columns fit no known format.
    """
    tables = [row for row in rows if isinstance(row, dict)]
    known = set(map(str, set().union(*tables)))
    expected = []
    for name, columns in FORMATS.items():
        needed, marker = ", ".join(sorted(columns)), MARKERS.get(name, "")
        needed += f" with {marker}" if marker else ""
        texts = [str(row.get(columns[-1])) for row in tables]
        solved = name == "gsm8k" and any(map(is_solved, texts))
        if known.issuperset(columns) and (solved or marker in "\n".join(texts)):
            return name, f"the rows have {needed}"
        expected.append(f"{name}: {needed}")
    listed = ", ".join(sorted(known)) or f"of {rows[:1]!r:.200}"
    raise DataError(
        f"{source}: the columns {listed} fit no known format ({'; '.join(expected)}); "
        "rename them to one of these"
    )


def is_solved(answer: str) -> bool:
    """Returns whether an answer ends as GSM8K's do, in a line `#### <number>`."""
    final = answer.rpartition(MARKER)[2].strip()
    return "\n" not in final and parse_gold(answer) is not None


def ask(question: str, system_prompt: str) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation.

    Args:
        question: the problem.
        system_prompt: the first turn, none if empty.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


# values


def to_object(row: Any, name: str) -> Row:
    """Returns a row or turn that is an object."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{name} is not an object: {row!r:.40}")
    return row


def is_empty(value: Any) -> bool:
    """Returns whether a field has no value, as JSON or as JSON in a text."""
    if isinstance(value, list | dict):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or str(value).strip() in ("", "[]", "{}", "null")


def text_of(value: Any, place: str) -> str:
    """Returns a content as text: text parts joined, a number as JSON has it."""
    if isinstance(value, list) and value and all(isinstance(p, dict) for p in value):
        kinds = {str(part.get("type") or "text") for part in value}
        if other := kinds - {"text", "input_text", "output_text"}:
            raise DataError(f"{place} has a part that is not text: {', '.join(other)}")
        value = "".join(text_of(part.get("text"), place) for part in value)
    elif isinstance(value, bool | int | float) and value == value:  # not NaN
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{place} is not text: {value!r:.40}")
    if half := re.search("[\ud800-\udfff]", value):
        raise DataError(f"text with a lone surrogate: {half[0]!r}")
    return value


def parse_json(value: Any, place: str) -> Any:
    """Returns a value; of JSON that is written as text what it holds."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"{place} is text that is not JSON: {value[:40]!r}") from None


def refuse(fields: Row, names: list[str]) -> None:
    """Raises DataError for a field that would change what is learnt."""
    for name in names:
        if not is_empty(fields.get(name)):
            raise DataError(
                f"field {name!r} is not trained on: remove it, or name it in "
                "data.ignore to leave it out knowingly"
            )


# turns


def read_turns(turns: Any, fields: Fields, place: str) -> Messages:
    """Returns turns, of a list, JSON in a text, or an object with a list per field."""
    turns = parse_json(turns, place)
    if isinstance(turns, dict):
        lists = {name: of for name, of in turns.items() if isinstance(of, list)}
        if len(set(map(len, lists.values()))) != 1:
            raise DataError(f"{place} has no lists of one length")
        rows = zip(*lists.values(), strict=True)
        turns = [dict(zip(lists, row, strict=True)) for row in rows]
    if not isinstance(turns, list):
        raise DataError(f"{place} is not a list of turns: {turns!r:.40}")
    return [read_turn(turn, n, fields, f"{place}.") for n, turn in enumerate(turns, 1)]


def read_turn(turn: Any, number: int, fields: Fields, prefix: str) -> dict[str, Any]:
    """Returns one turn as a message."""
    turn = fields.strip(to_object(turn, "a turn"), prefix)
    names = f"turn {number} has {', '.join(turn)}"
    refuse(turn, REFUSED_OF_TURN)
    words = [str(turn[key]) for key in ("from", "role") if turn.get(key)]
    roles = {ROLES.get(word.strip().lower(), word) for word in words}
    values = [turn[key] for key in ("value", "content") if turn.get(key) is not None]
    if not roles or not {"value", "content"} & set(turn):
        raise DataError(f"a turn has no role or no content: {names}")
    if len(roles) > 1 or values[1:] not in ([], values[:1]):
        raise DataError(f"fields of a turn differ: {names}")
    role = roles.pop()
    content = text_of(values[0] if values else None, f"the {role} turn's content")
    message: dict[str, Any] = {"role": role, "content": content}
    for mark in LEARNT:
        learnt = MARKS.get(str(turn.get(mark)).lower())
        if learnt is None:
            raise DataError(
                f"a {mark} that is neither 0 nor 1: turn {number} has "
                f"{turn[mark]!r:.40}; data.ignore leaves the field out knowingly"
            )
        if not learnt:
            message["weight"] = 0
    fields.count(turn, {"from", "role", "value", "content", *LEARNT}, prefix)
    return message


def read_side(value: Any, role: str, fields: Fields, place: str) -> Messages:
    """Returns one side of an exchange: a text, or a list of turns."""
    if isinstance(value, str) and TURNS_AS_TEXT.match(value):
        value = parse_json(value, place)
    turns = value if isinstance(value, list) else [value]
    if all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns):
        return read_turns(value, fields, place)
    return [{"role": role, "content": text_of(value, f"the {role} turn's content")}]


def cut_turns(name: str, text: str) -> Messages:
    """Returns the turns of text with the markers of Llama 2 or ChatML."""
    turns: Messages = []
    for turn in READY_MADE[name].finditer(text):
        parts = turn.groupdict()
        if name == "llama-2":
            turns += [{"role": r, "content": t} for r, t in parts.items() if t]
        else:
            turns.append(parts)
    if rest := READY_MADE[name].sub("", text).strip():
        raise DataError(f"broken markers: {rest[:40]!r} is no whole turn of {name}")
    return turns


# rows


def read_columns(row: Row, columns: list[str], fields: Fields) -> Messages:
    """Returns the turns of a row: its context, its question, and its answer."""
    refuse(row, REFUSED)
    question, answer = columns[0], columns[-1]
    used = {*columns, *SYSTEM, "history", "id"}
    messages: Messages = []
    for name in SYSTEM:
        if not is_empty(row.get(name)):
            messages.append({"role": "system", "content": text_of(row[name], name)})
    history = parse_json(row.get("history") or [], "history")
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history is not [question, answer] pairs: {pair!r:.40}")
        messages += read_side(pair[0], "user", fields, "history")
        messages += read_side(pair[1], "assistant", fields, "history")
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
    return tidy(messages, fields)


def tidy(turns: Messages, fields: Fields) -> Messages:
    """Returns turns with one system prompt, and one question before each answer."""
    messages: Messages = []
    for turn in turns:
        role, text = turn["role"], turn["content"]
        roles = [message["role"] for message in messages]
        if role == "system" and roles == ["system"]:
            if text.strip() not in ("", messages[0]["content"].strip()):
                raise DataError("two system prompts: columns or the first turn differ")
        elif role == "assistant" and "user" not in roles:
            fields.adjusted["answer before the first question dropped"] += 1
        elif role == "user" and roles[-1:] == ["user"]:
            fields.adjusted["questions in a row joined"] += 1
            text = f"{messages[-1]['content']}\n\n{text}"
            messages[-1] = messages[-1] | {"content": text}
        else:
            messages.append(turn)
    return messages


def read_row(form: str, row: Any, fields: Fields) -> Messages:
    """Returns a row of a format as messages; refuses fields that would be lost."""
    row, columns = fields.strip(to_object(row, "a row")), FORMATS[form]
    if missing := {columns[0], columns[-1]} - set(row):
        raise DataError(f"no {sorted(missing)[0]!r}: the row has {', '.join(row)}")
    # `loss` may be a column of measurements; of preferences, a false label is unwanted
    marks = [MARKS.get(str(row.get(name)).lower()) for name in ("weight", "train")]
    unwanted = form == "prompt-completion" and row.get("label") is False
    if unwanted or False in marks:
        raise DataError("no answer is learnt: the row is marked so")
    if form in READY_MADE:
        columns = ["messages"]
        row["messages"] = cut_turns(form, text_of(row.pop("text"), "text"))
    return read_columns(row, columns, fields)


def read_prompt(row: Any, system_prompt: str, fields: Fields) -> Messages:
    """Returns a prompt, of a row of any format, or of a text with a system prompt."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise DataError(f"it is {row!r:.40}, not a text or an object")
    columns = ("prompt", "question", "instruction", *CHATS)
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        raise DataError(f"it has {', '.join(row) or 'no field'}")
    messages = read_columns(row, [column], fields)
    if fault := check_turns(messages):
        raise DataError(fault)
    if not messages or messages[-1]["role"] != "user":
        raise DataError("it does not end with the user")
    if not messages[-1]["content"].strip():
        raise DataError("it is empty")
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    chat = isinstance(row[column], list) or TURNS_AS_TEXT.match(str(row[column]))
    if chat or column in CHATS or turns[0]["role"] == "system" or not system_prompt:
        return turns
    return [{"role": "system", "content": system_prompt}, *turns]


def read_problem(row: Any, fields: Fields) -> Row:
    """Returns a row as a problem, `{"id", "question", "answer", "gold"}`."""
    row = fields.strip(to_object(row, "a row"))
    if is_empty(row.get("question")) or is_empty(row.get("answer")):
        raise DataError(f"question or answer is missing: the row has {', '.join(row)}")
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
    if unknown := [role for role in roles if role not in ROLES.values()]:
        return f"role {unknown[0]!r} is not system, user or assistant"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    return None


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if fault := check_turns(messages):
        return fault
    if any(not message["content"].strip() for message in answers):
        return "empty answer"
    if answers and all(message.get("weight") == 0 for message in answers):
        return "no answer is learnt"
    return None if answers else "no assistant turn"
