"""The chat's real widgets with a tiny model and its adapter, without a browser."""

import copy
import gc
import html
import re
import threading
import time
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import recipes
from helpers.config import changed
from helpers.data.formats import ask
from helpers.errors import ModelError
from helpers.inference import generation
from helpers.models import load as models
from helpers.widgets import ChatForm, answer_forms
from tests.tiny import save_tiny_model

LONG = {"temperature": 2.0, "min_new_tokens": 1000, "max_new_tokens": 1000}


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    """A tiny model with an adapter; greedily, too, they say something, not the same."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("Llama", tokenizer, folder, tie_word_embeddings=False)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, tokenizer = models.load_model(str(folder))
    return get_peft_model(model, lora), tokenizer


def make_form(loaded, **inference):
    return ChatForm(*loaded, changed(recipes.load("smoke"), inference=inference))


@pytest.fixture
def form(loaded):
    return make_form(loaded, max_new_tokens=8)


def click(form, button, message):
    form.message.value = message
    form.buttons[button].click()


def begin(form):
    """Sends a message; returns when its answer, of seconds, is being written."""
    click(form, "Send", "One")
    while form.worker.is_alive() and not form.turns["tuned"]:
        time.sleep(0.01)
    assert form.turns["tuned"] and form.worker.is_alive()
    return form


def test_each_model_sees_its_own_conversation_and_the_system_prompt(form, loaded):
    form.system.value = "Be brief."
    form.send("Count to three.")
    for label, turns in form.send("And to four?").items():
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
        messages = [*ask("", "Be brief.")[:1], *turns[:-1]]
        with loaded[0].disable_adapter() if label == "base" else torch.no_grad():
            (answer,) = generation.generate(*loaded, [messages], max_new_tokens=8)
        assert turns[-1]["content"] == answer.text
    assert form.turns["base"][1] != form.turns["tuned"][1]


def test_the_first_values_are_the_configs_and_temperature_0_is_greedy(loaded):
    form = make_form(loaded, temperature=2.5, min_p=0.1, max_new_tokens=2000)
    assert [slider.value for slider in form.sliders.values()] == [2.5, 1, 2000]
    assert form.system.value == recipes.load("smoke").system_prompt
    form.sliders["max_new_tokens"].value, answers = 12, []
    for temperature in (0, 0, 2, 2):
        form.sliders["temperature"].value = temperature
        form.clear()
        answers.append(form.send("Hi")["tuned"][-1]["content"])
    assert answers[0] == answers[1] and len({*answers}) == 3


def test_stop_keeps_what_was_written_and_leaves_nothing_running(loaded):
    threads = threading.active_count()
    form = begin(make_form(loaded, **LONG))
    form.buttons["Stop"].click()
    assert threading.active_count() <= threads
    text = html.unescape(form.columns["tuned"].value)
    assert form.turns["tuned"][-1]["content"] in text
    tokens, speed = re.findall(r"(\d+) tokens, ([\d.]+) tokens/s", text)[0]
    assert 0 < int(tokens) < 1000 and float(speed) > 0
    assert form.turns["base"] == []


def test_a_second_message_is_refused_while_an_answer_is_written(loaded):
    form = begin(make_form(loaded, **LONG))
    click(form, "Send", "Two")
    assert "an answer is being written" in form.status.value
    assert form.message.value == "Two"
    form.stop()
    assert [turn["content"] for turn in form.turns["tuned"][::2]] == ["One"]


def test_a_new_conversation_stops_the_answer_and_forgets_the_old(loaded):
    form = begin(make_form(loaded, **LONG))
    form.buttons["New conversation"].click()
    assert not form.worker.is_alive() and not any(form.turns.values())
    assert "One" not in form.columns["tuned"].value


def test_a_message_that_is_too_long_is_one_sentence_and_comes_back(form):
    message = "word " * 3000
    with pytest.raises(ModelError, match="conversation has .* 2048 at most"):
        form.send(message)
    assert "2048 at most" in form.status.value and form.message.value == message
    assert [len(turns) for turns in form.send("Hi").values()] == [2, 2]
    assert "at most" not in form.status.value


def test_too_little_memory_is_said_with_a_remedy(form, loaded, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(loaded[0], "generate", fail)
    click(form, "Send", "Hi")
    form.worker.join()
    assert "CUDA out of memory; lower max_new_tokens, or" in form.status.value
    assert form.message.value == "Hi" and form.turns["tuned"] == []


def test_what_is_written_by_user_and_model_is_never_markup(form, monkeypatch):
    bad = "<img src=x onerror=alert(1)></div><script>1</script> {0} **a**"
    monkeypatch.setattr(answer_forms, "stream_answer", lambda *_, **__: iter([bad]))
    form.send(bad)
    for column in form.columns.values():
        assert column.value.count(html.escape(bad)) == 2
        assert "<img" not in column.value and "<script" not in column.value


def test_the_tuned_model_alone_is_asked_and_shown(form):
    form.alone.value = True
    assert form.columns["base"].layout.display == "none"
    assert [len(turns) for turns in form.send("Hi").values()] == [0, 2]
    form.alone.value = False
    assert form.columns["base"].layout.display == "flex"


def test_a_new_form_stops_the_one_of_before_and_lets_its_model_go(loaded):
    former = begin(make_form(copy.deepcopy(loaded), **LONG))
    model = weakref.ref(former.model)
    make_form(loaded)
    gc.collect()
    assert model() is None and not former.worker.is_alive()


def test_a_model_without_an_adapter_is_refused(loaded):
    with pytest.raises(ModelError, match="no adapter: give `load_model`"):
        make_form((loaded[0].get_base_model(), loaded[1]))
