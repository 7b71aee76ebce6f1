"""Tests of helpers.recipes: the values that are promised, and their small versions."""

import re

import pytest

from benchmarks import publish
from helpers import recipes, runtime
from helpers.config import SETS, changed
from helpers.errors import ConfigError
from helpers.grpo import rewards


def sources_of(config):
    data = config.data
    return [*data.train, *filter(None, (getattr(data, name) for name in SETS))]


def test_an_unknown_recipe_gets_the_nearest_name_and_all_known_ones():
    with pytest.raises(ConfigError) as caught:
        recipes.load("finetome-lama32-1b")
    assert "did you mean 'finetome-llama32-1b'?" in str(caught.value)
    assert all(name in str(caught.value) for name in recipes.NAMES)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_names_itself_and_what_exists(name):
    config = recipes.load(name)
    assert (config.name, config.recipe) == (name, name)
    config.lora["target_modules"].clear()  # what is changed leaves the next one alone
    assert recipes.load(name).lora["target_modules"]
    functions, weights = rewards.choose(config.rewards, 64)
    assert len(functions) == len(weights) > 0
    # the worst right answer outscores the best wrong one
    assert rewards.margin(config.rewards) >= 0.5
    local = [s for s in sources_of(config) if s.startswith("data_samples/")]
    assert all((runtime.ROOT / source).is_file() for source in local)
    if name != "smoke":
        notes = recipes.RECIPES[name]
        assert notes["source"] and notes["needs"]


# the figures that the sources publish
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*QKVO, "gate_proj", "up_proj", "down_proj"]
LLAMA1, LLAMA3 = (f"unsloth/Llama-3.2-{size}B-Instruct" for size in (1, 3))
DOLLY = "databricks/databricks-dolly-15k:train"
GUANACO = "mlabonne/guanaco-llama2-1k:train"
FINETOME = "mlabonne/FineTome-100k:train"
BOTH = [FINETOME, "WizardLMTeam/WizardLM_evol_instruct_70k:train"]
LLAMA2, CHAT = "meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b-chat-hf"

# model, rows, their cap, LoRA's r, alpha, dropout and modules
TRAINED = {
    "finetome-llama32-1b": (LLAMA1, [FINETOME], 2000, 16, 16, 0, SEVEN),
    "finetome-llama32-3b-a": (LLAMA3, [FINETOME], None, 16, 16, 0, SEVEN),
    "finetome-llama32-3b-b": (LLAMA3, [FINETOME], 15000, 16, 16, 0, SEVEN),
    "finetome-llama32-3b-c": (LLAMA3, BOTH, 15000, 16, 16, 0, SEVEN),
    "gsm8k-grpo-llama32-1b": (LLAMA1, [], None, 16, 16, 0, SEVEN),
    "dolly-llama32-3b": (LLAMA3, [DOLLY], None, 32, 64, 0.1, QKVO),
    "dolly-llama2-7b": (LLAMA2, [DOLLY], None, 16, 32, 0.05, SEVEN),
    "guanaco-llama2-7b": (CHAT, [GUANACO], None, 32, 16, 0.1, ["q_proj", "v_proj"]),
}
# micro-batch, accumulation, steps or epochs, rate, warm-up, weight decay, optimiser
SCHEDULES = {
    "finetome-llama32-1b": (2, 4, 60, 2e-4, 5, 0.01, "adamw_8bit"),
    "finetome-llama32-3b-a": (2, 4, 60, 2e-4, 5, 0.01, "adamw_8bit"),
    "finetome-llama32-3b-b": (4, 4, 40, 2e-5, 50, 0.01, "adamw_8bit"),
    "finetome-llama32-3b-c": (4, 4, 40, 2e-5, 50, 0.01, "adamw_8bit"),
    "gsm8k-grpo-llama32-1b": (1, 4, 20, 5e-6, 0.1, 0.1, "adamw_8bit"),
    "dolly-llama32-3b": (2, 8, 1, 2e-4, 50, 0.01, "adamw_torch"),
    "dolly-llama2-7b": (4, 4, 3, 2e-4, 100, None, "paged_adamw_8bit"),
    "guanaco-llama2-7b": (1, 8, 10, 2e-4, 0.03, 0.001, "paged_adamw_32bit"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_has_the_published_values(name):
    config = recipes.load(name)
    lora, part = config.lora, config.grpo if config.stages == ["grpo"] else config.sft
    sizes = lora["r"], lora["lora_alpha"], lora.get("lora_dropout", 0)
    rows = config.data.train, config.data.train_rows
    assert TRAINED[name] == (config.model, *rows, *sizes, lora["target_modules"])
    batch = part["per_device_train_batch_size"], part["gradient_accumulation_steps"]
    length = part.get("max_steps") or part["num_train_epochs"]
    schedule = length, part["learning_rate"], part["warmup_steps"]
    last = part.get("weight_decay"), part["optim"]
    assert SCHEDULES[name] == (*batch, *schedule, *last)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_our_samples_stand_for_every_dataset_of_the_recipes(name):
    config = recipes.scaled(recipes.load(name), samples=True)
    assert all((runtime.ROOT / source).is_file() for source in sources_of(config))
    small = recipes.small(recipes.load(name))
    assert small.name == f"{name}-small" and small.model == "smollm2-135m-offline"
    assert small.thinking is None  # its template has no such switch


PARENT = '[a]\nsource = "s"\nmodel = "m"\n[a.sft]\nmax_steps = 1\noptim = "o"\n'


def test_a_recipe_has_what_it_does_not_set_from_the_one_it_is_like():
    child = '[b]\nlike = "a"\nmodel = "n"\n[b.sft]\nmax_steps = 2\n'
    values = recipes.read_recipes(f"{PARENT}{child}")
    assert values["b"] == {"model": "n", "sft": {"max_steps": 2, "optim": "o"}}
    assert values["a"]["sft"] == {"max_steps": 1, "optim": "o"}
    for text in (child, f"{child}{PARENT}", f'{PARENT}[b]\nlike = "A"'):
        with pytest.raises(ConfigError, match="b: like='[aA]' is no recipe above it"):
            recipes.read_recipes(text)


def test_scaled_steps_shorten_both_stages_and_still_evaluate_and_save():
    for steps, grpo, every in ((6, 3, 3), (1, 2, 1)):
        small = recipes.scaled(recipes.load("demo"), steps=steps)
        assert (small.sft["max_steps"], small.grpo["max_steps"]) == (steps, grpo)
        assert (small.sft["eval_steps"], small.sft["save_steps"]) == (every, every)
    for name, warmup in (("finetome-llama32-1b", 2), ("guanaco-llama2-7b", 0.03)):
        small = recipes.scaled(recipes.load(name), steps=24)
        assert small.sft["warmup_steps"] == warmup  # steps shrink, a share stays


def test_the_one_that_ends_in_awq_ends_in_four_bits_without_a_gpu_too():
    config = recipes.load("dolly-llama32-3b")
    assert config.export == ["adapter", "merged", "awq"]
    assert recipes.small(config).export == ["adapter", "merged", "w4a16"]


def test_the_demo_takes_larger_sizes_where_there_is_a_gpu(monkeypatch):
    usual, larger = (recipes.load("demo", gpu=gpu) for gpu in (False, True))
    assert (usual.engine, larger.engine) == ("auto", "transformers")
    sizes = ("per_device_train_batch_size", "num_generations")
    assert [usual.grpo[name] for name in sizes] == [8, 4]
    assert [larger.grpo[name] for name in sizes] == [64, 8]
    kept = ("name", "recipe", "model", "lora", "sft", "rewards")
    assert usual.model_dump(include=kept) == larger.model_dump(include=kept)
    assert usual.data.train == larger.data.train
    for there, config in ((False, usual), (True, larger)):
        monkeypatch.setattr(recipes, "has_gpu", lambda there=there: there)
        assert recipes.load("demo") == config
        assert recipes.load("smoke").grpo["per_device_train_batch_size"] == 8


def test_scaled_changes_what_it_is_asked_to_and_leaves_the_rest():
    config = recipes.load("demo")
    assert recipes.scaled(config) == config
    data = recipes.scaled(config, rows=5).data
    assert data.train_rows == 40
    assert {getattr(data, f"{n}_rows") for n in SETS if n != "problems"} == {5}


def test_what_differs_from_a_recipe_is_at_most_ten_lines():
    demo = recipes.load("demo")
    assert recipes.differences(demo) == "demo, changes to the recipe demo: 0"
    changes = {"sft__max_steps": 7, "sft__save_steps": None, "lora__r": 16}
    assert recipes.differences(changed(demo, name="mine", **changes)).splitlines() == [
        "mine, changes to the recipe demo: 2",
        "sft.max_steps = 7, not 120",
        "sft.save_steps = None, not 40",
    ]
    small = recipes.differences(recipes.small(recipes.load("finetome-llama32-1b")))
    *lines, last = small.splitlines()
    assert (len(lines), max(map(len, small.splitlines())) <= 88) == (9, True)
    total, more = re.findall(r"recipe.*: (\d+)|and (\d+)", lines[0] + last)
    assert int(total[0]) == int(more[1]) + 8
    own = recipes.differences(changed(demo, recipe=""))
    assert re.match(r"demo, settings: \d+\nmodel = ", own)


def test_the_docs_list_every_recipe_with_what_is_estimated_today():
    text = (runtime.ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    between = text.split("<!-- recipes -->")[1].split("<!-- end of recipes -->")[0]
    assert between.strip() == publish.list_recipes()
