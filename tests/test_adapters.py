"""Adapters of every kind: what is saved computes what was trained, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adapters
from helpers import stages
from helpers.data import preparation as data
from helpers.errors import ModelError
from helpers.models import load as models
from helpers.runs import Run
from helpers.training import trainer as train

COMMITTED = Path(__file__).parent.parent / "results" / "adapters.json"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.arange(40, 104).reshape(2, 32)


def committed(engine: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(COMMITTED.read_text())["rows"]
    ours = (r for r in rows if (r["engine"], r["weights"]) == (engine, "16bit"))
    return {row["setting"]: row for row in ours}


def check(rows: list[dict[str, Any]], engine: str) -> None:
    """Holds freshly made rows to the limit, and the committed ones to them."""
    for row in rows:
        kept = committed(engine)[row["setting"]]
        assert row["refused"] == kept["refused"], row
        assert not adapters.is_wrong(row) and not adapters.is_wrong(kept), row
        assert row["refused"] or row["moved"] > 0.05  # the training changed something


def test_every_setting_comes_back_as_trained_or_is_refused_before() -> None:
    rows = adapters.measure_all("transformers", list(adapters.SETTINGS))
    assert len(rows) >= 20
    check(rows, "transformers")


def test_unsloth_on_a_cpu_brings_the_same_settings_back(
    run_python: Any, tmp_path: Path
) -> None:
    out = tmp_path / "rows.json"
    settings = ["DoRA", "PiSSA", "alpha pattern", "head saved", "regular expression"]
    command = ["benchmarks/adapters.py", "--engine", "unsloth", "--out", str(out)]
    run_python(*command, "--settings", *settings, "EVA")
    check(json.loads(out.read_text())["rows"], "unsloth")
    assert set(committed("unsloth")) == set(adapters.SETTINGS)


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_what_rewrites_the_base_is_refused_where_it_would_be_rounded(
    tiny_model_folder: Path, weights: str
) -> None:
    model, _ = models.load_model(str(tiny_model_folder), weights=weights)
    with pytest.raises(ModelError, match="'olora' changes the base.*weights='16bit'"):
        models.add_lora(model, {**LORA, "init_lora_weights": "olora"})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"rank_pattern": {"x_proj": 3}}, "rank_pattern 'x_proj' matches no target"),
        ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern 'k_proj' matches no target"),
        ({"layers_to_transform": [0, 2]}, "names layer 2; the model's layers are 0 to"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save lm_haed do not exist"),
        (
            {"target_modules": "no.*such"},
            "no module matches no.*such; a text is a regular",
        ),
        ({"target_modules": ["attn.q_proj"]}, "target_modules attn.q_proj do not exis"),
        ({"trainable_token_indices": [10**6]}, "LoRA cannot be attached as configured"),
        ({"no_such_field": 1}, "LoRA cannot be attached as configured.*no_such_field"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights='pizza' needs data or"),
    ],
)
def test_a_setting_that_nothing_follows_is_refused_in_words(
    tiny_model_folder: Path, setting: dict[str, Any], sentence: str
) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    with pytest.raises(ModelError, match=sentence):
        models.add_lora(model, LORA | setting)


def test_an_adapter_that_was_cut_short_is_one_sentence(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    tuned = models.add_lora(model, LORA)
    tuned.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be put on this model"):
        models.load_model(str(tiny_model_folder), adapter=tmp_path)


def test_an_adapter_without_a_rank_has_a_size(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert models.adapter_size(tmp_path) == f"{tmp_path}: 0.0 MiB"


def test_a_target_may_be_named_by_its_path(tiny_model_folder: Path) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    named = {**LORA, "target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]}
    tuned = models.add_lora(model, named)
    assert len(tuned.base_model.targeted_module_names) == 3


def test_a_tokenizer_larger_than_the_embedding_is_one_sentence(
    tiny_model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from tests.tiny import save_tiny_model

    small = save_tiny_model("Llama", tokenizer, tmp_path / "small", vocab_size=64)
    with pytest.raises(ModelError, match="gives ids up to .* embedding has 64 rows"):
        models.load_model(str(small))


def test_the_adapter_of_a_stage_is_compared_with_the_trained_model(
    run_factory: Callable[..., Run],
) -> None:
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


def test_an_adapter_that_computes_something_else_fails_the_stage(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_factory(stages=["sft"], sft__learning_rate=1e-2)
    data.prepare(run)
    whole = models.set_adapter_weights

    def forgetful(model: Any, adapter: Path) -> None:
        whole(model, adapter)
        for layer in model.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling = {name: -50 * s for name, s in layer.scaling.items()}

    monkeypatch.setattr(models, "set_adapter_weights", forgetful)
    with pytest.raises(ModelError, match="does not compute what was trained: logits"):
        stages.train_stage(run, "sft")
    assert "sft" not in run.report()


def test_other_peoples_adapters_are_loaded_as_peft_loads_them(
    tiny_model_folder: Path, tmp_path: Path, run_factory: Callable[..., Run]
) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = models.load_model(str(tiny_model_folder))
    odd = {"use_dora": True, "alpha_pattern": {"q_proj": 64}}
    theirs = get_peft_model(base, LoraConfig(**LORA, **odd, modules_to_save=["norm"]))
    adapters.train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    run = run_factory(sft_adapter=str(tmp_path / "theirs"))
    data.prepare(run)
    start = stages.ensure_adapter(run, "sft")
    model, _ = train.load_for_training(run, "grpo", start)
    found = models.last_logits(model, IDS)
    assert torch.equal(found, models.last_logits(theirs, IDS))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("magnitude" in n for n in trained) and any("norm" in n for n in trained)


def test_a_bias_is_refused_where_only_some_of_the_layers_have_one(
    tokenizer: Any, tmp_path: Path
) -> None:
    from tests.tiny import save_tiny_model

    folder = save_tiny_model("Qwen2", tokenizer, tmp_path / "qwen2")
    model, _ = models.load_model(str(folder))
    lora = {**LORA, "lora_bias": True}  # queries have a bias, the output has none
    with pytest.raises(ModelError, match="lora_bias=True trains a bias that the mode"):
        models.add_lora(model, lora | {"target_modules": ["q_proj", "o_proj"]})


def test_a_machine_without_memory_is_not_taken_for_an_unfit_adapter(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    model, _ = models.load_model(str(tiny_model_folder))
    with pytest.raises(torch.OutOfMemoryError):
        models.load_adapter(model, tmp_path)
