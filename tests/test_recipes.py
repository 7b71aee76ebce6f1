"""Tests of helpers.recipes: the values that are promised, and their small versions."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import recipes, runtime
from helpers.errors import ConfigError
from helpers.grpo import rewards


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
    functions, weights = rewards.choose(recipes.load(name).rewards, 64)
    assert len(functions) == len(weights) > 0


@pytest.mark.parametrize("name", recipes.NAMES)
def test_under_a_recipe_the_worst_right_answer_outscores_the_best_wrong_one(
    name: str,
) -> None:
    assert rewards.margin(recipes.load(name).rewards) >= 0.5


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
    local = [s for s in sources if s and s.startswith("data_samples/")]
    assert [source for source in local if not (runtime.ROOT / source).is_file()] == []


@pytest.mark.parametrize(
    "name", [n for n in recipes.NAMES if "grpo" in recipes.load(n).stages]
)
def test_a_recipes_grpo_step_holds_whole_groups(name: str) -> None:
    grpo = recipes.load(name).grpo
    answers = grpo["per_device_train_batch_size"]
    answers *= grpo.get("gradient_accumulation_steps", 1)
    assert answers % grpo["num_generations"] == 0


def test_changing_a_loaded_recipe_leaves_the_next_one_alone() -> None:
    first = recipes.load("demo")
    first.lora["target_modules"].clear()
    first.sft["max_steps"] = 1
    first.data.train.clear()
    second = recipes.load("demo")
    assert second.lora["target_modules"] == SEVEN
    assert second.sft["max_steps"] == 120
    assert len(second.data.train) == 3


# the figures that the sources publish; a dotted name is a path into the config
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*QKVO, "gate_proj", "up_proj", "down_proj"]
STOCK = {
    "lora": {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "target_modules": SEVEN},
    "sft.lr_scheduler_type": "linear",
    "sft.optim": "adamw_8bit",
    "sft.weight_decay": 0.01,
    "max_length": 2048,
    "seed": 3407,
    "loss_on": "assistant",
    "template": "own",
    "weights": "auto",
    "dtype": "auto",
}
MODEL_A = {
    **STOCK,
    "model": "unsloth/Llama-3.2-3B-Instruct",
    "stages": ["sft"],
    "best_by": "loss",
    "data.train": ["mlabonne/FineTome-100k:train"],
    "data.train_rows": None,
    "sft.per_device_train_batch_size": 2,
    "sft.gradient_accumulation_steps": 4,
    "sft.max_steps": 60,
    "sft.learning_rate": 2e-4,
    "sft.warmup_steps": 5,
    "sft.report_to": "wandb",
}
MODEL_B = {
    **MODEL_A,
    "data.train_rows": 15000,
    "data.eval_share": 0.05,
    "sft.per_device_train_batch_size": 4,
    "sft.max_steps": 40,
    "sft.learning_rate": 2e-5,
    "sft.warmup_steps": 50,
    "sft.logging_steps": 10,
    "sft.eval_strategy": "steps",
    "sft.eval_steps": 10,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "finetome-llama32-1b": {
        **STOCK,
        "model": "unsloth/Llama-3.2-1B-Instruct",
        "data.train": ["mlabonne/FineTome-100k:train"],
        "sft.per_device_train_batch_size": 2,
        "sft.gradient_accumulation_steps": 4,
        "sft.max_steps": 60,
        "sft.learning_rate": 2e-4,
        "sft.warmup_steps": 5,
        "sft.logging_steps": 1,
        "sft.packing": False,
        "inference.temperature": 1.5,
        "inference.min_p": 0.1,
    },
    "finetome-llama32-3b-a": {**MODEL_A, "data.eval_share": None},
    "finetome-llama32-3b-b": MODEL_B,
    "finetome-llama32-3b-c": {
        **MODEL_B,
        "data.train": [
            "mlabonne/FineTome-100k:train",
            "WizardLMTeam/WizardLM_evol_instruct_70k:train",
        ],
    },
    "gsm8k-grpo-llama32-1b": {
        "model": "unsloth/Llama-3.2-1B-Instruct",
        "stages": ["grpo"],
        "max_prompt_length": 288,
        "data.problems": "openai/gsm8k/main:train",
        "data.test": "openai/gsm8k/main:test",
        "grpo.max_steps": 20,
        "grpo.per_device_train_batch_size": 1,
        "grpo.gradient_accumulation_steps": 4,
        "grpo.num_generations": 4,
        "grpo.max_completion_length": 1760,
        "grpo.learning_rate": 5e-6,
        "grpo.lr_scheduler_type": "cosine",
        "grpo.warmup_steps": 0.1,
        "grpo.weight_decay": 0.1,
        "grpo.optim": "adamw_8bit",
        # exact and approximate format, right answer, close answer, number
        "rewards": {
            "correctness": 1.0,
            "closeness": 0.2,
            "strict_format": 0.2,
            "soft_format": 0.1,
            "number_present": 0.1,
        },
    },
    "dolly-llama32-3b": {
        "model": "unsloth/Llama-3.2-3B-Instruct",
        "engine": "transformers",
        "stages": ["sft"],
        "weights": "4bit",
        "double_quant": True,
        "dtype": "bfloat16",
        "pad_token": "eos",
        "template": "instruction",
        "loss_on": "all",
        "max_length": 2048,
        "seed": 42,
        "data.train": ["databricks/databricks-dolly-15k:train"],
        "data.eval_share": 0.05,
        "lora.r": 32,
        "lora.lora_alpha": 64,
        "lora.lora_dropout": 0.1,
        "lora.bias": "none",
        "lora.target_modules": QKVO,
        "sft.per_device_train_batch_size": 2,
        "sft.gradient_accumulation_steps": 8,
        "sft.num_train_epochs": 1,
        "sft.learning_rate": 2e-4,
        "sft.warmup_steps": 50,
        "sft.weight_decay": 0.01,
        "sft.optim": "adamw_torch",
        "sft.eval_strategy": "steps",
    },
    "dolly-llama2-7b": {
        "model": "meta-llama/Llama-2-7b-hf",
        "engine": "transformers",
        "stages": ["sft"],
        "best_by": "eval_loss",
        "weights": "4bit",
        "dtype": "bfloat16",
        "template": "instruction",
        "loss_on": "all",
        "data.train": ["databricks/databricks-dolly-15k:train"],
        "data.eval_share": 0.1,
        "data.test_share": 0.1,
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": SEVEN,
        "sft.per_device_train_batch_size": 4,
        "sft.gradient_accumulation_steps": 4,
        "sft.gradient_checkpointing": True,
        "sft.num_train_epochs": 3,
        "sft.learning_rate": 2e-4,
        "sft.optim": "paged_adamw_8bit",
        "sft.logging_steps": 10,
        "sft.eval_steps": 500,
        "sft.save_steps": 500,
        "sft.save_total_limit": 2,
    },
    "guanaco-llama2-7b": {
        "model": "NousResearch/Llama-2-7b-chat-hf",
        "engine": "transformers",
        "stages": ["sft"],
        "weights": "4bit",
        "double_quant": False,
        "dtype": "float16",
        "template": "llama-2",
        "loss_on": "all",
        "max_length": 256,
        "data.train": ["mlabonne/guanaco-llama2-1k:train"],
        "lora.r": 32,
        "lora.lora_alpha": 16,
        "lora.lora_dropout": 0.1,
        "lora.target_modules": ["q_proj", "v_proj"],
        "sft.per_device_train_batch_size": 1,
        "sft.gradient_accumulation_steps": 8,
        "sft.num_train_epochs": 10,
        "sft.learning_rate": 2e-4,
        "sft.lr_scheduler_type": "cosine",
        "sft.warmup_steps": 0.03,
        "sft.max_grad_norm": 0.3,
        "sft.weight_decay": 0.001,
        "sft.optim": "paged_adamw_32bit",
        "sft.train_sampling_strategy": "group_by_length",
        "sft.report_to": "tensorboard",
        "inference.max_new_tokens": 200,
    },
}


def test_every_system_that_we_reproduce_is_in_the_table() -> None:
    assert {*PUBLISHED, "demo", "demo-gpu", "smoke"} == set(recipes.NAMES)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [(name, *pair) for name, values in PUBLISHED.items() for pair in values.items()],
)
def test_a_recipe_has_the_published_value(name: str, path: str, value: Any) -> None:
    found: Any = recipes.load(name).model_dump()
    for key in path.split("."):
        found = found[key]
    assert found == value


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "smoke"])
def test_a_recipe_says_where_it_is_from_and_what_it_needs(name: str) -> None:
    said = recipes.describe(name)
    assert said["source"] and said["needs"]


def test_our_samples_stand_for_every_dataset_of_the_recipes() -> None:
    for name in recipes.NAMES:
        data = recipes.scaled(recipes.load(name), samples=True).data
        sources = [*data.train, data.eval, data.problems, data.test, data.test_new]
        assert all((runtime.ROOT / source).is_file() for source in sources if source)


def test_a_dataset_without_a_sample_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no sample of 'owner/other'; there are some"):
        recipes.sample_of("owner/other")


@pytest.mark.parametrize("name", ["demo", "demo-gpu"])
def test_the_demo_needs_no_hub(name: str) -> None:
    config = recipes.load(name)
    data = config.data
    sources = [*data.train, data.eval, data.problems, data.test, data.test_new]
    assert config.model == "smollm2-135m-offline"
    assert all((runtime.ROOT / source).is_file() for source in sources)


def test_on_a_gpu_the_demos_sft_is_the_same() -> None:
    one, other = recipes.load("demo"), recipes.load("demo-gpu")
    assert (one.sft, one.lora, one.seed) == (other.sft, other.lora, other.seed)
    assert one.data.train == other.data.train


def test_smoke_is_the_demo_with_sizes_cut_and_nothing_else() -> None:
    demo, smoke = recipes.load("demo").model_dump(), recipes.load("smoke").model_dump()
    differ = {key for key in demo if demo[key] != smoke[key]}
    sizes = {"grpo_minutes", "grpo_held_out"}
    assert differ == {"name", "recipe", "data", "evaluation", "sft", "grpo"} | sizes
    for group in ("sft", "grpo"):
        sizes = {k for k in demo[group] if demo[group][k] != smoke[group][k]}
        assert sizes <= {"max_steps", "warmup_steps", "eval_steps", "save_steps"}


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


def test_the_readme_lists_every_recipe_with_what_is_predicted_today() -> None:
    text = (runtime.ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split("<!-- recipes -->")[1].split("<!-- end of recipes -->")[0]
    assert between.strip() == recipes.list_recipes()


def test_a_warm_up_in_steps_shrinks_with_the_run_and_a_share_stays() -> None:
    stock = recipes.scaled(recipes.load("finetome-llama32-1b"), steps=24)
    assert stock.sft["warmup_steps"] == 2
    guanaco = recipes.scaled(recipes.load("guanaco-llama2-7b"), steps=24)
    assert guanaco.sft["warmup_steps"] == 0.03
