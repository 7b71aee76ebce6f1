"""Advice on a config before a model is loaded: what the libraries refuse, and why.

Their classes say what they take; the tables here hold what they take in silence.
"""

import math
import re
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import to_json

from helpers import estimate, recipes
from helpers.config import RunConfig, complete, library_class, library_fields
from helpers.data.preparation import sources_of
from helpers.data.sources import find_path
from helpers.errors import ConfigError, MissingInput, UnknownArchitecture, nearest
from helpers.grpo.rewards import choose, margin
from helpers.masking.templates import template_text
from helpers.models.adapters import check_attached, check_lora
from helpers.runtime import Machine, choose_dtype, count_processes, find_machine

Fault = tuple[str, str]  # dotted field; what was found, why it matters, what to do

# rates that LoRA is usually trained with, and who says so
USUAL_RATES = {
    "sft": (1e-5, 5e-4, "QLoRA, arXiv:2305.14314, takes 1e-4 and 2e-4"),
    "grpo": (1e-6, 5e-5, "TRL's default is 1e-6, Unsloth's notebooks take 5e-6"),
}

# fields of our config, and the library fields that they replace without a word
ELSEWHERE = {
    "dtype": "sft.fp16 sft.bf16 grpo.fp16 grpo.bf16",
    "max_length": "sft.max_length sft.max_seq_length",
    "max_prompt_length": "grpo.max_prompt_length",
    "name": "sft.output_dir grpo.output_dir",
    "template": "sft.chat_template_path sft.eos_token grpo.chat_template_kwargs "
    "inference.eos_token_id",
    "pad_token": "sft.pad_token inference.pad_token_id",
    "loss_on": "sft.assistant_only_loss sft.completion_only_loss",
    "data": "sft.dataset_text_field",
    "best_by": "sft.metric_for_best_model",
    "rewards": "grpo.reward_weights",
    "grpo_held_out": "grpo.num_generations_eval",
}
OWNER = {path: own for own, paths in ELSEWHERE.items() for path in paths.split()}

# values that a class takes, and training makes nothing of: fields, what is sound
POSITIVE = "learning_rate num_train_epochs max_completion_length temperature "
POSITIVE += "per_device_train_batch_size per_device_eval_batch_size "
POSITIVE += "gradient_accumulation_steps"
OURS = "save_only_model auto_find_batch_size resume_from_checkpoint"
SILENT: list[tuple[str, Callable[[Any], bool], str]] = [
    (POSITIVE, lambda x: type(x) in (int, float) and 0 < x < math.inf, "more than 0"),
    ("beta weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
    ("max_steps", bool, "more than 0, or -1 to go by num_train_epochs"),
    ("top_p", lambda x: x is None or type(x) is not str and 0 <= x <= 1, "0 to 1"),
    ("lora_dropout", lambda x: 0 <= x < 1, "0 to less than 1"),
    ("lora_alpha", lambda x: x > 0, "more than 0: else nothing would be learnt"),
    ("inference_mode", lambda x: not x, "false: no parameter would be trained"),
    ("loss_type", lambda x: x is None or is_loss(x), "one that TRL's classes name"),
    ("task_type", lambda x: x in (None, "CAUSAL_LM"), "CAUSAL_LM, the only task here"),
    ("report_to", lambda x: x is not None, "none, or names of trackers"),
    ("logging_first_step", bool, "true: the report needs its loss or reward"),
    (OURS, lambda x: not x, "no value: training resumes and fits by itself"),
]
# in a trial nothing is written, and nothing of this machine is judged
TRAINING = {"output_dir": "unused", "report_to": "none", "fp16": False, "bf16": False}
TRIAL: dict[str, Any] = {"sft": TRAINING, "lora": {}, "inference": {"do_sample": True}}
TRIAL["grpo"] = TRAINING | {"num_generations_eval": 1}  # ours needs no whole groups
# fields that take more than their type says
WIDER: dict[str, Any] = {"scale_rewards": bool | str, "init_lora_weights": bool | str}


class Advice(NamedTuple):
    """A fault of a config, with its remedy."""

    level: Literal["error", "warning"]  # with a warning it runs, and may disappoint
    field: str  # dotted path into the config, `sft.warmup_steps`
    text: str  # what was found, why it matters, what to do


def advise(
    config: RunConfig, *, machine: Machine | None = None, rows: int | None = None
) -> list[Advice]:
    """Returns the faults of a config, errors first, judged with `rows` to train on."""
    errors = [*library_faults(config)]
    for name, source in sources_of(config.data):
        try:
            find_path(str(source))
        except MissingInput as error:
            errors.append((f"data.{name}", str(error)))
    try:
        template_text(config.template)
        choose(config.rewards, max_completion_length=1)
    except ValueError as error:
        is_reward = isinstance(error, ConfigError)
        errors.append(("rewards" if is_reward else "template", str(error)))
    warnings = [*disappointments(config, machine or find_machine())]
    if not errors:  # else values cannot be compared
        errors += model_faults(config)
        warnings += schedule(config, rows)
    advice = [Advice("error", *fault) for fault in errors]
    return sorted(advice + [Advice("warning", *fault) for fault in warnings])


def report(advice: list[Advice]) -> str:
    return "\n".join(": ".join(a) for a in advice) or "The config is sound."


def require(advice: list[Advice]) -> None:
    """Raises ConfigError with all errors among the faults; warnings pass."""
    if errors := [f"{a.field}: {a.text}" for a in advice if a.level == "error"]:
        raise ConfigError("\n".join(errors))


def check_lengths(ends: list[int], max_length: int) -> Advice | None:
    """Returns a warning when `max_length` cuts over 1 % of answers, by their ends."""
    allowed = len(ends) // 100
    cut = sum(end > max_length for end in ends)
    if cut <= allowed:
        return None
    enough = 64 * math.ceil(sorted(ends)[-1 - allowed] / 64)
    text = f"{max_length} tokens cut {cut} of {len(ends)} answers, whose ends are not "
    text += f"learnt. Set it to {enough}, which cuts at most 1 %."
    return Advice("warning", "max_length", text)


def library_faults(config: RunConfig) -> Iterator[Fault]:
    """Finds what the libraries' classes do not know or refuse, or take in silence."""
    for group in [*config.stages, "lora", "inference"]:
        # Unsloth adds fields of its own to TRL's classes
        values = getattr(config, group).items()
        values = {n: v for n, v in values if not n.startswith("unsloth_")}
        faults = field_faults(group, values)
        drawn = field_faults("inference", values.get("generation_kwargs") or {})
        if drawn:
            faults["generation_kwargs"] = "; ".join(drawn.values())
        for name, text in (faults or trial_fault(group, values)).items():
            yield f"{group}.{name}".removesuffix("."), text


@cache
def schema(group: str) -> type[BaseModel]:
    """Returns a pydantic model with the names and types of a group's class."""
    kind = library_class(group)
    if known := library_fields(group):
        types = {n: t for n, t in typing.get_type_hints(kind).items() if n in known}
    else:  # GenerationConfig declares no types
        types = {n: Any for n in vars(kind()) if n[0] != "_"}
    fields: Any = {n: (WIDER.get(n, t), None) for n, t in types.items()}
    settings = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    settings["protected_namespaces"] = ()  # fields may begin with model_
    return create_model(kind.__name__, __config__=settings, **fields)


def is_loss(name: Any) -> bool:
    fields = [library_fields(group)["loss_type"] for group in ("sft", "grpo")]
    return any(f"'{name}'" in field.metadata["help"] for field in fields)


def field_faults(group: str, values: dict[str, Any]) -> dict[str, str]:
    """Returns what is wrong with single values of a group, by name."""
    owners = {n: OWNER[f"{group}.{n}"] for n in values if f"{group}.{n}" in OWNER}
    text = "the config's own {} decides it. Remove it."
    texts = {name: text.format(owner) for name, owner in owners.items()}
    model = schema(group)
    try:  # as JSON, which has no tuples, sets or enums of its own
        model.model_validate_json(to_json(values, inf_nan_mode="constants"))
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            text = fault["msg"].replace("Input should be", "expected")
            if fault["type"] == "extra_forbidden":
                hint = nearest(name, model.model_fields, sure=0.8) or "; remove it"
                text = f"{model.__name__} has no such field{hint}"
            texts.setdefault(name, f"found {values[name]!r}; {text}")
    for names, is_sound, expected in SILENT:
        for name in values.keys() & set(names.split()) - texts.keys():
            if not is_sound(values[name]):
                texts[name] = f"found {values[name]!r}; expected {expected}"
    return texts


def trial_fault(group: str, values: dict[str, Any]) -> dict[str, str]:
    """Returns what a group's class says when it is constructed, by the field named."""
    # of several processes each would start their group before a model is loaded
    if count_processes() > 1:
        return {}
    import torch
    from accelerate.state import AcceleratorState, PartialState

    trial = values | TRIAL[group]
    if group in ("sft", "grpo"):
        trial["use_cpu"] = not torch.cuda.is_available()
    # TRL's classes reset accelerate's state, which a trainer built before still needs
    states = AcceleratorState._shared_state, PartialState._shared_state
    try:
        with patch.dict(states[0]), patch.dict(states[1]):
            library_class(group)(**trial)
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        owner = {v: n for n, v in values.items() if isinstance(v, str)}
        name, text = name_fault(error, owner | {name: name for name in values})
        return {name: f"{schema(group).__name__}: {text}"}
    return {}


def name_fault(error: Exception, owner: dict[str, str]) -> Fault:
    """Returns the field that an error's words belong to, if any, and the error."""
    text = " ".join(str(error).split())[:300]
    names = (owner[word] for word in re.findall(r"\w+", text) if word in owner)
    return next(names, ""), text


def model_faults(config: RunConfig) -> Iterator[Fault]:
    """Finds LoRA and lengths that do not go with the base model, where it is known."""
    try:
        base = estimate.skeleton(config.model)
    except UnknownArchitecture:
        return  # nothing is known of the model until it is loaded
    try:
        check_lora(base, config.lora)
        check_attached(estimate.skeleton(config.model, config.lora), config.lora)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        name, text = name_fault(error, {name: name for name in config.lora})
        yield f"lora.{name}".removesuffix("."), text
        return
    numbers = base.config.get_text_config()
    positions = getattr(numbers, "max_position_embeddings", None) or math.inf
    lengths = {"evaluation.max_new_tokens": config.evaluation.max_new_tokens}
    lengths["inference.max_new_tokens"] = config.inference.get("max_new_tokens") or 0
    if "sft" in config.stages:
        lengths["max_length"] = config.max_length
    if "grpo" in config.stages:
        answer = complete(config, "grpo")["max_completion_length"]
        lengths["grpo.max_completion_length"] = answer + (config.max_prompt_length or 0)
    for field, length in lengths.items():
        text = f"{length} tokens in a row, the model has {positions} positions"
        if length > positions:
            yield field, text


def disappointments(config: RunConfig, machine: Machine) -> Iterator[Fault]:
    """Finds an engine, a pad token, a dtype and rewards that will not do as meant."""
    if "unsloth" in sys.modules and config.engine == "transformers":
        yield "engine", "Unsloth has patched transformers here: restart the kernel"
    if config.trust_remote_code:
        yield "trust_remote_code", "code of the model's authors runs with your rights"
    if config.recipe in recipes.NAMES:
        own = recipes.load(config.recipe)
        samples = recipes.scaled(own, samples=True)  # the rows of `--small`
        pairs = [p for p in sources_of(config.data) if p[0] != "general"]
        sets = [name for name, source in pairs if source == getattr(own.data, name)]
        kept = ["prompt"] * (config.system_prompt == own.system_prompt) + sets
        text = f"other rows than those of {config.recipe}, whose {', '.join(kept)} "
        text += "are kept: change them, or use recipes.for_data"
        if sets and config.data.train not in (own.data.train, samples.data.train):
            yield "data.train", text
    if config.pad_token == "eos":
        yield "pad_token", "EOS would never be learnt, so another token pads"
    dtype, reason = choose_dtype(machine, config.dtype)
    if config.dtype == "bfloat16" and str(dtype) != "torch.bfloat16":
        yield "dtype", f"{dtype} is used on {machine.name}: {reason}. Set it to auto."
    if "grpo" in config.stages and margin(config.rewards) <= 0:
        yield "rewards", "a wrong answer may get as much as a right one with them"


def schedule(config: RunConfig, rows: int | None) -> Iterator[Fault]:
    """Finds a rate, a warm-up or a lack of evaluations that defeats the training."""
    for stage in config.stages:
        values = complete(config, stage)
        low, high, source = USUAL_RATES[stage]
        rate, warmup = values["learning_rate"], values["warmup_steps"]
        if round(rate / low, 6) < 0.1 or round(rate / high, 6) > 10:
            text = f"{rate:g} is more than ten times outside the {low:g} to {high:g} "
            yield f"{stage}.learning_rate", f"{text}usual for LoRA ({source})"
        steps = estimate.count_steps(config, stage, rows if stage == "sft" else None)
        # below 1 it is a share of the run, as in transformers' get_warmup_steps
        length = int(warmup) if warmup >= 1 else math.ceil((steps or 0) * warmup)
        timed = stage == "grpo" and config.grpo_minutes  # which stretches the schedule
        rises = values["lr_scheduler_type"] != "constant" and not timed
        if steps and length >= steps and rises:
            text = f"{warmup} in a run of {steps} steps: the rate never reaches its "
            text += f"peak. Set it to {steps // 10}, or raise the number of steps."
            yield f"{stage}.warmup_steps", text
        unmeasured = values["eval_strategy"] == "no" and config.best_by == "eval_loss"
        if stage == "sft" and unmeasured:
            yield "sft.eval_strategy", "'no' keeps the last adapter: set it to epoch"
