"""The chat's real widgets with a tiny model and its adapter, without a browser."""

from __future__ import annotations

import gc
import html
import re
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import recipes
from helpers.config import RunConfig, changed
from helpers.data.formats import ask
from helpers.errors import ModelError
from helpers.inference import generation
from helpers.models import load as models
from helpers.widgets import ChatForm, chat_form
from tests.tiny import save_tiny_model

LONG = {"temperature": 2.0, "min_new_tokens": 1000, "max_new_tokens": 1000}


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that also says something greedily: its head is its own."""
    options = {"tie_word_embeddings": False, "max_position_embeddings": 2048}
    return save_tiny_model("Llama", tokenizer, tmp_path_factory.mktemp("m"), **options)


def load(folder: Path) -> tuple[Any, Any]:
    """The tiny model with an adapter that answers otherwise than the base."""
    torch.manual_seed(0)
    model, tokenizer = models.load_model(str(folder))
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, lora), tokenizer


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(folder)


def config(**inference: Any) -> RunConfig:
    return changed(recipes.load("smoke"), inference=inference)


@pytest.fixture
def form(loaded: Any) -> ChatForm:
    return ChatForm(*loaded, config(max_new_tokens=8))


@pytest.fixture
def slow(loaded: Any) -> ChatForm:
    """A form whose answers take seconds unless they are stopped."""
    return ChatForm(*loaded, config(**LONG))


def click(form: ChatForm, button: str, message: str = "") -> None:
    if message:
        form.message.value = message
    form.buttons[button].click()


def wait_for_text(form: ChatForm) -> None:
    deadline = time.monotonic() + 60
    while not form.turns["tuned"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert form.turns["tuned"] and form.worker.is_alive()


def test_both_models_see_their_own_conversation_and_the_system_prompt(
    form: ChatForm, loaded: Any
) -> None:
    form.system.value = "Be brief."
    form.send("Count to three.")
    turns = form.send("And to four?")
    for label, conversation in turns.items():
        assert [t["role"] for t in conversation] == ["user", "assistant"] * 2
        messages = [*ask("", "Be brief.")[:1], *conversation[:-1]]
        with loaded[0].disable_adapter() if label == "base" else torch.no_grad():
            (answer,) = generation.generate(*loaded, [messages], max_new_tokens=8)
        assert conversation[-1]["content"] == answer.text
    assert turns["base"][1] != turns["tuned"][1]


def test_the_first_values_are_the_configs_and_temperature_0_is_greedy(
    loaded: Any,
) -> None:
    form = ChatForm(*loaded, config(temperature=2.5, min_p=0.1, max_new_tokens=2000))
    values = [slider.value for slider in form.sliders.values()]
    assert values == [2.5, 1, 2000]
    assert form.system.value == recipes.load("smoke").system_prompt
    form.sliders["max_new_tokens"].value, answers = 12, []
    for temperature in (0, 0, 2, 2):
        form.sliders["temperature"].value = temperature
        form.clear()
        answers.append(form.send("Hi")["tuned"][-1]["content"])
    assert answers[0] == answers[1]
    assert len({*answers}) == 3


def test_send_leaves_the_kernel_free_and_stop_keeps_what_was_written(
    slow: ChatForm,
) -> None:
    threads = threading.active_count()
    click(slow, "Send", "Go on for ever.")
    wait_for_text(slow)
    click(slow, "Stop")
    assert threading.active_count() <= threads
    written = slow.turns["tuned"][-1]["content"]
    assert 0 < len(written) and html.escape(written) in slow.columns["tuned"].value
    tokens, speed = re.findall(
        r"(\d+) tokens, ([\d.]+) tok", slow.columns["tuned"].value
    )[0]
    assert 0 < int(tokens) < 1000 and float(speed) > 0
    assert slow.turns["base"] == []
    slow.sliders["temperature"].value, slow.sliders["max_new_tokens"].value = 0, 2
    assert len(slow.send("Again")["tuned"]) == 4


def test_a_second_message_is_refused_while_an_answer_is_written(slow: ChatForm) -> None:
    click(slow, "Send", "One")
    wait_for_text(slow)
    click(slow, "Send", "Two")
    assert "an answer is being written" in slow.status.value
    assert slow.message.value == "Two"
    click(slow, "Stop")
    assert [turn["content"] for turn in slow.turns["tuned"][::2]] == ["One"]


def test_a_new_conversation_stops_the_answer_and_forgets_the_old(
    slow: ChatForm,
) -> None:
    click(slow, "Send", "One")
    wait_for_text(slow)
    click(slow, "New conversation")
    assert not slow.worker.is_alive()
    assert slow.turns == {"base": [], "tuned": []}
    assert "One" not in slow.columns["tuned"].value


def test_a_message_that_is_too_long_is_one_sentence_and_comes_back(
    form: ChatForm,
) -> None:
    form.send("Hi")
    message = "word " * 3000
    with pytest.raises(ModelError, match="conversation has .* 2048 at most"):
        form.send(message)
    assert "2048 at most" in form.status.value
    assert form.message.value == message
    assert [len(turns) for turns in form.turns.values()] == [2, 2]
    assert [len(turns) for turns in form.send("Hi").values()] == [4, 4]
    assert "at most" not in form.status.value


def test_too_little_memory_is_said_with_a_remedy_and_the_form_goes_on(
    form: ChatForm, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "generate", fail)
        click(form, "Send", "Hi")
        form.worker.join()
    assert "CUDA out of memory; lower max_new_tokens, or" in form.status.value
    assert "Tried" not in form.status.value
    assert form.message.value == "Hi" and form.turns["tuned"] == []
    click(form, "Send")
    form.worker.join()
    assert len(form.turns["base"]) == len(form.turns["tuned"]) == 2


def test_what_is_written_by_user_and_model_is_never_markup(
    form: ChatForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = "<img src=x onerror=alert(1)></div><script>1</script> {0} **a**"
    monkeypatch.setattr(chat_form, "stream_answer", lambda *_, **__: iter([bad]))
    form.send(bad)
    for column in form.columns.values():
        assert column.value.count(html.escape(bad)) == 2
        assert "<img" not in column.value and "<script" not in column.value


def test_the_tuned_model_alone_is_asked_and_shown(form: ChatForm) -> None:
    form.alone.value = True
    assert form.columns["base"].layout.display == "none"
    assert [len(turns) for turns in form.send("Hi").values()] == [0, 2]
    form.alone.value = False
    assert form.columns["base"].layout.display == "flex"
    assert [len(turns) for turns in form.send("Hi").values()] == [2, 4]


def test_a_new_form_stops_the_one_of_before_and_lets_its_model_go(folder: Path) -> None:
    former = ChatForm(*load(folder), config(**LONG))
    model = weakref.ref(former.model)
    click(former, "Send", "Go on for ever.")
    wait_for_text(former)
    ChatForm(*load(folder), config())
    gc.collect()
    assert model() is None
    assert not former.worker.is_alive()


def test_a_model_without_an_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="no adapter: give `load_model`"):
        ChatForm(*models.load_model(str(folder)), config())
