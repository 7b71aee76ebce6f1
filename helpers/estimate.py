"""Estimates the peak GPU memory and the minutes of a config, with nothing loaded.

Closed formulas over the architecture's numbers. The memory is within about 15 % of what
was measured (`benchmarks/memory.py`), the minutes within a factor of two.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from helpers import runtime
from helpers.config import RunConfig, Stage, changed, complete
from helpers.errors import UnknownArchitecture

GIB = 2**30
COPY = "16-bit copy to sample from"
NAMES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
NAMES += " intermediate_size vocab_size max_position_embeddings tie_word_embeddings"
LLAMAS = {  # fields of LlamaConfig, for use offline
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, 131072, True),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, 131072, True),
    "llama-2-7b": (4096, 32, 32, 32, 128, 11008, 32000, 4096, False),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, 8192, True),
}
KNOWN = {n: dict(zip(NAMES.split(), x, strict=True)) for n, x in LLAMAS.items()}
ROW_TOKENS, PROMPT_TOKENS = 400, 200  # of a chat row, of a GSM8K prompt
# Fitted by least squares to the calibration half of results/memory.json
KEPT, KEPT_UNSLOTH = 1.56, 0.66  # times what a layer keeps at least
INT8 = 6.0  # times KEPT, of transformers' 8-bit layers
BACKWARD = 0.6  # gradients of a layer, times what it keeps
SCORE, KEPT_SCORE = 14.5, 3.0  # bytes an attention score: at the peak, and kept
LOGIT, LOGIT_UNSLOTH = 10.0, 3.3  # bytes a logit
CACHE = 4.4  # grown by copying: blocks of all sizes stay reserved
WORKSPACE_GB = 0.39


class Gpu(NamedTuple):
    """A GPU in numbers."""

    name: str
    memory_gb: float  # GiB that torch may reserve: the card's, less the CUDA context
    tflops: float  # 10**12 operations a second that QLoRA training reaches

    @property
    def safe_gb(self) -> float:
        """GiB that an estimate should stay below, because of its error."""
        return self.memory_gb / 1.07


T4 = Gpu("Tesla T4", 14.0, 9.75)
CPU = Gpu("two CPU cores", math.inf, 0.11)


class MemoryEstimate(NamedTuple):
    """The peak of torch's reserved memory while a stage trains."""

    stage: Stage
    parts: dict[str, float]  # GiB by component at the moment of the peak

    @property
    def peak_gb(self) -> float:
        """All parts together, in GiB."""
        return sum(self.parts.values())


def this_gpu() -> Gpu | None:
    """Returns this machine's GPU, under the cap of `TUNEBOOK_GPU_GB`; None without."""
    import torch

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0)
    free_gb = min(card.total_memory / GIB - 0.74, runtime.memory_cap_gb())
    # a multiprocessor's rate: Volta and Turing, Ampere and Ada, Hopper
    rate = 0.24 if card.major < 8 else 1.0 if card.major == 8 else 2.6
    return Gpu(card.name, free_gb, rate * card.multi_processor_count)


def step_rows(config: RunConfig, stage: Stage) -> int:
    """Returns the rows (GRPO: completions) of one optimiser step, of all processes."""
    values = complete(config, stage)
    rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return rows * int(os.environ.get("WORLD_SIZE", "1"))


def sampled_rows(config: RunConfig) -> int:
    """Returns the completions that one process of GRPO samples at a time."""
    values = complete(config, "grpo")
    rounds = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    return values["per_device_train_batch_size"] * rounds


def count_steps(config: RunConfig, stage: Stage, rows: int | None = None) -> int | None:
    """Returns the optimiser steps of a stage, None where they cannot be known.

    Args:
        config: the run.
        stage: `sft` or `grpo`.
        rows: conversations or problems; how many a packed row takes is not known.
    """
    values = complete(config, stage)
    if values["max_steps"] > 0:
        return values["max_steps"]
    if rows is None or values.get("packing"):
        return None
    rows *= values["num_generations"] if stage == "grpo" else 1
    an_epoch = math.ceil(rows / step_rows(config, stage))
    return math.ceil(values["num_train_epochs"] * an_epoch)


def sft_minutes(
    config: RunConfig, gpu: Gpu = T4, rows: int | None = None
) -> float | None:
    """Returns the minutes of SFT, roughly; None where `count_steps` knows no steps.

    A token costs two operations a weight forward, two backward (frozen weights get no
    gradient) and two more where activations are recomputed (Kaplan et al.,
    arXiv:2001.08361, section 2.1).
    """
    values, steps = complete(config, "sft"), count_steps(config, "sft", rows)
    if steps is None:
        return None
    length = config.max_length if values["packing"] else ROW_TOKENS
    tokens = step_rows(config, "sft") * min(length, config.max_length)
    passes = 6 if values["gradient_checkpointing"] else 4
    work = tokens * passes * skeleton(config.model).num_parameters()
    overhead = 0.35 + 0.03 * values["gradient_accumulation_steps"]  # s, on an H100
    return steps * (overhead + work / (gpu.tflops * 1e12)) / 60


def skeleton(model: str, lora: dict[str, Any] | None = None) -> Any:
    """Returns a base model without weights, on torch's meta device; do not change it.

    Args:
        model: hub id or folder.
        lora: fields of PEFT's `LoraConfig`; with them the result is a `PeftModel`.

    Raises:
        UnknownArchitecture: it has no config, or none that transformers can build.
        ValueError: PEFT refuses the fields; it also lets other errors pass.
    """
    file = Path(model, "config.json")
    changed_at = file.stat().st_mtime_ns if file.exists() else 0
    return build(model, json.dumps(lora, default=list), changed_at)


@cache
def build(model: str, lora: str, changed_at: int) -> Any:
    """Returns a model without weights, with LoRA as JSON unless it is `null`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    name = model.lower().rpartition("/")[2].removeprefix("meta-")
    known = None if Path(model).is_dir() else next(filter(name.startswith, KNOWN), None)
    if not known and not Path(model).is_dir() and not runtime.hub_reachable():
        raise UnknownArchitecture(
            f"the numbers of {model!r} are not known here and the model hub cannot be "
            "reached"
        )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warns, too
        try:
            if known:
                config = AutoConfig.for_model("llama", **KNOWN[known])
            else:
                config = AutoConfig.from_pretrained(model)
            base = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UnknownArchitecture(f"{model}: {str(error)[:200]}") from error
        if lora == "null":
            return base
        # without the matrices' first values, which would take time
        settings = json.loads(lora) | {"init_lora_weights": False}
        settings["task_type"] = "CAUSAL_LM"
        return get_peft_model(base, LoraConfig(**settings))


def estimate_memory(
    config: RunConfig, gpu: Gpu = T4, stage: Stage | None = None
) -> MemoryEstimate:
    """Returns the peak memory of a stage, within about 15 %.

    The peak is in the loss, with the activations of all layers waiting, or in the
    backward pass of the last layer. With gradient checkpointing only the layers'
    inputs wait; Unsloth moves all but three of them to RAM.

    Args:
        config: the run.
        gpu: decides about `sampler="auto"`, which is the copy where it fits.
        stage: `sft` or `grpo`; by default the one with the higher peak.

    Raises:
        UnknownArchitecture: see `skeleton`; or the model has no attention heads.
    """
    if stage is None:
        peaks = [estimate_memory(config, gpu, each) for each in config.stages]
        return max(peaks, key=lambda estimate: estimate.peak_gb)
    if stage == "grpo" and config.sampler == "auto":
        copied = estimate_memory(changed(config, sampler="copy"), gpu, stage)
        if copied.peak_gb <= gpu.safe_gb:
            return copied
    base, values = skeleton(config.model), complete(config, stage)
    numbers = base.config.get_text_config()
    try:
        hidden, heads = numbers.hidden_size, numbers.num_attention_heads
        layers, vocab = numbers.num_hidden_layers, numbers.vocab_size
    except AttributeError as error:
        raise UnknownArchitecture(f"{config.model}: {error}") from error
    trained, _ = skeleton(config.model, config.lora).get_nb_trainable_parameters()
    inner = getattr(numbers, "intermediate_size", None) or 4 * hidden  # GPT-2
    kv_heads = getattr(numbers, "num_key_value_heads", None) or heads
    width = kv_heads * (getattr(numbers, "head_dim", None) or hidden // heads)
    batch, length = values["per_device_train_batch_size"], config.max_length
    logit_rows = 256  # of TRL's chunked_nll; its GRPO takes all answers at once
    if stage == "grpo":
        length = values["max_completion_length"]
        logit_rows = batch * length
        length += config.max_prompt_length or PROMPT_TOKENS
    tokens = batch * length

    bits = config.weights.replace("auto", "4bit")
    embeddings = vocab * hidden * (1 if base.config.tie_word_embeddings else 2)
    # NF4 has a scale for 64 weights: in fp32, or in a byte with double quantisation
    sizes = {"4bit": 0.516 if config.double_quant else 0.5625, "8bit": 1, "16bit": 2}
    state = 0 if "paged" in values["optim"] else 2 if "8bit" in values["optim"] else 8
    if config.engine == "transformers":
        other = 2 if bits == "16bit" else 4  # PEFT casts what is not quantised to fp32
        # Without FlashAttention grouped heads and no mask are left to SDPA's math
        # kernel, which makes the matrix of all scores; packed rows come with a mask.
        whole = kv_heads != heads and not values.get("packing")
        scores = tokens * length * heads if whole else 0
        layer = KEPT * (INT8 if bits == "8bit" else 1)
        inputs = other * tokens * hidden * layers
        loss = LOGIT * logit_rows * vocab + (other - 2) * vocab * hidden
    else:
        other, scores, layer, inputs = 2, 0, KEPT_UNSLOTH, 6 * tokens * hidden
        logit_rows = 1024 + tokens // 2 if bits == "8bit" else max(512, tokens // 8)
        loss = LOGIT_UNSLOTH * logit_rows * vocab
    layer *= tokens * (20 * hidden + 8 * inner)
    if not values["gradient_checkpointing"]:
        inputs = layers * (layer + KEPT_SCORE * scores)
    backward = layer + max(BACKWARD * layer, SCORE * scores)
    parts = {
        "weights": sizes[bits] * (base.num_parameters() - embeddings),
        "embeddings": other * embeddings,
        "LoRA and gradients": 8 * trained,
        "optimiser": state * trained,
        "activations": inputs,
        "loss or backward pass": max(loss, backward),
        "workspace": WORKSPACE_GB * GIB,
    }
    if stage == "grpo":
        cache = 4 * sampled_rows(config) * length * layers * width
        if config.sampler == "copy":  # 16-bit weights are shared
            shared = embeddings if other == 2 else 0
            parts[COPY] = 2 * (base.num_parameters() - shared)
            parts["KV cache"] = cache
        elif config.engine != "transformers":  # transformers frees it before the loss
            parts["KV cache"] = CACHE * cache
    return MemoryEstimate(stage, {name: size / GIB for name, size in parts.items()})
