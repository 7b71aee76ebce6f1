"""Tells the formats that rows come in apart; a `DataError` has its reason first."""

import json
import re
from typing import Any

from helpers.errors import DataError
from helpers.grpo.answers import MARKER, parse_gold

Messages = list[dict[str, Any]]  # turns: `role`, `content`, `weight` 0 if not learnt
Row = dict[str, Any]

ROLES = dict.fromkeys(["system", "developer"], "system")
ROLES |= dict.fromkeys(["user", "human", "prompter"], "user")
ROLES |= dict.fromkeys("assistant gpt chatgpt bing bard model bot".split(), "assistant")
# a cell of a table that holds turns, in JSON or, to be refused, as Python prints them
TURNS_AS_TEXT = re.compile(
    rf"""\s*\[\s*\{{\s*["'](role|from)["']\s*:\s*["']({"|".join(ROLES)})["']"""
)
PART = r"(?:(?!\[/?INST\]|<</?SYS>>).)*?"  # of a Llama 2 turn: text without a marker
READY_MADE = {
    "llama-2": re.compile(
        rf"(?s)(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(?P<system>{PART})\s*<</SYS>>)?\s*"
        rf"(?P<user>{PART})\s*\[/INST\]\s*(?P<assistant>{PART})\s*(?:</s>|$)"
    ),
    "chatml": re.compile(
        r"(?s)<\|im_start\|>(?P<role>\w+)\n"
        r"(?P<content>(?:(?!<\|im_start\|>).)*?)<\|im_end\|>"
    ),
}
# the first that fits is taken; its columns: first the question or chat, last the answer
FORMATS = {"openai": ["messages"], "sharegpt": ["conversations"]}
FORMATS |= dict.fromkeys(["gsm8k", "question-answer"], ["question", "answer"])
FORMATS |= {"alpaca": ["instruction", "input", "output"]}
FORMATS |= {"wizardlm": ["instruction", "output"], "dolly": ["instruction", "response"]}
FORMATS |= {"prompt-completion": ["prompt", "completion"]}
FORMATS |= dict.fromkeys(READY_MADE, ["text"]) | {"labelled": ["text", "label"]}
MARKERS = {"gsm8k": "#### <number>", "llama-2": "[INST]", "chatml": "<|im_start|>"}


def detect_format(rows: list[Any], source: str = "the rows") -> tuple[str, str]:
    """Returns the name of the rows' format and the reason for it.

    Args:
        rows: the first few are enough.
        source: what they are called in messages.

    Raises:
        DataError: the columns fit no known format.
    """
    tables = [row for row in rows if isinstance(row, dict)]
    names, expected = set(map(str, set().union(*tables))), []
    for form, columns in FORMATS.items():
        needed, marker = ", ".join(sorted(columns)), MARKERS.get(form, "")
        needed += f" with {marker}" if marker else ""
        texts = [str(row.get(columns[-1])) for row in tables]
        solved = form == "gsm8k" and any(map(is_solved, texts))
        if names.issuperset(columns) and (solved or marker in "\n".join(texts)):
            return form, f"the rows have {needed}"
        expected.append(f"{form}: {needed}")
    shown = f"the columns {', '.join(sorted(names))}"
    if not names:
        shown = f"rows like {rows[0]!r:.60}"
    known = f"({'; '.join(expected)}); rename them, or take rows out from under a key"
    raise DataError(f"{source}: {shown} fit no known format {known}")


def is_solved(answer: str) -> bool:
    """Returns whether an answer ends as GSM8K's do, in a line `#### <number>`."""
    final = answer.rpartition(MARKER)[2].strip()
    return "\n" not in final and parse_gold(answer) is not None


def answer_places(messages: Messages) -> list[int]:
    """Returns where the answers stand that are learnt."""
    turns = enumerate(messages)
    return [n for n, m in turns if m["role"] == "assistant" and m.get("weight") != 0]


def ask(question: str, system_prompt: str) -> Messages:
    """Returns the prompt for a problem: the same in training, GRPO and evaluation."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def is_empty(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or str(value).strip() in ("", "[]", "{}", "null")


def text_of(value: Any, place: str) -> str:
    """Returns a content as text: text parts joined, a number as JSON has it."""
    if isinstance(value, list) and value and all(isinstance(p, dict) for p in value):
        kinds = ("text", "input_text", "output_text", None)
        texts = [p.get("text") if p.get("type") in kinds else p for p in value]
        return "".join(text_of(text, place) for text in texts)
    if isinstance(value, bool | int | float) and value == value:  # not NaN
        return json.dumps(value)
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise DataError(f"{place} is not text: {value!r:.40}")
    return value


def has_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    named = [isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns]
    return any(named) or bool(TURNS_AS_TEXT.match(str(value)))


def cut_turns(form: str, text: str) -> Messages:
    parts = [turn.groupdict() for turn in READY_MADE[form].finditer(text)]
    if rest := READY_MADE[form].sub("", text).strip():
        raise DataError(f"broken markers: {rest[:40]!r} is no whole turn of {form}")
    if form == "chatml":
        return parts
    return [{"role": r, "content": t} for part in parts for r, t in part.items() if t]


def arrange(turns: Messages) -> Messages:
    """Returns turns from the first question on, after one system prompt at most."""
    messages: Messages = []
    for turn in turns:
        role, last = turn["role"], messages[-1]["role"] if messages else None
        if role not in ROLES.values():
            raise DataError(f"role {role!r} is not system, user or assistant")
        if role == last or (role == "system" and messages):
            roles = " ".join(turn["role"] for turn in turns)
            raise DataError(f"turns do not alternate from user to assistant: {roles}")
        if role != "assistant" or last == "user":
            messages.append(turn)
    return messages
