"""Tests of helpers.masking.templates: BOS once, pad told from EOS, turns that end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes
from helpers.config import check_config
from helpers.data import preparation as data
from helpers.errors import TemplateError
from helpers.masking import templates
from helpers.masking.templates import FIXED_DATE, render

MakeTokenizer = Callable[..., Any]

EXCHANGE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
ONE_BOS = {"special": ("<s>", "</s>"), "bos_token": "<s>", "eos_token": "</s>"}


def ids_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids


def test_the_offline_template_renders_as_the_model_was_trained(tokenizer: Any) -> None:
    assert render(tokenizer, SYSTEM + EXCHANGE) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )


def test_a_prompt_for_generation_ends_in_the_assistants_header(tokenizer: Any) -> None:
    prompt = render(tokenizer, SYSTEM + EXCHANGE[:1], for_generation=True)
    assert prompt.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_the_offline_tokens_start_with_bos_once(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, EXCHANGE)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id


def test_a_bos_that_the_tokenizer_adds_is_put_before_a_template_without(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, adds_bos=True, chat_template=PLAIN)
    text = render(tokenizer, EXCHANGE)
    assert text == "<s>user: Hi</s>assistant: Hello.</s>"
    assert ids_of(tokenizer, EXCHANGE) == tokenizer(text.removeprefix("<s>")).input_ids


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_bos_that_the_template_writes_is_not_doubled(
    make_tokenizer: MakeTokenizer, adds_bos: bool
) -> None:
    template = "{{ bos_token }}" + PLAIN
    tokenizer = make_tokenizer(**ONE_BOS, adds_bos=adds_bos, chat_template=template)
    assert ids_of(tokenizer, EXCHANGE).count(tokenizer.bos_token_id) == 1


def test_no_bos_is_made_up_where_neither_tokenizer_nor_template_has_one(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=PLAIN)
    assert tokenizer.bos_token_id not in ids_of(tokenizer, EXCHANGE)


def test_a_tokenizer_without_bos_renders_the_template_alone(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(special=("</s>",), eos_token="</s>", chat_template=PLAIN)
    assert render(tokenizer, EXCHANGE) == "user: Hi</s>assistant: Hello.</s>"


def test_a_conversation_that_a_template_refuses_is_named_with_the_reason(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    with pytest.raises(
        TemplateError, match="refuses .* system user assistant: System role not supp"
    ):
        render(tokenizer, SYSTEM + EXCHANGE)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ tools | length }}", "has no len"),
        ("{{ messages[0].content + 3 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
    ],
)
def test_what_python_raises_inside_a_template_is_one_sentence(
    make_tokenizer: Any, template: str, reason: str
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    with pytest.raises(
        TemplateError, match=f"refuses a conversation of user: .*{reason}"
    ):
        render(tokenizer, [{"role": "user", "content": "Hi"}])


def test_a_template_is_looked_for_where_the_runs_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates.runtime, "home", lambda: tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert templates.template_text("mine.jinja") == "{{ messages }}"
    with pytest.raises(TemplateError, match=str(tmp_path)):
        templates.template_text("yours.jinja")


def test_a_template_that_asks_for_the_day_gets_a_fixed_one(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}"
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    assert render(tokenizer, EXCHANGE) == "2024-07-26"


def test_a_template_that_prints_the_date_prints_a_fixed_one(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "Today is {{ date_string }}. " + PLAIN
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    assert render(tokenizer, EXCHANGE).startswith(f"Today is {FIXED_DATE}. user: Hi")


# prepare_tokenizer


def test_the_offline_tokenizer_needs_no_change(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=PLAIN,
    )
    assert templates.prepare_tokenizer(tokenizer) == []
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_pad_that_is_eos_is_changed_with_a_note(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        special=("</s>", "<|finetune_right_pad_id|>"),
        eos_token="</s>",
        pad_token="</s>",
        chat_template=PLAIN,
    )
    notes = templates.prepare_tokenizer(tokenizer)
    assert notes == ["pad token was </s>, is <|finetune_right_pad_id|> (EOS is learnt)"]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_missing_pad_becomes_the_unknown_token_where_none_is_called_pad(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, unk_token="<|endoftext|>", chat_template=PLAIN
    )
    notes = templates.prepare_tokenizer(tokenizer)
    assert notes == ["pad token was None, is <|endoftext|> (EOS is learnt)"]


def test_a_reserved_token_pads_where_there_is_neither_pad_nor_unknown(
    make_tokenizer: MakeTokenizer,
) -> None:
    name = "<|reserved_special_token_0|>"
    tokenizer = make_tokenizer(
        special=("</s>", name), eos_token="</s>", chat_template=PLAIN
    )
    templates.prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == name


def test_the_bos_token_is_not_taken_to_pad_with(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, unk_token="<s>", pad_token="</s>", chat_template=PLAIN
    )
    # a special token that no template writes would do
    written = " ".join(map(str, tokenizer.added_tokens_decoder.values()))
    tokenizer.chat_template = f"{PLAIN}{{# {written} #}}"
    with pytest.raises(TemplateError, match="pad is EOS .</s>. and no other .*add one"):
        templates.prepare_tokenizer(tokenizer)


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(TemplateError, match="no EOS token; set tokenizer.eos_token"):
        templates.prepare_tokenizer(make_tokenizer(chat_template=PLAIN))


def test_a_missing_template_becomes_the_instruction_one_with_a_note(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, unk_token="<|endoftext|>")
    notes = templates.prepare_tokenizer(tokenizer)
    assert notes[0] == "no chat template: '### Instruction / ### Response' is used"
    assert render(tokenizer, SYSTEM + EXCHANGE) == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>"
    )


def test_the_instruction_template_opens_an_answer_as_it_will_be_generated(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.INSTRUCTION_TEMPLATE)
    prompt = render(tokenizer, EXCHANGE[:1], for_generation=True)
    assert render(tokenizer, EXCHANGE) == prompt + "Hello.</s>"


def test_the_instruction_template_has_dollys_three_blocks(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.INSTRUCTION_TEMPLATE)
    row = {"instruction": "When?", "context": "At ten.", "response": "Ten."}
    assert render(tokenizer, data.to_conversations([row])[0][0]) == (
        "### Instruction:\nWhen?\n\n### Context:\nAt ten.\n\n### Response:\nTen.</s>"
    )


def test_the_instruction_template_has_two_blocks_where_dolly_has_no_context(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.INSTRUCTION_TEMPLATE)
    row = {"instruction": "When?", "context": "", "response": "Ten."}
    assert render(tokenizer, data.to_conversations([row])[0][0]) == (
        "### Instruction:\nWhen?\n\n### Response:\nTen.</s>"
    )


def test_llama2_rows_come_out_of_the_llama2_template_as_they_went_in(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.LLAMA2_TEMPLATE)
    rows = data.load_rows("data_samples/llama2_text.jsonl")
    conversations = data.to_conversations(rows)[0]
    assert [render(tokenizer, messages) for messages in conversations] == (
        [row["text"] for row in rows]
    )


def test_the_llama2_template_opens_an_answer_as_it_will_be_generated(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.LLAMA2_TEMPLATE)
    prompt = render(tokenizer, SYSTEM + EXCHANGE[:1], for_generation=True)
    assert prompt == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert render(tokenizer, SYSTEM + EXCHANGE) == prompt + " Hello. </s>"


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_a_template_of_ours_takes_the_place_of_the_tokenizers_own(
    make_tokenizer: MakeTokenizer, name: str
) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, pad_token="<|endoftext|>", chat_template=PLAIN
    )
    assert templates.prepare_tokenizer(tokenizer, name) == []
    assert tokenizer.chat_template == templates.TEMPLATES[name]


@pytest.mark.parametrize("name", ["own", *templates.TEMPLATES])
def test_a_config_may_name_each_known_template(name: str) -> None:
    config = recipes.load("demo").model_dump() | {"template": name}
    assert check_config(config).template == name
    assert templates.template_text(name) == templates.TEMPLATES.get(name)


def test_a_config_may_name_a_file_whose_text_becomes_the_template(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "mein [1] täglich.jinja"
    path.write_text("\ufeff" + PLAIN, encoding="utf-8")
    config = check_config(recipes.load("demo").model_dump() | {"template": str(path)})
    assert templates.template_text(config.template) == PLAIN
    tokenizer = make_tokenizer(**ONE_BOS, unk_token="<|endoftext|>")
    templates.prepare_tokenizer(tokenizer, config.template)
    assert render(tokenizer, EXCHANGE) == "user: Hi</s>assistant: Hello.</s>"


@pytest.mark.parametrize("name", ["lama-2", "missing.jinja", "", "."])
def test_a_template_that_is_neither_known_nor_a_file_is_refused(name: str) -> None:
    with pytest.raises(TemplateError, match="neither own, instruction, llama-2 nor a"):
        templates.template_text(name)


def test_a_template_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.jinja"
    path.write_bytes("ä".encode("cp1252"))
    with pytest.raises(TemplateError, match="old.jinja is not UTF-8"):
        templates.template_text(str(path))


def test_the_default_of_several_templates_is_taken_with_a_note(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, pad_token="<|endoftext|>")
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools }}"}
    notes = templates.prepare_tokenizer(tokenizer)
    assert notes == ["chat template: 'default', of default, tool_use"]
    assert tokenizer.chat_template == PLAIN


def test_several_templates_without_a_default_are_refused_with_the_way_out(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, pad_token="<|endoftext|>")
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": "{{ tools }}"}
    with pytest.raises(TemplateError, match="2 chat templates .rag, tool_use.*='path"):
        templates.prepare_tokenizer(tokenizer)
    templates.prepare_tokenizer(tokenizer, "instruction")
    assert tokenizer.chat_template == templates.INSTRUCTION_TEMPLATE


@pytest.mark.parametrize("asked", ["eos", "</s>"])
def test_padding_with_eos_is_refused_in_words_and_another_token_taken(
    make_tokenizer: MakeTokenizer, asked: str
) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, unk_token="<|endoftext|>", pad_token="</s>", chat_template=PLAIN
    )
    with pytest.warns(
        UserWarning, match="EOS would never be learnt .*endoftext.* pads"
    ):
        templates.prepare_tokenizer(tokenizer, pad_token=asked)
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_pad_token_of_the_vocabulary_is_taken(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, pad_token="<|endoftext|>", chat_template=PLAIN
    )
    assert templates.prepare_tokenizer(tokenizer, pad_token="<s>") == []
    assert tokenizer.pad_token == "<s>"


def test_a_pad_token_outside_the_vocabulary_is_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        **ONE_BOS, unk_token="<|endoftext|>", chat_template=PLAIN
    )
    with pytest.raises(TemplateError, match="'<pad>' is not in .* '<.endoftext.>', or"):
        templates.prepare_tokenizer(tokenizer, pad_token="<pad>")


# answer_marks


def test_an_answers_marks_are_what_the_template_writes_around_it(
    tokenizer: Any,
) -> None:
    assert templates.answer_marks(tokenizer) == (
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    )


def test_a_template_that_prints_no_text_has_no_marks(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = "{% for m in messages %}{{ m.role + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=template)
    with pytest.raises(TemplateError, match="not print contents .* choose a template"):
        templates.answer_marks(tokenizer)


# stop_token_ids


def test_the_offline_model_stops_at_the_end_of_a_turn(tokenizer: Any) -> None:
    assert templates.stop_token_ids(tokenizer) == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]


def test_a_turn_that_does_not_end_in_eos_adds_its_own_stop_token(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        special=("<|end_of_text|>", "<|eot_id|>"),
        eos_token="<|end_of_text|>",
        chat_template=PLAIN.replace("eos_token", "'<|eot_id|>'"),
    )
    names = ["<|end_of_text|>", "<|eot_id|>"]
    assert templates.stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(names)


def test_a_header_token_is_no_stop_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        special=("</s>", "<|header|>"),
        eos_token="</s>",
        chat_template="{% for m in messages %}<|header|>{{ m.content }}{% endfor %}",
    )
    assert templates.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_the_instruction_template_ends_turns_with_eos(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(**ONE_BOS, chat_template=templates.INSTRUCTION_TEMPLATE)
    assert templates.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    assert render(tokenizer, EXCHANGE).endswith("</s>")


def test_each_token_that_ends_a_turn_is_a_stop_token(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(
        special=("</s>", "<|end|>"),
        eos_token="</s>",
        chat_template=PLAIN.replace("eos_token", "'<|end|>\\n' + eos_token"),
    )
    names = ["</s>", "<|end|>"]
    assert templates.stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(names)


def test_a_special_token_that_the_template_does_not_write_can_pad(
    make_tokenizer: Any,
) -> None:
    from helpers.masking.templates import find_pad_token

    tokenizer = make_tokenizer(bos_token="<|im_start|>", eos_token="<|endoftext|>")
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    token = find_pad_token(tokenizer)
    assert token not in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert token in tokenizer.get_vocab()
