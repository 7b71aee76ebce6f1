"""Minutes of training and evaluation, estimated before anything is loaded.

Rough: a factor of two on a machine that nobody measured. Sizes come from the config,
rates from the data sheets and the measurements that are named beside them.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

from helpers import runtime, shapes
from helpers.config import RunConfig, Stage
from helpers.data import answered, parts_of
from helpers.gpus import Gpu

# Of a machine: seconds that a batch takes for one token, by layer and by parameter;
# that batch; seconds of a row's eval loss, by parameter, at 300 tokens a row.
SPEEDS = {
    # SmolLM2-135M, fp32, two cores: 133 tokens/s of 32 answers, 3.8 s for a training
    # step of 512 tokens, a third of it forward
    "cpu": (0.0, 32 / 133 / 135e6, 32, 3.8 / 3 * 300 / 512 / 135e6),
    # H100, Llama-3.2-1B, 4 bit, LoRA: 34.1 ms a token of 64 answers, by starting the
    # kernels of 16 layers; 7,974 tokens/s trained, padded
    "gpu": (34.1e-3 / 16, 0.0, 64, 300 / 7974 / 3 / 1.24e9),
    # T4, not measured: the same, and 4.5 bytes a weight (4 bit read, 16 bit written and
    # read) at 320 GB/s. A published 3B run of 640 rows, 0.82 s each by its sibling,
    # took 2975 s with the loss of 6000 more.
    "t4": (34.1e-3 / 16, 4.5 / 320e9, 64, (2975 - 640 * 0.82) / 6000 / 3.2e9),
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
SHOT_TOKENS = 165  # of a solved one, on average


class Pass(NamedTuple):
    """What it takes to evaluate one of the held-out sets."""

    rows: int
    times: int
    minutes: float


def uses_unsloth(config: RunConfig) -> bool:
    """Returns whether a config trains with Unsloth on a GPU."""
    return config.engine in ("auto", "unsloth")


def step_rows(values: dict[str, Any]) -> int:
    """Returns the rows of one optimiser step, over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = values.get("per_device_train_batch_size", 8)
    return batch * values.get("gradient_accumulation_steps", 1) * processes


def sampled_rows(values: dict[str, Any]) -> int:
    """Returns the completions that one process of GRPO samples at a time.

    >>> sampled_rows({"per_device_train_batch_size": 4})
    4
    """
    each = values.get("gradient_accumulation_steps", 1)
    batch = values.get("per_device_train_batch_size", 8)
    return batch * (values.get("steps_per_generation") or each)


def prompt_tokens(config: RunConfig) -> int:
    """Returns the tokens of a GRPO prompt: the config's limit, or as GSM8K has them."""
    few = PROMPT_TOKENS + SHOT_TOKENS * config.few_shot
    return config.max_prompt_length or few


def count_steps(values: dict[str, Any], rows: int | None) -> int | None:
    """Returns the optimiser steps of a stage, None when that cannot be known.

    How many conversations go into a packed row is not known.

    >>> count_steps({"num_train_epochs": 2, "per_device_train_batch_size": 4}, 10)
    6
    """
    if values.get("max_steps", -1) > 0:
        return values["max_steps"]
    if rows is None or values.get("packing"):
        return None
    an_epoch = math.ceil(rows / step_rows(values))
    return math.ceil(values.get("num_train_epochs", 3) * an_epoch)


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
    values = getattr(config, stage)
    steps = steps or count_steps(values, None)
    if not steps:
        return None
    arch = shapes.find_architecture(config.model)
    parameters = shapes.count_parameters(arch)
    rows, micro = step_rows(values), values.get("gradient_accumulation_steps", 1)
    answer = values.get("max_completion_length", 256)
    if stage == "grpo":
        length = answer + prompt_tokens(config)
    else:
        packed = values.get("packing", False)
        length = config.max_length if packed else min(ROW_TOKENS, config.max_length)
    passes, rate, fixed = 6, CPU_RATE, 0.0
    if gpu is not None:
        passes = 6 if values.get("gradient_checkpointing", True) else 4
        rate, fixed = gpu.efficiency * gpu.tflops * 1e12, STEP_S + MICRO_S * micro
    seconds = fixed + rows * length * passes * parameters / rate
    if stage == "grpo":
        kind = "cpu" if gpu is None else "t4" if gpu.is_old else "gpu"
        a_layer, a_parameter, batch, _ = SPEEDS[kind]
        if gpu is not None and config.sampler in ("auto", "copy"):
            a_layer, a_parameter = COPY_LAYER_S, 2 / (gpu.bandwidth * 1e9)
        elif gpu is not None and uses_unsloth(config):
            a_layer = UNSLOTH_LAYER_S
        token_s = a_layer * arch.layers + a_parameter * parameters
        seconds += answer * token_s * max(1.0, rows / batch)
    return steps * seconds / 60


def held_out(config: RunConfig, rows: int | None) -> dict[str, int]:
    """Returns the rows, at most, of each held-out set whose size can be told.

    The sets are those of `data/`: `eval`, `test_chat`, `test` and `test_new`.
    """
    data, total = config.data, None
    if rows is not None:  # what is left of the source after splitting
        total = rows / max(0.01, 1 - (data.eval_share or 0) - (data.test_share or 0))
    elif data.train_rows:
        total = data.train_rows * len(data.train)
    sizes = {}
    for name, source, cap in (
        ("eval", data.eval_share or data.eval, data.eval_rows),
        ("test_chat", data.test_share, data.test_rows),
        ("test", data.test, data.test_rows),
        ("test_new", data.test_new, data.test_new_rows),
    ):
        size = round(source * total) if isinstance(source, float) and total else cap
        if source and size:
            sizes[name] = min(size, cap or size)
    return sizes


def evaluation_minutes(
    config: RunConfig,
    machine: runtime.Machine,
    arch: shapes.Architecture,
    rows: int | None,
) -> dict[str, Pass]:
    """Returns what evaluating takes at most: of `test` (all models) and of `eval`.

    Args:
        config: the run.
        machine: it is evaluated on.
        arch: the base model.
        rows: conversations to train on, once the data are prepared.
    """
    sizes, models = held_out(config, rows), 1 + len(config.stages)
    kind = "cpu"
    if machine.capability is not None:
        kind = "gpu" if machine.capability >= (8, 0) else "t4"
    a_layer, a_parameter, usual_batch, a_row = SPEEDS[kind]
    parameters = shapes.count_parameters(arch)

    options = config.evaluation
    batch = options.batch_size or usual_batch
    token_s = a_layer * arch.layers + a_parameter * parameters
    batch_s = token_s * options.max_new_tokens * max(1.0, batch / usual_batch)

    def answering_s(name: str) -> float:
        if name in ("test", "test_new"):  # and to each so many answers are drawn
            count = sizes.get(name, 0) * (1 + options.samples)
        else:
            count = min(sizes.get(name, 0), options.text_rows)
        return models * math.ceil(count / batch) * batch_s

    seconds = {n: answering_s(n) for n in answered(parts_of(config.data))}
    # conversations give a loss, the eval ones in training too
    chats, evaluated = sizes.get("test_chat", 0), sizes.get("eval", 0)
    row_s, times = a_row * parameters, models
    if "sft" in config.stages and config.sft.get("eval_strategy") == "steps":
        steps, every = count_steps(config.sft, rows), config.sft.get("eval_steps")
        if steps and every:
            times += int(steps / every if every >= 1 else 1 / every)
    eval_s = seconds.pop("eval", 0.0) + times * evaluated * row_s
    test_s = sum(seconds.values()) + models * chats * row_s
    tested = sum(sizes.get(name, 0) for name in ("test", "test_new", "test_chat"))
    return {
        "test": Pass(tested, models, test_s / 60),
        "eval": Pass(evaluated, times, eval_s / 60),
    }
