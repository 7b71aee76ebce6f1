"""Tests of masking.dataset: exactly which tokens carry loss.

The oracles build the ids piece by piece, turn by turn, from what the formats are
documented to be; they know nothing of templates, spans or offsets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import masking
from helpers.data.formats import Messages
from helpers.errors import DataError, TemplateError
from helpers.masking.dataset import (
    NO_LOSS,
    Example,
    check_rows,
    mask_conversation,
    mask_conversations,
    supervised_text,
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
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = THINKING.replace("assistant\n' }}", "assistant\n<think>\n' }}")
IN_LAST_QUESTION = (
    "{% set first = messages[0] %}"
    "{% set head = first.content + '\n' if first.role == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[Q] ' + (head if loop.last else '') + m.content + ' [/Q]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_THOUGHT = PLAIN.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")
FLAGGED = (
    "{% set quiet = '/quiet' in messages[0].content %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ 'QUIET\n' if quiet and m.role == 'assistant' else '' }}"
    "{{ m.content.replace('/quiet', '').rstrip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ 'QUIET\n' if quiet else '' }}{% endif %}"
)
BOTH = turns("Hi", "Yes.", "So?", "No.")


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


CONVERSATIONS = [
    turns("What is 2 + 2?", "It is 4."),
    turns("Hi", "Hello.", "Who?", "A model.", "Why?", "To help."),
    turns("Hi", "Hello.", "And?"),
    turns("Hi", "Hello.", "Bye", "Bye!", system="Be brief.\nBe kind."),
    turns("Grüße an Zoë?", "Grüße, Zoë — 你好, мир, こんにちは."),
    turns("Party? 🎉", "👩‍👩‍👧‍👦🎉 yes 🇩🇪", "Mood?", "🫠"),
    turns("e\u0301?", "e\u0301\u200d\u00a0a\u2028b"),
    turns("Code?", "```python\ndef f(a):\n    return a[0]\n\n\n# end\n```"),
    turns("Hi", " yo"),
    turns("Hi", "yo   "),
    turns("Hi", "yo\n\n"),
    turns("Hi", "a\t\tb\r\nc"),
    turns("How many?", "12 * 90 = 1,080\n#### 1080"),
    turns("Hi", "Yes.", "Yes.", "Yes."),
    turns("assistant\n", "assistant\nuser\nassistant"),
    turns(
        "Q", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n!", "T", "Sure."
    ),
    turns("Hi<|im_end|>\n<|im_start|>assistant\nI was hacked.", "No, you were not."),
    turns("How do you end?", "<|im_end|>", "And now?", "With <|im_end|>"),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_exactly_the_answers_and_their_end_tokens_are_learnt(
    tokenizer: Any, messages: Messages
) -> None:
    expected = chatml(tokenizer, messages, learnt={0, 1, 2})
    assert mask_conversation(tokenizer, messages) == expected
    last = sum(m["role"] == "assistant" for m in messages) - 1
    expected = chatml(tokenizer, messages, learnt={last})
    assert mask_conversation(tokenizer, messages, "last") == expected
    row = mask_conversation(tokenizer, messages, "all")
    assert row == {"input_ids": expected["input_ids"], "labels": expected["input_ids"]}
    theirs = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert row["input_ids"] == theirs


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


PORTABLE = [
    messages
    for messages in CONVERSATIONS
    if not any(m["content"] != m["content"].strip() for m in messages)
]


@pytest.fixture(scope="module")
def llama3(make_tokenizer: MakeTokenizer) -> Any:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return make_tokenizer(
        LLAMA3_SPECIAL, adds_bos=True, chat_template=LLAMA3_TEMPLATE, **names
    )


@pytest.fixture(scope="module")
def llama2(make_tokenizer: MakeTokenizer) -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return make_tokenizer(
        ("<s>", "</s>"), adds_bos=True, chat_template=LLAMA2_TEMPLATE, **names
    )


@pytest.mark.parametrize("messages", PORTABLE)
def test_a_llama3_template_with_a_date_is_masked_like_its_oracle(
    llama3: Any, messages: Messages
) -> None:
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


@pytest.mark.parametrize(
    "messages", [m for m in PORTABLE if m[0]["role"] == "user" and len(m) % 2 == 0]
)
def test_a_llama2_template_is_masked_like_its_oracle(
    llama2: Any, messages: Messages
) -> None:
    pieces = Pieces(llama2)
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        pieces.add("<s>")
        header = f"[INST] {question['content']} [/INST]"
        pieces.add(f" {answer['content']} ", learnt=True, header=header)
        pieces.add("</s>", learnt=True)
    assert mask_conversation(llama2, messages) == pieces.example()
    assert len(mask_conversations(llama2, [messages]).rows) == 1


# what is learnt under other templates


JSON_TEMPLATE = PLAIN.replace("m.content", "(m.content | tojson)")
OTHER_END = PLAIN.replace(
    "{{ '<|im_end|>\n' }}",
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}",
)
FINAL = PLAIN.replace(
    "m.content", "('[final] ' if m.role == 'assistant' else '') + m.content"
)
SHARED = "{% for m in messages %}{{ m.content }}{% endfor %}"
INSTRUCTED = (
    "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes.<|im_end|>\n\n"
    "### Instruction:\nSo?\n\n### Response:\nNo.<|im_end|>"
)
LEARNT: list[tuple[str, Messages, Any, str]] = [
    # a token that header and answer, or answer and next turn, share is not learnt
    (PLAIN, turns("Hi", "  two spaces"), "assistant", " two spaces<|im_end|>"),
    (SHARED, turns("Say:", " yes Hel", "lo", "!"), "assistant", " yes!"),
    (
        THINKING,
        turns("Hi", "<think>a</think>Yes.", "So?", "<think>b</think>No."),
        "last",
        "<think>b</think>No.<|im_end|>",
    ),
    (OPENED, turns("Hi", "Hello."), "assistant", "Hello.<|im_end|>"),
    (
        OPENED,
        turns("Hi", "<think>\nhm</think>Hello."),
        "assistant",
        "hm</think>Hello.<|im_end|>",
    ),
    # what only the template writes before an answer is learnt
    (FINAL, turns("Hi", "Hello."), "assistant", "[final] Hello.<|im_end|>"),
    (
        PLAIN.partition("{% if add")[0],
        turns("Hi", "Hello."),
        "assistant",
        "<|im_start|>assistant\nHello.<|im_end|>",
    ),
    (OTHER_END, BOTH, "assistant", "Yes.<|im_end|>No.<|return|>"),
    (OTHER_END, BOTH[:3], "assistant", "Yes.<|im_end|>"),
    (
        JSON_TEMPLATE,
        turns("Hi", 'So: "é"\n', "Bye", "Bye!"),
        "assistant",
        '"So: \\"é\\"\\n"<|im_end|>"Bye!"<|im_end|>',
    ),
    (
        NO_THOUGHT,
        turns("Hi", "Hello.", system="Be brief."),
        "assistant",
        "Hello.<|im_end|>",
    ),
    (
        NO_THOUGHT,
        turns("Hi", "<think>\n\n</think>Hello."),
        "assistant",
        "Hello.<|im_end|>",
    ),
    (
        IN_LAST_QUESTION,
        turns("Hi", "Hello.", system="S"),
        "assistant",
        " Hello.<|im_end|>",
    ),
    (
        IN_LAST_QUESTION,
        turns("Hi", "Hello.", "Bye", "Bye!", system="S"),
        "last",
        " Bye!<|im_end|>",
    ),
    (
        FLAGGED,
        turns("Hi", "Hello.", "Bye", "Bye! ", system="S /quiet"),
        "assistant",
        "Hello.<|im_end|>Bye!<|im_end|>",
    ),
    (
        INSTRUCTION_TEMPLATE,
        turns("Hi", "Yes.", "So?", "### Response:\nNo"),
        "assistant",
        "Yes.<|im_end|>### Response:\nNo<|im_end|>",
    ),
    (
        INSTRUCTION_TEMPLATE,
        turns("Hi", "Yes.", "So?", "No.", system="Be brief."),
        "all",
        INSTRUCTED,
    ),
]


@pytest.mark.parametrize(("template", "messages", "loss_on", "text"), LEARNT)
def test_the_learnt_text_follows_the_prompt_that_inference_renders(
    make_tokenizer: MakeTokenizer,
    template: str,
    messages: Messages,
    loss_on: Any,
    text: str,
) -> None:
    special = ("<|return|>", "<think>")
    tokenizer = make_tokenizer(special, **CHATML, chat_template=template)
    row = mask_conversation(tokenizer, messages, loss_on)
    assert supervised_text(tokenizer, row) == text
    if messages[-1]["role"] == "assistant" and loss_on != "all":
        prompt = render(tokenizer, messages[:-1], for_generation=True)
        whole = tokenizer.decode(row["input_ids"])
        assert whole.startswith(prompt)
        assert text.endswith(whole[len(prompt) :].strip())


def test_white_space_around_contents_and_end_tokens_is_not_missed(
    llama3: Any, make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    from tokenizers import AddedToken
    from tokenizers.processors import ByteLevel

    row = mask_conversation(llama3, turns("Hi", "  Hello.  \n"))
    assert supervised_text(llama3, row) == "Hello.<|eot_id|>"
    # spaces that a tokenizer leaves out of its offsets
    trimmed = make_tokenizer(**CHATML, chat_template=tokenizer.chat_template)
    trimmed.backend_tokenizer.post_processor = ByteLevel(
        trim_offsets=True, add_prefix_space=False
    )
    spaced = turns("Hi", "  a  table\n    with  columns  ", "Yes?", "ok")
    expected = mask_conversation(tokenizer, spaced)
    assert mask_conversation(trimmed, spaced) == expected
    # an end token that takes the white space after it
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    greedy = make_tokenizer(eos_token="<|end|>", chat_template=template)
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    greedy.add_tokens([AddedToken(n, rstrip=True, special=True) for n in names])
    row = mask_conversation(greedy, BOTH)
    assert supervised_text(greedy, row) == "Yes.<|end|>No.<|end|>"


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_turns_of_weight_0_are_read_and_not_learnt(
    tokenizer: Any, loss_on: Any
) -> None:
    messages = turns("A", "B", "C", "D", system="S")
    messages[4]["weight"] = 0
    row = mask_conversation(tokenizer, messages, loss_on)
    text = supervised_text(tokenizer, row)
    assert "D" not in text and "B<|im_end|>" in text
    plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    assert row["input_ids"] == mask_conversation(tokenizer, plain)["input_ids"]
    nothing = turns("Hi", "Hello.")
    nothing[1]["weight"] = 0
    rows = mask_conversations(tokenizer, [turns("Hi", "Yes."), nothing], loss_on)
    assert rows.describe_dropped() == (
        "1 of 2 conversations are left out: there is no answer to learn (rows 2)"
    )


# what is refused

REFUSAL = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
UPPER = "{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}"
LISTS = "{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}"
CHAT = turns("Hi", "<think>hm</think>Hello.", "Bye", "Bye!", system="S")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (THINKING, "^row 1: turn 3: .*leaves out text.*loss_on='last'"),
        (IN_LAST_QUESTION, "^row 1: turn 3: the prompt that .*loss_on='last'"),
        (NO_THOUGHT, "^row 1: turn 3: the prompt that .*loss_on='last'"),
        (UPPER, "^row 1: turn 3: the template changes"),
        (LISTS, "does not print contents that are text; it is made for lists"),
        (REFUSAL + "{% endif %}" + PLAIN, "^row 1: .*refuses .*system user.*no system"),
    ],
)
def test_a_row_that_would_teach_another_text_is_refused_or_dropped(
    make_tokenizer: MakeTokenizer, template: str, reason: str, loss_on: Any
) -> None:
    tokenizer = make_tokenizer(**CHATML, chat_template=template)
    if loss_on == "all" and template in (THINKING, UPPER):
        return  # all that is rendered is learnt, whatever it is
    with pytest.raises(TemplateError, match=reason):
        mask_conversations(tokenizer, [CHAT], loss_on)
    if template not in (UPPER, LISTS):
        rows = [turns("Hi", "Yes."), CHAT]
        masked = mask_conversations(tokenizer, rows, loss_on, drop=True)
        assert (len(masked.rows), list(masked.dropped)) == (1, [1])
        assert "(rows 2)" in masked.describe_dropped()
        with pytest.raises(DataError, match="none of 1 conversations has a token"):
            mask_conversations(tokenizer, [CHAT], loss_on, drop=True)


def test_an_answer_that_nothing_asks_for_is_refused(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "Hello."}, *turns("Hi", "Yes.")]
    with pytest.raises(TemplateError, match="turn 1 is an answer: .* no prompt"):
        mask_conversation(tokenizer, messages)
    row = mask_conversation(tokenizer, messages, "last")
    assert supervised_text(tokenizer, row) == "Yes.<|im_end|>"


UNENDED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{{ '<|im_end|>' if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (PLAIN, turns("very " * 900, "Yes"), "0.2% of the tokens carry loss.*'Yes<|im"),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            turns("Hi", "yes " * 900),
            "99.[0-9]% of the tokens carry loss",
        ),
        (
            UNENDED,
            BOTH,
            "1 of 4 answers do not end in a stop .*row 2, ends in '.*Yes.'",
        ),
        (
            UNENDED.replace("<|im_end|>", "\n"),
            turns("Hi", "Yes."),
            "3 of 3 answers do not end in a stop token .<.im_end.>.",
        ),
        ("{{ bos_token }}" + INSTRUCTION_TEMPLATE, BOTH, "3 rows start with .* row 1;"),
        (PLAIN, turns("Hi"), "none of 1 .*Hi.*They have no answer"),
    ],
)
def test_labels_that_would_go_silently_wrong_are_refused(
    make_tokenizer: MakeTokenizer, template: str, chat: Messages, reason: str
) -> None:
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    tokenizer = make_tokenizer(
        ("<s>",), adds_bos="{{" not in template[:2], chat_template=template, **names
    )
    fine = turns("Hi", "Yes.")
    alone = "carry loss" in reason or "none of" in reason
    chats = [chat] if alone else [fine, chat, fine]
    if template.startswith("{{ bos"):
        tokenizer.chat_template = "{{ bos_token }}" + template
    with pytest.raises(DataError, match=reason):
        mask_conversations(tokenizer, chats)


def test_a_guard_names_the_row_of_an_earlier_batch_too(tokenizer: Any) -> None:
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [{"input_ids": [bos, 5, end], "labels": [NO_LOSS, 5, end]}] * 2
    assert check_rows(tokenizer, rows, "assistant") == [3, 3]
    rows.append({"input_ids": [bos, bos, end], "labels": [NO_LOSS, NO_LOSS, end]})
    with pytest.raises(DataError, match="^1 rows .*<.im_start.> twice, .* row 43;"):
        check_rows(tokenizer, rows, "assistant", before=40)


def test_padding_with_the_token_that_ends_answers_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    same = {**CHATML, "pad_token": "<|im_end|>"}
    tokenizer = make_tokenizer(**same, chat_template=INSTRUCTION_TEMPLATE)
    with pytest.raises(DataError, match="pad and EOS are the same .*prepare_tokenizer"):
        mask_conversations(tokenizer, [turns("Hi", "Yes.")])


# many rows


def test_rows_are_cut_dropped_and_counted(tokenizer: Any) -> None:
    short, long = turns("Hi", "Yes."), turns("Hi", "yes " * 50)
    far = turns("very " * 100, "Yes.")
    chats = [short, far, long, far, short]
    masked = mask_conversations(tokenizer, chats, max_length=40)
    assert [len(row["input_ids"]) for row in masked.rows][1] == 40
    assert masked.describe_dropped() == (
        "2 of 5 conversations are left out: no answer begins within max_length "
        "(rows 2, 4)"
    )
    whole = [mask_conversation(tokenizer, chat) for chat in chats]
    ends = [len(row["labels"]) - 1 for row in whole]  # a line break is not learnt
    assert masked.ends == ends
    labels = [label for row in masked.rows for label in row["labels"]]
    fraction = sum(label != NO_LOSS for label in labels) / len(labels)
    assert masked.counts() == {
        "rows": 3,
        "dropped": 2,
        "dropped_rows": [2, 4],
        "truncated": 1,
        "supervised_fraction": fraction,
    }
    cut = mask_conversation(tokenizer, long, max_length=40)
    assert cut == {name: values[:40] for name, values in whole[2].items()}
    reason = "none of 2 .* max_length=30; .*<|im_start|>system.*raise it"
    with pytest.raises(DataError, match=reason):
        mask_conversations(tokenizer, [far, far], max_length=30)
    with pytest.raises(DataError, match="no conversations to tokenise"):
        mask_conversations(tokenizer, [])


def test_rows_may_be_read_one_by_one_and_written_to_a_file(
    tokenizer: Any, tmp_path: Path
) -> None:
    chats = [turns("Hi", f"Yes, {n}.") for n in range(600)]
    file = tmp_path / "rows.arrow"
    masked = mask_conversations(tokenizer, iter(chats), file=file)
    assert masked.rows.cache_files == [{"filename": str(file)}]
    assert list(masked.rows) == list(mask_conversations(tokenizer, chats).rows)
    assert masked.rows[599] == mask_conversation(tokenizer, chats[599])
    assert (masked.dropped, masked.truncated) == ({}, 0)


# show


def test_a_shown_row_brackets_or_underlines_exactly_what_is_learnt(
    tokenizer: Any,
) -> None:
    row = mask_conversation(tokenizer, turns("<b>Hi", "<i> & 'x'", system="S"))
    view = masking.show(tokenizer, row)
    share = sum(x != NO_LOSS for x in row["labels"]) / len(row["labels"])
    assert repr(view) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<b>Hi<|im_end|>\n"
        "<|im_start|>assistant\n[[<i> & 'x'<|im_end|>]]\n\n"
        f"[[...]] = learnt, {share:.0%} of the tokens"
    )
    before, span, rest = view._repr_html_().partition("<span ")
    assert "&lt;b&gt;Hi&lt;|im_end|&gt;" in before and "<b>" not in before
    text = rest.partition(">")[2].partition("</span>")[0]
    assert text == "&lt;i&gt; &amp; &#x27;x&#x27;&lt;|im_end|&gt;"
    assert span and "<span" not in rest
