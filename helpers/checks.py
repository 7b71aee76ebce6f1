"""Validates a readable config: names, types and values, and what usually goes wrong.

The libraries' own classes say which fields exist and what they take; nothing of that
is listed here. Nothing is loaded but the libraries, which takes ten seconds.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from helpers import runtime
from helpers.config import (
    CLASSES,
    RunConfig,
    Source,
    Stage,
    complete,
    library_class,
    library_fields,
)
from helpers.data.formats import find_format
from helpers.errors import ConfigError, ModelError, UnknownArchitecture, nearest
from helpers.estimate import count_steps, skeleton, step_rows
from helpers.grpo.rewards import choose, margin
from helpers.masking.templates import template_text
from helpers.models.adapters import check_attached, check_lora
from helpers.rollout.sampler import unsupported

Fault = tuple[str, str]  # dotted field; what was found, why it matters, what to do

# rates that LoRA is usually trained with, and who says so
USUAL_RATES = {
    "sft": (1e-5, 5e-4, "QLoRA, arXiv:2305.14314, takes 1e-4 and 2e-4"),
    "grpo": (1e-6, 5e-5, "TRL's default is 1e-6, Unsloth's notebooks take 5e-6"),
}
# what chat models end an answer with
ENDS = ["eos", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"]
ENDS += ["<end_of_turn>", "<|end|>"]
MAX_CUT_SHARE = 0.01  # of the answers
SURE = 0.8  # of difflib's ratio, from which on a name is taken for a misspelt one

# library fields that a field of our own config decides
ELSEWHERE = {
    "max_length": ["sft.max_length", "sft.max_seq_length"],
    "max_prompt_length": ["grpo.max_prompt_length"],
    "name": ["sft.output_dir", "grpo.output_dir"],
    "template": ["sft.chat_template_path", "sft.eos_token", "inference.eos_token_id"]
    + ["grpo.chat_template_kwargs"],
    "pad_token": ["sft.pad_token", "inference.pad_token_id"],
    "loss_on": ["sft.assistant_only_loss", "sft.completion_only_loss"],
    "data": ["sft.dataset_text_field"],
    "best_by": ["sft.metric_for_best_model"],
    "rewards": ["grpo.reward_weights"],
    "grpo_held_out": ["grpo.num_generations_eval"],
}
OWNER = {path: own for own, paths in ELSEWHERE.items() for path in paths}
# fields of earlier versions of the libraries, which tutorials still show
REMOVED = {
    "save_safetensors": "transformers 5 saves nothing but safetensors; remove it",
    "overwrite_output_dir": "transformers 5 never empties the folder; remove it",
    "group_by_length": "now train_sampling_strategy='group_by_length'",
    "warmup_ratio": "now warmup_steps, where a value below 1 is a share of the run",
    "no_cuda": "now use_cpu",
}
POSITIVE = ["learning_rate", "num_train_epochs", "eval_steps", "max_completion_length"]
POSITIVE += ["per_device_train_batch_size", "gradient_accumulation_steps"]
POSITIVE += ["per_device_eval_batch_size", "num_iterations", "repetition_penalty"]
POSITIVE += ["temperature"]  # at 0 the answers of a group are all the same
# numbers that the classes take, and training or drawing refuses later
LIMITS: list[tuple[str, Callable[[float], bool], list[str]]] = [
    ("more than 0", lambda value: 0 < value < math.inf, POSITIVE),
    ("0 to 1", lambda value: 0 <= value <= 1, ["min_p", "top_p", "typical_p"]),
    ("0 to less than 1", lambda value: 0 <= value < 1, ["lora_dropout"]),
    ("other than 0: nothing would be learnt", bool, ["lora_alpha"]),
    ("0 (off) or more", lambda value: value >= 0, ["top_k", "dataloader_num_workers"]),
    ("more than 0, or -1 to go by num_train_epochs", bool, ["max_steps"]),
]
# other values that no training comes of
REFUSED = {
    ("max_completion_length", None): "answers need an end: give a number of tokens",
    ("inference_mode", True): "no parameter would be trained. Remove it.",
}


class Advice(NamedTuple):
    """One fault of a config, and its remedy."""

    level: Literal["error", "warning"]  # with a warning it runs, and may disappoint
    field: str  # dotted path into the config, `sft.warmup_steps`
    text: str  # what was found, why it matters, what to do


def advise(
    config: RunConfig,
    *,
    machine: runtime.Machine | None = None,
    rows: int | None = None,
) -> list[Advice]:
    """Returns the faults of a config, errors first; none when it is sound.

    Args:
        config: of a recipe, a file or a form.
        machine: the machine it is to run on; this one by default.
        rows: conversations to train on, once the data are prepared.
    """
    machine = machine or runtime.find_machine()
    errors = [*names_of_ours(config), *library_faults(config)]
    warnings = [*disappointments(config, machine)]
    if not errors:  # else values cannot be compared
        errors += [*dtype_flags(config, machine), *model_faults(config)]
        for stage in config.stages:
            warnings += schedule(config, stage, rows if stage == "sft" else None)
    advice = [Advice("error", *fault) for fault in errors]
    return sorted(advice + [Advice("warning", *fault) for fault in warnings])


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

    `ends` are the tokens of each conversation up to its last supervised one, uncut.
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


def names_of_ours(config: RunConfig) -> Iterator[Fault]:
    """Finds templates, formats and rewards that do not exist."""
    data = config.data
    lookups: list[tuple[str, Callable[[], Any]]] = [
        ("template", partial(template_text, config.template)),
        ("rewards", partial(choose, config.rewards, max_completion_length=1)),
    ]
    for field in ("train", "eval", "problems", "test", "test_new"):
        value = getattr(data, field)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, Source) and source.format:
                lookups.append((f"data.{field}", partial(find_format, source.format)))
    for field, lookup in lookups:
        try:
            lookup()
        except ValueError as error:
            yield field, str(error)


def library_faults(config: RunConfig) -> Iterator[Fault]:
    """Finds what the libraries' classes do not know, or refuse."""
    # nothing is written, and nothing of this machine is judged
    training: dict[str, Any] = {
        "output_dir": "unused",
        "report_to": "none",
        "use_cpu": True,
    }
    training |= {"fp16": False, "bf16": False}
    instead: dict[str, dict[str, Any]] = {
        "sft": training,
        "grpo": training | {"num_generations_eval": 1},  # ours needs no whole groups
        "lora": {"task_type": "CAUSAL_LM"},
        "inference": {"do_sample": True},
    }
    for group in [*config.stages, "lora", "inference"]:
        values = getattr(config, group)
        faults = list(group_faults(group, values, instead[group]))
        if group == "grpo" and not faults:
            drawn = {n: values[n] for n in ["cache_implementation"] if n in values}
            drawn |= values.get("generation_kwargs") or {}
            inner = group_faults("inference", drawn, instead["inference"])
            faults = [(n if n in values else "generation_kwargs", t) for n, t in inner]
        for name, text in faults:
            yield f"{group}.{name}".removesuffix("."), text


def group_faults(
    group: str, values: dict[str, Any], instead: dict[str, Any]
) -> Iterator[Fault]:
    """Finds the names, types and values of a group that its class does not take.

    `instead` are values that replace or complete those of the config.
    """
    # Unsloth adds fields of its own to TRL's classes
    values = {n: v for n, v in values.items() if not n.startswith("unsloth_")}
    texts = {name: value_fault(group, name, value) for name, value in values.items()}
    yield from ((name, text) for name, text in texts.items() if text)
    # of several processes each would start their group before a model is loaded
    if any(texts.values()) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    try:
        try_out(library_class(group)(**{**values, **instead}))
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        text = f"{CLASSES[group][1]} refuses it: {' '.join(str(error).split())}"
        words = re.findall(r"\w+", text)
        named = [word for word in words if word in values]
        named += [n for n, v in values.items() if isinstance(v, str) and v in words]
        yield (named[0], describe(values[named[0]], text)) if named else ("", text)


def value_fault(group: str, name: str, value: Any) -> str:
    """Returns what is wrong with a value for a field, nothing where it may hold it."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError
    from pydantic_core import PydanticSerializationError, to_json

    if own := OWNER.get(f"{group}.{name}"):
        return f"the config's own {own} decides it. Remove it."
    if name in REMOVED or name not in hints(group):
        remedy = nearest(name, hints(group), sure=SURE) or "; remove it"
        remedy = f": {REMOVED[name]}" if name in REMOVED else remedy
        return f"{CLASSES[group][1]} has no such field{remedy}"
    for refused, text in REFUSED.items():
        if refused == (name, value):
            return f"found {value!r}; {text}"
    if name == "generation_kwargs" and isinstance(value, str):
        return f"found {value!r}; expected an object of GenerationConfig's fields"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for expected, is_right, names in LIMITS:
        if name in names and number and not is_right(value):
            return f"found {value!r}; expected {expected}"
    field, hint = library_fields(group).get(name), hints(group)[name]
    help = field.metadata.get("help", "") if field else ""
    # the help of scale_rewards, which is a text, names `True` too
    is_named = isinstance(value, bool) and f"`{value}`" in help
    if field and (is_named or value == field.default):
        return ""
    try:  # as JSON, which has no tuples, sets or enums of its own
        text = to_json(value, inf_nan_mode="constants").decode()
        # PEFT writes pissa_niter_[number of iters]
        text = re.sub(r'niter_\d+"$', 'niter_[number of iters]"', text)
        TypeAdapter(hint).validate_json(text, strict=True)
    except (ValidationError, PydanticSerializationError):
        return describe(value, f"expected {inspect.formatannotation(hint)}")
    except PydanticUserError:
        return ""  # pydantic does not know the type
    for word in value if isinstance(value, list) else [value]:
        known = trackers() if name == "report_to" else quoted_choices(field)
        if isinstance(word, str) and known and word not in known:
            return describe(word, f"expected one of {known}")
    return ""


def describe(value: Any, text: str) -> str:
    """Returns a fault with its value, and what it may mean of the texts named."""
    known = re.findall(r"'(\w+)'", text)
    hint = nearest(value, known) if isinstance(value, str) else ""
    return f"found {value!r}{hint}; {text[:300]}"


@cache
def hints(group: str) -> dict[str, Any]:
    """Returns the type of each field of a group's class, `Any` where unknown."""
    kind = library_class(group)
    if library_fields(group):
        return typing.get_type_hints(kind)
    # GenerationConfig names its types in its documentation alone
    types: dict[str, Any] = dict.fromkeys((n for n in vars(kind()) if n[0] != "_"), Any)
    for name, text in re.findall(r"^ +(\w+) ?\(`(.+?)`[,)]", kind.__doc__, re.M):
        text = text.replace("`", "").replace(" or ", " | ")
        with suppress(NameError, SyntaxError, TypeError):
            holder: Any = SimpleNamespace(__annotations__={name: f"{text} | None"})
            types |= typing.get_type_hints(holder, vars(typing))
    return types


def quoted_choices(field: Any) -> list[str]:
    """Returns the values that a text field's own help lists, none where it does not."""
    help = field.metadata.get("help", "") if field and "str" in str(field.type) else ""
    words = re.findall(r"(?<!=)['`](\w+)'", help) or re.findall(r"`(\w+)`", help)
    lists = field and field.default in words or re.search("(values are|one of) ", help)
    return list(dict.fromkeys(words)) if lists else []


def trackers() -> list[str]:
    """Returns the values that `report_to` may have."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return ["all", "none", *INTEGRATION_TO_CALLBACK]


def try_out(settings: Any) -> None:
    """Makes the optimiser and the schedule of training arguments, which may fail."""
    import torch
    from transformers import Trainer, TrainingArguments, get_scheduler

    # target modules of an optimiser are those of a real model
    if not isinstance(settings, TrainingArguments) or settings.optim_target_modules:
        return
    net = torch.nn.Linear(1, 1)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(settings, net)
    get_scheduler(
        settings.lr_scheduler_type,
        kind(net.parameters(), **options),
        num_warmup_steps=0,
        num_training_steps=10,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs,
    )


def dtype_flags(config: RunConfig, machine: runtime.Machine) -> Iterator[Fault]:
    """Finds fp16 and bf16 flags that conflict with the machine's dtype."""
    chosen = str(runtime.choose_dtype(machine, config.dtype)[0])
    for stage in config.stages:
        for flag, dtype in (("bf16", "torch.bfloat16"), ("fp16", "torch.float16")):
            value = getattr(config, stage).get(flag)
            is_on = machine.device == "cuda" and chosen == dtype
            if value not in (None, is_on):
                text = (
                    f"{value}, but the model computes in {chosen} on {machine.name}. "
                    "Remove it: dtype and the machine decide."
                )
                yield f"{stage}.{flag}", text


def model_faults(config: RunConfig) -> Iterator[Fault]:
    """Finds LoRA and lengths that do not go with the base model, where it is known."""
    try:
        base = skeleton(config.model)
    except UnknownArchitecture:
        return  # nothing is known of the model until it is loaded
    try:
        check_lora(base, config.lora)
        tuned = skeleton(config.model, config.lora)
        check_attached(tuned, config.lora)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, AttributeError):
            text = f"PEFT fails on a setting of lora that it should refuse: {text}"
        name = next((w for w in re.findall(r"\w+", text) if w in config.lora), "")
        yield f"lora.{name}".removesuffix("."), text
        return
    if config.lora.get("task_type") not in (None, "CAUSAL_LM"):
        yield "lora.task_type", "only causal models are trained here. Remove it."
    chunked = complete(config, "sft")["loss_type"] in (None, "chunked_nll")
    head = any(name.endswith("lm_head") for name in tuned.targeted_module_names)
    if "sft" in config.stages and chunked and head:
        text = "TRL trains LoRA on lm_head with the loss 'nll' alone. Set it to that."
        yield "sft.loss_type", text
    if "grpo" in config.stages and config.sampler == "copy":
        if reason := unsupported(config, tuned):
            text = f"'copy' does not work: {reason}. Choose 'auto' or 'model'."
            yield "sampler", text
    numbers = base.config.get_text_config()
    positions = getattr(numbers, "max_position_embeddings", None) or math.inf
    lengths = {
        "evaluation.max_new_tokens": config.evaluation.max_new_tokens,
        "inference.max_new_tokens": config.inference.get("max_new_tokens") or 0,
    }
    if "sft" in config.stages:
        lengths["max_length"] = config.max_length
    if "grpo" in config.stages:
        answer = complete(config, "grpo")["max_completion_length"]
        lengths["grpo.max_completion_length"] = answer + (config.max_prompt_length or 0)
    for field, length in lengths.items():
        if length > positions:
            text = (
                f"{length} tokens in a row, prompt included, but the model has "
                f"{positions} positions. Allow fewer."
            )
            yield field, text


def disappointments(config: RunConfig, machine: runtime.Machine) -> Iterator[Fault]:
    """Finds an engine, a pad token, a dtype and rewards that will not do as meant."""
    try:
        runtime.use_engine(config.engine)
    except ModelError as error:
        yield "engine", str(error)
    if config.pad_token in ENDS:
        text = (
            f"{config.pad_token!r} ends answers, and no loss is taken on padding: the "
            "model would never learn to stop. Leave it null, and another token pads."
        )
        yield "pad_token", text
    dtype, reason = runtime.choose_dtype(machine, config.dtype)
    chosen = str(dtype).removeprefix("torch.")
    if config.dtype == "bfloat16" != chosen:
        text = f"bfloat16, but {chosen} is used on {machine.name}: {reason}. "
        yield "dtype", text + "Set it to auto, or take a newer GPU."
    least = margin(config.rewards)
    if "grpo" in config.stages and least <= 0:
        text = (
            f"with these weights the worst right answer gets {-least:.2f} less than "
            "the best wrong one, or the same: training may prefer wrong ones. Raise "
            "the weight of correctness."
        )
        yield "rewards", text


def schedule(config: RunConfig, stage: Stage, rows: int | None) -> Iterator[Fault]:
    """Finds a rate, a warm-up or a number of steps that defeats the training."""
    values = complete(config, stage)
    low, high, source = USUAL_RATES[stage]
    rate = values["learning_rate"]
    if round(rate / low, 6) < 0.1 or round(rate / high, 6) > 10:
        text = (
            f"{rate:g} is more than ten times outside the {low:g} to {high:g} usual "
            f"for LoRA ({source}): likely nothing is learnt, or training diverges. "
            "Choose a rate in that range."
        )
        yield f"{stage}.learning_rate", text

    steps, warmup = count_steps(config, stage, rows), values["warmup_steps"]
    # below 1 it is a share of the run, as in transformers' get_warmup_steps
    length = int(warmup) if warmup >= 1 else math.ceil((steps or 0) * warmup)
    if steps and length >= steps and values["lr_scheduler_type"] != "constant":
        text = (
            f"{warmup} in a run of {steps} steps: the rate never reaches its peak. "
            f"Set it to {steps // 10}, or raise the number of steps."
        )
        yield f"{stage}.warmup_steps", text

    a_step = step_rows(config, stage)
    seen = values["max_steps"] * a_step
    if rows and 0 < seen < rows and not values.get("packing"):
        text = (
            f"{steps} steps of {a_step} rows see {seen} of {rows} "
            f"({100 * seen / rows:.0f} %). One epoch needs "
            f"{math.ceil(rows / a_step)}; or take fewer rows by data.train_rows."
        )
        yield f"{stage}.max_steps", text
