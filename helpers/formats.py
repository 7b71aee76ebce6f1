"""Rows in any known format -> `messages`; refuses bad rows by number and reason.

A conversation is a list of `{"role": ..., "content": ...}`, the form that chat
templates take.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from helpers.runs import fingerprint

Messages = list[dict[str, str]]
Row = dict[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"system": "system"}


class DataError(ValueError):
    """Rows that cannot be used; the message gives row numbers and reasons."""


def from_messages(row: Row) -> Messages:
    return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]


def from_sharegpt(row: Row) -> Messages:
    turns = row["conversations"]
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in turns
    ]


def from_problem(row: Row) -> Messages:
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
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
    answer = row["output"] if "output" in row else row["response"]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def from_completion(row: Row) -> Messages:
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def from_llama2_text(row: Row) -> Messages:
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
            raise KeyError("text is not `<s>[INST] ... [/INST] ... </s>`")
        system, question, answer = parts.groups()
        if system:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


# name, the columns it needs, how a row becomes messages; the first that fits is taken
FORMATS: list[tuple[str, set[str], Callable[[Row], Messages]]] = [
    ("openai messages", {"messages"}, from_messages),
    ("sharegpt", {"conversations"}, from_sharegpt),
    ("gsm8k", {"question", "answer"}, from_problem),
    ("alpaca", {"instruction", "output"}, from_instruction),
    ("dolly", {"instruction", "response"}, from_instruction),
    ("prompt/completion", {"prompt", "completion"}, from_completion),
    ("llama-2 text", {"text"}, from_llama2_text),
]


def detect_format(rows: list[Row]) -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    >>> detect_format([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    ('alpaca', 'the rows have instruction, output')

    Raises:
        DataError: the columns fit no known format.
    """
    columns = set(rows[0])
    for name, needed, _ in FORMATS:
        if needed <= columns:
            return name, f"the rows have {', '.join(sorted(needed))}"
    known = "; ".join(f"{name}: {', '.join(sorted(n))}" for name, n, _ in FORMATS)
    raise DataError(
        f"the rows have {', '.join(sorted(columns))}, which fits no known format "
        f"({known}); rename columns to one of these"
    )


def check_messages(messages: Messages) -> str | None:
    """Returns what is wrong with a conversation, None when nothing is.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    'no assistant turn'
    """
    for message in messages:
        if not isinstance(message["content"], str):
            return f"the content of a {message['role']} turn is not text"
        if message["role"] not in ROLES.values():
            return f"role {message['role']!r} is not system, user or assistant"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        return "no assistant turn"
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return f"turns do not alternate from user to assistant: {' '.join(roles)}"
    if any(not m["content"].strip() for m in messages if m["role"] == "assistant"):
        return "empty answer"
    return None


def to_conversations(
    rows: list[Row],
    system_prompt: str = "",
    source: str = "the rows",
    *,
    drop_unusable: bool = False,
) -> tuple[list[Messages], dict[str, int]]:
    """Returns the rows as conversations, and how many were left out, by reason.

    Args:
        rows: rows of one format; see `FORMATS`.
        system_prompt: put before problems (GSM8K format), so that training and
            evaluation ask in the same words.
        source: where the rows come from, for messages.
        drop_unusable: leave unusable rows out and count them, instead of refusing all.

    Raises:
        DataError: a row lacks an expected field or breaks the turn order (its number,
            counted from 1, and the reason are given), or no row is left.
    """
    name, _ = detect_format(rows)
    convert = next(function for known, _, function in FORMATS if known == name)
    kept: list[Messages] = []
    seen: set[str] = set()
    left_out = {"empty answer": 0, "duplicate": 0}
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            messages = convert(row)
            fault = check_messages(messages)
        except (KeyError, TypeError, AttributeError) as error:
            fault = f"unreadable as {name}: {type(error).__name__} {error}"
        if fault == "empty answer":
            left_out[fault] += 1
        elif fault:
            faults.append(f"row {number}: {fault}")
        elif (key := fingerprint(messages)) in seen:
            left_out["duplicate"] += 1
        else:
            seen.add(key)
            if name == "gsm8k" and system_prompt:
                messages.insert(0, {"role": "system", "content": system_prompt})
            kept.append(messages)
    if faults and not drop_unusable:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows)} rows cannot be used as {name}; "
            + "; ".join(faults[:3])
            + " (data.drop_unusable in the config leaves such rows out)"
        )
    if faults:
        left_out[f"unusable ({faults[0]})"] = len(faults)
    if not kept:
        raise DataError(f"{source}: no row is left ({left_out})")
    return kept, {reason: count for reason, count in left_out.items() if count}


def to_problems(rows: list[Row], source: str = "the rows") -> list[Row]:
    """Returns problems as `{"id", "question", "answer", "gold"}`.

    Args:
        rows: GSM8K-format rows; `answer` ends in a line `#### <number>`.

    Raises:
        DataError: a row has no question, or no gold answer after `####`.
    """
    from helpers.rewards import parse_gold

    problems, faults = [], []
    for number, row in enumerate(rows, start=1):
        question, answer = row.get("question"), row.get("answer")
        if not question or not answer:
            faults.append(f"row {number}: question or answer is missing")
            continue
        if not isinstance(question, str) or not isinstance(answer, str):
            faults.append(f"row {number}: question or answer is not text")
            continue
        gold = parse_gold(answer)
        if gold is None:
            faults.append(f"row {number}: answer has no `#### <number>` line")
            continue
        key = str(row.get("id") or fingerprint(question))
        problems.append(
            {"id": key, "question": question, "answer": answer, "gold": str(gold)}
        )
    if faults:
        raise DataError(
            f"{source}: {len(faults)} of {len(rows)} rows are no problems with a gold "
            "answer; " + "; ".join(faults[:3])
        )
    return problems
