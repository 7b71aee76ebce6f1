"""The named configurations; `load("demo")` is one word away from a run."""

from __future__ import annotations

import copy
from typing import Any

from helpers.config import ConfigError, RunConfig, changed, check_config, nearest

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS += ["gate_proj", "up_proj", "down_proj"]

WORD_PROBLEMS = "data_samples/word_problems"

# A 135M model that learns easy word problems in minutes on two CPU cores. Its rate is
# five times the usual one for LoRA: small models bear it, and 120 steps need it.
DEMO: dict[str, Any] = {
    "name": "demo",
    "model": "smollm2-135m-offline",
    "max_length": 512,
    "data": {
        "train": [
            f"{WORD_PROBLEMS}/train.jsonl",
            "data_samples/openai_messages.jsonl",
            "data_samples/sharegpt.jsonl",
        ],
        "eval": f"{WORD_PROBLEMS}/eval.jsonl",
        "eval_rows": 64,
        "problems": f"{WORD_PROBLEMS}/train.jsonl",
        "test": f"{WORD_PROBLEMS}/test.jsonl",
        "test_rows": 200,
        "test_new": f"{WORD_PROBLEMS}/test_new.jsonl",
        "test_new_rows": 100,
    },
    "evaluation": {"max_new_tokens": 128},
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": PROJECTIONS},
    "sft": {
        "max_steps": 120,
        # one packed row of 512 tokens a step, which is about five problems: on a CPU
        # attention is computed over the whole micro-batch, so short ones are fastest
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "packing": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 6,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 40,
        "save_steps": 40,
    },
    "grpo": {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 64,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 5,
    },
    "rewards": {"correctness": 1.0},
}

# The demo with every size cut down: proves that the cells run, measures nothing.
SMOKE: dict[str, Any] = {
    "name": "smoke",
    "evaluation": {"max_new_tokens": 24},
}

# The stock Unsloth QLoRA notebook's values, then GRPO on GSM8K.
FINETOME: dict[str, Any] = {
    "name": "finetome-llama32-1b",
    "model": "unsloth/Llama-3.2-1B-Instruct",
    "max_length": 2048,
    "data": {
        "train": ["mlabonne/FineTome-100k:train"],
        # 60 steps of 8 rows see 480; the rest of the 100,000 would only be tokenised
        "train_rows": 2000,
        "drop_unusable": True,  # counted in the report, not trained on
        "eval": "openai/gsm8k/main:train",
        "eval_rows": 100,
        "problems": "openai/gsm8k/main:train",
        "test": "openai/gsm8k/main:test",
        "test_rows": 200,
        "test_new": f"{WORD_PROBLEMS}/test_new.jsonl",
        "test_new_rows": 100,
    },
    "evaluation": {"batch_size": 32, "max_new_tokens": 320},
    "lora": {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": PROJECTIONS,
    },
    "sft": {
        "max_steps": 60,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "packing": False,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "optim": "adamw_8bit",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_steps": 20,
    },
    "grpo": {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 320,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "optim": "adamw_8bit",
        "logging_steps": 1,
        "save_steps": 5,
    },
    "rewards": {"correctness": 1.0, "strict_format": 0.2, "number_present": 0.1},
}

NAMES = ("demo", "smoke", "finetome-llama32-1b")


def load(name: str) -> RunConfig:
    """Returns the validated config of a recipe.

    >>> load("demo").model
    'smollm2-135m-offline'

    Raises:
        ConfigError: there is no such recipe; the nearest name is given.
    """
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise ConfigError(f"no recipe {name!r}{nearest(name, NAMES)} (known: {known})")
    if name == "smoke":
        config = scaled(load("demo"), steps=4, rows=16)
        return changed(config, recipe="smoke", **SMOKE)
    values = FINETOME if name == "finetome-llama32-1b" else DEMO
    return check_config(copy.deepcopy({"recipe": name, **values}))


def scaled(
    config: RunConfig,
    *,
    model: str | None = None,
    steps: int | None = None,
    rows: int | None = None,
) -> RunConfig:
    """Returns the small version of a config, everything else as it was.

    Args:
        model: another base model.
        steps: optimiser steps of SFT; GRPO takes half as many, at least 2.
        rows: held-out rows to score, and eight times as many to train on.
    """
    changes: dict[str, Any] = {}
    if model is not None:
        changes["model"] = model
    if steps is not None:
        changes |= {"sft__max_steps": steps, "grpo__max_steps": max(2, steps // 2)}
        every = max(1, steps // 2)
        changes |= {"sft__eval_steps": every, "sft__save_steps": every}
    if rows is not None:
        changes |= {"data__train_rows": 8 * rows}
        changes |= {f"data__{part}_rows": rows for part in ("eval", "test", "test_new")}
    return changed(config, **changes)


def default_name() -> str:
    """Returns the recipe a notebook starts with on this machine.

    `TUNEBOOK_RECIPE` decides when set; else the Llama recipe on a GPU with the model
    hub in reach, and the offline demo everywhere else.
    """
    import os

    import torch

    from helpers import runtime

    asked = os.environ.get("TUNEBOOK_RECIPE")
    if asked:
        return asked
    online = torch.cuda.is_available() and runtime.hub_reachable()
    return "finetome-llama32-1b" if online else "demo"
