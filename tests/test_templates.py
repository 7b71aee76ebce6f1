"""Tests of masking.templates: BOS once, pad told from EOS, turns that end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes
from helpers.config import check_config
from helpers.data import load_rows, to_conversations
from helpers.errors import TemplateError
from helpers.masking import templates
from helpers.masking.templates import FIXED_DATE, prepare_tokenizer, render
from tests.rows import turns

MakeTokenizer = Callable[..., Any]

EXCHANGE = turns("Hi", "Hello.")
BRIEF = turns("Hi", "Hello.", system="Be brief.")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
ONE_BOS = {"special": ("<s>", "</s>"), "bos_token": "<s>", "eos_token": "</s>"}
PLAIN_TEXT = "user: Hi</s>assistant: Hello.</s>"
INSTRUCTED = "### Instruction:\nHi\n\n### Response:\nHello.</s>"
LLAMA2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>"


# render


@pytest.mark.parametrize(
    ("template", "adds_bos", "messages", "text"),
    [
        (PLAIN, False, EXCHANGE, PLAIN_TEXT),
        (PLAIN, True, EXCHANGE, "<s>" + PLAIN_TEXT),
        ("{{ bos_token }}" + PLAIN, False, EXCHANGE, "<s>" + PLAIN_TEXT),
        ("{{ bos_token }}" + PLAIN, True, EXCHANGE, "<s>" + PLAIN_TEXT),
        (templates.INSTRUCTION_TEMPLATE, False, BRIEF, "Be brief.\n\n" + INSTRUCTED),
        (templates.LLAMA2_TEMPLATE, True, BRIEF, LLAMA2),
        ("{{ date_string }}" + PLAIN, False, EXCHANGE, FIXED_DATE + PLAIN_TEXT),
        ("{{ strftime_now('%Y-%m-%d') }}", False, EXCHANGE, "2024-07-26"),
        (
            "{% for m in messages %}{{ m.keys() | list | string }}{% endfor %}",
            False,
            [EXCHANGE[0] | {"weight": 0}],
            "['role', 'content']",
        ),
    ],
)
def test_a_text_has_bos_once_where_there_is_one_and_a_fixed_date(
    make_tokenizer: MakeTokenizer,
    template: str,
    adds_bos: bool,
    messages: Any,
    text: str,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, adds_bos=adds_bos, chat_template=template)
    assert render(tokenizer, messages) == text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == text.count("<s>") <= 1


def test_a_prompt_is_the_start_of_the_text_that_is_trained_on(
    tokenizer: Any, make_tokenizer: MakeTokenizer
) -> None:
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    assert render(tokenizer, BRIEF[:2], for_generation=True) == prompt
    assert render(tokenizer, BRIEF) == prompt + "Hello.<|im_end|>\n"
    for name, answer in (("instruction", "Hello.</s>"), ("llama-2", " Hello. </s>")):
        ours = make_tokenizer(**ONE_BOS, chat_template=templates.TEMPLATES[name])
        prompt = render(ours, BRIEF[:2], for_generation=True)
        assert render(ours, BRIEF) == prompt + answer


def test_llama2_rows_come_out_of_the_llama2_template_as_they_went_in(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.LLAMA2_TEMPLATE)
    rows = load_rows("data_samples/llama2_text.jsonl")
    texts = [render(tokenizer, chat) for chat in to_conversations(rows)[0]]
    assert texts == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ tools | length }}", "has no len"),
        ("{{ messages[0].content + 3 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
    ],
)
def test_a_conversation_that_a_template_refuses_is_named_with_the_reason(
    make_tokenizer: MakeTokenizer, template: str, reason: str
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    reason = f"refuses a conversation of system user assistant: .*{reason}"
    with pytest.raises(TemplateError, match=reason):
        render(tokenizer, BRIEF)


# which template


@pytest.mark.parametrize("name", ["own", *templates.TEMPLATES])
def test_a_config_may_name_each_known_template(
    make_tokenizer: MakeTokenizer, name: str
) -> None:
    config = recipes.load("demo").model_dump() | {"template": name}
    assert check_config(config).template == name
    tokenizer = make_tokenizer(
        **ONE_BOS, pad_token="<|endoftext|>", chat_template=PLAIN
    )
    assert prepare_tokenizer(tokenizer, name) == []
    assert tokenizer.chat_template == templates.TEMPLATES.get(name, PLAIN)


def test_a_config_may_name_a_file_whose_text_becomes_the_template(
    make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mein [1] täglich.jinja"
    path.write_text("\ufeff" + PLAIN, encoding="utf-8")
    config = check_config(recipes.load("demo").model_dump() | {"template": str(path)})
    tokenizer = make_tokenizer(**ONE_BOS, unk_token="<|endoftext|>")
    prepare_tokenizer(tokenizer, config.template)
    assert render(tokenizer, EXCHANGE) == PLAIN_TEXT
    monkeypatch.setattr(templates.runtime, "home", lambda: tmp_path)
    assert templates.template_text(path.name) == PLAIN
    path.write_bytes("ä".encode("cp1252"))
    with pytest.raises(TemplateError, match="jinja is not UTF-8"):
        templates.template_text(path.name)


@pytest.mark.parametrize("name", ["lama-2", "missing.jinja", "", "."])
def test_a_template_that_is_neither_known_nor_a_file_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="neither own, instruction, llama-2 nor a"):
        templates.template_text(name)


# prepare_tokenizer


PAD = "<|finetune_right_pad_id|>"
RESERVED = "<|reserved_special_token_0|>"
WAS = "pad token was {}, is {} (EOS is learnt)"


@pytest.mark.parametrize(
    ("options", "pad", "notes"),
    [
        ({"pad_token": "<|endoftext|>"}, "<|endoftext|>", []),
        (
            {"special": ("</s>", PAD), "pad_token": "</s>"},
            PAD,
            [WAS.format("</s>", PAD)],
        ),
        (
            {"unk_token": "<|endoftext|>"},
            "<|endoftext|>",
            [WAS.format(None, "<|endoftext|>")],
        ),
        ({"special": ("</s>", RESERVED)}, RESERVED, [WAS.format(None, RESERVED)]),
        (
            {"pad_token": "<|endoftext|>", "chat_template": None},
            "<|endoftext|>",
            ["no chat template: '### Instruction / ### Response' is used"],
        ),
        (
            {
                "pad_token": "<|endoftext|>",
                "chat_template": {"default": PLAIN, "tool_use": "{{ tools }}"},
            },
            "<|endoftext|>",
            ["chat template: 'default', of default, tool_use"],
        ),
    ],
)
def test_a_tokenizer_is_made_fit_to_train_with_and_each_change_noted(
    make_tokenizer: MakeTokenizer, options: Any, pad: str, notes: list[str]
) -> None:
    options = {
        "special": ("</s>",),
        "eos_token": "</s>",
        "chat_template": PLAIN,
    } | options
    template = options.pop("chat_template")
    tokenizer = make_tokenizer(**options)
    tokenizer.chat_template = template
    assert prepare_tokenizer(tokenizer) == notes
    assert tokenizer.pad_token == pad
    text = INSTRUCTED if template is None else PLAIN_TEXT
    assert render(tokenizer, EXCHANGE) == text


@pytest.mark.parametrize("pad", ["eos", "</s>", "<s>"])
def test_a_pad_token_that_is_asked_for_is_taken_unless_it_is_eos(
    make_tokenizer: MakeTokenizer, pad: str
) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, unk_token="<|endoftext|>", pad_token="</s>", chat_template=PLAIN
    )
    warning = pytest.warns(UserWarning, match="EOS would never .*endoftext.* pads")
    with warning if pad != "<s>" else contextlib.nullcontext():
        prepare_tokenizer(tokenizer, pad_token=pad)
    assert tokenizer.pad_token == (pad if pad == "<s>" else "<|endoftext|>")


def test_a_tokenizer_that_cannot_be_trained_with_is_refused_with_the_way_out(
    make_tokenizer: MakeTokenizer,
) -> None:
    with pytest.raises(TemplateError, match="no EOS token; set tokenizer.eos_token"):
        prepare_tokenizer(make_tokenizer(chat_template=PLAIN))
    tokenizer = make_tokenizer(**ONE_BOS, unk_token="<s>", pad_token="</s>")
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": "{{ tools }}"}
    with pytest.raises(TemplateError, match="2 chat templates .rag, tool_use.*='path"):
        prepare_tokenizer(tokenizer)
    # a special token that no template writes would do
    written = " ".join(map(str, tokenizer.added_tokens_decoder.values()))
    tokenizer.chat_template = f"{PLAIN}{{# {written} #}}"
    with pytest.raises(TemplateError, match="pad is EOS .</s>. and no other .*add one"):
        prepare_tokenizer(tokenizer)
    tokenizer.chat_template = PLAIN
    with pytest.raises(TemplateError, match="'<pad>' is not in the vocabulary; leave"):
        prepare_tokenizer(tokenizer, pad_token="<pad>")
    prepare_tokenizer(tokenizer)  # any special token that the template does not write
    assert tokenizer.pad_token not in ("<s>", "</s>", None)


# marks and stop tokens


def test_the_marks_of_an_answer_are_what_the_template_writes_around_it(
    tokenizer: Any, make_tokenizer: MakeTokenizer
) -> None:
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert templates.answer_marks(tokenizer) == (header, "<|im_end|>")
    template = "{% for m in messages %}{{ m.role + eos_token }}{% endfor %}"
    silent = make_tokenizer(**ONE_BOS, chat_template=template)
    with pytest.raises(TemplateError, match="not print contents .* choose a template"):
        templates.answer_marks(silent)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (PLAIN, ["</s>"]),
        (PLAIN.replace("eos_token", "'<|end|>'"), ["</s>", "<|end|>"]),
        (PLAIN.replace("eos_token", "'<|end|>\\n' + eos_token"), ["</s>", "<|end|>"]),
        (templates.INSTRUCTION_TEMPLATE, ["</s>"]),
        # a header token is none
        ("{% for m in messages %}<|end|>{{ m.content }}{% endfor %}", ["</s>"]),
    ],
)
def test_the_stop_tokens_are_eos_and_what_ends_an_answer(
    make_tokenizer: MakeTokenizer, template: str, names: list[str]
) -> None:
    tokenizer = make_tokenizer(
        special=("</s>", "<|end|>"), eos_token="</s>", chat_template=template
    )
    stops = templates.stop_token_ids(tokenizer)
    assert stops == tokenizer.convert_tokens_to_ids(names)
