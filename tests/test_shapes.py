"""Tests of helpers.shapes: counts against real models, made without their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import recipes, shapes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(arch: shapes.Architecture, kind: str = "Llama"):
    """A model of these numbers whose tensors have shapes but no memory."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**shapes.config_fields(arch))
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("name", shapes.KNOWN)
def test_the_count_of_parameters_is_that_of_the_built_model(name: str) -> None:
    arch = shapes.KNOWN[name]
    assert shapes.count_parameters(arch) == build(arch).num_parameters()


@pytest.mark.parametrize(("kind", "bias", "norm"), [("Qwen2", 1, 0), ("Qwen3", 0, 1)])
def test_biases_and_norms_of_other_layouts_are_counted(kind, bias, norm) -> None:
    arch = shapes.Architecture(64, 3, 4, 2, 16, 96, 300, True, bool(bias), bool(norm))
    assert shapes.count_parameters(arch) == build(arch, kind).num_parameters()


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
    assert shapes.count_parameters(shapes.find_architecture(name)) == base


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
def test_a_recipe_trains_what_peft_counts_on_its_base_model(recipe, trained) -> None:
    from peft import LoraConfig, get_peft_model

    config = recipes.load(recipe)
    arch = shapes.find_architecture(config.model)
    targets = config.lora["target_modules"]
    assert shapes.count_lora(arch, config.lora["r"], targets) == trained
    # all layers are alike: two of them show the same count a layer
    two = build(arch._replace(layers=2))
    counted = get_peft_model(two, LoraConfig(**config.lora)).num_parameters(True)
    assert counted * arch.layers == 2 * trained


def test_the_stock_recipe_trains_a_part_of_the_published_total() -> None:
    arch = shapes.find_architecture("unsloth/Llama-3.2-1B-Instruct")
    total = shapes.count_parameters(arch) + shapes.count_lora(arch, 16, ALL)
    assert total == 1_247_086_592


def test_a_module_that_the_model_lacks_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        shapes.count_lora(shapes.KNOWN["llama-3.2-1b"], 8, ["qproj"])


def test_a_model_folder_is_read(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    arch = shapes.find_architecture(str(tiny_model_folder))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert shapes.count_parameters(arch) == model.num_parameters()


def test_the_offline_models_numbers_are_those_of_its_file() -> None:
    from helpers import models

    known = shapes.find_architecture("smollm2-135m-offline")
    assert shapes.find_architecture(models.find_model("smollm2-135m-offline")) == known


def test_an_unknown_model_without_a_hub_is_said_to_be_unknown() -> None:
    with pytest.raises(shapes.UnknownArchitecture, match="hub cannot be reached"):
        shapes.find_architecture("nobody/nothing-9b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "config.json: "),
        ('{"model_type": "mamba"}', "model type 'mamba'; known: llama"),
        ('{"model_type": "llama"}', "lacks 'num_attention_heads'"),
    ],
)
def test_a_folder_without_usable_numbers_is_refused(content, message, tmp_path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(shapes.UnknownArchitecture, match=message):
        shapes.read_architecture(tmp_path / "config.json")


def test_heads_of_their_own_keys_are_assumed_where_the_file_says_nothing(tmp_path):
    numbers = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64}
    numbers |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    arch = shapes.read_architecture(tmp_path / "config.json")
    assert (arch.kv_heads, arch.head_dim, arch.tied) == (4, 16, False)
