"""The formats that rows come in: told apart, and turned into `messages` one by one.

A conversation is a list of `{"role": ..., "content": ...}`, the form that chat
templates take. Many rows are read in `reading`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from helpers.config import nearest

Messages = list[dict[str, str]]
Row = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"system": "system"}
# half of a surrogate pair: it has no place in a file, and tokenizers refuse it
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Rows that cannot be used; the message gives row numbers and reasons."""


def from_turns(turns: list[dict[str, str]]) -> Messages:
    """Returns turns spelt `from`/`value` or `role`/`content`, roles in our words."""
    messages = []
    for turn in turns:
        role = turn.get("from") or turn["role"]
        content = turn["value"] if turn.get("value") is not None else turn["content"]
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def exchange(question: str, answer: str) -> Messages:
    """Returns a conversation of one question and its answer."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def from_instruction(row: Row) -> Messages:
    """Returns the turns of Alpaca's `input` and Dolly's `context` rows.

    A context gets a heading, so that the `instruction` template renders Dolly's three
    blocks, and two where there is none.
    """
    question = row["instruction"]
    if row.get("input"):
        question += "\n\n" + row["input"]
    if row.get("context"):
        question += "\n\n### Context:\n" + row["context"]
    return exchange(question, row["output"] if "output" in row else row["response"])


def from_llama2(row: Row) -> Messages:
    """Returns the turns of ready-made `<s>[INST] ... [/INST] ... </s>` text."""
    messages: Messages = []
    for turn in re.split(r"\s*</s>\s*", row["text"].strip()):
        if not turn:
            continue
        parts = re.fullmatch(
            r"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(.*?)\s*<</SYS>>)?\s*(.*?)\s*"
            r"\[/INST\]\s*(.*)",
            turn,
            re.DOTALL,
        )
        if parts is None:
            raise DataError("text is not `<s>[INST] ... [/INST] ... </s>`")
        system, question, answer = parts.groups()
        stray = re.search(r"\[/?INST\]|<</?SYS>>", f"{system}{question}{answer}")
        if stray:
            raise DataError(f"{stray[0]} inside a turn; is </s> missing before it?")
        if system:
            messages.append({"role": "system", "content": system})
        messages += exchange(question, answer)
    return messages


def from_chatml(row: Row) -> Messages:
    """Returns the turns of ready-made `<|im_start|>role ... <|im_end|>` text.

    Contents are kept to the letter, so that a ChatML template renders the text again.
    """
    messages: Messages = []
    text, at = row["text"].rstrip(), 0
    turn = re.compile(r"\s*<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
    while at < len(text):
        found = turn.match(text, at)
        if found is None or "<|im_start|>" in found[2]:
            raise DataError(
                f"turn {len(messages) + 1} is not `<|im_start|>role`, a line break, "
                f"text and `<|im_end|>`: {text[at : at + 40]!r}"
            )
        role = ROLES.get(found[1], found[1])
        messages.append({"role": role, "content": found[2]})
        at = found.end()
    return messages


class Format(NamedTuple):
    """A form that rows come in."""

    name: str
    columns: set[str]
    """Rows of the format have all of these."""
    convert: Callable[[Row], Messages]
    marker: str = ""
    """Stands in the text of rows of the format."""


# the first that fits is taken
FORMATS = [
    Format("openai", {"messages"}, lambda row: from_turns(row["messages"])),
    Format("sharegpt", {"conversations"}, lambda r: from_turns(r["conversations"])),
    Format(
        "gsm8k",
        {"question", "answer"},
        lambda row: exchange(row["question"], row["answer"]),
    ),
    Format("alpaca", {"instruction", "input", "output"}, from_instruction),
    Format("wizardlm", {"instruction", "output"}, from_instruction),
    Format("dolly", {"instruction", "response"}, from_instruction),
    Format(
        "prompt-completion",
        {"prompt", "completion"},
        lambda row: exchange(row["prompt"], row["completion"]),
    ),
    Format("llama-2", {"text"}, from_llama2, "[INST]"),
    Format("chatml", {"text"}, from_chatml, "<|im_start|>"),
]


def detect_format(rows: list[Row]) -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    >>> detect_format([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    ('alpaca', 'the rows have input, instruction, output')

    Raises:
        DataError: the columns fit no known format.
    """
    columns = set().union(*rows)
    described = []
    for name, needed, _, marker in FORMATS:
        said = ", ".join(sorted(needed)) + (f" with {marker}" if marker else "")
        texts = [str(row.get("text")) for row in rows] if marker else []
        if needed <= columns and (not marker or any(marker in t for t in texts)):
            return name, f"the rows have {said}"
        described.append(f"{name}: {said}")
    raise DataError(
        f"the rows have {', '.join(sorted(columns))}, which fits no known format "
        f"({'; '.join(described)}); rename columns to one of these"
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


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    'no assistant turn'
    """
    for message in messages:
        if not isinstance(message["content"], str):
            return f"the {message['role']} turn's content is not text"
        if message["role"] not in ROLES.values():
            return f"role {message['role']!r} is not system, user or assistant"
        if half := HALF_A_CHARACTER.search(message["content"]):
            return f"text with half a character, which was cut apart: {half[0]!r}"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        return "no assistant turn"
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        return "empty answer"
    return None
