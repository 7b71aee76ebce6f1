"""Conversations tokenised word by word have the rows of those tokenised whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from helpers.formats import Messages
from helpers.frames import Frames, as_row
from helpers.masking import mask_conversation, mask_conversations, mask_rows
from helpers.words import CUT, KINDS, WORD, Words, cut, find_cuts

MakeTokenizer = Callable[..., Any]
CHATML = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
PIECES = ["yes", " no", "\n", "  ", "\t", "🎉", "é", "e\u0301", "<|im_end|>", "#### 12"]
PIECES += [
    "你好",
    "'s",
    "def f():\n    pass",
    ".",
    " (",
    "\u00a0",
    "assistant\n",
    " a b",
]
# How Llama-3, GPT-4o and DeepSeek-V3 cut words, besides GPT-2's way of the fixture.
PATTERNS = {
    "llama-3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}"
    r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-v3": r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def chats(count: int, seed: int = 0) -> list[Messages]:
    """Returns conversations of pieces put together at random."""
    draw = random.Random(seed)

    def text() -> str:
        return "x" + "".join(draw.choices(PIECES, k=draw.randint(0, 9))) + "."

    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            chat.append({"role": "user", "content": text()})
            chat.append({"role": "assistant", "content": text()})
        made.append(chat)
    return made


def cut_by(tokenizer: Any, pattern: str) -> Any:
    """Makes a tokenizer find words by another pattern, and returns it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(pattern), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_rows_made_by_words_are_those_of_the_whole_text(
    tokenizer: Any, loss_on: Any
) -> None:
    conversations = chats(120)
    rows = Frames(tokenizer, loss_on, find_cuts(tokenizer)).rows(conversations)
    whole = [as_row(**mask_conversation(tokenizer, m, loss_on)) for m in conversations]
    assert rows == whole


@pytest.mark.parametrize("name", PATTERNS)
def test_other_ways_to_find_words_give_the_rows_of_the_whole_text_too(
    make_tokenizer: MakeTokenizer, tokenizer: Any, name: str
) -> None:
    made = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    made = cut_by(made, PATTERNS[name])
    conversations = chats(80, seed=1)
    rows = Frames(made, "assistant", find_cuts(made)).rows(conversations)
    assert rows == [as_row(**mask_conversation(made, m)) for m in conversations]


def test_offsets_that_leave_out_spaces_do_not_change_the_rows(
    make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    from tokenizers.processors import ByteLevel

    made = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    conversations = chats(80, seed=2)
    rows = Frames(made, "assistant", find_cuts(made)).rows(conversations)
    assert rows == [as_row(**mask_conversation(made, m)) for m in conversations]


def test_few_words_kept_at_a_time_change_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.words.MAX_WORDS", 5)
    monkeypatch.setattr("helpers.frames.MAX_KEPT", 1)
    monkeypatch.setattr("helpers.masking.BLOCK", 7)
    conversations = chats(40, seed=3)
    rows = [row for rows in mask_rows(tokenizer, conversations) for row in rows]
    assert rows == [as_row(**mask_conversation(tokenizer, m)) for m in conversations]


def test_conversations_that_no_frame_fits_are_tokenised_whole(tokenizer: Any) -> None:
    spaced = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": ""}]
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Yes."}]
    frames = Frames(tokenizer, "assistant", find_cuts(tokenizer))
    assert frames.rows([spaced, empty]) == [None, None]
    made = mask_conversations(tokenizer, [empty])
    assert made.rows[0] == mask_conversation(tokenizer, empty)


def test_a_template_that_looks_at_the_contents_is_not_taken_for_a_frame(
    make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | replace('secret', '***')"
    )
    assert template != tokenizer.chat_template
    made = make_tokenizer(**CHATML, chat_template=template)
    plain, secret = (
        [{"role": "user", "content": x}, {"role": "assistant", "content": "Yes."}]
        for x in ("Hi", "a secret")
    )
    rows = Frames(made, "assistant", find_cuts(made)).rows([plain, secret])
    assert rows == [as_row(**mask_conversation(made, plain)), None]


# where a text may be cut


def test_a_text_of_words_is_cut_at_once_where_it_may_be() -> None:
    text = "The (quick) fox,\n\nit's 12 — 你好 🎉."
    assert cut(text) == CUT.split(text)
    assert all(map(WORD.fullmatch, cut(text)))


@pytest.mark.parametrize("text", ["a  b", "a\n b", "a \tb", "a ", " \nb", "a\u00a0 b"])
def test_a_cut_beside_other_white_space_is_noticed(text: str) -> None:
    assert not all(map(WORD.fullmatch, cut(text)))


@pytest.mark.parametrize(
    ("scheme", "may_cut"), [("never", True), ("first", False), ("always", True)]
)
def test_a_tokenizer_that_treats_the_start_of_a_text_alone_is_not_cut(
    scheme: Any, may_cut: bool
) -> None:
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    letters = [letter for kind in KINDS for letter in kind]
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["<unk>", "<s>"],
        initial_alphabet=[*letters, " "],
        show_progress=False,
    )
    core.train_from_iterator(["a B a. (a a's 7 a, B"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    # an unknown letter gives its id too, so it cannot part words
    assert find_cuts(tokenizer) == (["<s>"] if may_cut else [])


def test_a_tokenizer_without_words_is_not_cut(make_tokenizer: MakeTokenizer) -> None:
    # every space takes the letter before it along
    tokenizer = cut_by(make_tokenizer(**CHATML), r"\S |\S+(?=\S )|\s+|\S+")
    assert find_cuts(tokenizer) == []


def test_a_special_token_that_takes_spaces_along_forbids_cuts(
    make_tokenizer: MakeTokenizer,
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(**CHATML)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    assert find_cuts(tokenizer) == []


def test_a_special_token_that_another_begins_with_is_no_cut(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(("<|im_end|>!",), **CHATML)
    found = find_cuts(tokenizer)
    assert "<|im_end|>" not in found and "<|im_start|>" in found


def test_words_that_hold_the_separator_are_tokenised_alone(tokenizer: Any) -> None:
    words = Words(tokenizer, "<|im_end|>")
    words.learn({" a<|im_end|>b", " c"})
    for word, ids in words.ids.items():
        assert ids == as_row(tokenizer(word, add_special_tokens=False).input_ids, [])[0]
