"""Where in a rendered conversation the assistant speaks, whatever the template.

The conversation is rendered a second time with every letter of a turn replaced by one
character that stands for that turn. Both texts line up, so the second one says where
the turns lie in the first.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Literal

from helpers.formats import Messages
from helpers.templates import TemplateError, answer_marks, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
LossOn = Literal["all", "assistant", "last"]
Span = tuple[int, int]

# A plane for private use: neither data nor templates have its characters.
FIRST, LAST = 0xF0000, 0xFFFFD
RUN = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])\\1*")
# Every letter; or all but tags, for templates that move or drop thinking by its tags.
LETTERS = [re.compile(rf"({kept})|\S") for kept in (r"(?!)", r"<[^<>\s]+>")]


def find_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, loss_on: LossOn
) -> tuple[str, list[Span]]:
    """Returns the rendered text and the character spans to learn.

    Raises:
        TemplateError: see `find_answers`.
    """
    if loss_on == "all":
        text = render(tokenizer, messages)
        return text, [(0, len(text))]
    return find_answers(tokenizer, messages, last_only=loss_on == "last")


def label_tokens(
    ids: list[int], offsets: list[Span], text: str, spans: list[Span]
) -> list[int]:
    """Returns the labels of a text's tokens, -100 where they lie outside of all spans.

    >>> label_tokens([7, 8, 9], [(0, 2), (2, 5), (5, 6)], "to be.", [(2, 6)])
    [-100, 8, 9]

    Args:
        ids: of the tokens.
        offsets: where each token lies in the text, in characters.
        text: what was tokenised.
        spans: what is learnt, in order; a token that is only half inside is not.
    """
    labels = [NO_LOSS] * len(ids)
    span = iter(spans)
    start, end = next(span, (len(text), len(text)))
    before = 0
    for position, (left, right) in enumerate(offsets):
        left, before = min(left, before), right  # some tokenizers leave out spaces
        while left >= end and end < len(text):
            start, end = next(span, (len(text), len(text)))
        # an end-of-turn token may take the white space after it with it
        if start <= left < end and not text[end:right].strip():
            labels[position] = ids[position]
    return labels


def find_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, last_only: bool = False
) -> tuple[str, list[Span]]:
    """Returns the rendered text and the character spans of the assistant's turns.

    A span is what the model has to say itself: from where the generation prompt ends,
    as far as the text agrees with it, through the tokens that end the turn. With
    `last_only` only the last answer is looked for; earlier ones may be cut.

    Raises:
        TemplateError: the template refuses the conversation or leaves out text of an
            answer.
    """
    text = render(tokenizer, messages)
    opening, closing = answer_marks(tokenizer)
    tokens = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len)
    special = re.compile("|".join(map(re.escape, reversed(tokens))) or r"(?!)")
    places, letters = find_turns(tokenizer, messages, text)
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    spans = []
    for number in answers[-1:] if last_only else answers:
        mine = places.get(number, [])
        if not mine or "".join(text[a:b] for a, b in mine) != letters[number]:
            raise TemplateError(
                f"turn {number + 1}: the template leaves out text of this answer; if "
                "it does so only where later turns follow, train on the last turn "
                "(loss_on='last'), else choose another template"
            )
        before = [places[n][-1][1] for n in places if n < number]
        after = [places[n][0][0] for n in places if n > number]
        header = max(before, default=0), mine[0][0]
        footer = mine[-1][1], min(after, default=len(text))
        start = find_start(text, header, opening, special)
        spans.append((start, find_end(text, footer, closing, special)))
    return text, spans


def find_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str
) -> tuple[dict[int, list[Span]], list[str]]:
    """Returns where in a rendered text each turn's letters lie, and the letters.

    Raises:
        TemplateError: the template changes the turns' text.
    """
    for letter in LETTERS:
        drawn = render(tokenizer, [draw(m, n, letter) for n, m in enumerate(messages)])
        places: dict[int, list[Span]] = {}
        position, same = 0, len(text) == len(drawn)
        for run in RUN.finditer(drawn):
            between = slice(position, run.start())
            same = same and text[between] == drawn[between]
            places.setdefault(ord(run[1]) - FIRST, []).append(run.span())
            position = run.end()
        if same and text[position:] == drawn[position:]:
            found = [letter.finditer(m["content"]) for m in messages]
            return places, ["".join(x[0] for x in f if not x[1]) for f in found]
    raise TemplateError(
        "the template changes the text of the turns, so that it cannot be told where "
        "the assistant speaks; choose another template"
    )


def draw(
    message: dict[str, str], number: int, letter: re.Pattern[str]
) -> dict[str, str]:
    """Returns a message with the letters replaced by what stands for its number.

    >>> draw({"role": "user", "content": "a b"}, 0, LETTERS[0])["content"]
    '\\U000f0000 \\U000f0000'
    """
    stand_in = chr(FIRST + number)
    drawn = letter.sub(lambda found: found[1] or stand_in, message["content"])
    return {**message, "content": drawn}


def find_start(text: str, header: Span, opening: str, special: re.Pattern[str]) -> int:
    """Returns where an answer's span starts; `header` is what lies before its text.

    Raises:
        TemplateError: the header has nothing of the generation prompt.
    """
    previous, first = header
    if not opening.strip():
        return previous
    at = text.find(opening, previous, first + len(opening))
    if at >= 0:
        return at + len(opening)
    position = first - len(text[previous:first].lstrip())
    for piece in re.split(rf"({special.pattern}|\s+)", opening.lstrip()):
        if not text.startswith(piece, position, first):
            break
        position += len(piece)
    found = (
        f"the template opens an answer with {text[previous:first][-40:]!r}, but its "
        f"generation prompt is {opening[-40:]!r}"
    )
    if not text[previous:position].strip():
        raise TemplateError(f"{found}; choose another template")
    warnings.warn(
        f"{found}: the model learns to answer another prompt than it will be given; "
        "what both have in common is taken for the header",
        stacklevel=4,
    )
    return position


def find_end(text: str, footer: Span, closing: str, special: re.Pattern[str]) -> int:
    """Returns where an answer's span ends; `footer` is what follows its text."""
    last, following = footer
    if not closing:
        return last
    end = following - len(text[last:following].lstrip())
    if text.startswith(closing, end):
        return end + len(closing)
    # an earlier answer may be ended by another token than the last one
    token = special.match(text, end, following)
    return token.end() if token else last
