"""Where answers lie in a rendered conversation, and which tokens to learn, by hand.

It shares no code with `helpers.masking`. Each content is replaced by one character that
stands for it; that rendering shows what the template writes around the contents, and
putting them back must give the true rendering. What opens and what ends an answer is
written down below for each chat format. A token's characters come from its bytes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import Messages, turns  # noqa: E402
from helpers.errors import TemplateError  # noqa: E402
from helpers.masking.templates import render  # noqa: E402

NO_LOSS = -100
Span = tuple[int, int]

# What opens an answer -> what may end it, the longest first.
FORMATS = {
    "<|im_start|>assistant<|im_sep|>": ["<|im_end|>"],
    "<|im_start|>assistant\n": ["<|im_end|>"],
    "<|start_header_id|>assistant<|end_header_id|>\n\n": ["<|eot_id|>"],
    "<start_of_turn>model\n": ["<end_of_turn>"],
    "<|turn>model\n": ["<turn|>"],
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>": [
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    ],
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>": ["<|END_OF_TURN_TOKEN|>"],
    "<|start|>assistant": ["<|return|>", "<|end|>", "<|eot|>"],
    "<|assistant|>\n": ["<|end|>\n</s>", "<|end|>", "</s>"],
    "<|assistant|>": ["<|user|>"],
    "<｜Assistant｜>": ["<｜end▁of▁sentence｜>"],
    "GPT4 Correct Assistant:": ["<|end_of_turn|>"],
    "### Response:\n": ["</s>"],
    "### Assistant:": ["</s>"],
    ">>> Assistant: ": ["</s>"],
    "ASSISTANT:": ["</s>"],
    "[/INST]": ["</s>"],
}
# What a generation prompt may add to the header, token by token.
PREFILLS = [
    ["<think>", "\n\n", "</think>", "\n\n"],
    ["<think>", "\n"],
    ["<|channel>", "thought\n", "<channel|>"],
]
STAND_IN = re.compile("([\U000f0000-\U000ffffd])")
THINK = re.compile("(</?think>)")


class Answer(NamedTuple):
    """Where an assistant turn lies in the rendered text, in characters."""

    previous: int
    """The end of the content before it."""
    begin: int
    """Where the learnt part begins."""
    first: int
    last: int
    """From the first to the last letter of the answer's text."""
    end: int
    """Where the learnt part ends, after the end-of-turn token."""
    following: int
    """Where the next content begins, or the text ends."""


class Skipped(Exception):
    """What a template cannot be asked, and why."""


def find_format(tokenizer: Any) -> tuple[str, list[str]]:
    """Returns what opens and what ends an answer, from FORMATS.

    Raises:
        Skipped: the template prints no text, ends no answer, or is none of FORMATS.
    """
    try:
        text = render(tokenizer, turns("QQQ", "AAA"))
    except TemplateError as error:
        raise Skipped(f"it takes no text: {error}") from error
    if "QQQ" not in text or "AAA" not in text:
        raise Skipped("it leaves out contents that are text and wants lists of parts")
    opening, closing = text.partition("QQQ")[2].split("AAA")
    for header in sorted(FORMATS, key=len, reverse=True):
        if header in opening and any(end in closing for end in FORMATS[header]):
            return header, FORMATS[header]
    if not closing.strip():
        raise Skipped("it ends the last answer with no token")
    raise Skipped(f"no known format: an answer between {opening!r} and {closing!r}")


def find_answers(
    tokenizer: Any,
    messages: Messages,
    header: str,
    ends: list[str],
    last_only: bool = False,
) -> tuple[str, list[Answer]]:
    """Returns the text to train on and where its answers lie.

    Before each answer stands the prompt that inference renders, or the conversation
    must be refused; the last answer may be put behind that prompt instead.

    Raises:
        Skipped: the template refuses the conversation, leaves out some of its text, or
            renders another prompt for an earlier answer.
    """
    text, answers = lay_out(tokenizer, messages, header, ends)
    numbers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if last_only:
        numbers, answers = numbers[-1:], answers[-1:]
    for number, answer in zip(numbers, answers, strict=True):
        prompt = render(tokenizer, messages[:number], for_generation=True)
        if text.startswith(prompt):
            continue
        if len(answers) > 1:
            raise Skipped("an answer is asked for with another prompt")
        text, (*_, answer) = lay_out(tokenizer, messages[: number + 1], header, ends)
        if not text.startswith(prompt):
            said = text[: answer.begin].rpartition(header)[2]
            more = prompt.rpartition(header)[2].removeprefix(said)
            if said and more.strip():
                raise Skipped("the answer opens a thought that the prompt has closed")
            text = prompt + text[answer.begin :]
            shift = len(prompt) - answer.begin
            answer = Answer(answer.previous, *(at + shift for at in answer[1:]))
        return text, [answer]
    return text, answers


def lay_out(
    tokenizer: Any, messages: Messages, header: str, ends: list[str]
) -> tuple[str, list[Answer]]:
    """Returns the text of a conversation and where its answers lie.

    Raises:
        Skipped: the template refuses the conversation or leaves out some of its text.
    """
    cores: list[tuple[int, str]] = []  # the number of the message, a piece of its text
    drawn: Messages = []
    for number, message in enumerate(messages):
        pieces = THINK.split(message["content"])
        for at in range(0, len(pieces), 2):
            if core := pieces[at].strip():
                pieces[at] = pieces[at].replace(core, chr(0xF0000 + len(cores)))
                cores.append((number, core))
        drawn.append({**message, "content": "".join(pieces)})
    try:
        text, skeleton = render(tokenizer, messages), render(tokenizer, drawn)
    except TemplateError as error:
        raise Skipped(str(error)) from error
    found = STAND_IN.split(skeleton)
    if found[1::2] != [chr(0xF0000 + n) for n in range(len(cores))]:
        raise Skipped("the template leaves out text of it")
    places: list[Span] = []
    rebuilt = found[0]
    for (_, core), between in zip(cores, found[2::2], strict=True):
        places.append((len(rebuilt), len(rebuilt) + len(core)))
        rebuilt += core + between
    if rebuilt != text:
        raise Skipped("the template acts on markers in it and leaves out text")
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        mine = [n for n, (owner, _) in enumerate(cores) if owner == number]
        previous, first = places[mine[0] - 1][1], places[mine[0]][0]
        last = places[mine[-1]][1]
        following = places[mine[-1] + 1][0] if mine[-1] + 1 < len(cores) else len(text)
        begin = text.index(header, previous, first) + len(header)
        prompt = render(tokenizer, messages[:number], for_generation=True)
        begin += prefilled(text[begin:first], prompt, header)
        rest = text[last:following]
        spaces = len(rest) - len(rest.lstrip())
        end = next((e for e in ends if rest.startswith(e, spaces)), None)
        if end is None:
            raise Skipped(f"turn {number + 1} is ended by {rest!r}")
        end_at = last + spaces + len(end)
        answers.append(Answer(previous, begin, first, last, end_at, following))
    return text, answers


def prefilled(opening: str, prompt: str, header: str) -> int:
    """Returns how much of what follows a header the generation prompt says already.

    >>> prefilled("<think></think>", "Hi[ASK]<think>\\n", "[ASK]")
    7
    >>> prefilled("", "Hi[ASK]<think>\\n", "[ASK]")
    0
    """
    said = 0
    for prefill in PREFILLS:
        if prompt.endswith(header + "".join(prefill)):
            for piece in prefill:
                if not opening.startswith(piece, said):
                    return said
                said += len(piece)
    return said


def character_spans(tokenizer: Any, ids: list[int], text: str) -> list[Span]:
    """Returns the characters of each token of a byte-level tokenizer, from its bytes.

    A token that holds only some bytes of a character gets the whole character.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(others)}
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    owner = [n for n, char in enumerate(text) for _ in char.encode()]
    spans, said = [], b""
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        raw = (
            added[token].encode() if token in added else bytes(byte_of[c] for c in name)
        )
        spans.append((owner[len(said)], owner[len(said) + len(raw) - 1] + 1))
        said += raw
    if said != text.encode():
        raise ValueError("the tokens are not the text")
    return spans


def labels(ids: list[int], spans: list[Span], answers: list[Answer]) -> list[int]:
    """Returns the labels of a conversation; -100 = no loss."""
    return [
        token if any(a.begin <= start and end <= a.end for a in answers) else NO_LOSS
        for token, (start, end) in zip(ids, spans, strict=True)
    ]
