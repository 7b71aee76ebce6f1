"""Token ids of texts put together from those of their words, which are kept.

Most tokenizers cut a text into words and merge letters within each alone, so that a
word's ids are the same wherever it stands; and most words have been seen before.
`find_cuts` shows whether that is so for a tokenizer.
"""

from __future__ import annotations

import re
from array import array
from itertools import chain, product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WORDS = 200_000  # kept at a time, some 40 MB
AT_ONCE = 64  # words in a text: each text costs the tokenizer as much as two words
# Words are cut before a single space, which is theirs.
CUT = re.compile(r"(?<=\S)(?= \S)")
# What may lie between two cuts; the first word of a text may follow any white space.
WORD = re.compile(r"(?: |[^\S ]+)?\S(?:.*\S)?", re.DOTALL)
# Tokens that may span a cut, as vocabularies write them.
SPANNING = re.compile(r"[^\sĠ▁Ċĉč][Ġ▁ ]")
# A character of each kind that the patterns of tokenizers tell apart.
KINDS = [*"aB7.'(<_你🎉", "é", ",", "-", "か", "ا", "\u0301", "\u200d", "'s", "a\nb"]


def cut(text: str) -> list[str]:
    r"""Returns a text cut before every space, the fastest way.

    Where each part is a `WORD` these are the places where it may be cut.

    >>> cut("Hi there,\n you  two")
    ['Hi', ' there,\n', ' you', ' ', ' two']
    >>> CUT.split("Hi there,\n you  two")
    ['Hi', ' there,\n you  two']
    """
    return text.replace(" ", "\0 ").split("\0")


def find_cuts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the special tokens at which a text may be cut; none if words may not be.

    A text may be cut at a special token that no other token begins with or overlaps.
    It may be cut into words if no token of the vocabulary spans a cut, and if texts of
    all kinds of characters before and behind a cut have the ids of their words.
    """
    added = list(tokenizer.added_tokens_decoder.values())
    names = [token.content for token in added]
    taking = any(t.lstrip or t.rstrip or t.single_word for t in added)
    if not tokenizer.is_fast or taking or any(map(CUT.search, names)):
        return []
    for token in set(filter(SPANNING.search, tokenizer.get_vocab())).difference(names):
        if CUT.search(tokenizer.convert_tokens_to_string(["a", token, "a"])):
            return []
    inner = set("".join(name[1:] for name in names))
    cuts = [
        token.content
        for token in added
        if token.special
        and token.content != tokenizer.unk_token
        and not token.normalized
        and token.content[0] not in inner
        and sum(name.startswith(token.content) for name in names) == 1
    ]
    return cuts if cuts and are_apart(tokenizer, cuts[0]) else []


def are_apart(tokenizer: PreTrainedTokenizerBase, between: str) -> bool:
    """Returns whether texts of all `KINDS` have the ids of their words.

    Args:
        tokenizer: any.
        between: a special token at which a text may be cut.
    """
    pairs = ["".join(pair) for pair in product(KINDS[:8], KINDS[:8])]
    around = [*product(KINDS, KINDS), *product(pairs, KINDS[:8])]
    around += product(KINDS[:8], pairs)
    lefts, rights = [x for x, _ in around], [f" {y}" for _, y in around]
    texts = [f"{x} {y}" for x, y in around]
    ids = encode(tokenizer, [*lefts, *rights, *texts])
    halves = map(list.__add__, ids, ids[len(texts) :])
    wholes = ids[2 * len(texts) :]
    stop = tokenizer.convert_tokens_to_ids(between)
    inside = encode(tokenizer, [between + between.join(texts)])[0]
    apart = chain.from_iterable([stop, *whole] for whole in wholes)
    return list(halves)[: len(texts)] == wholes and inside == list(apart)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, which holds all its special tokens."""
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


class Run(NamedTuple):
    """Words that follow each other."""

    ids: list[bytes | None]
    """The ids of each word, None of those that are not yet known."""
    unknown: list[tuple[int, str]]
    """Place and text of these."""

    def joined(self, words: Words) -> bytes:
        """Returns the ids of all, which have been learnt meanwhile."""
        for place, word in self.unknown:
            self.ids[place] = words.ids[word]
        return b"".join(filter(None, self.ids))


class Words:
    """The ids of words, as int32 bytes; each word is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, between: str) -> None:
        self.tokenizer, self.between = tokenizer, between
        self.stop = tokenizer.convert_tokens_to_ids(between)
        self.ids: dict[str, bytes] = {}

    def run(self, words: list[str]) -> Run:
        """Returns the ids of words as far as they are known."""
        ids = list(map(self.ids.get, words))
        if all(ids):
            return Run(ids, [])
        return Run(ids, [(n, words[n]) for n, found in enumerate(ids) if not found])

    def learn(self, words: set[str]) -> None:
        """Has words tokenised; where room is short, all others are forgotten."""
        if len(self.ids) > MAX_WORDS:
            self.ids.clear()
        new = [word for word in words if word not in self.ids]
        odd = [word for word in new if self.between in word]
        for word, ids in zip(odd, encode(self.tokenizer, odd), strict=True):
            self.ids[word] = array("i", ids).tobytes()
        new = [word for word in new if self.between not in word] if odd else new
        groups = [new[at : at + AT_ONCE] for at in range(0, len(new), AT_ONCE)]
        texts = [self.between.join(group) for group in groups]
        for group, ids in zip(groups, encode(self.tokenizer, texts), strict=True):
            ids.append(self.stop)
            start = 0
            for word in group:
                end = ids.index(self.stop, start)
                self.ids[word] = array("i", ids[start:end]).tobytes()
                start = end + 1
