"""Tests of GGUF export: llama.cpp's bytes, its answers, and Ollama's Modelfile."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import chats, gguf_quants
from helpers.errors import ModelError, TemplateError
from helpers.export import gguf as export
from helpers.export.gguf import write_gguf
from helpers.inference import chat
from helpers.inference.generation import generate
from helpers.masking.templates import fix_date, render
from helpers.models import load_model
from tests.rows import turns
from tests.tiny import save_tiny_model

gguf = pytest.importorskip("gguf")
DIGESTS = json.loads(gguf_quants.DIGESTS.read_text(encoding="utf-8"))
TRL = {name: t for t in chats.trl_templates() for name in t.names}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
TALK = turns("Hi", "Hello.", "Grüße 🎉")
NOT_LLAMA_CPP = "llama.cpp's converter fails: .*"


@contextmanager
def serve(file):
    """Yields what asks llama.cpp's server on a file."""
    with chat.open_gguf(file, context=1024) as url:
        yield lambda path, **values: json.load(chat.post(url + path, values))


@pytest.fixture(scope="module")
def small_tokenizer():
    """Bytes and printable ASCII as Llama 2 has them: the converter knows the form."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<|endoftext|>"])
    names = {"unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, small_tokenizer):
    """A model as Llama-3.2 is: scaled rotations, and a template that prints a date."""
    tokenizer = chats.fit_tokenizer(small_tokenizer, TRL["trl/llama3_2"])
    tokenizer.chat_template = fix_date(tokenizer.chat_template)
    tokenizer.pad_token = "<|endoftext|>"
    shape = {"max_position_embeddings": 131072, "rope_parameters": ROPE}
    folder = tmp_path_factory.mktemp("llama32")
    return save_tiny_model("Llama", tokenizer, folder, **shape)


@pytest.fixture(scope="module")
def files(merged, tmp_path_factory):
    kinds = ["q8_0", "q4_k_m"]
    folders = write_gguf(merged, tmp_path_factory.mktemp("export"), kinds)
    return {k: f / "model.gguf" for k, f in zip(kinds, folders, strict=True)}


@pytest.fixture(scope="module")
def readers(files):
    return {kind: gguf.GGUFReader(file) for kind, file in files.items()}


def changed_copy(folder, target, name, old, new):
    shutil.copytree(folder, target)
    text = (target / name).read_text(encoding="utf-8")
    assert old in text
    (target / name).write_text(text.replace(old, new), encoding="utf-8")
    return target


def test_every_tensor_has_the_bytes_of_llama_cpps_quantiser(tokenizer, tmp_path):
    family, shape = gguf_quants.SHAPES["llama-untied-wide"]
    merged = save_tiny_model(family, tokenizer, tmp_path / "merged", **shape)
    kinds = ["q8_0", "q4_k_m"]
    folders = write_gguf(gguf_quants.fill(merged), tmp_path, kinds)
    for kind, out in zip(kinds, folders, strict=True):
        tensors, digest = gguf_quants.digest(out / "model.gguf")
        assert digest == DIGESTS["llama-untied-wide"][kind]
    heads = [tensors[name][0] for name in ("output.weight", "token_embd.weight")]
    assert heads == ["Q6_K", "Q4_K"]


def test_only_the_kinds_asked_for_stay_and_say_what_they_are(files, readers):
    folder = files["q8_0"].parent.parent
    assert {path.name for path in folder.iterdir()} == {"gguf-q8_0", "gguf-q4_k_m"}
    fields = {kind: reader.fields for kind, reader in readers.items()}
    numbers = {k: f["general.file_type"].contents() for k, f in fields.items()}
    assert numbers == {"q8_0": 7, "q4_k_m": 15}
    version = fields["q4_k_m"]["general.quantization_version"]
    assert version.contents() == 2


def test_rope_scaling_is_in_every_kind(readers):
    for reader in readers.values():
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        factors = tensors["rope_freqs.weight"]
        assert (factors.min(), factors.max()) == (1, 32)


def test_llama_cpp_prints_the_date_and_the_prompt_of_training(merged, files):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = render(tokenizer, TALK, for_generation=True)
    assert "Today Date: 26 Jul 2024" in prompt
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(TALK, **options) == prompt
    with serve(files["q4_k_m"]) as ask:
        printed = ask("/apply-template", messages=TALK)["prompt"]
    # llama.cpp adds BOS itself with this kind of tokenizer
    assert printed == prompt.removeprefix(tokenizer.bos_token)


def test_a_date_is_fixed_in_calls_and_refused_where_its_form_is_worked_out():
    assert fix_date("{{ strftime_now('%Y-%m-%d') }}") == "{{ '2024-07-26' }}"
    assert fix_date("{{ messages }}") == "{{ messages }}"
    with pytest.raises(TemplateError, match="takes no plain string"):
        fix_date("{{ strftime_now(form) }}")


def test_a_failure_leaves_the_files_of_before_and_no_others(files, merged, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = shutil.copytree(merged, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    shutil.copytree(files["q8_0"].parent, out / "gguf-q8_0")
    before = (out / "gguf-q8_0" / "model.gguf").read_bytes()
    with pytest.raises(ModelError, match="blk.1.ffn_up.weight has values beyond 16 bi"):
        write_gguf(broken, out, ["f16", "q8_0"])
    assert [path.name for path in out.iterdir()] == ["gguf-q8_0"]
    assert (out / "gguf-q8_0" / "model.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("config.json", "LlamaFor", "FancyFor", "Model FancyForCausalLM is not"),
        (
            "tokenizer.json",
            'space": false',
            'space": true',
            ".*tokenizer was not recogn",
        ),
    ],
)
def test_what_the_converter_does_not_know_is_refused_with_its_reason(
    tiny_model_folder, tmp_path, file, old, new, reason
):
    folder = changed_copy(tiny_model_folder, tmp_path / "m", file, old, new)
    with pytest.raises(ModelError, match=NOT_LLAMA_CPP + reason):
        write_gguf(folder, tmp_path / "out", ["f16"])
    assert list((tmp_path / "out").iterdir()) == []


def test_models_with_rules_of_their_own_are_not_quantised(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "qwen2moe")
    writer.add_block_count(1)
    name = "blk.0.ffn_gate_exps.weight"
    writer.add_tensor(name, np.zeros((2, 32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"q8_0: qwen2moe's {name} has rules of its"):
        export.quantise(tmp_path / "moe.gguf", tmp_path / "out.gguf", "q8_0")


def test_the_offline_models_file_answers_as_transformers_and_has_upstreams_bytes(
    tmp_path,
):
    model, tokenizer = load_model(
        "smollm2-135m-offline", engine="transformers", weights="16bit"
    )
    folder = tmp_path / "merged"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = [f / "model.gguf" for f in write_gguf(folder, tmp_path, [*export.BITS])]
    digests = [gguf_quants.digest(file)[1] for file in files]
    assert digests == [DIGESTS[gguf_quants.OFFLINE][kind] for kind in export.BITS]
    prompts = [turns(text) for text in ("What is 17 + 25?", "Name three colours.")]
    answers = generate(model, tokenizer, prompts, max_new_tokens=24)
    with serve(files[0]) as ask:
        for messages, answer in zip(prompts, answers, strict=True):
            prompt = ask("/apply-template", messages=messages)["prompt"]
            assert prompt == render(tokenizer, messages, for_generation=True)
            reply = ask("/completion", prompt=prompt, n_predict=24, temperature=0)
            assert reply["content"].strip() == answer.text
