"""Export: files that answer as the trained model does, without this project too."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import export, files, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError, ModelError
from helpers.export import formats
from helpers.inference import chat
from helpers.masking import templates
from helpers.models.load import OFFLINE, find_model
from helpers.runs import Run

SFT_ONLY = {
    "stages": ["sft"],
    "data__train": ["data_samples/llama2_text.jsonl"],
    "data__eval": None,
    "data__problems": None,
    "data__test": None,
    "data__test_new": None,
    "data__general": None,
    "best_by": "loss",
    "template": "llama-2",
    "sft": {"max_steps": 2, "learning_rate": 5e-3},
    "evaluation__max_new_tokens": 6,
}


@pytest.mark.parametrize("weights", ["16bit", "4bit", "8bit"])
def test_adapter_and_merged_model_answer_as_trained(run_factory, weights):
    run = run_factory(
        weights=weights,
        sft__max_steps=3,
        sft__eval_steps=3,
        sft__learning_rate=5e-3,
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    stages.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=6)
    for name in ("adapter", "merged"):
        assert part[name]["faults"] == [] and part[name]["stage"] == "sft"
        assert part[name]["tokens_agree"] >= (1.0 if weights == "16bit" else 0.9)
        limits = {"16bit": 1e-4, "4bit": 2e-2, "8bit": 0.1}  # of the largest logit
        off = part[name]["reloaded"]
        assert off["difference"] <= limits[weights] * off["logits"]
    merged = Path(part["merged"]["path"])
    assert (merged / "chat_template.jinja").exists()
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert run.report()["export"] == part


def test_a_run_of_sft_alone_is_exported_with_its_template(run_factory):
    run = run_factory(**SFT_ONLY)
    stages.train_stage(run, "sft")
    part = export.export(run, prompts=3)
    assert part["merged"]["prompts_equal"] == {"k": 3, "n": 3}
    assert part["merged"]["tokens_agree"] == 1.0
    template = Path(part["merged"]["path"]) / "chat_template.jinja"
    assert "[INST]" in template.read_text()


def test_what_a_base_like_model_becomes_stops_by_itself_in_plain_transformers(
    run_factory, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(find_model(OFFLINE), base)
    edits = {  # another EOS than the one that its template writes
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }
    for name, values in edits.items():
        file = base / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    run = run_factory(
        **SFT_ONLY
        | {
            "model": str(base),
            "template": "own",
            "sft": {"max_steps": 1, "learning_rate": 1e-5},
            "data__train": ["data_samples/openai_messages.jsonl"],
            "evaluation__max_new_tokens": 48,
        }
    )
    stages.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=3)
    assert part["trained"]["stop_rate"] > 0
    for name in ("adapter", "merged"):
        assert part[name]["stop_rate"] == part["trained"]["stop_rate"]
        assert part[name]["tokens_agree"] == 1.0
    merged = Path(part["merged"]["path"])
    settings = json.loads((merged / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"


@pytest.fixture
def trained(run_factory):
    """A run after SFT, with short answers."""
    run = run_factory(evaluation__max_new_tokens=4, stages=["sft"], sft__max_steps=2)
    stages.train_stage(run, "sft")
    return run


def test_four_bits_load_in_plain_transformers_and_leave_other_formats_alone(trained):
    merged = export.export(trained, formats=["merged"], prompts=2)["merged"]
    part = export.export(trained, formats=["w4a16"], prompts=2)
    assert part["merged"] == merged and part["w4a16"]["faults"] == []
    settings = json.loads(Path(part["w4a16"]["path"], "config.json").read_text())
    weights = settings["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (4, 64)
    # the merged model for it was another copy
    assert {f.name for f in (trained.path / "export").iterdir()} == {"merged", "w4a16"}
    assert trained.report()["export"] == part


PINS_NOTHING = """
import json, sys, torch
from helpers.export.formats import write_4bit

torch.Tensor.pin_memory = lambda tensor, *_: tensor  # needs a GPU
write_4bit(*json.loads(sys.argv[1]))
"""


def test_awq_is_calibrated_with_the_rows_of_training(trained, tmp_path, run_python):
    tokenizer = formats.merge(
        trained.config, trained.path / "sft" / "adapter", tmp_path / "merged"
    )
    ids, longest = (
        formats.training_ids(trained, tokenizer, 2),
        trained.config.max_length,
    )
    text = tokenizer.decode(sum(ids, []))
    rows = files.read_rows(trained.path / "data" / "train.jsonl")
    shown = [row["messages"][-1]["content"][:20] in text for row in rows]
    assert shown == [True, True, *[False] * (len(rows) - 2)]
    assert {len(block) for block in ids[:-1]} <= {longest} and len(ids[-1]) <= longest
    paths = str(tmp_path / "merged"), str(tmp_path / "awq")
    request = json.dumps([*paths, True, ids])
    run_python("-c", PINS_NOTHING, request)
    recipe = (tmp_path / "awq" / "recipe.yaml").read_text()
    assert "AWQModifier" in recipe and "GPTQModifier" in recipe


def test_a_run_of_grpo_alone_calibrates_with_solved_problems(run_factory, tokenizer):
    run = run_factory(stages=["grpo"], data__train=[], data__eval=None)
    data.prepare(run)
    text = tokenizer.decode(formats.training_ids(run, tokenizer, 1)[0])
    assert run.config.system_prompt in text and "####" in text.partition("assistant")[2]


def test_a_file_with_faults_is_reported_and_stays(trained, monkeypatch):
    monkeypatch.setattr(templates, "fix_date", lambda text: text + "{{ ' ' }}")
    with pytest.raises(ModelError, match="merged: "):
        export.export(trained, formats=["merged"], prompts=2)
    assert trained.report()["export"]["merged"]["faults"]
    assert (trained.path / "export" / "merged" / "README.md").exists()


def test_a_space_has_the_page_its_settings_and_the_smallest_sound_gguf(trained):
    part = export.export(trained, formats=["space", "gguf:f16"], prompts=2)
    folder = Path(part["space"]["path"])
    assert (folder / "app.py").read_bytes() == Path(chat.__file__).read_bytes()
    model = Path(part["gguf:f16"]["path"], "model.gguf")
    assert (folder / "model.gguf").read_bytes() == model.read_bytes()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model"] == "model.gguf" and settings["title"] == "test"
    text, pins = ((folder / n).read_text() for n in ("README.md", "requirements.txt"))
    version = text.partition("sdk_version: ")[2].split()[0]
    assert "sdk: gradio" in text and f"gradio=={version}" in pins


def test_other_programs_print_the_bos_and_the_date_of_training(
    make_tokenizer, monkeypatch, run
):
    from transformers import GenerationConfig

    template = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}{{ eos_token }}"
    template += "{% if messages[1:] %}{{ messages[1].content + eos_token }}{% endif %}"
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = make_tokenizer(adds_bos=True, chat_template=template, **tokens)
    tokenizer.pad_token = "<|endoftext|>"
    turns = [{"role": "user", "content": "Hi"}]
    expected = templates.render(tokenizer, turns)
    monkeypatch.setattr(formats.load, "load_tokenizer", lambda *_, **__: tokenizer)
    plain = formats.plain_tokenizer(run.config, GenerationConfig())
    assert plain.apply_chat_template(turns, tokenize=False) == expected
    assert expected.startswith("<|im_start|>26 Jul 2024")


def test_a_bases_tokenizer_model_and_settings_go_into_the_exported_folders(
    trained, tiny_model_folder, tmp_path
):
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    # as some models have them: transformers itself would not save them again
    settings = json.dumps({"temperature": 0.9, "top_p": 0.6})
    (base / "generation_config.json").write_text(settings)
    run = Run(trained.path, changed(trained.config, model=str(base)))
    names = ("adapter", "merged")
    paths = {name: trained.path / "export" / name for name in names}
    formats.write_files(run, trained.path / "sft" / "adapter", paths)
    assert (paths["merged"] / "tokenizer.model").read_bytes() == b"pieces"
    for path in paths.values():
        values = json.loads((path / "generation_config.json").read_text())
        assert (values["temperature"], values["do_sample"]) == (0.9, True)


def test_too_little_disk_or_memory_is_refused_and_3b_fits_a_free_colab(
    tmp_path, monkeypatch
):
    import psutil

    gpu = SimpleNamespace(device="cuda")
    monkeypatch.setattr(formats.runtime, "find_machine", lambda: gpu)
    ggufs, merged, w4a16 = ["gguf:q8_0", "gguf:q4_k_m"], ["merged"], ["w4a16"]
    cases = [(25, 8, "", ggufs), (15, 8, "of disk", ggufs), (7, 8, "", merged)]
    cases += [(25, 2, "of memory", ggufs), (12, 8, "of disk", w4a16)]
    for disk, memory, text, names in cases:
        space = SimpleNamespace(free=disk * 1e9, available=memory * 1e9)
        monkeypatch.setattr(formats.shutil, "disk_usage", lambda _, s=space: s)
        monkeypatch.setattr(psutil, "virtual_memory", lambda s=space: s)
        expected = pytest.raises(ModelError, match=f" GB {text} needed for .* free")
        with expected if text else nullcontext():
            formats.require_space(tmp_path, 3_210_000_000, names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": ["gguf:q3"]}, "should be 'adapter', .* 'awq' or 'space'"),
        ({"formats": ["awq"]}, "there is none: use w4a16"),
        ({"formats": ["merged"], "push": "o/n"}, "and a token in .* HF_TOKEN"),
        ({"formats": ["merged"], "public": True}, "push=OWNER/NAME"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(
    run, values, message, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (run.path / "sft" / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        export.export(run, "sft", **values)
    assert not (run.path / "export").exists()
