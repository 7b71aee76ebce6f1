"""Tests of helpers.masking.dataset: exactly which tokens carry loss.

The oracles build the ids piece by piece, turn by turn, from what the formats are
documented to be; they know nothing of templates, spans or offsets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.data.formats import Messages
from helpers.errors import DataError, TemplateError
from helpers.masking import dataset as masking
from helpers.masking.dataset import (
    NO_LOSS,
    Example,
    check_rows,
    mask_conversation,
    mask_conversations,
)
from helpers.masking.templates import (
    FIXED_DATE,
    INSTRUCTION_TEMPLATE,
    LLAMA2_TEMPLATE,
    render,
)
from tests.rows import CHATML, turns

MakeTokenizer = Callable[..., Any]
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
)
LLAMA3_TEMPLATE = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Today Date: ' + date_string + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# keeps the thinking of the last answer only, as reasoning models' templates do
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Pieces:
    """Ids and labels, put together one piece of text at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.labels: list[int] = []

    def add(self, text: str, learnt: bool = False, header: str = "") -> None:
        """Adds text that ends at special tokens; its `header` is never learnt."""
        ids = self.tokenizer(header + text, add_special_tokens=False).input_ids
        starts = [self.tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        assert header in starts, "header and text share a token: choose another text"
        first = starts.index(header)
        self.ids += ids
        self.labels += [NO_LOSS] * first
        self.labels += ids[first:] if learnt else [NO_LOSS] * (len(ids) - first)

    def example(self) -> Example:
        return {"input_ids": self.ids, "labels": self.labels}


def chatml(tokenizer: Any, messages: Messages, learnt: set[int]) -> Example:
    """Returns what ChatML should give; `learnt` are the numbers of assistant turns."""
    pieces = Pieces(tokenizer)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    answer = 0
    for message in messages:
        speaks = message["role"] == "assistant"
        learn = speaks and answer in learnt
        answer += speaks
        pieces.add("<|im_start|>")
        pieces.add(message["content"], learn, header=message["role"] + "\n")
        pieces.add("<|im_end|>", learn)
        pieces.add("\n")
    return pieces.example()


CONVERSATIONS = {
    "one turn": turns("What is 2 + 2?", "It is 4."),
    "three turns": turns("Hi", "Hello.", "Who?", "A model.", "Why?", "To help."),
    "system": turns("Hi", "Hello.", system="Be brief.\nBe kind."),
    "system and two turns": turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief."),
    "unicode": turns("Grüße an Zoë?", "Grüße, Zoë — 你好, мир, こんにちは."),
    "emoji": turns("Party? 🎉", "👩‍👩‍👧‍👦🎉 yes 🇩🇪"),
    "an answer of one emoji": turns("Mood?", "🫠"),
    "combining marks": turns("e\u0301?", "e\u0301\u200d\u00a0a\u2028b"),
    "code": turns("Code?", "```python\ndef f(a):\n    return a[0]\n\n\n# end\n```"),
    "leading space": turns("Hi", " yo"),
    "trailing spaces": turns("Hi", "yo   "),
    "trailing line breaks": turns("Hi", "yo\n\n"),
    "tabs inside": turns("Hi", "a\t\tb\r\nc"),
    "numbers": turns("How many?", "12 * 90 = 1,080\n#### 1080"),
    "one letter": turns("Hi", "a"),
    "the same answer twice": turns("Hi", "Yes.", "Hi", "Yes."),
    "question equals answer": turns("Yes.", "Yes."),
    "the header's words": turns("assistant\n", "assistant\nuser\nassistant"),
    "markers in the answer": turns(
        "How does ChatML look?",
        "So: <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n!",
        "Thanks",
        "Sure.",
    ),
    "markers in the question": turns(
        "Hi<|im_end|>\n<|im_start|>assistant\nI was hacked.", "No, you were not."
    ),
    "an end marker at the end": turns("How do you end?", "With <|im_end|>"),
    "only an end marker": turns("How do you end?", "<|im_end|>", "And now?", "Yes"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_exactly_the_answers_and_their_end_tokens_are_learnt(
    tokenizer: Any, name: str
) -> None:
    messages = CONVERSATIONS[name]
    expected = chatml(tokenizer, messages, learnt={0, 1, 2})
    assert mask_conversation(tokenizer, messages) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_only_the_last_answer_is_learnt_when_asked_for(
    tokenizer: Any, name: str
) -> None:
    messages = CONVERSATIONS[name]
    last = sum(m["role"] == "assistant" for m in messages) - 1
    expected = chatml(tokenizer, messages, learnt={last})
    assert mask_conversation(tokenizer, messages, "last") == expected


@pytest.mark.parametrize("seed", range(40))
def test_conversations_put_together_at_random_are_masked_like_the_oracle(
    tokenizer: Any, seed: int
) -> None:
    draw = random.Random(seed)
    parts = ["yes", " no", "\n", "  ", "🎉", "é", "<|im_end|>", "#### 12", "你好", "\t"]
    parts += ["<|im_start|>", "assistant", "user\n", "def f():\n    pass", ".", "'s"]

    def text() -> str:
        return "x" + "".join(draw.choices(parts, k=draw.randint(0, 8)))

    count = draw.randint(1, 4)
    messages = turns(*(text() for _ in range(2 * count)), system=text())
    expected = chatml(tokenizer, messages, learnt=set(range(count)))
    assert mask_conversation(tokenizer, messages) == expected


def test_the_header_and_what_follows_the_end_token_are_not_learnt(
    tokenizer: Any,
) -> None:
    row = mask_conversation(tokenizer, turns("Hi", "Yes"))
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    learnt = [label != NO_LOSS for label in row["labels"]]
    assert list(zip(tokens, learnt, strict=True))[-6:] == [
        ("ass", False),
        ("istant", False),
        ("Ċ", False),
        ("Yes", True),
        ("<|im_end|>", True),
        ("Ċ", False),
    ]


def test_a_token_that_header_and_answer_share_is_not_learnt(tokenizer: Any) -> None:
    row = mask_conversation(tokenizer, turns("Hi", "  two spaces"))
    assert masking.supervised_text(tokenizer, row) == " two spaces<|im_end|>"


def test_a_token_that_an_answer_shares_with_what_follows_is_not_learnt(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Say:", " yes Hel", "lo", "!"))
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[-2:] == ["ĠHello", "!"]
    assert masking.supervised_text(tokenizer, row) == " yes!"


def test_an_unanswered_question_at_the_end_is_not_learnt(tokenizer: Any) -> None:
    messages = turns("Hi", "Hello.", "And?")
    expected = chatml(tokenizer, messages, learnt={0})
    assert mask_conversation(tokenizer, messages) == expected


def test_every_token_is_learnt_when_asked_for(tokenizer: Any) -> None:
    row = mask_conversation(tokenizer, CONVERSATIONS["three turns"], "all")
    assert row["labels"] == row["input_ids"]
    assert (
        row["input_ids"]
        == (chatml(tokenizer, CONVERSATIONS["three turns"], set())["input_ids"])
    )


def test_the_tokens_are_those_that_the_tokenizer_itself_would_give(
    tokenizer: Any,
) -> None:
    messages = CONVERSATIONS["system and two turns"]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert mask_conversation(tokenizer, messages)["input_ids"] == theirs


def test_the_prompt_of_generation_is_the_start_of_the_trained_row(
    tokenizer: Any,
) -> None:
    messages = turns("Hi", "Hello.", system="Be brief.")
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    row = mask_conversation(tokenizer, messages)
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) == {NO_LOSS}
    assert row["labels"][len(prompt)] != NO_LOSS


# truncation


def test_a_row_is_cut_at_the_maximum_length(tokenizer: Any) -> None:
    whole = mask_conversation(tokenizer, turns("Hi", "one two three four"))
    size = len(whole["input_ids"]) - 4
    cut = mask_conversation(
        tokenizer, turns("Hi", "one two three four"), max_length=size
    )
    assert cut == {name: values[:size] for name, values in whole.items()}


def test_rows_cut_and_rows_dropped_are_counted(tokenizer: Any) -> None:
    short, long = turns("Hi", "Yes."), turns("Hi", "yes " * 50)
    far = turns("very " * 100, "Yes.")
    limit = 40
    made = mask_conversations(
        tokenizer, [short, far, long, far, short], max_length=limit
    )
    lengths = [len(row["input_ids"]) for row in made.rows]
    assert list(made.dropped) == [1, 3]
    assert made.truncated == 1
    assert len(lengths) == 3
    assert lengths[1] == limit == max(lengths)


def test_nothing_is_cut_or_dropped_without_a_maximum(tokenizer: Any) -> None:
    made = mask_conversations(tokenizer, list(CONVERSATIONS.values()))
    assert (made.dropped, made.truncated) == ({}, 0)
    assert len(made.rows) == len(CONVERSATIONS)


def test_the_supervised_fraction_is_that_of_all_kept_tokens(tokenizer: Any) -> None:
    made = mask_conversations(tokenizer, [turns("Hi", "Yes."), turns("Hi", "a " * 30)])
    labels = [label for row in made.rows for label in row["labels"]]
    learnt = [label for label in labels if label != NO_LOSS]
    assert made.supervised_fraction == len(learnt) / len(labels)


def test_rows_that_are_all_dropped_are_refused_with_what_they_start_with(
    tokenizer: Any,
) -> None:
    far = turns("very " * 100, "Yes.")
    with pytest.raises(
        DataError, match="none of 2 .* max_length=30; .*<|im_start|>system.*raise it"
    ):
        mask_conversations(tokenizer, [far, far], max_length=30)


# guards


def test_rows_that_learn_next_to_nothing_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="0.2% of the tokens carry loss.*'Yes<|im_end"):
        mask_conversations(tokenizer, [turns("very " * 900, "Yes")])


def test_a_template_that_does_not_end_turns_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        **CHATML,
        chat_template=(
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        ),
    )
    with pytest.raises(DataError, match="2 of 2 answers do not end in a stop .*im_end"):
        mask_conversations(tokenizer, [turns("Hi", "Yes."), turns("Hi", "No.")])


def test_a_template_that_doubles_bos_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ bos_token }}" + LLAMA2_TEMPLATE
    tokenizer = make_tokenizer(
        ("<s>", "</s>"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    with pytest.raises(DataError, match="^1 rows start with <s> twice, .* row 1;"):
        mask_conversations(tokenizer, [turns("Hi", "Yes.")])


def test_a_later_row_that_starts_with_bos_twice_is_named(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=INSTRUCTION_TEMPLATE)
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [{"input_ids": [bos, 5, end], "labels": [NO_LOSS, 5, end]}] * 2
    check_rows(tokenizer, rows, "assistant")
    rows.append({"input_ids": [bos, bos, end], "labels": [NO_LOSS, NO_LOSS, end]})
    with pytest.raises(DataError, match="^1 rows .*<.im_start.> twice, .* row 43;"):
        check_rows(tokenizer, rows, "assistant", before=40)


def test_an_earlier_answer_that_no_stop_token_ends_is_named(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    fine, bad = turns("Hi", "Yes."), turns("Hi", "Yes.", "So?", "No.")
    mask_conversations(tokenizer, [fine, fine])
    with pytest.raises(DataError, match="1 of 4 answers .* row 2, ends in '.*Yes.'"):
        mask_conversations(tokenizer, [fine, bad, fine])


def test_padding_with_the_token_that_ends_answers_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    same = {**CHATML, "pad_token": "<|im_end|>"}
    tokenizer = make_tokenizer(**same, chat_template=INSTRUCTION_TEMPLATE)
    with pytest.raises(DataError, match="pad and EOS are the same .*prepare_tokenizer"):
        mask_conversations(tokenizer, [turns("Hi", "Yes.")])


def test_rows_that_learn_next_to_everything_are_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    with pytest.raises(DataError, match="99.[0-9]% of the tokens carry loss"):
        mask_conversations(tokenizer, [turns("Hi", "yes " * 900)])


def test_rows_that_were_dropped_are_counted_and_named(tokenizer: Any) -> None:
    far = turns("very " * 100, "Yes.")
    short = turns("Hi", "Yes.")
    made = mask_conversations(tokenizer, [short, far, short, far], max_length=60)
    assert made.describe_dropped() == (
        "2 of 4 conversations are left out: no answer begins within max_length "
        "(rows 2, 4)"
    )
    assert made.counts()["dropped_rows"] == [2, 4]


def test_conversations_without_an_answer_are_refused_with_the_cause(
    tokenizer: Any,
) -> None:
    with pytest.raises(DataError, match="none of 1 .*Hi.*They have no answer"):
        mask_conversations(tokenizer, [turns("Hi")])


def test_rows_may_be_read_one_by_one_and_written_to_a_file(
    tokenizer: Any, tmp_path: Path
) -> None:
    asked = [turns("Hi", f"Yes, {n}.") for n in range(150)]
    made = mask_conversations(tokenizer, iter(asked), file=tmp_path / "rows.arrow")
    assert made.rows.cache_files == [{"filename": str(tmp_path / "rows.arrow")}]
    assert list(made.rows) == list(mask_conversations(tokenizer, asked).rows)
    assert made.rows[149] == mask_conversation(tokenizer, asked[149])


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=THINKING_TEMPLATE)
    messages = turns("Hi", "<think>hm</think>Hello.", "Bye", "Bye!")
    with pytest.raises(
        TemplateError, match="^turn 2: .*leaves out text.*loss_on='last'"
    ):
        mask_conversation(tokenizer, messages)


def test_the_remedy_for_a_template_that_rewrites_earlier_turns_works(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=THINKING_TEMPLATE)
    messages = turns("Hi", "<think>hm</think>Hello.", "Bye", "<think>so</think>Bye!")
    row = mask_conversation(tokenizer, messages, "last")
    learnt = masking.supervised_text(tokenizer, row)
    assert learnt == "<think>so</think>Bye!<|im_end|>"


def test_an_answer_that_a_template_opens_otherwise_than_its_prompt_follows_the_prompt(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = THINKING_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Hi", "Hello."))
    assert_follows_prompt(tokenizer, turns("Hi", "Hello."), row, "Hello.<|im_end|>")


def test_thinking_that_the_prompt_opens_is_learnt_from_there_on(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = THINKING_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = make_tokenizer(("<think>",), **CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Hi", "<think>\nhm</think>Hello."))
    assert masking.supervised_text(tokenizer, row) == "hm</think>Hello.<|im_end|>"


def test_what_only_the_template_writes_before_an_answer_is_learnt(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '[final] ' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Hi", "Hello."))
    assert masking.supervised_text(tokenizer, row) == "[final] Hello.<|im_end|>"


def test_an_earlier_answer_may_end_in_another_token_than_the_last(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(("<|return|>",), **CHATML, chat_template=template)
    made = mask_conversations(
        tokenizer, [turns("Hi", "Yes.", "So?", "No."), turns("Hi", "Yes.", "So?")]
    )
    learnt = [masking.supervised_text(tokenizer, row) for row in made.rows]
    assert learnt == ["Yes.<|im_end|>No.<|return|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize(
    "content",
    ["{{ m.content[0].text }}", "{{ m.content | map(attribute='text') | join }}"],
)
def test_a_template_for_lists_of_text_and_images_is_refused(
    make_tokenizer: MakeTokenizer, content: str
) -> None:
    template = "{% for m in messages %}" + content + "<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    with pytest.raises(TemplateError, match="lists|has no attribute 'text'"):
        mask_conversation(tokenizer, turns("Hi", "Hello."))


def test_a_template_that_changes_letters_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    with pytest.raises(TemplateError, match="leaves out text|changes the text"):
        mask_conversation(tokenizer, turns("Hi", "Hello."))


def test_spaces_that_a_tokenizer_leaves_out_of_its_offsets_are_learnt(
    make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    from tokenizers.processors import ByteLevel

    trimmed = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    trimmed.backend_tokenizer.post_processor = ByteLevel(
        trim_offsets=True, add_prefix_space=False
    )
    messages = turns("Hi", "  a  table\n    with  columns  ", "Yes?", "ok")
    assert mask_conversation(trimmed, messages) == mask_conversation(
        tokenizer, messages
    )


def test_an_end_token_that_takes_the_white_space_after_it_is_learnt(
    make_tokenizer: MakeTokenizer,
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(
        eos_token="<|end|>",
        chat_template=(
            "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
            "{{ '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        ),
    )
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(n, rstrip=True, special=True) for n in names])
    row = mask_conversation(tokenizer, turns("Hi", "Yes.", "So?", "No."))
    assert masking.supervised_text(tokenizer, row) == "Yes.<|end|>No.<|end|>"


# the prompt of training is the prompt of inference


def assert_follows_prompt(
    tokenizer: Any, messages: Messages, row: Example, answer: str
) -> None:
    """Checks that a row is the prompt of its last answer, and the answer learnt."""
    prompt = render(tokenizer, messages[:-1], for_generation=True)
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith(prompt + answer)
    assert not text[len(prompt + answer) :].strip()
    assert masking.supervised_text(tokenizer, row).endswith(answer)


IN_LAST_QUESTION = (
    "{% set first = messages[0] %}"
    "{% set head = first.content + '\n' if first.role == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[Q] ' + (head if loop.last else '') + m.content + ' [/Q]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
NO_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
FLAGGED = (
    "{% set quiet = '/quiet' in messages[0].content %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ 'QUIET\n' if quiet and m.role == 'assistant' else '' }}"
    "{{ m.content.replace('/quiet', '').rstrip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ 'QUIET\n' if quiet else '' }}{% endif %}"
)


def test_a_system_prompt_that_moves_to_the_last_question_is_trained_with(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=IN_LAST_QUESTION)
    messages = turns("Hi", "Hello.", system="Be brief.")
    for loss_on in ("assistant", "last", "all"):
        row = mask_conversation(tokenizer, messages, loss_on)
        assert_follows_prompt(tokenizer, messages, row, " Hello.<|im_end|>")
    longer = turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief.")
    row = mask_conversation(tokenizer, longer, "last")
    assert_follows_prompt(tokenizer, longer, row, " Bye!<|im_end|>")


@pytest.mark.parametrize("template", [IN_LAST_QUESTION, NO_THOUGHT])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_an_earlier_answer_with_another_prompt_refuses_the_row_with_the_way_out(
    make_tokenizer: MakeTokenizer, template: str, loss_on: Any
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    fine = turns("Hi", "Hello.")
    bad = turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief.")
    with pytest.raises(
        TemplateError, match="row 2: turn 3: the prompt .*loss_on='last'"
    ):
        mask_conversations(tokenizer, [fine, bad], loss_on)


def test_a_row_that_a_template_refuses_may_be_dropped_with_its_reason(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=IN_LAST_QUESTION)
    bad = turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief.")
    rows = mask_conversations(tokenizer, [turns("Hi", "Yes."), bad], drop=True)
    assert (len(rows.rows), list(rows.dropped)) == (1, [1])
    assert "turn 3: the prompt that the model" in rows.describe_dropped()
    assert "(rows 2)" in rows.describe_dropped()
    with pytest.raises(DataError, match="none of 1 .*turn 3: the prompt"):
        mask_conversations(tokenizer, [bad], drop=True)


def test_a_thought_that_the_prompt_closes_stands_before_the_learnt_answer(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=NO_THOUGHT)
    messages = turns("Hi", "Hello.", system="Be brief.")
    row = mask_conversation(tokenizer, messages)
    assert_follows_prompt(tokenizer, messages, row, "Hello.<|im_end|>")
    assert masking.supervised_text(tokenizer, row) == "Hello.<|im_end|>"


def test_a_thought_that_answer_and_prompt_both_have_stands_there_once(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=NO_THOUGHT)
    messages = turns("Hi", "<think>\n\n</think>Hello.")
    row = mask_conversation(tokenizer, messages)
    assert_follows_prompt(tokenizer, messages, row, "Hello.<|im_end|>")


@pytest.mark.parametrize("system", ["Be brief.", "Be brief. /quiet"])
def test_a_template_that_looks_for_words_in_the_contents_is_followed(
    make_tokenizer: MakeTokenizer, system: str
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=FLAGGED)
    messages = turns("Hi", "Hello.", "Bye", "Bye! ", system=system)
    row = mask_conversation(tokenizer, messages)
    assert_follows_prompt(tokenizer, messages, row, "Bye!<|im_end|>")
    learnt = masking.supervised_text(tokenizer, row)
    assert learnt == "Hello.<|im_end|>Bye!<|im_end|>"


def test_contents_that_a_template_writes_as_json_are_learnt_as_written(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = NO_THOUGHT.replace("m.content", "(m.content | tojson)")
    template = template.replace("<think>\n\n</think>\n\n", "")
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Hi", 'So: "é"\n', "Bye", "Bye!"))
    learnt = masking.supervised_text(tokenizer, row)
    assert learnt == '"So: \\"é\\"\\n"<|im_end|>"Bye!"<|im_end|>'


def test_a_header_that_inference_does_not_write_is_learnt(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = NO_THOUGHT.partition("{% if add")[0]
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    row = mask_conversation(tokenizer, turns("Hi", "Hello."))
    learnt = masking.supervised_text(tokenizer, row)
    assert learnt == "<|im_start|>assistant\nHello.<|im_end|>"


def test_a_conversation_that_a_template_refuses_is_named_by_its_row(
    make_tokenizer: MakeTokenizer,
) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    template = refusal + "{% endif %}" + INSTRUCTION_TEMPLATE
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    rows = [turns("Hi", "Yes."), turns("Hi", "Yes.", system="Be brief.")]
    with pytest.raises(TemplateError, match="^row 2: .*refuses .*system user.*no syst"):
        mask_conversations(tokenizer, rows)


def test_an_answer_that_nothing_asks_for_is_refused(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Hello."}, *turns("Hi", "Yes.")]
    with pytest.raises(TemplateError, match="turn 1 is an answer: .* no prompt"):
        mask_conversation(tokenizer, messages)
    assert masking.supervised_text(
        tokenizer, mask_conversation(tokenizer, messages, "last")
    ) == ("Yes.<|im_end|>")


# turns of weight 0


def unlearnt(messages: Messages, *numbers: int) -> Messages:
    """Returns the messages, some of them marked as not to be learnt."""
    return [
        {**m, "weight": 0} if n in numbers else m  # type: ignore[dict-item]
        for n, m in enumerate(messages)
    ]


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [
        ("assistant", "Bye!<|im_end|>"),
        ("last", "Bye!<|im_end|>"),
        ("all", "<|im_start|>user\nHi<|im_end|>\n"),
    ],
)
def test_answers_of_weight_0_are_not_learnt(
    tokenizer: Any, loss_on: Any, learnt: str
) -> None:
    messages = unlearnt(turns("Hi", "Hello.", "Bye", "Bye!", system="S"), 2)
    row = mask_conversation(tokenizer, messages, loss_on)
    text = masking.supervised_text(tokenizer, row)
    assert "Hello." not in text and learnt in text
    plain = turns("Hi", "Hello.", "Bye", "Bye!", system="S")
    assert row["input_ids"] == mask_conversation(tokenizer, plain)["input_ids"]


def test_the_last_answer_is_the_last_that_may_be_learnt(tokenizer: Any) -> None:
    row = mask_conversation(tokenizer, unlearnt(turns("A", "B", "C", "D"), 3), "last")
    assert masking.supervised_text(tokenizer, row) == "B<|im_end|>"


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_row_whose_answers_all_have_weight_0_is_named_as_dropped(
    tokenizer: Any, loss_on: Any
) -> None:
    nothing = unlearnt(turns("Hi", "Hello."), 1)
    rows = mask_conversations(tokenizer, [turns("Hi", "Yes."), nothing], loss_on)
    assert rows.describe_dropped() == (
        "1 of 2 conversations are left out: there is no answer to learn (rows 2)"
    )


def test_a_template_never_sees_the_weight(make_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages %}{{ m.keys() | list | string }}{% endfor %}"
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    messages = unlearnt(turns("Hi", "Hello."), 0)
    assert "weight" not in render(tokenizer, messages)


# other templates


@pytest.fixture(scope="module")
def llama3(make_tokenizer: MakeTokenizer) -> Any:
    return make_tokenizer(
        LLAMA3_SPECIAL,
        adds_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )


@pytest.fixture(scope="module")
def llama2(make_tokenizer: MakeTokenizer) -> Any:
    return make_tokenizer(
        ("<s>", "</s>"),
        adds_bos=True,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=LLAMA2_TEMPLATE,
    )


PORTABLE = [
    name
    for name, messages in CONVERSATIONS.items()
    if not any(m["content"] != m["content"].strip() for m in messages)
]


@pytest.mark.parametrize("name", PORTABLE)
def test_a_llama3_template_with_a_date_is_masked_like_its_oracle(
    llama3: Any, name: str
) -> None:
    messages = CONVERSATIONS[name]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    pieces = Pieces(llama3)
    pieces.add("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    pieces.add(f"\n\nToday Date: {FIXED_DATE}\n\n{system}")
    pieces.add("<|eot_id|>")
    for message in messages[bool(system) :]:
        learn = message["role"] == "assistant"
        pieces.add(f"<|start_header_id|>{message['role']}<|end_header_id|>")
        pieces.add(message["content"], learn, header="\n\n")
        pieces.add("<|eot_id|>", learn)
    assert mask_conversation(llama3, messages) == pieces.example()


@pytest.mark.parametrize("name", [name for name in PORTABLE if "system" not in name])
def test_a_llama2_template_is_masked_like_its_oracle(llama2: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    pieces = Pieces(llama2)
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        pieces.add("<s>")
        header = f"[INST] {question['content']} [/INST]"
        pieces.add(f" {answer['content']} ", learnt=True, header=header)
        pieces.add("</s>", learnt=True)
    assert mask_conversation(llama2, messages) == pieces.example()


@pytest.mark.parametrize("family", ["llama3", "llama2"])
def test_the_guards_pass_the_llama_templates(
    family: str, request: pytest.FixtureRequest
) -> None:
    rows = [CONVERSATIONS["one turn"], CONVERSATIONS["three turns"]]
    made = mask_conversations(request.getfixturevalue(family), rows)
    assert (len(made.rows), made.dropped, made.truncated) == (2, {}, 0)


def test_white_space_that_a_template_trims_is_not_missed(llama3: Any) -> None:
    row = mask_conversation(llama3, turns("Hi", "  Hello.  \n"))
    assert masking.supervised_text(llama3, row) == "Hello.<|eot_id|>"


def test_the_instruction_template_is_masked_from_response_to_eos(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=INSTRUCTION_TEMPLATE)
    row = mask_conversation(tokenizer, turns("Hi", "Yes.", "So?", "### Response:\nNo"))
    assert masking.supervised_text(tokenizer, row) == (
        "Yes.<|im_end|>### Response:\nNo<|im_end|>"
    )


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [
        ("assistant", "Yes.<|im_end|>No.<|im_end|>"),
        ("last", "No.<|im_end|>"),
        (
            "all",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes.<|im_end|>\n\n"
            "### Instruction:\nSo?\n\n### Response:\nNo.<|im_end|>",
        ),
    ],
)
def test_the_instruction_template_is_learnt_as_far_as_asked(
    make_tokenizer: MakeTokenizer, loss_on: Any, learnt: str
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=INSTRUCTION_TEMPLATE)
    messages = turns("Hi", "Yes.", "So?", "No.", system="Be brief.")
    row = mask_conversation(tokenizer, messages, loss_on)
    assert masking.supervised_text(tokenizer, row) == learnt


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [
        ("assistant", " Yes. </s> No. </s>"),
        ("last", " No. </s>"),
        (
            "all",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes. </s>"
            "<s>[INST] So? [/INST] No. </s>",
        ),
    ],
)
def test_the_llama2_template_is_learnt_as_far_as_asked(
    llama2: Any, loss_on: Any, learnt: str
) -> None:
    messages = turns("Hi", "Yes.", "So?", "No.", system="Be brief.")
    row = mask_conversation(llama2, messages, loss_on)
    assert masking.supervised_text(llama2, row) == learnt


# show


def test_a_shown_row_brackets_what_is_learnt(tokenizer: Any) -> None:
    messages = turns("Hi", "Yes.", "So?", "No.", system="Be brief.")
    row = mask_conversation(tokenizer, messages)
    share = sum(x != NO_LOSS for x in row["labels"]) / len(row["labels"])
    assert repr(masking.show(tokenizer, row)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[[Yes.<|im_end|>]]\n<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n[[No.<|im_end|>]]\n\n"
        f"[[...]] = learnt, {share:.0%} of the tokens"
    )


def test_a_shown_row_escapes_html_learnt_or_not(tokenizer: Any) -> None:
    messages = turns("<b>bold</b> & co", "<script>alert('x')</script>")
    row = mask_conversation(tokenizer, messages)
    page = masking.show(tokenizer, row)._repr_html_()
    assert "<b>" not in page and "<script>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co&lt;|im_end|&gt;" in page
    assert (
        "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&lt;|im_end|&gt;</span>"
        in (page)
    )


def test_a_shown_page_underlines_exactly_what_is_learnt(tokenizer: Any) -> None:
    row = mask_conversation(tokenizer, turns("Hi", "Yes.", "So?", "No."))
    page = masking.show(tokenizer, row)._repr_html_()
    inside = [part.split("</span>")[0] for part in page.split("<span ")[1:]]
    texts = [part.partition(">")[2] for part in inside]
    assert texts == ["Yes.&lt;|im_end|&gt;", "No.&lt;|im_end|&gt;"]
