"""Tests of masking.templates: BOS once, pad told from EOS, turns that end."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers import recipes
from helpers.config import check_config
from helpers.errors import TemplateError
from helpers.masking import templates
from helpers.masking.templates import TEMPLATES, prepare_tokenizer, render
from tests.rows import turns

MakeTokenizer = Callable[..., Any]

EXCHANGE = turns("Hi", "Hello.")
BRIEF = turns("Hi", "Hello.", system="Be brief.")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
ONE_BOS = {"special": ("<s>", "</s>"), "bos_token": "<s>", "eos_token": "</s>"}
PLAIN_TEXT = "user: Hi</s>assistant: Hello.</s>"
INSTRUCTED = "### Instruction:\nHi\n\n### Response:\nHello.</s>"
LLAMA2 = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>"
KEYS = "{% for m in messages %}{{ m.keys() | list | string }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "adds_bos", "messages", "text"),
    [
        (PLAIN, False, EXCHANGE, PLAIN_TEXT),
        (PLAIN, True, EXCHANGE, "<s>" + PLAIN_TEXT),
        ("{{ bos_token }}" + PLAIN, True, EXCHANGE, "<s>" + PLAIN_TEXT),
        (TEMPLATES["instruction"], False, BRIEF, "Be brief.\n\n" + INSTRUCTED),
        (TEMPLATES["llama-2"], True, BRIEF, LLAMA2),
        ("{{ date_string }}" + PLAIN, False, EXCHANGE, "26 Jul 2024" + PLAIN_TEXT),
        ("{{ strftime_now('%Y-%m-%d') }}", False, EXCHANGE, "2024-07-26"),
        (KEYS, False, [EXCHANGE[0] | {"weight": 0}], "['role', 'content']"),
    ],
)
def test_a_text_has_bos_once_where_there_is_one_and_a_fixed_date(
    make_tokenizer, template, adds_bos, messages, text
):
    tokenizer = make_tokenizer(**ONE_BOS, adds_bos=adds_bos, chat_template=template)
    assert render(tokenizer, messages) == text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.bos_token_id) == text.count("<s>") <= 1


@pytest.mark.parametrize("text", ["{{ raise_exception('no system') }}", "{{ 1 / 0 }}"])
def test_a_conversation_that_a_template_refuses_is_named_with_the_reason(
    make_tokenizer, text
):
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=text)
    reason = "refuses a conversation of system user assistant: (no system|division)"
    with pytest.raises(TemplateError, match=reason):
        render(tokenizer, BRIEF)


@pytest.mark.parametrize("name", ["own", *TEMPLATES, "mein [1] täglich.jinja"])
def test_a_config_may_name_a_known_template_or_a_file(
    make_tokenizer, name, tmp_path, monkeypatch
):
    monkeypatch.setattr(templates.runtime, "HOME", tmp_path)
    (tmp_path / "mein [1] täglich.jinja").write_text("\ufeff{{ 1 }}", encoding="utf-8")
    config = recipes.load("demo").model_dump() | {"template": name}
    assert check_config(config).template == name
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=PLAIN)
    prepare_tokenizer(tokenizer, name)
    texts = {"own": PLAIN, **TEMPLATES}
    assert tokenizer.chat_template == texts.get(name, "{{ 1 }}")


@pytest.mark.parametrize("name", ["lama-2", "missing.jinja", "", "."])
def test_a_template_that_is_neither_known_nor_a_file_is_refused(name):
    with pytest.raises(TemplateError, match="is not own, instruction, llama-2 or a"):
        templates.template_text(name)


def test_a_tokenizer_without_a_template_gets_the_instruction_one(
    make_tokenizer, caplog
):
    tokenizer = make_tokenizer(**ONE_BOS)
    prepare_tokenizer(tokenizer)
    assert render(tokenizer, EXCHANGE) == INSTRUCTED
    assert "no chat template" in caplog.text


PAD = "<|finetune_right_pad_id|>"
RESERVED = "<|reserved_special_token_0|>"
END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("special", "options", "wanted", "pad"),
    [
        ((), {"pad_token": END}, None, END),
        ((PAD, RESERVED), {"pad_token": "</s>"}, None, PAD),
        ((), {"unk_token": END}, None, END),
        ((RESERVED,), {}, None, RESERVED),
        ((), {"unk_token": END, "pad_token": "</s>"}, "<s>", "<s>"),
    ],
)
def test_a_pad_token_that_is_not_eos_is_kept_or_chosen(
    make_tokenizer, special, options, wanted, pad
):
    names = ONE_BOS | {"special": ("<s>", "</s>", *special)}
    tokenizer = make_tokenizer(**names, **options, chat_template=PLAIN)
    prepare_tokenizer(tokenizer, pad_token=wanted)
    assert tokenizer.pad_token == pad


@pytest.mark.parametrize("wanted", ["eos", "</s>"])
def test_eos_pads_not_even_where_it_is_asked_for(make_tokenizer, wanted, caplog):
    tokenizer = make_tokenizer(**ONE_BOS, unk_token=END, chat_template=PLAIN)
    prepare_tokenizer(tokenizer, pad_token=wanted)
    assert tokenizer.pad_token == END
    assert "would not end: another token pads" in caplog.text


def test_a_tokenizer_that_cannot_be_trained_with_is_refused_with_the_way_out(
    make_tokenizer,
):
    with pytest.raises(TemplateError, match="no EOS token; set tokenizer.eos_token"):
        prepare_tokenizer(make_tokenizer(chat_template=PLAIN))
    tokenizer = make_tokenizer(**ONE_BOS, unk_token="<s>", pad_token="</s>")
    with pytest.raises(TemplateError, match="'<pad>' is not in the vocabulary"):
        prepare_tokenizer(tokenizer, pad_token="<pad>")
    prepare_tokenizer(tokenizer)  # any special token that the template does not write
    assert tokenizer.pad_token not in ("<s>", "</s>", None)
    # none is left
    written = " ".join(map(str, tokenizer.added_tokens_decoder.values()))
    tokenizer.pad_token, tokenizer.chat_template = "</s>", f"{PLAIN}{{# {written} #}}"
    with pytest.raises(TemplateError, match="no special token but EOS can pad"):
        prepare_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (PLAIN.replace("eos_token", "'<|end|>\\n' + eos_token"), ["</s>", "<|end|>"]),
        (TEMPLATES["instruction"], ["</s>"]),
        # a header token is none
        ("{% for m in messages %}<|end|>{{ m.content }}{% endfor %}", ["</s>"]),
    ],
)
def test_the_stop_tokens_are_eos_and_what_ends_an_answer(
    make_tokenizer, template, names
):
    tokenizer = make_tokenizer(
        special=("</s>", "<|end|>"), eos_token="</s>", chat_template=template
    )
    stops = templates.stop_token_ids(tokenizer)
    assert stops == tokenizer.convert_tokens_to_ids(names)
