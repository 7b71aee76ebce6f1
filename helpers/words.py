"""Token ids of texts put together from those of their words, which are kept.

Most tokenizers cut a text into words and merge letters within each alone, so that a
word's ids are the same wherever it stands; and most words have been seen before.
`find_cuts` shows where that is so for a tokenizer.
"""

from __future__ import annotations

import re
from itertools import chain, product, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

MAX_WORDS = 200_000  # kept at a time, some 40 MB
AT_ONCE = 64  # words in a text: each text costs the tokenizer as much as two words
BETWEEN, FIXED = "\0", "\1"
"""Characters between words, and before a text that is kept as it is."""
# Words are cut before a single space, which is theirs, and after some new lines.
AT_SPACE = r"(?<=\S)(?= \S)"
AT_LINE = r"|(?<=\S\n)(?=\S)|(?<=\A\n)(?=\S)"
AT_LINES = AT_LINE.replace(r"\n", r"\n\n")
# What may lie between two cuts; only what ends a text ends in a space.
WORD = re.compile(r" ?\S(?:.*\S)?(?: |\n*)", re.DOTALL)
# Tokens that may span a cut, as vocabularies write them.
SPANNING = re.compile(r"[^\sĠ▁Ċĉč][Ġ▁ ]|[Ċ\n][^\sĠ▁Ċĉč]")
# A character of each kind that the patterns of tokenizers tell apart.
KINDS = [*"aB7.'(<_你🎉", "é", ",", "-", "か", "ا", "\u0301", "\u200d", "'s", "a\nb"]


class Cuts(NamedTuple):
    """Where the texts of a tokenizer may be cut."""

    special: list[str]
    """Special tokens, before and behind which they may be."""
    lines: int
    """How many new lines between words there may be to cut behind them, 0 to 2."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """What is empty and lies between two words."""
        return re.compile("".join([AT_SPACE, AT_LINE, AT_LINES][: self.lines + 1]))

    def apart(self, text: str) -> str:
        r"""Returns a text with `BETWEEN` between its words.

        Beside white space that is neither a space nor a new line it is put in places
        where it must not be: what it parts there is no `WORD`.

        >>> Cuts([], 1).apart("Hi there,\nyou  two").split(BETWEEN)
        ['Hi', ' there,\n', 'you  two']
        """
        text = text.replace(" ", "\0 ")
        if "\0 \0 " in text:  # no word has one of several spaces
            text = text.replace("\0 \0 ", "  ").replace("  \0 ", "   ")
        if "\n" not in text:
            return text
        text = text.replace("\n\0 ", "\n ").replace("\0 \n", " \n")
        if not self.lines:
            return text
        more = "\n" * (self.lines + 1)
        text = text.replace("\n", "\n\0").replace("\0\n", "\n")
        text = text.replace("\n\0 ", "\n ").replace(" \n\0", " \n")
        text = text.replace(" \n\n\0", " \n\n")
        return text.replace(f"{more}\0", more)


def find_cuts(tokenizer: PreTrainedTokenizerBase) -> Cuts | None:
    """Returns where texts may be cut, None if they may not be cut into words.

    A text may be cut at a special token that no other token begins with or overlaps.
    It may be cut into words if no token of the vocabulary spans a cut, and if texts of
    all kinds of characters before and behind a cut have the ids of their words.
    """
    added = list(tokenizer.added_tokens_decoder.values())
    names = [token.content for token in added]
    taking = any(t.lstrip or t.rstrip or t.single_word for t in added)
    if not tokenizer.is_fast or taking:
        return None
    inner = set("".join(name[1:] for name in names))
    special = [
        token.content
        for token in added
        if token.special
        and token.content != tokenizer.unk_token
        and not token.normalized
        and token.content[0] not in inner
        and sum(name.startswith(token.content) for name in names) == 1
    ]
    suspects = set(filter(SPANNING.search, tokenizer.get_vocab())).difference(names)
    texts = [tokenizer.convert_tokens_to_string(["a", x, "a"]) for x in suspects]
    found = None
    for lines, (end, start) in enumerate([("", " "), ("\n", ""), ("\n\n", "")]):
        cuts = Cuts(special, lines)
        if (
            not special
            or any(map(cuts.pattern.search, [*texts, *names]))
            or not are_apart(tokenizer, special[0], end, start)
        ):
            break
        found = cuts
    return found


def are_apart(
    tokenizer: PreTrainedTokenizerBase, between: str, end: str, start: str
) -> bool:
    """Returns whether texts of all `KINDS` have the ids of their words.

    Args:
        tokenizer: any.
        between: a special token at which a text may be cut.
        end: what the first word ends in.
        start: what the second word starts with.
    """
    pairs = ["".join(pair) for pair in product(KINDS[:8], KINDS[:8])]
    around = [*product(KINDS, KINDS), *product(pairs, KINDS[:8])]
    around += [*product(KINDS[:8], pairs), *(("", kind) for kind in KINDS if end)]
    lefts, rights = [x + end for x, _ in around], [start + y for _, y in around]
    texts = list(map(str.__add__, lefts, rights))
    joined = between + between.join(lefts + rights)
    found = encode(tokenizer, [*lefts, *rights, *texts, joined])
    count = len(texts)
    left, right, wholes = (found[n * count : (n + 1) * count] for n in range(3))
    stop = tokenizer.convert_tokens_to_ids(between)
    inside = [token for ids in [*left, *right] for token in (stop, *ids)]
    return list(map(list.__add__, left, right)) == wholes and found[-1] == inside


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, which holds all its special tokens."""
    backend = tokenizer.backend_tokenizer
    # what an earlier call has left on
    backend.no_truncation()
    backend.no_padding()
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [each.ids for each in found]


class Words:
    """The token ids of words; each word is tokenised once, and has a number.

    Attributes:
        ids: of all words, one after the other, int32 of (tokens,).
        starts: where in them those of a word begin, by its number, (words,).
        lengths: how many they are, (words,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, between: str) -> None:
        self.tokenizer, self.between = tokenizer, between
        self.stop = tokenizer.convert_tokens_to_ids(between)
        self.forget()

    def forget(self) -> None:
        """Drops all words."""
        self.numbers: dict[str, int] = {}
        # number 0 is what is no word
        self.ids = np.empty(0, np.int32)
        self.lengths = np.zeros(1, int)
        self.starts = np.zeros(1, int)

    def find(self, words: list[str]) -> np.ndarray:
        """Returns the numbers of different words, 0 of what is none.

        A text behind `FIXED` is kept as if it were a word, whatever it is.
        """
        if len(self.numbers) > MAX_WORDS:
            self.forget()
        numbers = np.fromiter(map(self.numbers.get, words, repeat(-1)), int, len(words))
        places = np.flatnonzero(numbers < 0)
        new = [words[place] for place in places]
        self.learn(new)
        numbers[places] = list(map(self.numbers.get, new))
        return numbers

    def learn(self, words: list[str]) -> None:
        """Has words tokenised that are not yet known."""
        fixed, new = [], []
        for word in words:
            if word.startswith(FIXED):
                fixed.append(word)
            elif WORD.fullmatch(word) and self.between not in word:
                new.append(word)
            else:
                self.numbers[word] = 0
        ids = encode(self.tokenizer, [word[1:] for word in fixed])
        self.add(fixed, list(chain.from_iterable(ids)), list(map(len, ids)))
        groups = [new[at : at + AT_ONCE] for at in range(0, len(new), AT_ONCE)]
        ids = encode(self.tokenizer, list(map(self.between.join, groups)))
        flat = np.array([x for each in ids for x in (*each, self.stop)], np.int32)
        ends = np.flatnonzero(flat == self.stop)
        self.add(new, np.delete(flat, ends), np.diff(ends, prepend=-1) - 1)

    def add(self, words: list[str], ids: ArrayLike, lengths: ArrayLike) -> None:
        """Keeps words with their ids, one after the other."""
        first = len(self.lengths)
        self.numbers.update(zip(words, range(first, first + len(words)), strict=True))
        lengths = np.array(lengths, int)
        starts = len(self.ids) + np.cumsum(lengths) - lengths
        self.starts = np.concatenate([self.starts, starts])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.ids = np.concatenate([self.ids, np.array(ids, np.int32)])

    def join(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of words, (tokens,), and where each word ends, (words,)."""
        lengths = self.lengths[numbers]
        ends = np.cumsum(lengths)
        shift = np.repeat(self.starts[numbers] - ends + lengths, lengths)
        return self.ids[np.arange(len(shift)) + shift], ends
