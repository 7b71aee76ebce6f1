"""Tests of helpers.checks: each fault is found, and a sound config is left alone."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest

from helpers import checks, estimate, recipes, runtime
from helpers.checks import Advice
from helpers.config import RunConfig, changed
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


def count_steps(values: dict[str, Any], rows: int) -> int | None:
    """Returns the steps of training with these values, the rest TRL's defaults."""
    config = changed(recipes.load("demo"), sft=values)
    return estimate.count_steps(config, "sft", rows)


def only(advice: list[Advice], field: str) -> Advice:
    """Returns the single fault, which must be of a field."""
    assert [a.field for a in advice] == [field]
    return advice[0]


def advise(config: RunConfig, machine: Machine = T4, **changes: Any) -> list[Advice]:
    rows = changes.pop("rows", None)
    return checks.advise(changed(config, **changes), machine=machine, rows=rows)


# ---------------------------------------------------------------- the recipes


@pytest.mark.parametrize("machine", [T4, A100, LAPTOP], ids=lambda m: m.name)
def test_the_demo_recipe_is_sound_everywhere(demo: RunConfig, machine: Machine) -> None:
    assert checks.advise(demo, machine=machine, rows=2424) == []


FAULTS = {
    "demo": set(),
    "demo-gpu": set(),
    "finetome-llama32-1b": set(),
    "finetome-llama32-3b-a": set(),
    "finetome-llama32-3b-b": {"sft.warmup_steps"},
    "finetome-llama32-3b-c": {"sft.warmup_steps"},
    "gsm8k-grpo-llama32-1b": set(),
    "dolly-llama32-3b": {"pad_token", "dtype"},
    "dolly-llama2-7b": {"pad_token", "dtype"},
    "guanaco-llama2-7b": {"pad_token"},
}


def test_the_table_of_faults_names_every_recipe() -> None:
    assert set(FAULTS) == set(recipes.read_file())


@pytest.mark.parametrize("name", FAULTS)
def test_a_recipe_has_the_known_faults_of_its_source_on_a_t4(name: str) -> None:
    found = checks.advise(recipes.load(name), machine=T4)
    assert {advice.field for advice in found} == FAULTS[name]
    assert {advice.level for advice in found} <= {"warning"}


def test_the_warm_up_of_50_in_40_steps_is_said_in_words() -> None:
    found = checks.advise(recipes.load("finetome-llama32-3b-b"), machine=T4)
    assert checks.report(found) == (
        "warning: sft.warmup_steps: 50 in a run of 40 steps: the rate never reaches "
        "its peak. Set it to 4, or raise the number of steps."
    )


def test_without_a_machine_it_is_this_one_that_is_judged(demo: RunConfig) -> None:
    config = changed(demo, dtype="bfloat16")
    here = runtime.find_machine()
    assert checks.advise(config) == checks.advise(config, machine=here)


# ---------------------------------------------------------------- what is done with it


WARNING = Advice("warning", "pad_token", "no good.")
ERROR = Advice("error", "sft.max_step", "no field.")


def test_errors_come_first(demo: RunConfig) -> None:
    found = advise(demo, pad_token="eos", sft__max_step=1, lora__rank=1)
    assert [advice.level for advice in found] == ["error", "error", "warning"]


def test_errors_are_raised_together() -> None:
    with pytest.raises(
        ConfigError, match="^sft.max_step: no field.\nlora.rank: none.$"
    ):
        checks.require(
            [ERROR, WARNING, ERROR._replace(field="lora.rank", text="none.")]
        )


def test_warnings_alone_are_not_raised() -> None:
    assert checks.require([WARNING]) is None


# ---------------------------------------------------------------- warm-up


def warns_of_warmup(config: RunConfig, **changes: Any) -> bool:
    found = advise(config, **changes)
    return "sft.warmup_steps" in {advice.field for advice in found}


@pytest.mark.parametrize("warmup", [0, 1, 5, 9, 10, 11, 0.0, 0.5, 0.9, 0.91, 0.99])
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
    warned = warns_of_warmup(demo, sft__max_steps=10, sft__warmup_steps=warmup)
    assert warned is (max(rates) < 1.0)


def test_a_warm_up_of_grpo_is_checked_too(demo: RunConfig) -> None:
    found = advise(demo, grpo__max_steps=10, grpo__warmup_steps=10)
    assert "10 in a run of 10 steps" in only(found, "grpo.warmup_steps").text


def test_epochs_are_steps_once_the_rows_are_known() -> None:
    dolly = recipes.load("dolly-llama32-3b")
    few = 49 * 16  # a step is 2 x 8 rows, the warm-up 50 steps
    assert not warns_of_warmup(dolly)
    assert warns_of_warmup(dolly, rows=few)
    assert not warns_of_warmup(dolly, rows=few, sft__num_train_epochs=2)


def test_a_constant_rate_has_no_warm_up_to_warn_of(demo: RunConfig) -> None:
    changes = {"sft__warmup_steps": 500, "sft__lr_scheduler_type": "constant"}
    assert not warns_of_warmup(demo, **changes)


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
    counted = trainer.set_initial_training_values(
        arguments, trainer.get_train_dataloader()
    )
    assert count_steps(values, rows) == counted[-1]


def test_every_process_takes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert count_steps(values, 80) == 10


# ---------------------------------------------------------------- pad and dtype


@pytest.mark.parametrize("token", ["eos", "</s>", "<|im_end|>", "<|eot_id|>"])
def test_padding_with_the_end_of_an_answer_is_warned_of(
    demo: RunConfig, token: str
) -> None:
    advice = only(advise(demo, pad_token=token), "pad_token")
    assert advice.level == "warning"
    assert "would never learn to stop" in advice.text


@pytest.mark.parametrize(
    "token", [None, "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>"]
)
def test_padding_with_another_token_is_sound(
    demo: RunConfig, token: str | None
) -> None:
    assert advise(demo, pad_token=token) == []


def test_bf16_on_a_t4_becomes_fp16_and_says_why(demo: RunConfig) -> None:
    advice = only(advise(demo, dtype="bfloat16"), "dtype")
    assert advice.level == "warning"
    assert "float16 is used on Tesla T4: compute capability 7.5 has no" in advice.text
    assert "Set it to auto" in advice.text


def test_bf16_on_a_cpu_becomes_fp32(demo: RunConfig) -> None:
    advice = only(advise(demo, LAPTOP, dtype="bfloat16"), "dtype")
    assert "float32 is used on x86_64, 2 cores" in advice.text


def test_bf16_on_a_gpu_that_has_it_is_sound(demo: RunConfig) -> None:
    assert advise(demo, A100, dtype="bfloat16") == []


def test_a_dtype_forced_by_the_environment_is_taken_into_account(
    demo: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBOOK_DTYPE", "float16")
    advice = only(advise(demo, A100, dtype="bfloat16"), "dtype")
    assert "TUNEBOOK_DTYPE=float16 asks for it" in advice.text


@pytest.mark.parametrize(
    ("machine", "stage", "flag", "value"),
    [
        (T4, "sft", "bf16", True),
        (T4, "grpo", "bf16", True),
        (T4, "sft", "fp16", False),
        (A100, "sft", "fp16", True),
        (A100, "sft", "bf16", False),
        (LAPTOP, "sft", "fp16", True),
        (LAPTOP, "grpo", "bf16", True),
    ],
)
def test_a_flag_that_fights_with_the_machine_is_an_error(
    demo: RunConfig, machine: Machine, stage: str, flag: str, value: bool
) -> None:
    found = advise(demo, machine, **{f"{stage}__{flag}": value})
    advice = only(found, f"{stage}.{flag}")
    assert advice.level == "error"
    assert "Remove it: dtype and the machine decide." in advice.text


@pytest.mark.parametrize(
    ("machine", "flag", "value"),
    [(T4, "fp16", True), (T4, "bf16", False), (A100, "bf16", True)]
    + [(LAPTOP, "bf16", False), (LAPTOP, "fp16", False), (T4, "bf16", None)],
)
def test_a_flag_that_says_what_the_machine_does_is_sound(
    demo: RunConfig, machine: Machine, flag: str, value: bool | None
) -> None:
    assert advise(demo, machine, **{f"sft__{flag}": value}) == []


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("stage", "rate"),
    [("sft", 9e-7), ("sft", 5.1e-3), ("grpo", 9e-8), ("grpo", 5.1e-4)],
)
def test_a_rate_ten_times_outside_the_usual_range_is_warned_of(
    demo: RunConfig, stage: str, rate: float
) -> None:
    found = advise(demo, **{f"{stage}__learning_rate": rate})
    advice = only(found, f"{stage}.learning_rate")
    assert advice.level == "warning"
    assert f"{rate:g} is more than ten times outside" in advice.text


@pytest.mark.parametrize(
    ("stage", "rate"),
    [("sft", 1e-6), ("sft", 5e-3), ("grpo", 1e-7), ("grpo", 5e-4)],
)
def test_a_rate_at_the_limit_is_left_alone(
    demo: RunConfig, stage: str, rate: float
) -> None:
    assert advise(demo, **{f"{stage}__learning_rate": rate}) == []


@pytest.mark.parametrize(
    ("stage", "words"),
    [("sft", "1e-05 to 0.0005 .*arXiv:2305.14314"), ("grpo", "1e-06 to 5e-05 .*TRL")],
)
def test_the_usual_range_is_quoted_with_its_source(
    demo: RunConfig, stage: str, words: str
) -> None:
    import re

    found = advise(demo, **{f"{stage}__learning_rate": 1.0})
    assert re.search(words, found[0].text)


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan")])
def test_a_rate_that_is_not_above_0_is_an_error(demo: RunConfig, rate: float) -> None:
    advice = only(advise(demo, sft__learning_rate=rate), "sft.learning_rate")
    assert advice == ("error", "sft.learning_rate", advice.text)
    assert advice.text == f"found {rate}; expected more than 0"


def test_a_temperature_of_0_is_an_error_since_answers_would_be_alike(
    demo: RunConfig,
) -> None:
    advice = only(advise(demo, grpo__temperature=0), "grpo.temperature")
    assert advice == ("error", "grpo.temperature", "found 0; expected more than 0")


@pytest.mark.parametrize("value", ["2e-4", True, [1e-4], None])
def test_a_rate_that_is_no_number_is_an_error(demo: RunConfig, value: Any) -> None:
    advice = only(advise(demo, sft__learning_rate=value), "sft.learning_rate")
    assert advice.text == f"found {value!r}; expected float"


def test_answers_without_an_end_are_an_error(demo: RunConfig) -> None:
    found = advise(demo, grpo__max_completion_length=None)
    assert only(found, "grpo.max_completion_length").level == "error"


def test_evaluation_steps_may_be_left_to_the_trainer(demo: RunConfig) -> None:
    assert advise(demo, sft__eval_steps=None) == []


@pytest.mark.parametrize("value", [1.0, "2e-4"])
def test_a_stage_that_is_not_run_is_not_judged(demo: RunConfig, value: Any) -> None:
    assert advise(demo, stages=["sft"], grpo__learning_rate=value) == []
    assert advise(demo, stages=["grpo"], sft__max_steps=value) == []


# ---------------------------------------------------------------- one epoch


def test_too_few_steps_for_one_epoch_say_how_many_rows_are_seen() -> None:
    stock = recipes.load("finetome-llama32-1b")
    advice = only(advise(stock, rows=2000), "sft.max_steps")
    assert advice.level == "warning"
    assert advice.text == (
        "60 steps of 8 rows see 480 of 2000 (24 %). One epoch needs 250; or take fewer "
        "rows by data.train_rows."
    )


@pytest.mark.parametrize(("rows", "warned"), [(479, False), (480, False), (481, True)])
def test_an_epoch_is_full_when_the_last_row_is_seen(rows: int, warned: bool) -> None:
    stock = recipes.load("finetome-llama32-1b")
    assert bool(advise(stock, rows=rows)) is warned


def test_nothing_is_said_of_packed_rows_as_they_hold_several_conversations(
    demo: RunConfig,
) -> None:
    assert advise(demo, rows=10_000) == []
    alone = advise(demo, rows=10_000, sft__packing=False)
    assert [advice.field for advice in alone] == ["sft.max_steps"]


# ---------------------------------------------------------------- target modules


def test_a_target_that_the_model_lacks_is_an_error_with_the_nearest(
    demo: RunConfig,
) -> None:
    found = advise(demo, lora__target_modules=["q_prj", "v_proj"])
    advice = only(found, "lora.target_modules")
    assert advice.level == "error"
    assert "q_prj do not exist in this model; did you mean 'q_proj'?" in advice.text


@pytest.mark.parametrize(
    "targets",
    [["self_attn.q_proj", "v_proj"], "all-linear", r".*\.(q|v)_proj", None],
)
def test_targets_that_peft_understands_are_sound(demo: RunConfig, targets: Any) -> None:
    assert advise(demo, lora__target_modules=targets) == []


def test_the_modules_of_a_local_model_are_read_from_its_folder(
    demo: RunConfig, tiny_model_folder: Path
) -> None:
    changes = {"model": str(tiny_model_folder), "lora__target_modules": ["c_attn"]}
    only(advise(demo, **changes), "lora.target_modules")


def test_a_model_of_unknown_architecture_is_judged_by_the_rest(demo: RunConfig) -> None:
    changes = {"model": "somebody/unheard-of", "lora__target_modules": ["c_attn"]}
    only(advise(demo, **changes, pad_token="eos"), "pad_token")


# ---------------------------------------------------------------- cut answers


def test_one_answer_in_a_hundred_may_be_cut() -> None:
    assert checks.check_lengths([100] * 99 + [5000], 256) is None


def test_more_than_one_in_a_hundred_is_warned_of_with_the_share() -> None:
    advice = checks.check_lengths([100] * 98 + [300, 5000], 256)
    assert advice == (
        "warning",
        "max_length",
        "256 tokens cut 2 of 100 answers (2.0 %): their ends are not learnt. Set it to "
        "320, which cuts at most 1 %, or leave the long rows out.",
    )


def test_an_answer_that_just_fits_is_not_cut() -> None:
    assert checks.check_lengths([256, 256], 256) is None


def test_no_conversations_cut_nothing() -> None:
    assert checks.check_lengths([], 256) is None


@pytest.mark.parametrize("count", [1, 10, 99, 100, 101, 1000])
def test_the_length_offered_is_the_least_multiple_of_64_that_will_do(
    count: int,
) -> None:
    ends = [1000 + 3 * n for n in range(count)]
    advice = checks.check_lengths(ends, 16)
    assert advice is not None
    enough = int(advice.text.split("Set it to ")[1].split(",")[0])
    assert enough % 64 == 0
    assert checks.check_lengths(ends, enough) is None
    assert checks.check_lengths(ends, enough - 64) is not None


# ---------------------------------------------------------------- what classes refuse


@pytest.mark.parametrize(
    "values",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 2, "steps_per_generation": 2},
        {"per_device_train_batch_size": 2, "steps_per_generation": 3},
        {"per_device_train_batch_size": 2, "generation_batch_size": 6},
        {"per_device_train_batch_size": 2, "generation_batch_size": 8},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_a_batch_is_an_error_exactly_when_trl_refuses_it(
    demo: RunConfig, tmp_path: Path, values: dict[str, int]
) -> None:
    from trl import GRPOConfig

    values = {"num_generations": 4, **values}
    try:
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **values)
        refused = False
    except ValueError:
        refused = True
    found = advise(changed(demo, grpo=values))
    assert bool(found) is refused
    assert all(a.level == "error" and a.field.startswith("grpo") for a in found)


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
        ("grpo.num_generations", "4", "found '4'; expected int | None"),
        ("inference.temperature", "hot", "found 'hot'; expected float | None"),
        ("inference.max_new_tokens", 12.5, "found 12.5; expected int | None"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error(
    demo: RunConfig, field: str, value: Any, words: str
) -> None:
    advice = only(advise(demo, **{field.replace(".", "__"): value}), field)
    assert advice.level == "error"
    assert words in advice.text


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
    advice = only(advise(demo, **{field.replace(".", "__"): value}), field)
    assert advice.level == "error"
    assert advice.text.startswith(f"found {value!r}; did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora.init_lora_weights", "pissa_niter_4"),
        ("lora.init_lora_weights", False),
        ("lora.layers_to_transform", 3),
        ("lora.target_modules", r".*\.q_proj"),
        ("lora.lora_dropout", 0),
        ("sft.learning_rate", 1),
        ("sft.report_to", ["wandb", "tensorboard"]),
        ("sft.gradient_checkpointing_kwargs", {"use_reentrant": False}),
        ("sft.lr_scheduler_kwargs", {}),
        ("grpo.scale_rewards", False),
        ("grpo.min_p", None),
        ("inference.top_p", 1),
        ("inference.stop_strings", ["Q:"]),
        ("inference.suppress_tokens", [1, 2]),
    ],
)
def test_a_value_that_the_class_takes_is_sound(
    demo: RunConfig, field: str, value: Any
) -> None:
    found = advise(demo, **{field.replace(".", "__"): value})
    assert [a for a in found if a.level == "error"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sft__lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"sft__lr_scheduler_kwargs": {"min_lr": 0.1}}, "keyword argument 'min_lr'"),
        ({"sft__adam_beta1": 2}, "Invalid beta parameter"),
        ({"sft__per_device_eval_batch_size": 0}, "expected more than 0"),
        ({"sft__dataloader_num_workers": -1}, "expected 0 (off) or more"),
        ({"sft__max_steps": 0}, "found 0; expected more than 0, or -1"),
        ({"sft__learning_rate": math.inf}, "found inf"),
        ({"sft__report_to": 3}, "found 3; expected"),
        ({"grpo__top_k": -5}, "found -5; expected 0 (off) or more"),
        ({"grpo__min_p": 2.0}, "found 2.0; expected 0 to 1"),
        ({"grpo__repetition_penalty": 0.0}, "grpo.repetition_penalty: found 0.0"),
        ({"grpo__generation_kwargs": {"top_p": 2}}, "found 2; expected 0 to 1"),
        ({"grpo__generation_kwargs": {"foo": 1}}, "GenerationConfig has no such field"),
        ({"grpo__generation_kwargs": "x"}, "expected an object"),
        ({"inference": {"top_p": 2}}, "inference.top_p: found 2"),
        ({"inference": {"temperature": 0}}, "expected more than 0"),
        ({"lora__lora_alpha": 0}, "lora.lora_alpha: lora_alpha=0 takes away"),
        ({"lora__lora_dropout": 1.0}, "lora.lora_dropout: lora_dropout=1 takes away"),
        ({"lora__runtime_config": {}}, "PEFT fails on a setting of lora"),
        (
            {"lora__target_modules": [], "lora__target_parameters": ["q_proj.weight"]},
            "no module",
        ),
    ],
)
def test_what_training_or_drawing_would_refuse_is_an_error_before(
    demo: RunConfig, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        checks.require(advise(demo, **change))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "own"),
    [
        ("sft__eos_token", "template"),
        ("sft__completion_only_loss", "loss_on"),
        ("sft__metric_for_best_model", "best_by"),
        ("grpo__chat_template_kwargs", "template"),
        ("inference__eos_token_id", "template"),
    ],
)
def test_what_another_field_of_the_config_decides_is_refused(
    demo: RunConfig, field: str, own: str
) -> None:
    found = advise(demo, **{field: None})
    advice = only(found, field.replace("__", "."))
    assert advice.text == f"the config's own {own} decides it. Remove it."


@pytest.mark.parametrize(
    ("field", "changes", "words"),
    [
        ("sft.warmup_steps", {"warmup_steps": -1}, "SFTConfig refuses it"),
        ("sft.logging_steps", {"logging_steps": 1.5}, "must be an integer"),
        (
            "sft.load_best_model_at_end",
            {"save_steps": 30, "load_best_model_at_end": True},
            "30, which is not a round multiple of 40",
        ),
        ("lora.layers_to_transform", {}, "cannot be used when `target_modules`"),
        ("inference.max_new_tokens", {"max_new_tokens": 0}, "greater than 0"),
    ],
)
def test_what_the_class_itself_refuses_is_said_in_one_sentence(
    demo: RunConfig, field: str, changes: dict[str, Any], words: str
) -> None:
    group = field.partition(".")[0]
    if group == "lora":
        changes = {"layers_to_transform": [1], "target_modules": "all-linear"}
    values = {f"{group}__{name}": value for name, value in changes.items()}
    advice = only(advise(demo, **values), field)
    assert advice.level == "error"
    assert words in advice.text and "\n" not in advice.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("save_safetensors", "saves nothing but safetensors"),
        ("overwrite_output_dir", "never empties the folder"),
        ("evaluation_strategy", "did you mean 'eval_strategy'?"),
        ("per_gpu_train_batch_size", "mean 'per_device_train_batch_size'?"),
        ("group_by_length", "train_sampling_strategy='group_by_length'"),
        ("warmup_ratio", "warmup_steps"),
        ("half_precision_backend", "remove it"),
        ("logging_dir", "remove it"),
        ("push_to_hub_token", "remove it"),
    ],
)
def test_an_option_that_was_removed_gets_its_reason_or_its_successor(
    demo: RunConfig, name: str, words: str
) -> None:
    advice = only(advise(demo, **{f"sft__{name}": 1}), f"sft.{name}")
    assert "SFTConfig has no such field" in advice.text
    assert words in advice.text
    assert ("did you mean" in advice.text) is ("mean" in words)


def test_a_judgement_leaves_no_folder_behind(
    demo: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert advise(demo) == []
    assert list(tmp_path.iterdir()) == []


def test_no_default_of_a_class_is_written_down_a_second_time() -> None:
    """A copy goes wrong when the library changes: `fields.complete` has them all."""
    named = set(checks.hints("sft")) | set(checks.hints("grpo"))
    named |= set(checks.hints("lora"))
    copies = []
    for path in sorted(Path(checks.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="get"),
                    args=[ast.Constant(value=str(name)), ast.Constant(value=value)],
                ) if name in named and value is not None:
                    copies.append(f"{path.name}:{node.lineno}: {name}={value!r}")
    assert copies == []


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("max_length", {"max_length": 8193}),
        ("grpo.max_completion_length", {"grpo__max_completion_length": 8193}),
        (
            "grpo.max_completion_length",
            {"grpo__max_completion_length": 8000, "max_prompt_length": 193},
        ),
        ("evaluation.max_new_tokens", {"evaluation__max_new_tokens": 8193}),
        ("inference.max_new_tokens", {"inference__max_new_tokens": 8193}),
    ],
)
def test_more_tokens_than_the_model_has_positions_are_an_error(
    demo: RunConfig, field: str, changes: dict[str, Any]
) -> None:
    advice = only(advise(demo, **changes), field)
    assert advice.level == "error"
    assert "8193 tokens in a row" in advice.text
    assert "the model has 8192 positions" in advice.text


def test_as_many_tokens_as_positions_are_sound(demo: RunConfig) -> None:
    whole = {"grpo__max_completion_length": 8000, "max_prompt_length": 192}
    assert advise(demo, max_length=8192, **whole) == []


def test_the_positions_of_a_local_model_are_those_of_its_folder(
    demo: RunConfig, tiny_model_folder: Path
) -> None:
    model = str(tiny_model_folder)
    assert advise(demo, model=model, max_length=2048) == []
    only(advise(demo, model=model, max_length=2049), "max_length")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sft.learning_rat", "learning_rate"),
        ("sft.paking", "packing"),
        ("grpo.num_generation", "num_generations"),
        ("lora.lora_alfa", "lora_alpha"),
        ("inference.temprature", "temperature"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(
    demo: RunConfig, key: str, hint: str
) -> None:
    advice = only(advise(demo, **{key.replace(".", "__"): 1}), key)
    assert advice.level == "error"
    assert advice.text.endswith(f"Config has no such field; did you mean {hint!r}?")


def test_an_unknown_name_like_no_other_is_to_be_removed(demo: RunConfig) -> None:
    advice = only(advise(demo, lora__qqqqqq=1), "lora.qqqqqq")
    assert advice.text == "LoraConfig has no such field; remove it"


def test_lora_that_trains_nothing_is_an_error(demo: RunConfig) -> None:
    advice = only(advise(demo, lora__inference_mode=True), "lora.inference_mode")
    assert advice.level == "error" and "no parameter" in advice.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("modules_to_save", ["lm_hed"]), ("rank_pattern", {"q_prj": 4})]
    + [("exclude_modules", ["mpl"]), ("layers_to_transform", [30])],
)
def test_a_part_of_lora_that_peft_would_skip_is_an_error(
    demo: RunConfig, field: str, value: Any
) -> None:
    only(advise(demo, **{f"lora__{field}": value}), f"lora.{field}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_lora_weights", "eva"), ("lora_bias", True), ("task_type", "SEQ_CLS")]
    + [("layer_replication", [[0, 3], [2, 4]])],
)
def test_lora_that_could_not_come_back_is_an_error_before_anything_is_loaded(
    demo: RunConfig, field: str, value: Any
) -> None:
    advice = only(advise(demo, **{f"lora__{field}": value}), f"lora.{field}")
    assert advice.level == "error"


def test_lora_on_the_output_head_needs_the_loss_that_trl_has_for_it(
    demo: RunConfig,
) -> None:
    head = changed(demo, lora__target_modules=["q_proj", "lm_head"])
    assert "'nll'" in only(advise(head), "sft.loss_type").text
    assert advise(head, sft__loss_type="nll") == []
    assert advise(demo, lora__target_modules="all-linear") == []


def test_a_copy_that_cannot_be_made_is_an_error_where_it_is_asked_for(
    demo: RunConfig,
) -> None:
    dora = changed(demo, lora__use_dora=True)
    assert advise(dora) == []
    advice = only(advise(dora, sampler="copy"), "sampler")
    assert "lora_magnitude_vector" in advice.text and "'model'" in advice.text


def test_an_unknown_reward_is_an_error(demo: RunConfig) -> None:
    found = advise(demo, rewards={"correctness": 1.0, "corectness": 1.0})
    assert "no reward 'corectness'" in only(found, "rewards").text


@pytest.mark.parametrize(
    "names", ["wandbb", ["wandb", "tensorbord"], ["wandb", "none"]], ids=str
)
def test_a_misspelt_tracker_is_an_error(demo: RunConfig, names: Any) -> None:
    found = advise(demo, sft__report_to=names)
    assert bool(found) is ("none" not in names)
    assert {advice.field for advice in found} <= {"sft.report_to"}


@pytest.mark.parametrize("key", checks.OWNER)
def test_what_the_config_decides_elsewhere_is_an_error_in_a_group(
    demo: RunConfig, key: str
) -> None:
    advice = only(advise(demo, **{key.replace(".", "__"): 1}), key)
    assert advice.level == "error"
    assert f"the config's own {checks.OWNER[key]} decides it" in advice.text
    assert checks.OWNER[key] in RunConfig.model_fields


def test_a_field_that_unsloth_adds_is_not_unknown(demo: RunConfig) -> None:
    assert advise(demo, grpo__unsloth_num_chunks=1) == []


@pytest.mark.parametrize(
    ("weights", "warned"),
    [
        ({"correctness": 1.0, "number_present": 0.5}, False),
        ({"soft_format": 1.0}, True),
    ],
)
def test_rewards_that_may_prefer_a_wrong_answer_are_warned_of(
    weights: dict[str, float], warned: bool
) -> None:
    found = advise(changed(recipes.load("demo"), rewards=weights), LAPTOP)
    assert [a.field == "rewards" for a in found] == [True] * warned


def test_a_config_with_errors_is_refused_before_its_data_are_read(
    runs_home: Path, demo: RunConfig
) -> None:
    from helpers import runs, stages

    run = runs.save_run(changed(demo, lora__r="16"))
    with pytest.raises(ConfigError, match="^lora.r: found '16'; expected int$"):
        stages.train_stage(run, "sft")
    assert not (run.path / "data").exists()
