"""Streamed answers, the chat page, and an exported folder that runs by itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.inference import chat, generation

Pair = tuple[Any, Any]
TURN = [{"role": "user", "content": "Count the 🎉 from 1 to 30."}]


@pytest.fixture(scope="module")
def pair(
    tiny_model_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """The tiny model with an adapter that changes its answers, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from helpers.models.load import load_model

    model, tokenizer = load_model(str(tiny_model_folder))
    torch.manual_seed(0)
    lora = LoraConfig(
        init_lora_weights=False, lora_alpha=64, target_modules="all-linear"
    )
    return get_peft_model(model, lora), tokenizer


def last(texts: Any) -> str:
    return list(texts)[-1]


def test_a_stream_has_the_tokens_of_a_batch_greedy_and_drawn(pair: Pair) -> None:
    import torch

    for sampling in ({"max_new_tokens": 40}, {"temperature": 1.2, "max_new_tokens": 9}):
        torch.manual_seed(1)
        whole = generation.generate(*pair, [TURN], sampling=sampling)[0]
        torch.manual_seed(1)
        texts = list(chat.stream_answer(*pair, TURN, sampling))
        assert texts[-1] == whole.text
        assert len(texts) == whole.tokens - whole.stopped
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_the_base_answers_where_the_adapter_is_off_and_the_adapter_afterwards(
    pair: Pair,
) -> None:
    model, tokenizer = pair
    sampling = {"max_new_tokens": 12}
    tuned = last(chat.stream_answer(*pair, TURN, sampling))
    base = last(chat.stream_answer(*pair, TURN, sampling, adapter=False))
    with model.disable_adapter():
        expected = generation.generate(*pair, [TURN], sampling=sampling)[0].text
    assert base == expected != tuned
    assert last(chat.stream_answer(*pair, TURN, sampling)) == tuned


def test_an_answer_that_is_stopped_ends_and_the_next_one_is_whole(pair: Pair) -> None:
    stop, sampling = threading.Event(), {"max_new_tokens": 1500}
    texts = chat.stream_answer(*pair, TURN, sampling, stop)
    next(texts)
    stop.set()
    start = time.monotonic()
    assert len(list(texts)) < 100 and time.monotonic() - start < 5
    assert not [t for t in threading.enumerate() if t.name.endswith("(run)")]
    assert len(list(chat.stream_answer(*pair, TURN, {"max_new_tokens": 5}))) == 5


def test_what_fails_while_generating_is_raised_to_the_caller(pair: Pair) -> None:
    with pytest.raises(ValueError, match="temperature"):
        list(chat.stream_answer(*pair, TURN, {"temperature": -1.0}))
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(ValueError, match="has 30.. tokens, the model reads 2048"):
        list(chat.stream_answer(*pair, long, {}))


def test_a_prompt_has_the_ids_of_training(make_tokenizer: Any) -> None:
    today = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ date_string }}"
    turns = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for adds_bos, head in ((True, today), (True, ""), (False, "")):
        options = {**special, "chat_template": head + turns}
        tokenizer = make_tokenizer((*special.values(),), adds_bos, **options)
        text = chat.render(tokenizer, TURN)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == generation.encode(tokenizer, TURN)
