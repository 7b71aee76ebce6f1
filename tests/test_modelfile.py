"""Tests of Ollama's Modelfile: its template prints what the model was trained on."""

import hashlib

import pytest

from benchmarks import chats
from helpers.errors import ModelError
from helpers.export.gguf import render_modelfile, write_modelfile
from helpers.masking.templates import TEMPLATES, render
from tests.rows import turns

BRIEF = 'Be "brief".\nBe kind {{ x }}.'
TALK = turns("Hi {{ .Role }}", 'So "x" }}\n\n`y` \\', "Grüße 🎉 {%s}")
LAST = (
    "{% for m in messages if m.role != 'system' %}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% endif %}{{ m.content + eos_token }}{% endfor %}"
)
# Of what Go's own text/template prints (1.27) for TALK, with BRIEF and without.
DIGESTS = {
    "own": "b6b785e320e5",
    "instruction": "e329e132e298",
    "llama-2": "204bf1eee210",
    "trl/llama3": "bdf181cdfcff",
    "trl/llama3_2": "ee5a09f74fd2",
    "trl/gemma": "dcf635a08676",
    "trl/gemma3": "dcf635a08676",
    "trl/qwen2_5": "e9efd14fb04f",
    "trl/qwen3": "1d749ea47423",
    "trl/phi3": "ce1fb6e3151c",
    "trl/cohere": "caae1356e42a",
    "trl/gptoss": "1b238ab90c40",
}


def fit(tokenizer, name):
    """Returns a tokenizer with a template of trl, of ours, or a text."""
    known = {n: t for t in chats.trl_templates() for n in t.names}
    text = tokenizer.chat_template if name == "own" else TEMPLATES.get(name, name)
    stop = "<|im_end|>" if name == "own" else "</s>"
    template = known.get(name) or chats.Template([name], text, stop)
    return chats.fit_tokenizer(tokenizer, template)


@pytest.mark.parametrize("name", DIGESTS)
def test_ollama_renders_the_prompt_of_training(name, tokenizer, tmp_path):
    tokenizer = fit(tokenizer, name)
    greedy = {"do_sample": False, "temperature": 0.7}
    write_modelfile(tmp_path, tokenizer, system="", sampling=greedy)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "PARAMETER temperature 0\n" in text and '\nSYSTEM "' not in text
    printed = [render_modelfile(text, TALK)]
    assert printed[0] == render(tokenizer, TALK, for_generation=True)
    messages = [{"role": "system", "content": BRIEF}, *TALK]
    printed.append(render_modelfile(text, messages))
    if name != "trl/gemma":  # takes no system turn
        assert printed[1] == render(tokenizer, messages, for_generation=True)
    digest = hashlib.sha256("\0".join(printed).encode()).hexdigest()
    assert digest[:12] == DIGESTS[name]


def test_a_modelfile_has_template_system_stops_and_every_parameter(tokenizer, tmp_path):
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 128}
    write_modelfile(tmp_path, tokenizer, system=BRIEF, sampling=sampling)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- range ')
    assert text.endswith(
        f'{{{{- end }}}}"""\nSYSTEM """{BRIEF}"""\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\nPARAMETER top_k 50\n"
        "PARAMETER min_p 0\nPARAMETER repeat_penalty 1\nPARAMETER num_predict 128\n"
    )
    start = "<|im_start|>system\n" + BRIEF + "<|im_end|>\n<|im_start|>user\nHi"
    assert render_modelfile(text, TALK).startswith(start)


def test_bos_is_left_to_llama_cpp_where_it_adds_it(make_tokenizer, tmp_path):
    special = {"special": ("<s>", "</s>"), "bos_token": "<s>", "eos_token": "</s>"}
    template = {"chat_template": TEMPLATES["llama-2"]}
    starts = []
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(**special, **template, adds_bos=adds_bos)
        write_modelfile(tmp_path, tokenizer, system="", sampling={})
        text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
        starts.append(render_modelfile(text, TALK)[:9])
        assert render_modelfile(text, TALK).count("<s>") == 2 - adds_bos
    assert starts == ["[INST] Hi", "<s>[INST]"]


@pytest.mark.parametrize(
    ("system", "sampling", "template", "error"),
    [
        ("", {"num_beams": 4}, "own", "llama.cpp has no num_beams"),
        ('Say """\nx', {}, "own", "does more than put texts around contents"),
        ("", {}, LAST, "does more than put texts around contents"),
        ("Brief.", {}, "trl/gemma", "refuses .*system user assistant|System role not"),
    ],
)
def test_no_modelfile_is_written_rather_than_a_wrong_one(
    system, sampling, template, error, tokenizer, tmp_path
):
    tokenizer = fit(tokenizer, template)
    with pytest.raises(ValueError, match=error):
        write_modelfile(tmp_path, tokenizer, system=system, sampling=sampling)
    assert list(tmp_path.iterdir()) == []


def test_a_modelfile_with_another_template_is_not_rendered():
    with pytest.raises(ModelError, match="template is another one: write it again"):
        render_modelfile('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\n', TALK)
