"""Tests of helpers.checks: each fault is found, and a sound config is left alone."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import checks, estimate, recipes, runtime
from helpers.checks import Advice
from helpers.config import RunConfig, Source, changed
from helpers.errors import ConfigError
from helpers.runtime import Machine

T4 = Machine("local", "cuda", "Tesla T4", 14.7, (7, 5))
A100 = Machine("local", "cuda", "NVIDIA A100", 39.4, (8, 0))
LAPTOP = Machine("local", "cpu", "x86_64, 2 cores", 8.0, None)


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNEBOOK_DTYPE", "TUNEBOOK_GPU_GB", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def demo() -> RunConfig:
    return recipes.load("demo")


def only(advice: list[Advice], field: str) -> Advice:
    """Returns the single fault, which must be of a field."""
    assert [a.field for a in advice] == [field]
    return advice[0]


def advise(config: RunConfig, machine: Machine = T4, **changes: Any) -> list[Advice]:
    """Returns the faults of a changed config; `sft.r` is written `sft__r`, or as is."""
    rows = changes.pop("rows", None)
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    return checks.advise(changed(config, **changes), machine=machine, rows=rows)


# the whole


@pytest.mark.parametrize("machine", [T4, A100, LAPTOP], ids=lambda m: m.name)
def test_the_demo_recipe_is_sound_everywhere(
    demo: RunConfig, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_recipe_has_the_known_faults_of_its_source_on_a_t4(name: str) -> None:
    advice = checks.advise(recipes.load(name), machine=T4)
    assert {a.field for a in advice} == FAULTS.get(name, set())
    assert {a.level for a in advice} <= {"warning"}


def test_a_report_is_one_sentence_a_fault() -> None:
    advice = checks.advise(recipes.load("finetome-llama32-3b-b"), machine=T4)
    assert checks.report(advice) == (
        "warning: sft.warmup_steps: 50 in a run of 40 steps: the rate never reaches "
        "its peak. Set it to 4, or raise the number of steps."
    )


def test_without_a_machine_this_one_is_judged(demo: RunConfig) -> None:
    config = changed(demo, dtype="bfloat16")
    here = runtime.find_machine()
    assert checks.advise(config) == checks.advise(config, machine=here)


def test_errors_come_first_and_are_raised_together(demo: RunConfig) -> None:
    advice = advise(demo, pad_token="eos", sft__max_step=1, lora__rank=1)
    assert [a.level for a in advice] == ["error", "error", "warning"]
    with pytest.raises(ConfigError, match="^lora.rank: .*\nsft.max_step: [^\n]*$"):
        checks.require(advice)
    checks.require(advice[2:])


# names, types and values of the libraries' classes


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sft.learning_rat", "did you mean 'learning_rate'?"),
        ("sft.paking", "did you mean 'packing'?"),
        ("grpo.num_generation", "did you mean 'num_generations'?"),
        ("lora.lora_alfa", "did you mean 'lora_alpha'?"),
        ("inference.temprature", "did you mean 'temperature'?"),
        ("lora.qqqqqq", "LoraConfig has no such field; remove it"),
        ("sft.save_safetensors", "saves nothing but safetensors"),
        ("sft.overwrite_output_dir", "never empties the folder"),
        ("sft.evaluation_strategy", "did you mean 'eval_strategy'?"),
        ("sft.group_by_length", "now train_sampling_strategy='group_by_length'"),
        ("sft.warmup_ratio", "now warmup_steps"),
        ("sft.half_precision_backend", "SFTConfig has no such field; remove it"),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_its_successor(
    demo: RunConfig, key: str, words: str
) -> None:
    advice = only(advise(demo, **{key: 1}), key)
    assert advice.level == "error" and words in advice.text


@pytest.mark.parametrize("key", checks.OWNER)
def test_what_another_field_of_the_config_decides_is_an_error(
    demo: RunConfig, key: str
) -> None:
    for value in (1, None):
        advice = only(advise(demo, **{key: value}), key)
        assert f"the config's own {checks.OWNER[key]} decides it" in advice.text
    assert checks.OWNER[key] in RunConfig.model_fields


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lora.r", "16", "found '16'; expected int"),
        ("lora.r", [8], "found [8]; expected int"),
        ("lora.r", 8.5, "found 8.5; expected int"),
        ("lora.use_dora", "true", "found 'true'; expected bool"),
        ("lora.lora_dropout", "0.1", "expected float"),
        ("lora.target_modules", 3, "found 3; expected"),
        ("sft.per_device_train_batch_size", 2.5, "found 2.5; expected int"),
        ("sft.max_steps", "10", "found '10'; expected int"),
        ("sft.packing", "yes", "found 'yes'; expected bool"),
        ("sft.seed", None, "found None; expected int"),
        ("sft.learning_rate", "2e-4", "found '2e-4'; expected float"),
        ("sft.learning_rate", True, "found True; expected float"),
        ("sft.learning_rate", None, "found None; expected float"),
        ("sft.report_to", 3, "found 3; expected"),
        ("grpo.num_generations", "4", "found '4'; expected int | None"),
        ("inference.temperature", "hot", "found 'hot'; expected float | None"),
        ("inference.max_new_tokens", 12.5, "found 12.5; expected int | None"),
        # numbers out of range
        ("sft.learning_rate", 0, "found 0; expected more than 0"),
        ("sft.learning_rate", -1e-4, "found -0.0001; expected more than 0"),
        ("sft.learning_rate", math.nan, "found nan; expected more than 0"),
        ("sft.learning_rate", math.inf, "found inf; expected more than 0"),
        ("sft.per_device_eval_batch_size", 0, "expected more than 0"),
        ("sft.dataloader_num_workers", -1, "expected 0 (off) or more"),
        ("sft.max_steps", 0, "expected more than 0, or -1"),
        ("sft.adam_beta1", 2, "Invalid beta parameter"),
        ("sft.warmup_steps", -1, "SFTConfig refuses it"),
        ("sft.logging_steps", 1.5, "must be an integer"),
        ("grpo.temperature", 0, "found 0; expected more than 0"),
        ("grpo.max_completion_length", None, "answers need an end"),
        ("grpo.top_k", -5, "found -5; expected 0 (off) or more"),
        ("grpo.min_p", 2.0, "found 2.0; expected 0 to 1"),
        ("grpo.repetition_penalty", 0.0, "found 0.0; expected more than 0"),
        ("grpo.generation_kwargs", {"top_p": 2}, "found 2; expected 0 to 1"),
        ("grpo.generation_kwargs", {"foo": 1}, "GenerationConfig has no such field"),
        ("grpo.generation_kwargs", "x", "expected an object"),
        ("grpo.cache_implementation", "statik", "found 'statik'"),
        ("inference.top_p", 2, "found 2; expected 0 to 1"),
        ("inference.max_new_tokens", 0, "greater than 0"),
        ("lora.lora_alpha", 0, "expected other than 0"),
        ("lora.lora_dropout", 1.0, "expected 0 to less than 1"),
        ("lora.inference_mode", True, "no parameter would be trained"),
        ("lora.runtime_config", {}, "PEFT fails on a setting of lora"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error(
    demo: RunConfig, field: str, value: Any, words: str
) -> None:
    (advice,) = advise(demo, **{field: value})
    assert (advice.level, "\n" in advice.text) == ("error", False)
    assert field.startswith(advice.field) and words in advice.text


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("sft.optim", "adamw_8bits", "adamw_8bit"),
        ("sft.optim", "adamw", "adamw_torch"),
        ("sft.lr_scheduler_type", "cosin", "cosine"),
        ("sft.save_strategy", "step", "steps"),
        ("sft.eval_strategy", "epochs", "epoch"),
        ("sft.loss_type", "chunkd_nll", "chunked_nll"),
        ("sft.packing_strategy", "wraped", "wrapped"),
        ("sft.report_to", "wandbb", "wandb"),
        ("grpo.loss_type", "dappo", "dapo"),
        ("grpo.importance_sampling_level", "tokens", "token"),
        ("grpo.scale_rewards", "groups", "group"),
        ("lora.bias", "lora_olny", "lora_only"),
        ("lora.init_lora_weights", "pisa", "pissa"),
    ],
)
def test_a_misspelt_choice_is_an_error_with_the_nearest(
    demo: RunConfig, field: str, value: str, meant: str
) -> None:
    advice = only(advise(demo, **{field: value}), field)
    assert advice.level == "error"
    assert advice.text.startswith(f"found {value!r}; did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora.init_lora_weights", "pissa_niter_4"),
        ("lora.init_lora_weights", False),
        ("lora.layers_to_transform", 3),
        ("lora.target_modules", r".*\.(q|v)_proj"),
        ("lora.target_modules", ["self_attn.q_proj", "v_proj"]),
        ("lora.target_modules", "all-linear"),
        ("lora.target_modules", None),
        ("lora.lora_dropout", 0),
        ("sft.learning_rate", 1e-4),
        ("sft.eval_steps", None),
        ("sft.report_to", ["wandb", "tensorboard"]),
        ("sft.report_to", "all"),
        ("sft.gradient_checkpointing_kwargs", {"use_reentrant": False}),
        ("sft.lr_scheduler_kwargs", {}),
        ("grpo.scale_rewards", False),
        ("grpo.min_p", None),
        ("grpo.top_k", 0),
        ("grpo.unsloth_num_chunks", 1),
        ("inference.top_p", 1),
        ("inference.stop_strings", ["Q:"]),
        ("inference.suppress_tokens", [1, 2]),
    ],
)
def test_a_value_that_the_class_takes_is_sound(
    demo: RunConfig, field: str, value: Any
) -> None:
    assert [a for a in advise(demo, **{field: value}) if a.level == "error"] == []


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"sft.lr_scheduler_type": "cosine_with_min_lr"}, "sft", "min_lr_rate"),
        ({"sft.lr_scheduler_kwargs": {"min_lr": 0.1}}, "sft", "argument 'min_lr'"),
        (
            {"sft.save_steps": 30, "sft.load_best_model_at_end": True},
            "sft.load_best_model_at_end",
            "30, which is not a round multiple of 40",
        ),
        (
            {"lora.layers_to_transform": [1], "lora.target_modules": "all-linear"},
            "lora.layers_to_transform",
            "cannot be used when `target_modules`",
        ),
        (
            {"lora.target_modules": [], "lora.target_parameters": ["q_proj.weight"]},
            "lora",
            "name modules in target_modules",
        ),
    ],
)
def test_values_that_do_not_go_together_are_an_error(
    demo: RunConfig, changes: dict[str, Any], field: str, words: str
) -> None:
    (advice,) = advise(demo, **changes)
    assert advice.field.startswith(field) and advice.level == "error"
    assert words in advice.text and "\n" not in advice.text


@pytest.mark.parametrize(
    "values",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "steps_per_generation": 2},
        {"per_device_train_batch_size": 2, "generation_batch_size": 6},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_a_group_that_does_not_divide_the_batch_is_an_error_as_for_trl(
    demo: RunConfig, tmp_path: Path, values: dict[str, int]
) -> None:
    from trl import GRPOConfig

    values = {"num_generations": 4, **values}
    try:
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **values)
        refused = False
    except ValueError:
        refused = True
    advice = advise(changed(demo, grpo=values))
    assert bool(advice) is refused
    assert all(a.level == "error" and a.field.startswith("grpo") for a in advice)


@pytest.mark.parametrize("value", [1.0, "2e-4"])
def test_a_stage_that_is_not_run_is_not_judged(demo: RunConfig, value: Any) -> None:
    assert advise(demo, stages=["sft"], grpo__learning_rate=value) == []
    assert advise(demo, stages=["grpo"], sft__max_steps=value) == []


def test_no_default_of_a_class_is_written_down_a_second_time() -> None:
    """A copy goes wrong when the library changes: `config.complete` has them all."""
    names = set().union(*(checks.hints(group) for group in ("sft", "grpo", "lora")))
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


# names of ours


def test_a_template_format_or_reward_that_does_not_exist_is_an_error(
    demo: RunConfig,
) -> None:
    only(advise(demo, template="lama-2"), "template")
    source = Source(path="a.jsonl", format="alpacca")
    assert "mean 'alpaca'" in only(advise(demo, data__test=source), "data.test").text
    rewards = {"correctness": 1.0, "corectness": 1.0}
    assert "no reward 'corectness'" in only(advise(demo, rewards=rewards), "rewards")[2]


@pytest.mark.parametrize(
    ("weights", "warned"),
    [({"correctness": 1.0, "number_present": 0.5}, 0), ({"soft_format": 1.0}, 1)],
)
def test_rewards_that_may_prefer_a_wrong_answer_are_warned_of(
    demo: RunConfig, weights: dict[str, float], warned: int
) -> None:
    assert [a.field for a in advise(demo, rewards=weights)] == ["rewards"] * warned


# the model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", ["q_prj", "v_proj"]),
        ("modules_to_save", ["lm_hed"]),
        ("rank_pattern", {"q_prj": 4}),
        ("exclude_modules", ["mpl"]),
        ("layers_to_transform", [30]),
        ("init_lora_weights", "eva"),
        ("lora_bias", True),
        ("task_type", "SEQ_CLS"),
        ("layer_replication", [[0, 3], [2, 4]]),
    ],
)
def test_lora_that_does_not_fit_or_could_not_come_back_is_an_error(
    demo: RunConfig, field: str, value: Any
) -> None:
    advice = only(advise(demo, **{f"lora__{field}": value}), f"lora.{field}")
    assert advice.level == "error"
    assert field != "target_modules" or "did you mean 'q_proj'?" in advice.text


def test_modules_and_positions_of_a_local_model_are_read_from_its_folder(
    demo: RunConfig, tiny_model_folder: Path
) -> None:
    config = changed(demo, model=str(tiny_model_folder), max_length=2048)
    assert advise(config) == []
    only(advise(config, max_length=2049), "max_length")
    only(advise(config, lora__target_modules=["c_attn"]), "lora.target_modules")


def test_a_model_of_unknown_architecture_is_judged_by_the_rest(demo: RunConfig) -> None:
    changes = {"model": "somebody/unheard-of", "lora__target_modules": ["c_attn"]}
    only(advise(demo, **changes, pad_token="eos"), "pad_token")


def test_lora_on_the_output_head_needs_the_loss_that_trl_has_for_it(
    demo: RunConfig,
) -> None:
    head = changed(demo, lora__target_modules=["q_proj", "lm_head"])
    assert "'nll'" in only(advise(head), "sft.loss_type").text
    assert advise(head, sft__loss_type="nll") == []


def test_a_copy_that_cannot_be_made_is_an_error_where_it_is_asked_for(
    demo: RunConfig,
) -> None:
    dora = changed(demo, lora__use_dora=True)
    assert advise(dora) == []
    advice = only(advise(dora, sampler="copy"), "sampler")
    assert "lora_magnitude_vector" in advice.text and "'model'" in advice.text


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 8193},
        {"grpo.max_completion_length": 8193},
        {"grpo.max_completion_length": 8000, "max_prompt_length": 193},
        {"evaluation.max_new_tokens": 8193},
        {"inference.max_new_tokens": 8193},
    ],
    ids=str,
)
def test_more_tokens_than_the_model_has_positions_are_an_error(
    demo: RunConfig, changes: dict[str, Any]
) -> None:
    advice = only(advise(demo, **changes), next(iter(changes)))
    assert advice.level == "error" and "8193 tokens in a row" in advice.text
    less = {name: value - 1 for name, value in changes.items()}
    assert advise(demo, **less) == []


# the machine


def test_padding_with_the_end_of_an_answer_is_warned_of(demo: RunConfig) -> None:
    for token in ("eos", "</s>", "<|im_end|>", "<|eot_id|>"):
        advice = only(advise(demo, pad_token=token), "pad_token")
        assert "would never learn to stop" in advice.text
    for token in ("<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>"):
        assert advise(demo, pad_token=token) == []


def test_a_dtype_without_units_is_warned_of_with_what_is_used(
    demo: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = only(advise(demo, T4, dtype="bfloat16"), "dtype").text
    assert "float16 is used on Tesla T4: compute capability 7.5 has no" in text
    assert "float32 is used" in only(advise(demo, LAPTOP, dtype="bfloat16"), "dtype")[2]
    assert advise(demo, A100, dtype="bfloat16") == []
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float16")
    text = only(advise(demo, A100, dtype="bfloat16"), "dtype").text
    assert "TUNEBOOK_DTYPE=float16 asks for it" in text


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize(
    ("machine", "right", "wrong"),
    [
        (T4, {"fp16": True, "bf16": False}, {"bf16": True, "fp16": False}),
        (A100, {"bf16": True}, {"fp16": True, "bf16": False}),
        (LAPTOP, {"bf16": False, "fp16": False}, {"fp16": True, "bf16": True}),
    ],
)
def test_a_flag_that_conflicts_with_the_machine_is_an_error(
    demo: RunConfig, stage: str, machine: Machine, right: Any, wrong: Any
) -> None:
    for flag, value in [*right.items(), ("bf16", None)]:
        assert advise(demo, machine, **{f"{stage}.{flag}": value}) == []
    for flag, value in wrong.items():
        advice = advise(demo, machine, **{f"{stage}.{flag}": value})
        text = only(advice, f"{stage}.{flag}").text
        assert "Remove it: dtype and the machine decide." in text


def test_an_engine_that_needs_another_kernel_is_warned_of(
    demo: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    advice = only(advise(demo, engine="transformers"), "engine")
    assert advice.level == "warning" and "restart the kernel" in advice.text


# the schedule


@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 11, 0.5, 0.9, 0.91, 0.99])
def test_it_warns_exactly_when_the_schedule_never_reaches_its_peak(
    demo: RunConfig, warmup: float
) -> None:
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
        fields = [f"{stage}.warmup_steps"] * (max(rates) < 1.0)
        assert [a.field for a in advise(demo, **changes)] == fields


def test_epochs_are_steps_once_the_rows_are_known() -> None:
    dolly = recipes.load("dolly-llama32-3b")
    few = 49 * 16  # a step is 2 x 8 rows, the warm-up 50 steps
    known = FAULTS["dolly-llama32-3b"]
    assert {a.field for a in advise(dolly, rows=few)} == known | {"sft.warmup_steps"}
    for changes in ({"num_train_epochs": 2}, {"lr_scheduler_type": "constant"}):
        config = changed(dolly, sft=dolly.sft | changes)
        assert {a.field for a in advise(config, rows=few)} == known


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(10, 4, 1, 2), (100, 2, 8, 1), (101, 2, 8, 3), (7, 8, 4, 1.5), (64, 4, 4, 0.3)],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    tmp_path: Path, rows: int, batch: int, accumulation: int, epochs: float
) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    values = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
    }
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **values)
    trainer = Trainer(
        torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 0.0}] * rows
    )
    loader = trainer.get_train_dataloader()
    steps = trainer.set_initial_training_values(arguments, loader)[-1]
    config = changed(recipes.load("demo"), sft=values)
    assert estimate.count_steps(config, "sft", rows) == steps


@pytest.mark.parametrize(
    ("stage", "low", "high", "words"),
    [
        ("sft", 1e-6, 5e-3, "1e-05 to 0.0005 usual for LoRA (QLoRA, arXiv:2305.14314"),
        ("grpo", 1e-7, 5e-4, "1e-06 to 5e-05 usual for LoRA (TRL's default"),
    ],
)
def test_a_rate_ten_times_outside_the_usual_range_is_warned_of(
    demo: RunConfig, stage: str, low: float, high: float, words: str
) -> None:
    field = f"{stage}.learning_rate"
    assert advise(demo, **{field: low}) == advise(demo, **{field: high}) == []
    for rate in (0.9 * low, 1.02 * high):
        assert words in only(advise(demo, **{field: rate}), field).text


def test_too_few_steps_for_one_epoch_say_how_many_rows_are_seen(
    demo: RunConfig,
) -> None:
    stock = recipes.load("finetome-llama32-1b")
    assert only(advise(stock, rows=2000), "sft.max_steps").text == (
        "60 steps of 8 rows see 480 of 2000 (24 %). One epoch needs 250; or take fewer "
        "rows by data.train_rows."
    )
    assert advise(stock, rows=480) == []
    only(advise(stock, rows=481), "sft.max_steps")
    # a packed row holds several conversations
    assert advise(demo, rows=10_000) == []
    only(advise(demo, rows=10_000, sft__packing=False), "sft.max_steps")


# cut answers


@pytest.mark.parametrize(
    "ends", [[], [256, 256], [100] * 99 + [5000]], ids=["none", "fit", "one in 100"]
)
def test_few_cut_answers_are_sound(ends: list[int]) -> None:
    assert checks.check_lengths(ends, 256) is None


@pytest.mark.parametrize("count", [1, 10, 99, 100, 101, 1000])
def test_the_length_offered_is_the_least_multiple_of_64_that_will_do(
    count: int,
) -> None:
    ends = [1000 + 3 * n for n in range(count)]
    advice = checks.check_lengths(ends, 16)
    assert advice is not None and f"cut {count} of {count} answers" in advice.text
    enough = int(advice.text.split("Set it to ")[1].split(",")[0])
    assert enough % 64 == 0
    assert checks.check_lengths(ends, enough) is None
    assert checks.check_lengths(ends, enough - 64) is not None
