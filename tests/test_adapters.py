"""Adapters of every kind: what is saved computes what was trained, or is refused."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import adapters as benchmark
from helpers import stages
from helpers.data import preparation as data
from helpers.errors import ModelError
from helpers.models import adapters
from helpers.models import load as models
from helpers.training import trainer as train
from tests.tiny import save_tiny_model

COMMITTED = Path(__file__).parent.parent / "results" / "adapters.json"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.arange(40, 104).reshape(2, 32)


@pytest.fixture
def base(tiny_model_folder):
    """The tiny model, freshly loaded."""
    return models.load_model(str(tiny_model_folder))[0]


def committed(engine):
    rows = json.loads(COMMITTED.read_text())["rows"]
    ours = (r for r in rows if (r["engine"], r["weights"]) == (engine, "16bit"))
    return {row["setting"]: row for row in ours}


def check(rows, engine):
    """Holds freshly measured rows to the limit, and the committed ones to them."""
    for row in rows:
        old = committed(engine)[row["setting"]]
        assert bool(row["refused"]) == bool(old["refused"]), row
        assert not benchmark.is_wrong(row) and not benchmark.is_wrong(old), row
        assert row["refused"] or row["moved"] > 0.05  # the training changed something


FEW = ["DoRA", "PiSSA, rsLoRA, patterns, head", "embedding saved, tied", "token rows"]
FEW += ["all-linear but one", "LoftQ", "LoRA bias"]


@pytest.mark.parametrize(
    "settings",
    [FEW, pytest.param(list(benchmark.SETTINGS), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_every_setting_comes_back_as_trained_or_is_refused_before(settings):
    rows = benchmark.measure_all("transformers", settings)
    assert [row["setting"] for row in rows] == settings
    check(rows, "transformers")


def test_unsloth_on_a_cpu_brings_the_same_settings_back(run_python, tmp_path):
    out = tmp_path / "rows.json"
    settings = ["DoRA", "PiSSA", "alpha pattern", "head saved", "regular expression"]
    command = ["benchmarks/adapters.py", "--engine", "unsloth", "--out", str(out)]
    run_python(*command, "--settings", *settings, "EVA")
    check(json.loads(out.read_text())["rows"], "unsloth")
    assert set(committed("unsloth")) == set(benchmark.SETTINGS)


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_what_rewrites_the_base_is_refused_where_it_would_be_rounded(
    tiny_model_folder, weights
):
    model, _ = models.load_model(str(tiny_model_folder), weights=weights)
    with pytest.raises(ModelError, match="'olora' needs data or changes the base"):
        adapters.add_lora(model, {**LORA, "init_lora_weights": "olora"})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"target_modules": ["query"]}, "target_modules query do not exist"),
        ({"target_modules": "no.*such"}, "no.*such do not exist in this model"),
        ({"target_modules": "*_proj"}, "is no pattern: nothing to repeat"),
        ({"modules_to_save": ["lm_haed"]}, "lm_haed do not .* did you mean 'lm_head'"),
        ({"rank_pattern": {"x_proj": 3}}, "rank_pattern x_proj do not exist"),
        ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern k_proj do not exist"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform=2: the layers are 0"),
        ({"lora_alpha": 0}, "nothing is learnt with lora_alpha=0"),
    ],
)
def test_a_setting_that_nothing_follows_is_refused_in_words(base, setting, sentence):
    with pytest.raises(ModelError, match=sentence):
        adapters.add_lora(base, LORA | setting)


@pytest.mark.parametrize(
    ("base_shape", "sentence"),
    [
        ({}, "adapter at .* does not fit this model: 0 .*, or all zero"),
        ({"num_hidden_layers": 1}, "does not fit this model: .* 4 too many"),
        ({"hidden_size": 32}, "could not be loaded: .*size mismatch for .*lora_A"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    base, tokenizer, tmp_path, base_shape, sentence
):
    adapters.add_lora(base, LORA).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t * bool(base_shape) for n, t in load_file(file).items()}, file)
    model = save_tiny_model("Llama", tokenizer, tmp_path / "base", **base_shape)
    with pytest.raises(ModelError, match=sentence):
        models.load_model(str(model), adapter=tmp_path)


def test_the_adapter_of_a_stage_is_compared_with_the_trained_model(run_factory):
    pissa = {"init_lora_weights": "pissa_niter_4", "use_rslora": True}
    run = run_factory(lora={**LORA, **pissa}, stages=["sft"], sft__learning_rate=1e-2)
    data.prepare(run)
    part = stages.train_stage(run, "sft")
    reloaded = part["reloaded"]
    assert reloaded["difference"] <= 1e-4 * reloaded["logits"]
    # what anybody loads is plain LoRA
    config = json.loads((run.path / "sft" / "adapter/adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    assert math.isclose(config["lora_alpha"], 8 * 2**0.5)


def test_a_reloaded_adapter_is_compared_under_the_attention_it_was_trained_with(
    run_factory, monkeypatch
):
    run = run_factory(stages=["sft"])
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    model.set_attn_implementation("eager")
    seen, compare = [], adapters.compare_saved

    def note(copy, folder):
        seen.append(copy.config._attn_implementation)
        return compare(copy, folder)

    monkeypatch.setattr(adapters, "compare_saved", note)
    train.fit(train.build_sft(run, model, tokenizer), run)
    assert seen == ["eager"]


def test_an_adapter_that_computes_something_else_fails_the_stage(
    run_factory, monkeypatch
):
    run = run_factory(stages=["sft"], sft__learning_rate=1e-2)
    data.prepare(run)
    whole = models.set_adapter_weights

    def forgetful(model, adapter):
        whole(model, adapter)
        for layer in model.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling = {name: -50 * s for name, s in layer.scaling.items()}

    monkeypatch.setattr(models, "set_adapter_weights", forgetful)
    with pytest.raises(ModelError, match="does not compute what was trained: logits"):
        stages.train_stage(run, "sft")
    assert "sft" not in run.report()


def test_other_peoples_adapters_are_loaded_as_peft_loads_them(
    base, tmp_path, run_factory
):
    odd = {"use_dora": True, "alpha_pattern": {"q_proj": 64}}
    fields = peft.LoraConfig(**LORA, **odd, modules_to_save=["norm"])
    theirs = peft.get_peft_model(base, fields)
    benchmark.train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    run = run_factory(sft_adapter=str(tmp_path / "theirs"))
    data.prepare(run)
    start = stages.ensure_adapter(run, "sft")
    model, _ = train.load_for_training(run, "grpo", start)
    logits = adapters.last_logits(model, IDS)
    assert torch.equal(logits, adapters.last_logits(theirs, IDS))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("magnitude" in n for n in trained) and any("norm" in n for n in trained)
