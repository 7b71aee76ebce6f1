"""The fields of the libraries' own classes, which take the groups of a config.

Names, types and defaults are asked of the classes; none are written down here. The
first question imports TRL, which takes ten seconds.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import NoneType, SimpleNamespace
from typing import Any, get_args, get_origin

from helpers.config import RunConfig, Stage
from helpers.errors import nearest

PLACES = {
    "sft": ("trl", "SFTConfig"),
    "grpo": ("trl", "GRPOConfig"),
    "lora": ("peft", "LoraConfig"),
    "inference": ("transformers", "GenerationConfig"),
}
SURE = 0.8  # of difflib's ratio, from which on a name is taken for a misspelt one
FEW = 12  # values, which are all named
# values that transformers judges only when it draws a token
DRAWING = {
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
}
# what earlier versions had, and tutorials still show
REMOVED = {
    "save_safetensors": "transformers 5 saves nothing but safetensors; remove it",
    "overwrite_output_dir": "transformers 5 never empties the folder; remove it",
    "group_by_length": "now train_sampling_strategy='group_by_length'",
    "warmup_ratio": "now warmup_steps, where a value below 1 is a share of the run",
    "no_cuda": "now use_cpu",
}


def import_engine(engine: str) -> None:
    """Imports Unsloth where it will train: it must come before TRL and PEFT."""
    from helpers.models.load import resolve_engine

    late = "trl" in sys.modules or importlib.util.find_spec("unsloth") is None
    if not late and resolve_engine(engine) == "unsloth":
        import unsloth  # noqa: F401


@cache
def owner(group: str) -> Any:
    """Returns the class that takes a group's values.

    Unsloth puts subclasses with other defaults in the place of TRL's own.
    """
    package, name = PLACES[group]
    kind = getattr(importlib.import_module(package), name)
    return next(k for k in kind.__mro__ if k.__module__.startswith(f"{package}."))


def own_fields(group: str) -> dict[str, Any]:
    """Returns the dataclass fields of a group's class; GenerationConfig has none."""
    return getattr(owner(group), "__dataclass_fields__", {})


@cache
def defaults(group: str) -> dict[str, Any]:
    """Returns the defaults of a class that has them in its fields.

    But AdamW is not TRL's fused one, which hides from accelerate the steps that fp16
    skips.

    >>> defaults("grpo")["max_completion_length"], defaults("sft")["optim"]
    (512, 'adamw_torch')
    """
    named = own_fields(group).items()
    found = {n: f.default for n, f in named if f.default is not dataclasses.MISSING}
    return found | ({"optim": "adamw_torch"} if "optim" in found else {})


def complete(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """Returns a stage's values, with TRL's defaults where the config is silent."""
    return {**defaults(stage), **getattr(config, stage)}


@cache
def hints(group: str) -> dict[str, Any]:
    """Returns the type of each field, `Any` where it cannot be told."""
    kind = owner(group)
    types = {name: field.type for name, field in own_fields(group).items()}
    if not types:  # GenerationConfig names its types in its documentation alone
        documented = re.findall(r"^ +(\w+) ?\(`(.+?)`[,)]", kind.__doc__ or "", re.M)
        types = dict.fromkeys(vars(kind()), Any) | {
            name: text.replace("`", "").replace(" or ", " | ") + " | None"
            for name, text in documented
        }
    scope: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        scope |= vars(sys.modules[parent.__module__])
    found: dict[str, Any] = {}
    for name, annotation in types.items():
        holder: Any = SimpleNamespace(__annotations__={name: annotation})
        try:
            found |= typing.get_type_hints(holder, scope)
        except (NameError, SyntaxError, TypeError):
            found[name] = Any
    return {name: hint for name, hint in found.items() if not name.startswith("_")}


@cache
def allowed(group: str, name: str) -> tuple[str, ...]:
    """Returns the texts that a field may hold, none where any may be.

    They are the type's, or those that the field's own help quotes as its values.

    >>> allowed("lora", "bias"), allowed("sft", "loss_type")
    (('none', 'all', 'lora_only'), ('chunked_nll', 'nll', 'dft'))
    """
    hint = hints(group)[name]
    parts = get_args(hint) if get_origin(hint) is not typing.Literal else (hint,)
    values: list[Any] = []
    for part in parts or (hint,):
        if isinstance(part, type) and issubclass(part, Enum):
            values += [each.value for each in part]
        elif get_origin(part) is typing.Literal:
            values += get_args(part)
    field, plain = own_fields(group).get(name), set(parts or (hint,))
    if field and not values and str in plain and plain <= {str, bool, NoneType}:
        text = field.metadata.get("help", "")
        words = re.findall(r"(?<!=)['`](\w+)'", text) or re.findall(r"`(\w+)`", text)
        lists = field.default in words or re.search(r"(values are|one of) ", text)
        values = list(field.metadata.get("choices", words if lists else []))
    return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))


def check(group: str, name: str, value: Any) -> str:
    """Returns what is wrong with a value for a field, nothing where it may hold it."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError
    from pydantic_core import PydanticSerializationError, to_json

    if name in REMOVED or name not in hints(group):
        hint = nearest(name, hints(group), sure=SURE) or "; remove it"
        hint = f": {REMOVED[name]}" if name in REMOVED else hint
        return f"{PLACES[group][1]} has no such field{hint}"
    hint, texts, field = hints(group)[name], allowed(group, name), own_fields(group)
    if name in field:  # the help of scale_rewards, which is a text, names `True` too
        told = hint is str and isinstance(value, bool)
        told &= f"`{value}`" in field[name].metadata.get("help", "")
        if told or value == field[name].default:
            return ""
    names = f" (one of {', '.join(texts)})" if 0 < len(texts) <= FEW else ""
    if texts and isinstance(value, str):
        # pissa_niter_[number of iters] stands for all that begin so
        starts = tuple(text.partition("[")[0] for text in texts if "[" in text)
        if value in texts or value.startswith(starts or ("\n",)):
            return ""
        return f"found {value!r}{nearest(value, texts)}{names}"
    try:  # as JSON, which has no tuples, sets or enums of its own
        text = to_json(value, inf_nan_mode="constants")
        TypeAdapter(hint).validate_json(text, strict=True)
    except (ValidationError, PydanticSerializationError):
        return f"found {value!r}; expected {inspect.formatannotation(hint)}{names}"
    except PydanticUserError:
        return ""  # pydantic does not know the type
    return ""


def named(values: dict[str, Any], text: str) -> str:
    """Returns the name that a text speaks of first, empty when it speaks of none."""
    return next((word for word in re.findall(r"\w+", text) if word in values), "")


def try_out(settings: Any) -> None:
    """Makes what training or drawing makes of settings first, which may refuse them."""
    import torch
    import transformers

    if isinstance(settings, transformers.GenerationConfig):
        for name, kind in DRAWING.items():
            value = getattr(settings, name)
            if value in (None, 1) or (name, value) == ("top_k", 0):
                continue  # it is off
            try:
                getattr(transformers, kind)(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if not isinstance(settings, transformers.TrainingArguments):
        return
    torch.utils.data.DataLoader(
        [0],
        settings.per_device_eval_batch_size,
        num_workers=settings.dataloader_num_workers,
    )
    net = torch.nn.Linear(1, 1)
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(settings, net)
    if settings.optim_target_modules is None:  # those are of a real model
        transformers.get_scheduler(
            settings.lr_scheduler_type,
            kind(net.parameters(), **options),
            num_warmup_steps=0,
            num_training_steps=10,
            scheduler_specific_kwargs=settings.lr_scheduler_kwargs,
        )


def faults(
    group: str, values: dict[str, Any], more: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yields the name and the fault of each value that a group's class does not take.

    Args:
        group: `sft`, `grpo`, `lora` or `inference`.
        values: of the config.
        more: what the class is given besides or instead, once all types are right.
    """
    # Unsloth adds fields of its own to TRL's classes
    own = {n: v for n, v in values.items() if not n.startswith("unsloth_")}
    texts = {name: check(group, name, value) for name, value in own.items()}
    yield from ((name, text) for name, text in texts.items() if text)
    # of several processes each would start their group before a model is loaded
    if any(texts.values()) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    try:  # Unsloth's classes would mend some values with a printed word
        try_out(owner(group)(**{**own, **more}))
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        text = f"{PLACES[group][1]} refuses it: {' '.join(str(error).split())[:300]}"
        name = named(own, text)
        yield name, f"found {own[name]!r}; {text}" if name else text
