"""Minutes of training, estimated before anything is loaded.

Rough: a factor of two on a machine that nobody measured. Sizes come from the config,
rates from the data sheets and the measurements that are named beside them.
"""

from __future__ import annotations

import math
import os
from typing import Any

from helpers import shapes
from helpers.config import RunConfig, Stage, complete
from helpers.gpus import Gpu

# Of a machine: seconds that a batch takes for one sampled token, by layer and by
# parameter; and that batch.
SPEEDS = {
    # SmolLM2-135M, fp32, two cores: 133 tokens/s of 32 answers
    "cpu": (0.0, 32 / 133 / 135e6, 32),
    # H100, Llama-3.2-1B, 4 bit, LoRA: 34.1 ms a token of 64 answers, by starting the
    # kernels of 16 layers
    "gpu": (34.1e-3 / 16, 0.0, 64),
    # T4, not measured: the same, and 4.5 bytes a weight (4 bit read, 16 bit written and
    # read) at 320 GB/s
    "t4": (34.1e-3 / 16, 4.5 / 320e9, 64),
}

# two cores, SmolLM2-135M, fp32: 3.8 s for a training step of 512 tokens
CPU_RATE = 6 * 135e6 * 512 / 3.8
# Of a token sampled from the 16-bit copy, besides reading its weights once: 1.67 ms on
# an H200, Llama-3.2-1B, 8 answers (results/grpo_speed.json), of which 0.52 are reading
COPY_LAYER_S = 1.15e-3 / 16
# of a token sampled by Unsloth's kernels in 4 bit, by the same run: 8.79 ms
UNSLOTH_LAYER_S = 8.79e-3 / 16
STEP_S, MICRO_S = 0.35, 0.03  # a step and a micro-batch besides, measured on an H100
ROW_TOKENS = 400  # of a chat row, without a figure of the data
PROMPT_TOKENS = 200  # of a GSM8K problem with a system prompt


def uses_unsloth(config: RunConfig) -> bool:
    """Returns whether a config trains with Unsloth on a GPU."""
    return config.engine in ("auto", "unsloth")


def step_rows(values: dict[str, Any]) -> int:
    """Returns the rows of one optimiser step, over all processes.

    Args:
        values: of `fields.complete`, as for the functions below.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = values["per_device_train_batch_size"]
    return batch * values["gradient_accumulation_steps"] * processes


def sampled_rows(values: dict[str, Any]) -> int:
    """Returns the completions that one process of GRPO samples at a time.

    >>> sampled_rows({**defaults("grpo"), "per_device_train_batch_size": 4})
    4
    """
    batch, rounds = (
        values["per_device_train_batch_size"],
        values["steps_per_generation"],
    )
    return batch * (rounds or values["gradient_accumulation_steps"])


def prompt_tokens(config: RunConfig) -> int:
    """Returns the tokens of a GRPO prompt: the config's limit, or as GSM8K has them."""
    return config.max_prompt_length or PROMPT_TOKENS


def count_steps(values: dict[str, Any], rows: int | None) -> int | None:
    """Returns the optimiser steps of a stage, None when that cannot be known.

    How many conversations go into a packed row is not known.

    >>> count_steps({**defaults("sft"), "per_device_train_batch_size": 4}, 10)
    9
    """
    if values["max_steps"] > 0:
        return values["max_steps"]
    if rows is None or values.get("packing"):
        return None
    an_epoch = math.ceil(rows / step_rows(values))
    return math.ceil(values["num_train_epochs"] * an_epoch)


def training_minutes(
    config: RunConfig, gpu: Gpu | None, stage: Stage, steps: int | None = None
) -> float | None:
    """Returns the minutes that a stage trains, None when its steps are not known.

    A token costs two operations a weight forward, two backward (frozen weights get no
    gradient) and two more where activations are recomputed (Kaplan et al.,
    arXiv:2001.08361, section 2.1). GRPO also samples, a token at a time; `auto` is
    counted as the 16-bit copy.

    Args:
        config: the run.
        gpu: None for this machine's CPU.
        stage: `sft` or `grpo`.
        steps: optimiser steps, where the config counts epochs.

    Raises:
        UnknownArchitecture: the base model's numbers are not known.
    """
    if stage == "grpo" and config.grpo_minutes:
        return config.grpo_minutes
    values = complete(config, stage)
    steps = steps or count_steps(values, None)
    if not steps:
        return None
    arch = shapes.find_architecture(config.model)
    parameters = arch.parameters
    rows, micro = step_rows(values), values["gradient_accumulation_steps"]
    if stage == "grpo":
        length = values["max_completion_length"] + prompt_tokens(config)
    else:
        packed = values["packing"]
        length = config.max_length if packed else min(ROW_TOKENS, config.max_length)
    passes, rate, fixed = 6, CPU_RATE, 0.0
    if gpu is not None:
        passes = 6 if values["gradient_checkpointing"] else 4
        rate, fixed = gpu.efficiency * gpu.tflops * 1e12, STEP_S + MICRO_S * micro
    seconds = fixed + rows * length * passes * parameters / rate
    if stage == "grpo":
        kind = "cpu" if gpu is None else "t4" if gpu.is_old else "gpu"
        a_layer, a_parameter, batch = SPEEDS[kind]
        if gpu is not None and config.sampler in ("auto", "copy"):
            a_layer, a_parameter = COPY_LAYER_S, 2 / (gpu.bandwidth * 1e9)
        elif gpu is not None and uses_unsloth(config):
            a_layer = UNSLOTH_LAYER_S
        token_s = a_layer * arch.layers + a_parameter * parameters
        seconds += values["max_completion_length"] * token_s * max(1.0, rows / batch)
    return steps * seconds / 60
