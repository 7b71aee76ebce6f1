"""The values of a config that people turn: label, kind, choices, how text is read.

The panel shows them, with the defaults of the classes that take them; what is not here
keeps the value that the recipe gave it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import BaseModel

from helpers.config import (
    CLASSES,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    Source,
    defaults,
)
from helpers.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

OWN: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = tuple("adamw_torch adamw_torch_fused adamw_8bit".split())
OPTIMIZERS += tuple("paged_adamw_8bit paged_adamw_32bit".split())


class Knob(NamedTuple):
    """A value that people turn: what the form calls it and takes for it."""

    label: str
    kind: Any = str
    """`str`, `int`, `float`, `bool`, `list`, or `int | float`: the first that fits.

    `list | str` is a list of names, or else a pattern; `Source` is a path or an
    object, `list[Source]` one a line.
    """
    choices: tuple[str, ...] = ()
    wide: bool = False


def find_field(path: str) -> FieldInfo | None:
    """Returns our own field at a path, None where TRL, PEFT or transformers own it."""
    owner, _, leaf = path.rpartition("__")
    return OWN[owner].model_fields[leaf] if owner in OWN else None


def choices(path: str) -> tuple[str, ...]:
    """Returns the values that a field of `RunConfig` may have.

    >>> choices("best_by")
    ('eval_loss', 'loss')
    """
    field = find_field(path)
    return get_args(field.annotation) if field else ()


def default(path: str) -> Any:
    """Returns TRL's or PEFT's default of a value; None of our own fields.

    >>> default("sft__packing"), default("seed")
    (False, None)
    """
    group, _, leaf = path.partition("__")
    return defaults(group).get(leaf) if group in CLASSES else None


# by group and path into the config
KNOBS: dict[str, dict[str, Knob]] = {
    "Model": {
        "model": Knob("base model"),
        "engine": Knob("engine", choices=choices("engine")),
        "weights": Knob("weights", choices=choices("weights")),
        "double_quant": Knob("double quantisation", bool),
        "dtype": Knob("dtype", choices=choices("dtype")),
        "max_length": Knob("max length, tokens", int),
        "template": Knob("template"),
        "pad_token": Knob("pad token"),
        "system_prompt": Knob("system prompt", wide=True),
    },
    "Data": {
        "data__train": Knob("train on", list[Source], wide=True),
        "data__train_rows": Knob("rows of each source", int),
        "data__drop_unusable": Knob("drop unusable rows", bool),
        "data__max_chars": Knob("drop longer, characters", int),
        "loss_on": Knob("loss on", choices=choices("loss_on")),
        "data__eval": Knob("eval loss on", Source),
        "data__eval_rows": Knob("eval rows", int),
        "data__eval_share": Knob("or a share for eval", float),
        "data__test_share": Knob("share for metrics", float),
        "data__problems": Knob("problems (GRPO)", Source),
        "data__test": Knob("test problems", Source),
        "data__test_rows": Knob("test rows", int),
        "data__test_new": Knob("test problems, other kind", Source),
        "data__test_new_rows": Knob("test rows, other kind", int),
    },
    "LoRA": {
        "lora__r": Knob("rank", int),
        "lora__lora_alpha": Knob("alpha", int),
        "lora__lora_dropout": Knob("dropout", float),
        "lora__target_modules": Knob("target modules", list | str, wide=True),
    },
    "Optimisation": {
        "sft__max_steps": Knob("steps", int),
        "sft__num_train_epochs": Knob("or epochs", int | float),
        "sft__learning_rate": Knob("learning rate", float),
        "sft__lr_scheduler_type": Knob("schedule", str, SCHEDULES),
        "sft__warmup_steps": Knob("warm-up steps, or share", int | float),
        "sft__per_device_train_batch_size": Knob("rows a micro-batch", int),
        "sft__gradient_accumulation_steps": Knob("micro-batches a step", int),
        "sft__packing": Knob("packing", bool),
        "sft__gradient_checkpointing": Knob("gradient checkpointing", bool),
        "sft__optim": Knob("optimiser", str, OPTIMIZERS),
        "sft__weight_decay": Knob("weight decay", float),
        "sft__max_grad_norm": Knob("max gradient norm", float),
        "sft__eval_strategy": Knob("evaluate by", str, ("no", "steps", "epoch")),
        "sft__eval_steps": Knob("steps between evals", int),
        "sft__save_steps": Knob("steps between saves", int),
    },
    "Generation": {
        "grpo__max_steps": Knob("GRPO steps", int),
        "grpo__num_train_epochs": Knob("or GRPO epochs", int | float),
        "grpo__learning_rate": Knob("GRPO learning rate", float),
        "grpo__warmup_steps": Knob("GRPO warm-up, or share", int | float),
        "grpo__num_generations": Knob("answers a problem", int),
        "grpo__per_device_train_batch_size": Knob("answers a micro-batch", int),
        "grpo__gradient_accumulation_steps": Knob("micro-batches, GRPO step", int),
        "grpo__max_completion_length": Knob("answer length, tokens", int),
        "grpo__temperature": Knob("sampling temperature", float),
        "grpo_minutes": Knob("or GRPO minutes", float),
        "grpo_held_out": Knob("GRPO: held-out problems", int),
        "sampler": Knob("GRPO samples from", choices=choices("sampler")),
        "max_prompt_length": Knob("max prompt length, tokens", int),
        "inference__max_new_tokens": Knob("chat: answer length", int),
        "inference__temperature": Knob("chat: temperature", float),
        "inference__min_p": Knob("chat: min p", float),
        "evaluation__max_new_tokens": Knob("evaluation: answer length", int),
        "evaluation__batch_size": Knob("evaluation: batch size", int),
        "evaluation__labels": Knob("evaluation: class labels", list, wide=True),
    },
    "Run": {
        "name": Knob("name"),
        "stages": Knob("stages", list, ("sft, grpo", "sft", "grpo")),
        "seed": Knob("seed", int),
        "save_minutes": Knob("minutes between saves", float),
        "sft_adapter": Knob("ready-made adapter"),
        "best_by": Knob("best checkpoint by", choices=choices("best_by")),
    },
}
BY_PATH = {path: knob for knobs in KNOBS.values() for path, knob in knobs.items()}


def hint(path: str) -> str:
    """Returns what a field means, where the config says more than its label.

    >>> hint("data__train_rows")
    'cap a source; empty = all'
    """
    field = find_field(path)
    text = (field.description or "") if field else ""
    return text.replace("null", "empty")


def read(values: dict[str, Any], path: str) -> Any:
    """Returns the value at a path like `sft__max_steps`, None when there is none."""
    for key in path.split("__"):
        values = values.get(key) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def write(values: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value at a path; None takes it away where TRL or PEFT have a default."""
    *groups, leaf = path.split("__")
    for key in groups:
        values = values[key]
    if value is None and find_field(path) is None:
        values.pop(leaf, None)
    else:
        values[leaf] = value


def show(value: Any, between: str = ", ") -> str:
    """Returns a value as text; nothing for None, a source with options as JSON.

    >>> show(None), show(["q_proj", "v_proj"]), show({"path": "a", "rows": 5})
    ('', 'q_proj, v_proj', '{"path": "a", "rows": 5}')
    """
    if isinstance(value, list):
        return between.join(map(show, value))
    if isinstance(value, dict):
        return json.dumps({k: v for k, v in value.items() if v}, ensure_ascii=False)
    return "" if value is None else str(value)


def parse_source(text: str, where: str) -> Any:
    """Returns the source that a text means: a path, or a JSON object.

    Raises:
        ConfigError: it begins as an object does and is none.
    """
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {text!r} is no JSON object: {error}") from None


def parse(text: str | bool, path: str) -> Any:
    """Returns the value that a field's text means; None for no text where that is one.

    What a box to tick says is the value already.

    >>> parse("1e-3", "sft__learning_rate"), parse("", "data__train_rows")
    (0.001, None)

    Raises:
        ConfigError: the text is no number, or none in range, where one is expected.
    """
    if isinstance(text, bool):
        return text
    text, where, kind = text.strip(), path.replace("__", "."), BY_PATH[path].kind
    field = find_field(path)
    if not text and (field is None or type(None) in get_args(field.annotation)):
        return None
    if kind is str:
        return text
    if kind is Source:
        return parse_source(text, where)
    if kind == list[Source]:
        lines = [line.strip() for line in text.splitlines()]
        return [parse_source(line, where) for line in lines if line]
    if kind in (list, list | str):
        names = [item.strip() for item in text.split(",") if item.strip()]
        word = re.compile(r"[\w.]+")
        return names if kind is list or all(map(word.fullmatch, names)) else text
    value = None
    for convert in get_args(kind) or (kind,):
        try:
            value = convert(text)
            break
        except ValueError:
            continue
    expected = "a whole number" if kind is int else "a number"
    if value is None:
        raise ConfigError(f"{where}: {text!r} is not {expected}")
    least = 1 if kind is int else 0
    if field is None and not least <= value < 1e9:
        raise ConfigError(f"{where}: {text} found, {expected} from {least} expected")
    return value
