"""The parity gate passes sound exports, and names what is wrong with others."""

import json
import math
import shutil
from pathlib import Path

import pytest

from helpers import files, recipes, runs, runtime, stages
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ModelError
from helpers.export import formats, parity
from tests.tiny import save_tiny_model

Folders = dict[str, Path]
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FORMATS = ["adapter", "merged", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "w4a16"]


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A trained run of a tiny model with scaled rope, and a folder of each format."""
    home = tmp_path_factory.mktemp("parity")
    scaled = ROPE | {"original_max_position_embeddings": 512}
    base = save_tiny_model("Llama", tokenizer, home / "base", rope_parameters=scaled)
    small = {"train_rows": 24, "eval_rows": 4, "test_rows": 6, "test_new_rows": 4}
    small["general_rows"] = 4
    changes = {f"data__{name}": rows for name, rows in small.items()}
    changes |= {"sft__max_steps": 3, "sft__eval_steps": 3, "sft__learning_rate": 5e-3}
    changes |= {"model": str(base), "max_length": 256, "evaluation__max_new_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(home / "runs"))
        run = runs.save_run(changed(recipes.load("smoke"), **changes))
        data.prepare(run)
        stages.train_stage(run, "sft")
    (run.path / "export").mkdir()
    paths = {name: run.path / "export" / name.replace(":", "-") for name in FORMATS}
    formats.write_files(run, run.require("sft/adapter"), paths)
    return run, paths


@pytest.fixture
def plant(exported, tmp_path):
    """Copies a format's folder and changes a JSON file in it."""

    def change(name, file="", **values):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        shutil.copytree(exported[1][name], folder)
        if file:
            path = folder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change


@pytest.mark.parametrize(("lead", "agree"), [(0.01, 1.0), (0.03, 0.6)])
def test_what_follows_a_tie_is_another_answer(tokenizer, lead, agree):
    ids = [11, 12, 13, 14, 15]
    trained = {"answers": [ids, ids], "stops": [15], "gold": [None, None]}
    trained["leads"] = [[9.0, lead, 9.0, 9.0, 9.0], [9.0] * 5]
    own = {"answers": [[11, 20, 13, 14, 15], ids], "tokens_per_second": 1.0}
    row = {}
    assert not [*parity.compare_answers(tokenizer, own, trained, row)]
    assert row["tokens_agree"] == agree and row["first_difference"]


def test_prompts_without_the_runs_system_turn_are_no_fault(exported):
    run, paths = exported
    rows = files.read_rows(run.path / "data" / "train.jsonl")
    assert any(row["messages"][0]["role"] != "system" for row in rows)
    name = "gguf:q8_0"
    table, faults = parity.check(run, "sft", {name: paths[name]}, 64)
    assert faults == [] and table[name]["prompts_equal"]["n"] > 30


def rewrite(folder, drop=(), **values):
    """Writes a GGUF anew with other metadata, without some fields or tensors."""
    import gguf

    file = folder / "model.gguf"
    old = gguf.GGUFReader(file.rename(folder / "old"))
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in old.fields.items():
        short = name.rpartition(".")[2]
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = values.get(short, field.contents())
            if short not in drop:
                kinds = field.types
                writer.add_key_value(name, value, kinds[0], sub_type=kinds[-1])
    for tensor in old.tensors:
        if tensor.name not in drop:
            kind = tensor.tensor_type
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "old").unlink()
    return folder


def find_fault(faults, name, fault):
    """The sentence on a format's fault."""
    return next((f for f in faults if f.startswith(f"{name}: {fault}")), "")


def test_sound_exports_of_every_format_pass(exported):
    run, folders = exported
    rows, faults = parity.check(run, "sft", folders, 6)
    assert faults == []
    for name in FORMATS:
        assert rows[name]["prompts_equal"]["k"] == 6
        assert rows[name]["perplexity"] == pytest.approx(
            rows["trained"]["perplexity"], rel=0.05
        )
    for name in ("adapter", "merged"):
        assert rows[name]["tokens_agree"] == 1.0
    assert rows["gguf:q8_0"]["mb"] < rows["gguf:f16"]["mb"] < rows["merged"]["mb"]
    run.write_part("export", rows)
    table = parity.parity_table(run.report())
    assert [*table.index] == ["trained", *FORMATS]
    assert table["prompts_equal"]["merged"] == "6/6"


def test_faults_of_folders_for_transformers_are_named(exported, plant, tmp_path):
    run, settings = exported[0], "generation_config.json"
    template = plant("merged")
    (template / "chat_template.jinja").write_text(
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    )
    unmerged = plant("merged")
    shutil.copy(Path(run.config.model) / "model.safetensors", unmerged)
    planted = {
        "adapter": plant("adapter", settings, eos_token_id=None),
        "merged": unmerged,
        "w4a16": template,
        "tied": plant("merged", "config.json", tie_word_embeddings=False),
        "stop": plant("merged", settings, eos_token_id=0),
        "rope": plant(
            "merged",
            "config.json",
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        ),
        "bos": plant("merged"),
        "empty": tmp_path / "empty",
    }
    text = (planted["bos"] / "chat_template.jinja").read_text()
    (planted["bos"] / "chat_template.jinja").write_text("{{ bos_token }}" + text)
    planted["empty"].mkdir()
    _, faults = parity.check(run, "sft", planted, 4)
    assert "answers end in ['<|im_end|>']" in find_fault(
        faults, "adapter", "missing EOS"
    )
    assert "the base's to" in find_fault(faults, "merged", "adapter not merged")
    sentence = find_fault(faults, "w4a16", "wrong chat template")
    assert sentence.endswith("... [<|im_start|>] / [[]")
    assert "no lm_head.weight" in find_fault(faults, "tied", "tied embedding lost")
    assert "'<|endoftext|>'" in find_fault(faults, "stop", "old stop token")
    assert "'llama3'" in find_fault(faults, "rope", "rope scaling lost")
    assert "[system] / [<|im_start|>]" in find_fault(faults, "bos", "doubled BOS")
    assert "plain transformers fails" in find_fault(faults, "empty", "")


def test_faults_of_ggufs_are_named(exported, plant):
    name = "gguf:f16"
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    lost = ("eos_token_id", "eot_token_id", "rope_freqs.weight")
    planted = {
        "gguf:lost": rewrite(plant(name), drop=lost, pre="default"),
        "gguf:other": rewrite(plant(name), chat_template=template, eos_token_id=0),
        "gguf:bos": rewrite(plant(name), add_bos_token=True),
    }
    file = planted["gguf:other"] / "Modelfile"
    file.write_text(file.read_text().replace("Solve step by step", "Guess"))
    _, faults = parity.check(exported[0], "sft", planted, 4)
    assert "sets no stop token" in find_fault(faults, "gguf:lost", "missing EOS")
    assert "'default'" in find_fault(faults, "gguf:lost", "rope scaling lost")
    assert "] / [" in find_fault(faults, "gguf:lost", "wrong pre-tokenizer")
    assert "'<|endoftext|>'" in find_fault(faults, "gguf:other", "old stop token")
    template_fault = find_fault(faults, "gguf:other", "wrong chat template:")
    assert "[<|im_start|>] / [[]" in template_fault
    sentence = find_fault(faults, "gguf:other", "wrong chat template (Modelfile)")
    assert "[Sol] / [Gu" in sentence
    assert "[system] / [<|im_start|>]" in find_fault(faults, "gguf:bos", "doubled BOS")


def test_answers_that_no_longer_end_or_are_wrong_are_faults(tokenizer):
    texts = ["#### 4<|im_end|>", "#### 5 and on"]
    right, wrong = ([tokenizer(text).input_ids] * 10 for text in texts)
    loading = {"loading": {"dtype": "float32"}, "gold": ["4"] * 10}
    stops = {"stops": [tokenizer.eos_token_id], "rope": {}}
    trained = loading | stops | {"answers": right, "leads": [[9.0] * 9] * 10}
    own = {"answers": wrong, "tokens_per_second": 1.0}
    row, faults = parity.compare("merged", tokenizer, own, trained)
    assert faults == [
        "lost stops: 10 of 10 answers no longer end, p = 0.00195",
        "fewer right answers: 0 of 10, 10 as trained, p = 0.00195",
        "other answers: 50.0% of tokens agree, 100% must: ...####  [4] / [5]",
    ]
    assert (row["right"]["k"], row["right"]["n"], row["stop_rate"]) == (0, 10, 0.0)


def test_numbers_that_are_none_are_faults(tokenizer):
    loading = {"loading": {"dtype": "float32"}, "limit": 1e-4, "rope": {}}
    sound = {"logits": [1.0, 2.0], "base": [1.0, 0.0], "perplexity": 2.0, "stops": [2]}
    own = {"logits": [math.nan, 2.0], "perplexity": math.nan}
    for name, number in (("merged", 2), ("w4a16", 1)):
        _, faults = parity.compare(name, tokenizer, own, loading | sound)
        assert len(faults) == number and "perplexity nan" in faults[-1]


def test_a_process_that_fails_is_an_error():
    with pytest.raises(ModelError, match="^refuse fails: not today$"):
        runtime.run_alone(refuse, "not today")


def refuse(reason):
    raise SystemExit(reason)
