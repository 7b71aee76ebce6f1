"""Tests of helpers.recipes: the values that are promised, and their small versions."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import recipes, rewards, runtime
from helpers.config import ConfigError

ALL_PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


def test_an_unknown_recipe_gets_the_nearest_name_and_all_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.load("finetome-lama32-1b")
    assert "did you mean 'finetome-llama32-1b'?" in str(caught.value)
    assert all(name in str(caught.value) for name in recipes.NAMES)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_carries_its_own_name_into_the_run(name: str) -> None:
    config = recipes.load(name)
    assert (config.name, config.recipe) == (name, name)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_pays_only_rewards_that_exist(name: str) -> None:
    functions, weights = rewards.choose(recipes.load(name).rewards)
    assert len(functions) == len(weights) > 0


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_gives_only_arguments_that_the_libraries_take(name: str) -> None:
    from dataclasses import fields

    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    config = recipes.load(name)
    pairs = [(config.sft, SFTConfig), (config.grpo, GRPOConfig)]
    for given, taker in [*pairs, (config.lora, LoraConfig)]:
        assert set(given) <= {field.name for field in fields(taker)}


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipes_local_files_are_in_the_project(name: str) -> None:
    data = recipes.load(name).data
    sources = [*data.train, data.eval, data.problems, data.test, data.test_new]
    local = [source for source in sources if source.startswith("data_samples/")]
    assert local
    assert [source for source in local if not (runtime.ROOT / source).is_file()] == []


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipes_grpo_batch_holds_whole_groups(name: str) -> None:
    grpo = recipes.load(name).grpo
    assert grpo["per_device_train_batch_size"] % grpo["num_generations"] == 0


def test_changing_a_loaded_recipe_leaves_the_next_one_alone() -> None:
    first = recipes.load("demo")
    first.lora["target_modules"].clear()
    first.sft["max_steps"] = 1
    first.data.train.clear()
    second = recipes.load("demo")
    assert set(second.lora["target_modules"]) == ALL_PROJECTIONS
    assert second.sft["max_steps"] == recipes.DEMO["sft"]["max_steps"]
    assert len(second.data.train) == 3


def test_finetome_has_the_stock_lora_values() -> None:
    lora = recipes.load("finetome-llama32-1b").lora
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (16, 16, 0)
    assert set(lora["target_modules"]) == ALL_PROJECTIONS
    assert len(lora["target_modules"]) == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("per_device_train_batch_size", 2),
        ("gradient_accumulation_steps", 4),
        ("max_steps", 60),
        ("learning_rate", 2e-4),
        ("lr_scheduler_type", "linear"),
        ("warmup_steps", 5),
        ("optim", "adamw_8bit"),
        ("weight_decay", 0.01),
        ("packing", False),
    ],
)
def test_finetome_has_the_stock_training_values(field: str, value: Any) -> None:
    assert recipes.load("finetome-llama32-1b").sft[field] == value


def test_finetome_has_the_stock_model_data_seed_and_length() -> None:
    config = recipes.load("finetome-llama32-1b")
    assert config.model == "unsloth/Llama-3.2-1B-Instruct"
    assert config.data.train == ["mlabonne/FineTome-100k:train"]
    assert (config.seed, config.max_length) == (3407, 2048)


def test_finetome_learns_from_the_assistants_turns_only() -> None:
    assert recipes.load("finetome-llama32-1b").loss_on == "assistant"


def test_the_demo_has_the_values_of_the_file() -> None:
    config = recipes.load("demo")
    written = {**recipes.DEMO, "recipe": "demo"}
    loaded = config.model_dump()
    for group in ("data", "evaluation"):
        loaded[group] = {k: loaded[group][k] for k in written[group]}
    assert {key: loaded[key] for key in written} == written


def test_the_demo_needs_no_hub() -> None:
    config = recipes.load("demo")
    data = config.data
    sources = [*data.train, data.eval, data.problems, data.test, data.test_new]
    assert config.model == "smollm2-135m-offline"
    assert all((runtime.ROOT / source).is_file() for source in sources)


def test_smoke_is_the_demo_with_sizes_cut_and_nothing_else() -> None:
    demo, smoke = recipes.load("demo").model_dump(), recipes.load("smoke").model_dump()
    differ = {key for key in demo if demo[key] != smoke[key]}
    assert differ == {"name", "recipe", "data", "evaluation", "sft", "grpo"}
    for group in ("sft", "grpo"):
        sizes = {k for k in demo[group] if demo[group][k] != smoke[group][k]}
        assert sizes <= {"max_steps", "eval_steps", "save_steps"}


def test_scaled_without_arguments_changes_nothing() -> None:
    config = recipes.load("demo")
    assert recipes.scaled(config) == config


def test_scaled_steps_shorten_both_stages_and_still_evaluate_and_save() -> None:
    small = recipes.scaled(recipes.load("demo"), steps=6)
    assert (small.sft["max_steps"], small.grpo["max_steps"]) == (6, 3)
    assert (small.sft["eval_steps"], small.sft["save_steps"]) == (3, 3)


def test_scaled_to_one_step_keeps_every_interval_positive() -> None:
    small = recipes.scaled(recipes.load("demo"), steps=1)
    assert (small.sft["max_steps"], small.grpo["max_steps"]) == (1, 2)
    assert (small.sft["eval_steps"], small.sft["save_steps"]) == (1, 1)


def test_scaled_rows_cap_every_held_out_set_and_eight_times_as_many_for_training() -> (
    None
):
    data = recipes.scaled(recipes.load("demo"), rows=5).data
    assert data.train_rows == 40
    assert (data.eval_rows, data.test_rows, data.test_new_rows) == (5, 5, 5)


def test_scaled_takes_another_model_and_leaves_the_rest() -> None:
    config = recipes.load("demo")
    other = recipes.scaled(config, model="some/other")
    assert other.model == "some/other"
    assert other.model_dump(exclude={"model"}) == config.model_dump(exclude={"model"})


def test_scaled_to_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.train_rows: .*found 0"):
        recipes.scaled(recipes.load("demo"), rows=0)


def test_the_default_recipe_is_the_one_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNEBOOK_RECIPE", "smoke")
    assert recipes.default_name() == "smoke"


def test_the_default_recipe_without_a_hub_is_the_demo() -> None:
    assert recipes.default_name() == "demo"
