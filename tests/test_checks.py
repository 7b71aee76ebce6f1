"""Tests of helpers.checks: each fault is found, and a sound config is left alone."""

import ast
import math
import sys
from pathlib import Path

import pytest

from helpers import checks, recipes
from helpers.config import RunConfig, changed, library_fields
from helpers.errors import ConfigError
from tests.test_runtime import A100, LAPTOP, T4


@pytest.fixture
def demo():
    return recipes.load("demo")


def advise(config, machine=T4, **changes):
    """Returns the faults of a changed config; `sft.r` is written `sft__r`, or as is."""
    rows = changes.pop("rows", None)
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    return checks.advise(changed(config, **changes), machine=machine, rows=rows)


@pytest.mark.parametrize("machine", [T4, A100, LAPTOP], ids=lambda m: m.name)
def test_the_demo_recipe_is_sound_everywhere(demo, machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checks.advise(demo, machine=machine, rows=2424) == []
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "finetome-llama32-3b-b": {"sft.warmup_steps"},
    "finetome-llama32-3b-c": {"sft.warmup_steps"},
    "dolly-llama32-3b": {"pad_token", "dtype"},
    "dolly-llama2-7b": {"pad_token", "dtype"},
    "guanaco-llama2-7b": {"pad_token"},
}


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_has_the_known_faults_of_its_source_on_a_t4(name):
    advice = checks.advise(recipes.load(name), machine=T4)
    assert {a.field for a in advice} == FAULTS.get(name, set())
    assert {a.level for a in advice} <= {"warning"}


def test_errors_come_first_and_are_raised_together(demo):
    advice = advise(demo, pad_token="eos", sft__max_step=1, lora__rank=1)
    assert [a.level for a in advice] == ["error", "error", "warning"]
    with pytest.raises(ConfigError, match="^lora.rank: .*\nsft.max_step: [^\n]*$"):
        checks.require(advice)
    checks.require(advice[2:])
    assert checks.report(advice[2:]).startswith("warning: pad_token: EOS would never")
    assert checks.report([]) == "The config is sound."


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sft.learning_rat", 1, "no such field; did you mean 'learning_rate'?"),
        ("grpo.num_generation", 1, "did you mean 'num_generations'?"),
        ("lora.lora_alfa", 1, "did you mean 'lora_alpha'?"),
        ("inference.temprature", 1, "did you mean 'temperature'?"),
        ("grpo.generation_kwargs", {"foo": 1}, "GenerationConfig has no such field"),
        ("sft.evaluation_strategy", "no", "did you mean 'eval_strategy'?"),
        ("sft.save_safetensors", True, "SFTConfig has no such field; remove it"),
        ("sft.overwrite_output_dir", True, "SFTConfig has no such field; remove it"),
        # types
        ("lora.r", "16", "found '16'; expected a valid integer"),
        ("lora.r", 8.5, "found 8.5; expected a valid integer"),
        ("lora.use_dora", "true", "expected a valid boolean"),
        ("lora.target_modules", 3, "found 3; expected"),
        ("lora.bias", "lora_olny", "expected 'none', 'all' or 'lora_only'"),
        ("sft.per_device_train_batch_size", 2.5, "expected a valid integer"),
        ("sft.learning_rate", "2e-4", "expected a valid number"),
        ("sft.learning_rate", None, "found None; expected a valid number"),
        # taken in silence
        ("sft.learning_rate", 0, "found 0; expected more than 0"),
        ("sft.learning_rate", math.nan, "found nan; expected more than 0"),
        ("sft.learning_rate", math.inf, "found inf; expected more than 0"),
        ("sft.max_steps", 0, "expected more than 0, or -1"),
        ("sft.per_device_train_batch_size", 0, "expected more than 0"),
        ("grpo.temperature", 0, "found 0; expected more than 0"),
        ("grpo.per_device_eval_batch_size", 0, "found 0; expected more than 0"),
        ("sft.report_to", None, "found None; expected none, or names of trackers"),
        ("sft.logging_first_step", False, "expected true: the report needs its loss"),
        ("grpo.save_only_model", True, "expected no value: training resumes"),
        ("sft.resume_from_checkpoint", "a", "expected no value: training resumes"),
        ("grpo.max_completion_length", None, "found None; expected more than 0"),
        ("inference.temperature", "hot", "found 'hot'; expected more than 0"),
        ("lora.lora_alpha", 0, "found 0; expected more than 0"),
        ("lora.lora_alpha", -16, "found -16; expected more than 0"),
        ("inference.top_p", 2.0, "found 2.0; expected 0 to 1"),
        ("inference.top_p", "x", "found 'x'; expected 0 to 1"),
        ("grpo.beta", -1, "found -1; expected 0 or more"),
        ("sft.weight_decay", -0.1, "expected 0 or more"),
        ("max_length", 10**9, "1000000000 tokens in a row, the model has 8192"),
        ("lora.lora_dropout", 1.0, "expected 0 to less than 1"),
        ("lora.inference_mode", True, "no parameter would be trained"),
        ("lora.task_type", "SEQ_CLS", "expected CAUSAL_LM"),
        # refused by the class itself
        ("sft.optim", "adamw_8bits", "adamw_8bits is not a valid OptimizerNames"),
        ("sft.lr_scheduler_type", "cosin", "cosin is not a valid SchedulerType"),
        ("sft.save_strategy", "step", "step is not a valid SaveStrategy"),
        ("sft.warmup_steps", -1, "SFTConfig: "),
        ("inference.max_new_tokens", 0, "greater than 0"),
        # refused by PEFT for this model, or could not come back
        ("lora.target_modules", ["q_prj", "v_proj"], "did you mean 'q_proj'?"),
        ("lora.modules_to_save", ["lm_hed"], "lm_hed"),
        ("lora.rank_pattern", {"q_prj": 4}, "q_prj"),
        ("lora.layers_to_transform", [30], "30"),
        ("lora.init_lora_weights", "eva", "eva"),
        ("lora.lora_bias", True, "lora_bias"),
        # names of ours
        ("template", "lama-2", "lama-2"),
        ("rewards", {"correctness": 1.0, "corectness": 1.0}, "no reward 'corectness'"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error(demo, field, value, words):
    (advice,) = advise(demo, **{field: value})
    assert (advice.level, "\n" in advice.text) == ("error", False)
    assert advice.field == field and words in advice.text


@pytest.mark.parametrize("key", checks.OWNER)
def test_what_another_field_of_the_config_decides_is_an_error(demo, key):
    for value in (1, None):
        (advice,) = advise(demo, **{key: value})
        assert f"the config's own {checks.OWNER[key]} decides it" in advice.text
    assert checks.OWNER[key] in RunConfig.model_fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora.init_lora_weights", "pissa_niter_4"),
        ("lora.init_lora_weights", False),
        ("lora.target_modules", r".*\.(q|v)_proj"),
        ("lora.target_modules", "all-linear"),
        ("lora.target_modules", None),
        ("lora.lora_dropout", 0),
        ("sft.learning_rate", 1e-4),
        ("sft.eval_steps", None),
        ("sft.report_to", ["wandb", "tensorboard"]),
        ("sft.gradient_checkpointing_kwargs", {"use_reentrant": False}),
        ("grpo.scale_rewards", False),
        ("grpo.min_p", None),
        ("grpo.unsloth_num_chunks", 1),
        ("inference.top_p", 1),
        ("inference.stop_strings", ["Q:"]),
    ],
)
def test_a_value_that_the_class_takes_is_sound(demo, field, value):
    assert [a for a in advise(demo, **{field: value}) if a.level == "error"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sft.load_best_model_at_end": True, "sft.save_steps": 30},
            "30, which is not a round multiple of 40",
        ),
        (
            {"lora.layers_to_transform": [1], "lora.target_modules": "all-linear"},
            "cannot be used when `target_modules`",
        ),
        (
            {"grpo.num_generations": 4, "grpo.per_device_train_batch_size": 3},
            "divisible",
        ),
    ],
)
def test_values_that_do_not_go_together_are_an_error(demo, changes, words):
    (advice,) = advise(demo, **changes)
    assert (advice.level, advice.field) == ("error", next(iter(changes)))
    assert words in advice.text and "\n" not in advice.text


def test_a_trainer_built_before_can_still_train_after_advice(demo, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(torch.nn.Linear(1, 1), TrainingArguments(tmp_path, use_cpu=True))
    assert advise(demo) == []
    assert trainer.accelerator.distributed_type == "NO"


@pytest.mark.parametrize("value", [1.0, "2e-4"])
def test_a_stage_that_is_not_run_is_not_judged(demo, value):
    assert advise(demo, stages=["sft"], grpo__learning_rate=value) == []
    assert advise(demo, stages=["grpo"], sft__max_steps=value) == []


def test_no_default_of_a_class_is_written_down_a_second_time():
    """A copy goes wrong when the library changes: `config.complete` has them all."""
    names = {name for g in ("sft", "grpo", "lora") for name in library_fields(g)}
    copies = []
    for path in sorted(Path(checks.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="get"),
                    args=[ast.Constant(value=str(name)), ast.Constant(value=value)],
                ) if name in names and value is not None:
                    copies.append(f"{path.name}:{node.lineno}: {name}={value!r}")
    assert copies == []


def test_modules_and_positions_of_a_local_model_are_read_from_its_folder(
    demo, tiny_model_folder
):
    config = changed(demo, model=str(tiny_model_folder), max_length=2048)
    assert advise(config) == []
    assert advise(config, max_length=2049)[0].field == "max_length"
    wrong = advise(config, lora__target_modules=["c_attn"])
    assert wrong[0].field == "lora.target_modules"
    # of a model that is not known nothing is said
    assert advise(config, model="a/b", lora__target_modules=["c_attn"]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 8193},
        {"grpo.max_completion_length": 8000, "max_prompt_length": 193},
        {"evaluation.max_new_tokens": 8193},
        {"inference.max_new_tokens": 8193},
    ],
    ids=str,
)
def test_more_tokens_than_the_model_has_positions_are_an_error(demo, changes):
    (advice,) = advise(demo, **changes)
    assert (advice.level, advice.field) == ("error", next(iter(changes)))
    assert "8193 tokens in a row" in advice.text
    assert advise(demo, **{name: value - 1 for name, value in changes.items()}) == []


@pytest.mark.parametrize(
    ("changes", "machine", "field", "words"),
    [
        ({"pad_token": "eos"}, T4, "pad_token", "EOS would never be learnt"),
        ({"dtype": "bfloat16"}, T4, "dtype", "float16 is used on Tesla T4: compute ca"),
        ({"dtype": "bfloat16"}, LAPTOP, "dtype", "float32 is used"),
        ({"rewards": {"soft_format": 1.0}}, T4, "rewards", "as much as a right one"),
        ({"sft.learning_rate": 0.9e-6}, T4, "sft.learning_rate", "1e-05 to 0.0005"),
        ({"grpo.learning_rate": 5.1e-4}, T4, "grpo.learning_rate", "1e-06 to 5e-05"),
        ({"sft.eval_strategy": "no"}, T4, "sft.eval_strategy", "keeps the last"),
    ],
)
def test_what_will_disappoint_is_warned_of(demo, changes, machine, field, words):
    (advice,) = advise(demo, machine, **changes)
    assert (advice.level, advice.field) == ("warning", field)
    assert words in advice.text


def test_what_will_do_is_not_warned_of(demo):
    rates = {"sft.learning_rate": 1e-6, "grpo.learning_rate": 5e-4}
    rewards = {"correctness": 1.0, "number_present": 0.5}
    changes = {"pad_token": "<|endoftext|>", "dtype": "bfloat16", "rewards": rewards}
    assert advise(demo, A100, **changes, **rates) == []
    timed = {"grpo.max_steps": 4, "grpo.warmup_steps": 9, "grpo_minutes": 5}
    assert advise(demo, **timed) == []


def test_an_engine_that_needs_another_kernel_is_warned_of(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    (advice,) = advise(demo, engine="transformers")
    assert advice.level == "warning" and "restart the kernel" in advice.text


@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 11, 0.5, 0.9, 0.91, 0.99])
def test_it_warns_exactly_when_the_schedule_never_reaches_its_peak(demo, warmup):
    import torch
    from transformers import TrainingArguments, get_scheduler

    arguments = TrainingArguments(warmup_steps=warmup, use_cpu=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        "constant_with_warmup", optimizer, arguments.get_warmup_steps(10), 10
    )
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    for stage in ("sft", "grpo"):
        changes = {f"{stage}.max_steps": 10, f"{stage}.warmup_steps": warmup}
        changes["grpo_minutes"] = None  # by which the schedule would be stretched
        fields = [f"{stage}.warmup_steps"] * (max(rates) < 1.0)
        assert [a.field for a in advise(demo, **changes)] == fields


def test_epochs_are_steps_once_the_rows_are_known():
    dolly = recipes.load("dolly-llama32-3b")
    few = 49 * 16  # a step is 2 x 8 rows, the warm-up 50 steps
    known = FAULTS["dolly-llama32-3b"]
    assert {a.field for a in advise(dolly, rows=few)} == known | {"sft.warmup_steps"}
    for changes in ({"num_train_epochs": 2}, {"lr_scheduler_type": "constant"}):
        config = changed(dolly, sft=dolly.sft | changes)
        assert {a.field for a in advise(config, rows=few)} == known


@pytest.mark.parametrize("count", [1, 10, 99, 100, 101, 1000])
def test_the_length_offered_is_the_least_multiple_of_64_that_will_do(count):
    ends = [1000 + 3 * n for n in range(count)]
    advice = checks.check_lengths(ends, 16)
    assert advice is not None and f"cut {count} of {count} answers" in advice.text
    enough = int(advice.text.split("Set it to ")[1].split(",")[0])
    assert enough % 64 == 0
    assert checks.check_lengths(ends, enough) is None
    assert checks.check_lengths(ends, enough - 64) is not None
    assert checks.check_lengths([], 256) is None
