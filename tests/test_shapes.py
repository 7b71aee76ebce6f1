"""Tests of helpers.shapes: what the libraries count on models without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes, shapes
from helpers.errors import ModelError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STOCK = "unsloth/Llama-3.2-1B-Instruct"


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("unsloth/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("unsloth/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("NousResearch/Llama-2-7b-chat-hf", 6_738_415_616),
        ("smollm2-135m-offline", 134_515_008),
    ],
)
def test_base_models_have_the_published_number_of_parameters(name, base) -> None:
    assert shapes.find_architecture(name).parameters == base


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        ("demo", 4_884_480),
        ("finetome-llama32-1b", 11_272_192),
        ("finetome-llama32-3b-a", 24_313_856),
        ("finetome-llama32-3b-b", 24_313_856),
        ("finetome-llama32-3b-c", 24_313_856),
        ("gsm8k-grpo-llama32-1b", 11_272_192),
        ("dolly-llama32-3b", 18_350_080),
        ("dolly-llama2-7b", 39_976_960),
        ("guanaco-llama2-7b", 16_777_216),
    ],
)
def test_a_recipe_trains_the_known_number_of_parameters(recipe, trained) -> None:
    config = recipes.load(recipe)
    assert shapes.count_lora(config.model, config.lora).trained == trained


def test_the_stock_recipe_trains_a_part_of_the_published_total() -> None:
    found = shapes.count_lora(STOCK, {"r": 16, "target_modules": ALL})
    assert found == (11_272_192, 1_247_086_592, 973_078_528, 16 * (6 * 2048 + 8192))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ALL, "exclude_modules": r".*\.mlp\..*"},
        {"target_modules": ALL, "layers_to_transform": [1]},
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "layers.0.*down_proj": 9},
        },
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {},
    ],
    ids=str,
)
def test_what_is_trained_is_what_peft_counts_on_the_loaded_model(
    lora: dict[str, Any], tiny_model_folder: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    base = shapes.find_architecture(str(tiny_model_folder)).parameters
    assert base == model.num_parameters()
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    found = shapes.count_lora(str(tiny_model_folder), lora)
    assert found[:2] == tuned.get_nb_trainable_parameters()


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen3", "gpt2"])
def test_architectures_besides_llama_are_counted(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    numbers = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    numbers |= {"vocab_size": 300, "pad_token_id": 0}
    if kind != "gpt2":
        numbers |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
    config = AutoConfig.for_model(kind, **numbers)
    config.save_pretrained(tmp_path)
    lora = {"r": 4, "target_modules": "all-linear"}
    model = AutoModelForCausalLM.from_config(config)
    arch = shapes.find_architecture(str(tmp_path))
    assert (arch.layers, arch.parameters) == (2, model.num_parameters())
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    found = shapes.count_lora(str(tmp_path), lora)
    assert found[:2] == tuned.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["qproj"]}, "target_modules qproj do .*mean 'q_proj'"),
        ({"target_modules": ["q_proj", "c_attn"]}, "c_attn do not exist.*it has"),
        ({"target_modules": r".*\.c_attn"}, r"target_modules: no .* \.\*\\\.c_attn;"),
        ({"target_modules": "q_proj"}, "a list holds their ends: down_proj"),
        ({"target_modules": "*_proj"}, "no regular expression"),
        ({"target_modules": ALL, "exclude_modules": ["qq"]}, "exclude_modules qq"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save lm_hed .*mean 'lm_head'"),
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern 'q_prj' matches no"),
        ({"target_modules": ALL, "layers_to_transform": 16}, "layers are 0 to 15"),
        ({"r": 0}, "`r` should be a positive"),
        ({"lora_dropout": 1.5}, "between 0 and 1"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' needs data"),
    ],
)
def test_lora_that_does_not_fit_the_model_is_refused_in_one_sentence(
    lora: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        shapes.count_lora(STOCK, lora)
    assert "\n" not in str(refusal.value)


def test_the_offline_models_numbers_are_those_of_its_file() -> None:
    from helpers.models import load as models

    known = shapes.find_architecture("smollm2-135m-offline")
    place = models.find_model("smollm2-135m-offline")
    assert shapes.find_architecture(place) == known
    positions = [
        shapes.find_config(name).max_position_embeddings
        for name in (place, "smollm2-135m-offline")
    ]
    assert positions[0] == positions[1]


def test_an_unknown_model_without_a_hub_is_said_to_be_unknown() -> None:
    with pytest.raises(shapes.UnknownArchitecture, match="hub cannot be reached"):
        shapes.find_architecture("nobody/nothing-9b")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "unheard-of"}'])
def test_a_folder_without_a_usable_config_is_refused(content, tmp_path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(shapes.UnknownArchitecture, match=str(tmp_path)):
        shapes.find_architecture(str(tmp_path))


def test_a_model_without_attention_heads_is_unknown(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(shapes.UnknownArchitecture, match="num_attention_heads"):
        shapes.find_architecture(str(tmp_path))


def test_a_config_that_was_changed_is_read_again(tmp_path) -> None:
    numbers = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}
    numbers |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300}
    for layers in (2, 3):
        text = json.dumps({**numbers, "num_hidden_layers": layers})
        (tmp_path / "config.json").write_text(text)
        assert shapes.find_architecture(str(tmp_path)).layers == layers
