"""What is wrong with a config, or will disappoint, in words, before anything is loaded.

`config` refuses what cannot be read; here a readable config is judged: against the
libraries' fields, the machine, the data's size, and what usually works.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from helpers import fields, runtime, shapes
from helpers.config import RunConfig, Stage
from helpers.errors import ConfigError, ModelError, nearest
from helpers.timing import count_steps, step_rows

# the rates that LoRA is usually trained with; we warn ten times outside of them
USUAL_RATES = {
    "sft": (1e-5, 5e-4, "QLoRA, arXiv:2305.14314, takes 1e-4 and 2e-4"),
    "grpo": (1e-6, 5e-5, "TRL's default is 1e-6, Unsloth's notebooks take 5e-6"),
}
# what chat models end an answer with
ENDS = ["eos", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"]
ENDS += ["<end_of_turn>", "<|end|>"]
MAX_CUT_SHARE = 0.01  # of the answers

# what the libraries also take, or took, but the rest of the config decides
ELSEWHERE = {
    "sft.max_length": "max_length",
    "sft.max_seq_length": "max_length",
    "sft.output_dir": "name",
    "sft.chat_template_path": "template",
    "sft.eos_token": "template",
    "sft.pad_token": "pad_token",
    "sft.assistant_only_loss": "loss_on",
    "sft.completion_only_loss": "loss_on",
    "sft.dataset_text_field": "data",
    "sft.metric_for_best_model": "best_by",
    "grpo.output_dir": "name",
    "grpo.max_prompt_length": "max_prompt_length",
    "grpo.reward_weights": "rewards",
    "grpo.chat_template_kwargs": "template",
    "grpo.num_generations_eval": "grpo_held_out",
    "inference.eos_token_id": "template",
    "inference.pad_token_id": "pad_token",
}
POSITIVE = ["learning_rate", "num_train_epochs", "eval_steps", "max_completion_length"]
POSITIVE += ["per_device_train_batch_size", "gradient_accumulation_steps"]
POSITIVE += ["per_device_eval_batch_size", "num_iterations"]
POSITIVE += ["temperature"]  # at 0 the answers of a group are all the same


class Advice(NamedTuple):
    """One fault of a config, and its remedy."""

    level: Literal["error", "warning"]
    """An error stops the run; with a warning it runs, and may disappoint."""
    field: str
    """Dotted path into the config, `sft.warmup_steps`."""
    text: str
    """What was found, why it matters, what to do."""


def advise(
    config: RunConfig,
    *,
    machine: runtime.Machine | None = None,
    rows: int | None = None,
) -> list[Advice]:
    """Returns the faults of a config, errors first; none when it is sound.

    Args:
        config: of a recipe, a file or a panel.
        machine: the machine it is to run on; this one by default.
        rows: conversations to train on, once the data are prepared.
    """
    machine = machine or runtime.find_machine()
    fields.import_engine(config.engine)
    found = [*check_dtype(config, machine), *check_pad(config)]
    for stage in config.stages:
        wrong = list(check_training(config, stage))
        found += wrong or check_stage(config, stage, rows if stage == "sft" else None)
    if "grpo" in config.stages:
        found += check_rewards(config)
    found += check_group(config, "inference", {"do_sample": True})
    wrong = list(check_group(config, "lora", {"task_type": "CAUSAL_LM"}))
    found += wrong
    try:
        found += check_positions(config)
        found += () if wrong else check_lora(config)
    except shapes.UnknownArchitecture:
        pass  # nothing is known of the model until it is loaded
    return sorted(found)


def report(advice: list[Advice]) -> str:
    """Returns one line a fault, for a terminal or a notebook.

    >>> report([Advice("warning", "pad_token", "'eos' is refused. Leave it null.")])
    "warning: pad_token: 'eos' is refused. Leave it null."
    >>> report([])
    'The config is sound.'
    """
    return "\n".join(": ".join(a) for a in advice) or "The config is sound."


def require(advice: list[Advice]) -> None:
    """Raises ConfigError with all errors among the faults; warnings pass."""
    errors = [f"{a.field}: {a.text}" for a in advice if a.level == "error"]
    if errors:
        raise ConfigError("\n".join(errors))


def check_lengths(ends: list[int], max_length: int) -> Advice | None:
    """Returns a warning when `max_length` cuts more than 1 % of the answers.

    >>> check_lengths([100, 200, 300], 256).text
    '256 tokens cut 1 of 3 answers (33.3 %): their ends are not learnt. Set it to 320, \
which cuts at most 1 %, or leave the long rows out.'

    Args:
        ends: tokens of each conversation up to its last supervised one, uncut.
        max_length: tokens that are kept.
    """
    allowed = int(MAX_CUT_SHARE * len(ends))
    cut = sum(end > max_length for end in ends)
    if cut <= allowed:
        return None
    enough = 64 * math.ceil(sorted(ends)[-1 - allowed] / 64)
    text = (
        f"{max_length} tokens cut {cut} of {len(ends)} answers "
        f"({100 * cut / len(ends):.1f} %): their ends are not learnt. Set it to "
        f"{enough}, which cuts at most 1 %, or leave the long rows out."
    )
    return Advice("warning", "max_length", text)


def check_group(
    config: RunConfig, group: str, more: dict[str, Any]
) -> Iterator[Advice]:
    """Finds what the class of a group does not take; see `fields.faults`."""
    values = dict(getattr(config, group))
    for name in list(values):
        field = f"{group}.{name}"
        if field in ELSEWHERE:
            text = f"the config's own {ELSEWHERE[field]} decides it. Remove it."
            yield Advice("error", field, text)
            del values[name]
    for name, text in fields.faults(group, values, more):
        yield Advice("error", f"{group}.{name}".removesuffix("."), text)


def check_training(config: RunConfig, stage: Stage) -> Iterator[Advice]:
    """Finds training arguments that TRL refuses, or that must be above 0."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from helpers.training.trainer import machine_arguments

    values = getattr(config, stage)
    numbers = [n for n in POSITIVE if isinstance(values.get(n), int | float)]
    low = [n for n in numbers if not 0 < values[n] < math.inf]
    for name in low:
        text = f"found {values[name]}; expected more than 0"
        yield Advice("error", f"{stage}.{name}", text)
    if values.get("max_completion_length", low) is None:
        text = "found None; answers need an end. Give a number of tokens, or remove it."
        yield Advice("error", f"{stage}.max_completion_length", text)
    if values.get("max_steps") == 0:
        text = "found 0; expected more than 0, or -1 to go by num_train_epochs"
        yield Advice("error", f"{stage}.max_steps", text)
    if low:
        return
    # nothing is written there; and our evaluation of GRPO needs no whole groups
    more: dict[str, Any] = {"output_dir": "unused", "report_to": "none"}
    if stage == "grpo":
        more["num_generations_eval"] = 1
    wrong = list(check_group(config, stage, more | machine_arguments(config)))
    yield from wrong
    if stage == "grpo" and not wrong:
        yield from check_drawing(values)
    names = values.get("report_to") or []
    if not isinstance(names, str | list):
        return  # named already
    known = ["all", "none", *INTEGRATION_TO_CALLBACK]
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            text = f"found {name!r}{nearest(str(name), known)}"
            yield Advice("error", f"{stage}.report_to", text)


def check_drawing(values: dict[str, Any]) -> Iterator[Advice]:
    """Finds values of GRPO that transformers refuses when it draws the answers."""
    names = [*fields.DRAWING, "cache_implementation"]
    drawn = {name: values[name] for name in names if name in values}
    more = values.get("generation_kwargs") or {}
    if not isinstance(more, dict):
        text = f"found {more!r}; expected an object with GenerationConfig's fields"
        yield Advice("error", "grpo.generation_kwargs", text)
        return
    for name, text in fields.faults("inference", drawn | more, {"do_sample": True}):
        field = "generation_kwargs" if name in more else name
        yield Advice("error", f"grpo.{field}".removesuffix("."), text)


def check_dtype(config: RunConfig, machine: runtime.Machine) -> Iterator[Advice]:
    """Finds a dtype that the machine has no units for, and flags that fight with it."""
    flags = {"bf16": "bfloat16", "fp16": "float16"}
    stages = {stage: getattr(config, stage) for stage in config.stages}
    by_hand = [(s, f) for s, v in stages.items() for f in flags if v.get(f) is not None]
    if config.dtype != "bfloat16" and not by_hand:
        return  # nothing to judge, and torch need not be loaded
    dtype, reason = runtime.choose_dtype(machine, config.dtype)
    taken = str(dtype).removeprefix("torch.")
    if config.dtype == "bfloat16" and taken != "bfloat16":
        text = f"bfloat16, but {taken} is used on {machine.name}: {reason}. "
        yield Advice("warning", "dtype", text + "Set it to auto, or take a newer GPU.")
    for stage, flag in by_hand:
        if stages[stage][flag] != (machine.device == "cuda" and taken == flags[flag]):
            text = (
                f"{stages[stage][flag]}, but the model computes in {taken} on "
                f"{machine.name}. Remove it: dtype and the machine decide."
            )
            yield Advice("error", f"{stage}.{flag}", text)


def check_pad(config: RunConfig) -> Iterator[Advice]:
    """Finds padding with the token that ends answers."""
    if config.pad_token in ENDS:
        text = (
            f"{config.pad_token!r} ends answers, and no loss is taken on padding: the "
            "model would never learn to stop. Leave it null, and another token pads."
        )
        yield Advice("warning", "pad_token", text)


def check_stage(config: RunConfig, stage: Stage, rows: int | None) -> Iterator[Advice]:
    """Finds a rate, a warm-up or a length that defeats the training."""
    values = fields.complete(config, stage)
    low, high, source = USUAL_RATES[stage]
    rate = values["learning_rate"]
    if round(rate / low, 6) < 0.1 or round(rate / high, 6) > 10:
        text = (
            f"{rate:g} is more than ten times outside the {low:g} to {high:g} usual "
            f"for LoRA ({source}): likely nothing is learnt, or training diverges. "
            "Choose a rate in that range."
        )
        yield Advice("warning", f"{stage}.learning_rate", text)

    steps, warmup = count_steps(values, rows), values["warmup_steps"]
    if steps and values["lr_scheduler_type"] != "constant":
        # below 1 it is a share of the run, as in transformers' get_warmup_steps
        length = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
        if length >= steps:
            text = (
                f"{warmup} in a run of {steps} steps: the rate never reaches its peak. "
                f"Set it to {steps // 10}, or raise the number of steps."
            )
            yield Advice("warning", f"{stage}.warmup_steps", text)

    counts = rows and values["max_steps"] > 0 and not values.get("packing")
    seen, a_step = values["max_steps"] * step_rows(values), step_rows(values)
    if rows and counts and seen < rows:
        text = (
            f"{steps} steps of {a_step} rows see {seen} of {rows} "
            f"({100 * seen / rows:.0f} %). One epoch needs "
            f"{math.ceil(rows / a_step)}; or take fewer rows by data.train_rows."
        )
        yield Advice("warning", f"{stage}.max_steps", text)


def check_rewards(config: RunConfig) -> Iterator[Advice]:
    """Finds unknown rewards, and those that may pay a wrong answer more.

    >>> from helpers import recipes
    >>> list(check_rewards(recipes.load("demo")))
    []
    """
    from helpers.grpo.rewards import choose, margin

    try:
        choose(config.rewards, max_completion_length=1)  # the names are judged alone
    except ValueError as error:
        yield Advice("error", "rewards", str(error))
    least = margin(config.rewards)
    if least <= 0:
        yield Advice(
            "warning",
            "rewards",
            f"with these weights the worst right answer gets {-least:.2f} less than "
            "the best wrong one, or the same: training may prefer wrong ones. Raise "
            "the weight of correctness.",
        )


def check_lora(config: RunConfig) -> Iterator[Advice]:
    """Finds LoRA that PEFT cannot put on the model, or that trains nothing."""
    if config.lora.get("task_type") not in (None, "CAUSAL_LM"):
        text = "only causal language models are trained here. Remove it."
        yield Advice("error", "lora.task_type", text)
    try:
        tuned = shapes.adapt(config.model, config.lora)
    except ModelError as error:
        field = f"lora.{fields.named(config.lora, str(error))}"
        yield Advice("error", field.removesuffix("."), str(error))
        return
    if not tuned.num_parameters(only_trainable=True):
        text = "no parameter would be trained. Take inference_mode away."
        yield Advice("error", "lora", text)
    chunked = config.sft.get("loss_type") in (None, "chunked_nll")
    head = any(name.endswith("lm_head") for name in tuned.targeted_module_names)
    if "sft" in config.stages and chunked and head:
        text = "TRL trains LoRA on lm_head with the loss 'nll' alone. Set it to that."
        yield Advice("error", "sft.loss_type", text)
    if "grpo" in config.stages and config.sampler == "copy":
        from helpers.rollout.sampler import unsupported

        fault = unsupported(config, tuned)
        if fault:
            text = f"'copy' does not work: {fault}. Choose 'auto' or 'model'."
            yield Advice("error", "sampler", text)


def check_positions(config: RunConfig) -> Iterator[Advice]:
    """Finds rows, prompts and answers that are longer than the model's positions."""
    numbers = shapes.find_config(config.model).get_text_config()
    positions = getattr(numbers, "max_position_embeddings", None)
    lengths: dict[str, Any] = {
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        "inference.max_new_tokens": config.inference.get("max_new_tokens"),
    }
    if "sft" in config.stages:
        lengths["max_length"] = config.max_length
    if "grpo" in config.stages:
        answer = fields.complete(config, "grpo")["max_completion_length"]
        if isinstance(answer, int):
            answer += config.max_prompt_length or 0
        lengths["grpo.max_completion_length"] = answer
    for field, length in lengths.items():
        if positions and isinstance(length, int) and length > positions:
            text = (
                f"{length} tokens in a row, prompt included, but the model has "
                f"{positions} positions. Allow fewer."
            )
            yield Advice("error", field, text)
