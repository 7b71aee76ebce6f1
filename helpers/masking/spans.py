"""Finds the answers in a rendered conversation, whatever the template.

An answer begins where the prompt ends that inference renders for the turns before it:
the template itself is asked, so there are no markers to write by hand, and a row whose
prompt would be another one at inference is noticed.
"""

from __future__ import annotations

import json
import os.path
import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Literal

from helpers.data.formats import Messages
from helpers.errors import TemplateError
from helpers.masking.templates import MARK, answer_marks, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
LossOn = Literal["all", "assistant", "last"]
Span = tuple[int, int]
# templates move thoughts and write their tags themselves
TAG = re.compile(r"<[^<>\s]+>")


def find_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    loss_on: LossOn,
    closing: str = "",
) -> tuple[str, list[Span]]:
    """Returns the training text of a conversation and the character spans to learn.

    Up to each learnt answer the text is the prompt that inference renders for the turns
    before it. Where a template renders the whole conversation otherwise, the text is
    that prompt, the last answer and its closing; for an earlier answer the row is
    refused. Turns of `"weight": 0` are not learnt.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        loss_on: see `dataset.mask_conversation`.
        closing: what ends an answer, from `answer_marks`; it spares some renderings.

    Raises:
        TemplateError: the template refuses the conversation, asks for an earlier answer
            with another prompt, or leaves out text of an answer.
    """
    text = render(tokenizer, messages)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    learnt = [n for n in answers if messages[n].get("weight") != 0]
    if loss_on == "last":
        learnt = learnt[-1:]
    if not learnt and (answers or loss_on != "all"):
        return text, []
    spans: list[Span] = []
    for number in learnt:
        prompt = render_prompt(tokenizer, messages, number)
        if not text.startswith(prompt):
            follows = loss_on == "all" and number + 1 < len(messages)
            earlier = text[: spans[-1][1]] if spans else ""
            if number < learnt[-1] or follows or not prompt.startswith(earlier):
                raise differs(number, prompt, text)
            messages = messages[: number + 1]
            text = compose(tokenizer, messages, prompt)
        if loss_on == "all":
            continue
        answer = prompt + messages[number]["content"].strip() + closing
        if closing and text.startswith(answer):
            spans.append((len(prompt), len(answer)))
            continue
        spans.append((len(prompt), find_end(tokenizer, messages, number, text)))
        if not holds(text[slice(*spans[-1])], messages[number]["content"]):
            answer_marks(tokenizer)  # a template that prints no text is named as such
            raise TemplateError(
                f"turn {number + 1}: the template changes or leaves out text of this "
                "answer; if it does so only where later turns follow, train on the "
                "last turn (loss_on='last'), else choose another template"
            )
    if loss_on != "all":
        return text, spans
    edges = [0]
    for number, message in enumerate(messages):
        if message.get("weight") == 0:
            prompt = render_prompt(tokenizer, messages, number) if number else ""
            if not text.startswith(prompt):
                raise differs(number, prompt, text)
            edges += [len(prompt), find_end(tokenizer, messages, number, text)]
    edges.append(len(text))
    return text, list(zip(edges[::2], edges[1::2], strict=True))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, number: int
) -> str:
    """Returns what inference renders before a turn; for an answer, with its header."""
    if not number:
        raise TemplateError("turn 1 is an answer: there is no prompt before it")
    is_answer = messages[number]["role"] == "assistant"
    return render(tokenizer, messages[:number], for_generation=is_answer)


def differs(number: int, prompt: str, text: str) -> TemplateError:
    """Returns the error for a turn that inference asks for with another prompt."""
    at = len(os.path.commonprefix([prompt, text]))
    near = slice(max(0, at - 20), at + 40)
    return TemplateError(
        f"turn {number + 1}: the prompt that the model will be given has "
        f"{prompt[near]!r} where the text of the whole conversation has "
        f"{text[near]!r}, so it would learn to answer another prompt; train on the "
        "last turn (loss_on='last') or choose another template"
    )


def compose(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: str) -> str:
    """Returns inference's prompt, the last answer as the template renders it, its end.

    Raises:
        TemplateError: it cannot be told where the template writes the answer.
    """
    text = render(tokenizer, messages)
    if text.startswith(prompt):
        return text
    answer = messages[-1]
    bare = render(tokenizer, [*messages[:-1], {**answer, "content": MARK}])
    before, _, closing = bare.partition(MARK)
    body = text[len(before) : len(text) - len(closing)]
    if before + body + closing != text or not holds(body, answer["content"]):
        answer_marks(tokenizer)
        raise TemplateError(
            f"turn {len(messages)}: the template moves or leaves out text of this "
            f"answer, and its prompt ends in {prompt[-40:]!r}; choose another template"
        )
    at = len(os.path.commonprefix([prompt, before]))
    more, header = prompt[at:].strip(), before[at:]
    if more and header.strip():  # the template has moved text of earlier turns
        opening = answer_marks(tokenizer)[0]
        known = opening.strip() and prompt.endswith(opening) and opening in before
        header = before.rpartition(opening)[2] if known else ""
    elif more:
        header = ""
        if body.lstrip().startswith(more):  # the prompt has it already
            body = body.lstrip()[len(more) :].lstrip()
    return prompt + header + body + closing


def find_end(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, number: int, text: str
) -> int:
    """Returns the end of a turn in a text, after the tokens that end it.

    Raises:
        TemplateError: the template renders the turn otherwise when its end is marked.
    """
    last = number + 1 == len(messages)
    whole = (text if last else render(tokenizer, messages[: number + 1])).rstrip()
    if text.startswith(whole):
        return len(whole)
    # an earlier answer is ended or opened otherwise than the last one
    content = messages[number]["content"].rstrip()
    marked = content + MARK + messages[number]["content"][len(content) :]
    turn = {**messages[number], "content": marked}
    drawn = render(tokenizer, [*messages[:number], turn, *messages[number + 1 :]])
    before, _, after = drawn.partition(MARK)
    if before + after != text:
        raise TemplateError(
            f"turn {number + 1}: it cannot be told where the template ends this turn; "
            "train on the last turn (loss_on='last') or choose another template"
        )
    closing = answer_marks(tokenizer)[1]
    end = len(text) - len(after.lstrip())
    tokens = [closing, *map(str, tokenizer.added_tokens_decoder.values())]
    tokens = [token for token in tokens if text.startswith(token, end)]
    if not closing or not tokens:
        return len(before)
    return end + (len(closing) if closing in tokens else max(map(len, tokens)))


def holds(text: str, content: str) -> bool:
    """Returns whether a text has all of a content but white space, in its order.

    The tags of thoughts may be written otherwise, and the content as a JSON string.

    >>> holds("[final] It is 4.", "It  is 4. "), holds("It is", "It is 4.")
    (True, False)
    """
    if content.strip() in text:
        return True
    flat = "".join(text.split())
    quoted = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    if any("".join(form.split()) in flat for form in (content, *quoted)):
        return True
    pieces = ("".join(piece.split()) for piece in TAG.split(content))
    return re.search(".*?".join(map(re.escape, pieces)), flat) is not None


def label_tokens(
    ids: list[int], offsets: list[Span], text: str, spans: list[Span]
) -> list[int]:
    """Returns the labels of a text's tokens, -100 where they lie outside of all spans.

    >>> label_tokens([7, 8, 9], [(0, 2), (2, 5), (5, 6)], "to be.", [(2, 6)])
    [-100, 8, 9]

    Args:
        ids: of the tokens.
        offsets: of each token in the text, in characters.
        text: what was tokenised.
        spans: what is learnt, in order; a token that is only half inside is not.
    """
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


def learnt_spans(labels: list[int]) -> list[Span]:
    """Returns the positions of the tokens that carry loss, as from and to.

    >>> learnt_spans([-100, 8, 9, -100, 7])
    [(1, 3), (4, 5)]
    """
    flags = bytes(map(NO_LOSS.__ne__, labels))
    return [run.span() for run in re.finditer(b"\1+", flags)]
