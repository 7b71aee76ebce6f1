"""Conversations tokenised word by word have the rows of those tokenised whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.formats import Messages
from helpers.frames import Example, Frames
from helpers.masking import mask_conversation, mask_conversations, mask_rows
from helpers.templates import TEMPLATES
from helpers.words import BETWEEN, FIXED, KINDS, WORD, Cuts, Words, find_cuts
from tests.rows import CHATML

MakeTokenizer = Callable[..., Any]
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


def by_words(
    tokenizer: Any, conversations: list[Messages], loss_on: Any = "assistant"
) -> tuple[list[Example], list[Messages]]:
    """Returns the rows, and the conversations that were tokenised whole."""
    whole: list[Messages] = []

    def mask(messages: Messages) -> Example:
        whole.append(messages)
        return mask_conversation(tokenizer, messages, loss_on)

    cuts = find_cuts(tokenizer)
    assert cuts is not None
    frames = Frames(tokenizer, loss_on, cuts, mask)
    return frames.rows(frames.lay(conversations)).examples(), whole


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_rows_made_by_words_are_those_of_the_whole_text(
    tokenizer: Any, loss_on: Any
) -> None:
    conversations = chats(120)
    rows, whole = by_words(tokenizer, conversations, loss_on)
    assert rows == [mask_conversation(tokenizer, m, loss_on) for m in conversations]
    assert 20 < len(whole) < 100  # both ways are taken


@pytest.mark.parametrize("name", PATTERNS)
def test_other_ways_to_find_words_give_the_rows_of_the_whole_text_too(
    make_tokenizer: MakeTokenizer, tokenizer: Any, name: str
) -> None:
    made = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    made = cut_by(made, PATTERNS[name])
    conversations = chats(80, seed=1)
    rows, whole = by_words(made, conversations)
    assert rows == [mask_conversation(made, m) for m in conversations]
    assert len(whole) < 70


def test_offsets_that_leave_out_spaces_do_not_change_the_rows(
    make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    from tokenizers.processors import ByteLevel

    made = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    conversations = chats(80, seed=2)
    rows, _ = by_words(made, conversations)
    assert rows == [mask_conversation(made, m) for m in conversations]


def test_few_words_kept_at_a_time_change_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.words.MAX_WORDS", 5)
    monkeypatch.setattr("helpers.frames.MAX_KEPT", 1)
    monkeypatch.setattr("helpers.masking.BLOCK", 7)
    conversations = chats(40, seed=3)
    rows = [x for rows in mask_rows(tokenizer, conversations) for x in rows.examples()]
    assert rows == [mask_conversation(tokenizer, m) for m in conversations]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (" Hi ", "Yes."),
        ("", "Yes."),
        ("Hi", f"a{BETWEEN}b"),
        ("Hi", f"a {FIXED}b"),
        ("a\u00a0 b", "Yes."),
        ("Hi", "a <|im_end|> b"),
    ],
)
def test_conversations_that_no_frame_fits_are_tokenised_whole(
    tokenizer: Any, question: str, answer: str
) -> None:
    cuts = find_cuts(tokenizer)
    assert cuts is not None
    between = cuts.special[0]
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer.replace("<|im_end|>", between)},
    ]
    plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows, whole = by_words(tokenizer, [plain, chat, plain])
    assert whole == [chat]
    assert rows == [mask_conversation(tokenizer, m) for m in (plain, chat, plain)]


def test_all_rows_may_be_tokenised_whole(tokenizer: Any) -> None:
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Yes."}]
    made = mask_conversations(tokenizer, [empty])
    assert made.rows[0] == mask_conversation(tokenizer, empty)


@pytest.mark.parametrize("pattern", ["llama-3", None])
@pytest.mark.parametrize("header", ["\n", "\n\n", "<|endoftext|>\n\n"])
def test_headers_that_end_in_new_lines_fit_frames_where_they_may_be_cut(
    make_tokenizer: MakeTokenizer, header: str, pattern: str | None
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + HEADER + m['content'] "
        "+ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant' + HEADER }}{% endif %}"
    )
    template = template.replace("HEADER", repr(header))
    made = make_tokenizer(**CHATML, chat_template=template)
    if pattern:
        cut_by(made, PATTERNS[pattern])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rows, whole = by_words(made, [chat])
    assert rows == [mask_conversation(made, chat)]
    # GPT-2's way takes two new lines apart where a word follows
    assert len(whole) == ("\n\n" in header and pattern is None)


def test_an_answer_between_spaces_fits_a_frame(
    make_tokenizer: MakeTokenizer,
) -> None:
    made = make_tokenizer(**CHATML, chat_template=TEMPLATES["llama-2"])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rows, whole = by_words(made, [chat])
    assert rows == [mask_conversation(made, chat)]
    assert whole == []


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
    cuts = find_cuts(made)
    assert cuts is not None
    laid = Frames(made, "assistant", cuts, lambda messages: {}).lay([plain, secret])
    assert laid.counts[0] > 0 and laid.counts[1] == 0


# where a text may be cut


@pytest.mark.parametrize("lines", [0, 1, 2])
@given(st.text(st.sampled_from("ab.  \n\n\t\u00a0é"), min_size=1, max_size=12))
def test_a_text_is_cut_where_it_may_be_or_has_what_is_no_word(
    lines: int, text: str
) -> None:
    cuts = Cuts([], lines)
    text = f"x{text}y"
    found = cuts.apart(text).split(BETWEEN)
    assert "".join(found) == text
    if all(map(WORD.fullmatch, found)):
        assert found == cuts.pattern.split(text)


def test_a_text_of_words_is_cut_where_it_may_be() -> None:
    text = "The (quick) fox,\n\nit's 12 — 你好 🎉."
    for lines in range(3):
        found = Cuts([], lines).apart(text).split(BETWEEN)
        assert found == Cuts([], lines).pattern.split(text)
        assert all(map(WORD.fullmatch, found))


@pytest.mark.parametrize("text", ["a \tb", "a\t b", "a\u00a0 b", "a \u00a0b", "a\t\nb"])
def test_a_cut_beside_other_white_space_is_noticed(text: str) -> None:
    assert not all(map(WORD.fullmatch, Cuts([], 2).apart(text).split(BETWEEN)))


@pytest.mark.parametrize("text", ["a  b", "a\n b", "a \nb", "a\n\n\nb", "a,  b\n c"])
def test_white_space_that_is_not_cut_leaves_words(text: str) -> None:
    assert Cuts([], 2).apart(text) == text
    assert WORD.fullmatch(text)


@pytest.mark.parametrize(
    ("scheme", "lines"), [("never", 2), ("first", None), ("always", 0)]
)
def test_a_tokenizer_that_treats_the_start_of_a_text_alone_is_not_cut(
    scheme: Any, lines: int | None
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
    assert find_cuts(tokenizer) == (Cuts(["<s>"], lines) if lines is not None else None)


def test_a_tokenizer_without_words_is_not_cut(make_tokenizer: MakeTokenizer) -> None:
    # every space takes the letter before it along
    tokenizer = cut_by(make_tokenizer(**CHATML), r"\S |\S+(?=\S )|\s+|\S+")
    assert find_cuts(tokenizer) is None


def test_a_special_token_that_takes_spaces_along_forbids_cuts(
    make_tokenizer: MakeTokenizer,
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(**CHATML)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    assert find_cuts(tokenizer) is None


def test_a_special_token_that_another_begins_with_is_no_cut(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(("<|im_end|>!",), **CHATML)
    found = find_cuts(tokenizer)
    assert found is not None
    assert "<|im_end|>" not in found.special and "<|im_start|>" in found.special


def test_words_are_numbered_and_joined_to_their_ids(tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    words = Words(tokenizer, "<|im_end|>")
    fixed = f"{FIXED}<|im_end|>\n"
    first = words.find([" florist", fixed, " a<|im_end|>b", " odd\t"])
    assert first.tolist() == [2, 1, 0, 0]
    again = words.find([" vases", " florist"])
    assert again.tolist() == [3, 2]
    joined, ends = words.join(np.array([2, 1, 0, 3]))
    parts = [ids(" florist"), ids("<|im_end|>\n"), [], ids(" vases")]
    assert joined.tolist() == [x for part in parts for x in part]
    assert ends.tolist() == np.cumsum(list(map(len, parts))).tolist()
