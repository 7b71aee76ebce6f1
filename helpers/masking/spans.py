"""Finds the answers in a rendered conversation by asking the template, not by markers.

An answer begins where the prompt ends that inference renders for the turns before it.
"""

from __future__ import annotations

import json
import os.path
import re
from bisect import bisect_left
from itertools import chain
from typing import TYPE_CHECKING, Literal

from helpers.data.formats import Messages
from helpers.errors import TemplateError
from helpers.masking.templates import MARK, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

NO_LOSS = -100
REMEDY = "train on the last turn (loss_on='last') or choose another template"
LossOn = Literal["all", "assistant", "last"]
Span = tuple[int, int]
# templates move thoughts and write their tags themselves
TAG = re.compile(r"<[^<>\s]+>")


def find_spans(
    tokenizer: Tokenizer, messages: Messages, loss_on: LossOn, marks: tuple[str, str]
) -> tuple[str, list[Span]]:
    """Returns the training text of a conversation and the character spans to learn.

    Up to each learnt answer the text is the prompt that inference renders for the turns
    before it. Where a template renders the whole conversation otherwise, the text is
    that prompt, the last answer and its closing; for an earlier answer the row is
    refused, as is one that lacks text of an answer. `marks`: see `answer_marks`.
    """
    text = render(tokenizer, messages)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    silent = [n for n, m in enumerate(messages) if m.get("weight") == 0]
    learnt = [n for n in answers if n not in silent]
    if loss_on == "last":
        learnt = learnt[-1:]
    everything = loss_on == "all"
    if not learnt and (answers or not everything):
        return text, []
    spans: list[Span] = []
    for number in sorted([*learnt, *silent]) if everything else learnt:
        if number == 0 and 0 in learnt:
            raise TemplateError("turn 1 is an answer: there is no prompt before it")
        before, asked = messages[:number], number in answers
        prompt = render(tokenizer, before, for_generation=asked) if before else ""
        if not text.startswith(prompt):
            earlier = text[: spans[-1][1]] if spans else ""
            follows = everything and number + 1 < len(messages)
            if learnt[-1:] != [number] or follows or not prompt.startswith(earlier):
                at = len(os.path.commonprefix([prompt, text]))
                near = slice(max(0, at - 20), at + 40)
                raise TemplateError(
                    f"turn {number + 1}: the prompt that the model will be given has "
                    f"{prompt[near]!r} where the text of the whole conversation has "
                    f"{text[near]!r}, so it would learn to answer another; {REMEDY}"
                )
            messages = messages[: number + 1]
            text = compose(tokenizer, messages, prompt, marks[0])
        if everything and number in learnt:
            continue
        content = messages[number]["content"]
        end = len(prompt + content.strip() + marks[1])
        if not marks[1] or text[len(prompt) : end] != content.strip() + marks[1]:
            end = find_end(tokenizer, messages, number, text, marks[1])
        spans.append((len(prompt), end))
        if not everything and not holds(text[len(prompt) : end], content):
            raise TemplateError(
                f"turn {number + 1}: the template changes or leaves out text of this "
                f"answer; {REMEDY}"
            )
    if everything:  # the spans are those of silent turns
        edges = [0, *chain(*spans), len(text)]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
    return text, spans


def around(tokenizer: Tokenizer, messages: Messages, number: int) -> tuple[str, str]:
    """Returns what a template writes before and after the content of a turn."""
    turn = {**messages[number], "content": MARK}
    text = render(tokenizer, [*messages[:number], turn, *messages[number + 1 :]])
    before, _, after = text.partition(MARK)
    return before, after


def compose(tokenizer: Tokenizer, messages: Messages, prompt: str, opening: str) -> str:
    """Returns inference's prompt, and the last answer with its end as rendered."""
    text = render(tokenizer, messages)
    if text.startswith(prompt):
        return text
    number, content = len(messages), messages[-1]["content"]
    before, after = around(tokenizer, messages, number - 1)
    body = text[len(before) : len(text) - len(after)]
    if before + body + after != text or not holds(body, content):
        raise TemplateError(
            f"turn {number}: the template moves or leaves out text of this answer, "
            f"and its prompt ends in {prompt[-40:]!r}; choose another template"
        )
    at = len(os.path.commonprefix([prompt, before]))
    more, header = prompt[at:].strip(), before[at:]
    if more and header.strip():  # the template has moved text of earlier turns
        known = opening.strip() and prompt.endswith(opening) and opening in before
        header = before.rpartition(opening)[2] if known else ""
    elif more:
        header = ""
        if body.lstrip().startswith(more):  # the prompt has it already
            body = body.lstrip()[len(more) :].lstrip()
    return prompt + header + body + after


def find_end(
    tokenizer: Tokenizer, messages: Messages, number: int, text: str, closing: str
) -> int:
    """Returns the end of a turn in a text, after the tokens that end it."""
    if number + 1 == len(messages):
        return len(text.rstrip())
    _, after = around(tokenizer, messages, number)
    if not text.endswith(after):
        raise TemplateError(
            f"turn {number + 1}: the end of this turn cannot be found; {REMEDY}"
        )
    rest = after.lstrip()
    # an earlier answer may be ended otherwise than the last one
    tokens = [closing, *map(str, tokenizer.added_tokens_decoder.values())]
    longest = max((len(t) for t in tokens if rest.startswith(t)), default=0)
    return len(text) - (len(rest) - longest if closing and longest else len(after))


def holds(text: str, content: str) -> bool:
    """Returns whether a text has all of a content but white space, in its order.

    The tags of thoughts may be written otherwise, and the content as a JSON string.
    """
    if content.strip() in text:
        return True
    flat = "".join(text.split())
    for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]):
        pieces = ("".join(piece.split()) for piece in TAG.split(form))
        if re.search(".*?".join(map(re.escape, pieces)), flat):
            return True
    return False


def label_tokens(
    ids: list[int], offsets: list[Span], text: str, spans: list[Span]
) -> list[int]:
    """Returns the labels of a text's tokens, -100 where not wholly inside a span."""
    labels = [NO_LOSS] * len(ids)
    for start, end in spans:
        first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
        # some tokenizers leave spaces before a token out of its offsets
        first += first > 0 and offsets[first - 1][1] < start
        while 0 < last < len(ids) and offsets[last - 1][1] < end:
            last += 1
        # an end-of-turn token may take the white space after it with it
        while last > first and text[end : offsets[last - 1][1]].strip():
            last -= 1
        labels[first:last] = ids[first:last]
    return labels
