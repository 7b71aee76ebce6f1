"""Estimates peak GPU memory (within 15 %) and minutes (within a factor of two)."""

import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil

from helpers import runtime
from helpers.config import RunConfig, Stage, complete
from helpers.errors import UnknownArchitecture

GIB = 2**30
# fields of the configs of models, for use offline
SHAPES = pd.read_csv(Path(__file__).with_name("shapes.csv"), index_col="name")
NAMES = [*SHAPES.columns]
KNOWN: dict[str, dict[str, Any]] = SHAPES.to_dict("index")
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
TOWER |= {"num_attention_heads": 16, "image_size": 896, "patch_size": 14}
GEMMA3 = {"model_type": "gemma3", "vision_config": TOWER | {"vision_use_head": False}}
KNOWN["gemma-3-4b"] = {**GEMMA3, "text_config": KNOWN["gemma-3-4b"]}
# Fitted by least squares to the calibration half of results/memory.json
KEPT, KEPT_UNSLOTH = 1.56, 0.66  # times what a layer keeps at least
INT8 = 6.0  # times KEPT, of transformers' 8-bit layers
BACKWARD = 0.6  # gradients of a layer, times what it keeps
SCORE, KEPT_SCORE = 14.5, 3.0  # bytes an attention score: at the peak, and kept
LOGIT, LOGIT_UNSLOTH = 10.0, 3.3  # bytes a logit
CACHE = 4.4  # grown by copying: blocks of all sizes stay reserved
WORKSPACE_GB = 0.39
CPU_FACTOR, PROCESS_GB = 2, 0.75  # fp32 activations; Python with its libraries


class Gpu(NamedTuple):
    name: str
    memory_gb: float  # GiB that torch may reserve, less the CUDA context; a CPU's RAM
    tflops: float  # 10**12 operations a second that QLoRA training reaches


T4 = Gpu("Tesla T4", 14.0, 9.75)
CPU = Gpu("two CPU cores", psutil.virtual_memory().total / GIB, 0.18)


def this_gpu() -> Gpu | None:
    """Returns this machine's GPU, under the cap of `TUNEBOOK_GPU_GB`; None without."""
    import torch

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties()
    free_gb = min(card.total_memory / GIB - 0.74, runtime.memory_cap_gb())
    # a multiprocessor's rate: Volta and Turing, Ampere and Ada, Hopper
    rate = 0.24 if card.major < 8 else 1.0 if card.major == 8 else 2.6
    return Gpu(card.name, free_gb, rate * card.multi_processor_count)


def step_rows(config: RunConfig, stage: Stage) -> int:
    """Returns the rows (GRPO: completions) of one optimiser step, of all processes."""
    values = complete(config, stage)
    return values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]


def count_steps(config: RunConfig, stage: Stage, rows: int | None = None) -> int | None:
    """Returns the optimiser steps over some rows, None where they cannot be known."""
    values = complete(config, stage)
    if values["max_steps"] > 0:
        return values["max_steps"]
    if rows is None or values.get("packing"):
        return None
    if stage == "grpo":  # answers of a problem
        rows *= values["num_generations"]
    an_epoch = math.ceil(rows / step_rows(config, stage))
    return math.ceil(values["num_train_epochs"] * an_epoch)


def sft_minutes(config: RunConfig, gpu: Gpu, rows: int | None = None) -> float | None:
    """Returns the minutes of SFT, roughly; None where `count_steps` knows no steps."""
    values, steps = complete(config, "sft"), count_steps(config, "sft", rows)
    if steps is None:
        return None
    a_row = config.max_length if values["packing"] else min(400, config.max_length)
    tokens = a_row * step_rows(config, "sft")
    # operations a weight: forward, backward, to recompute activations (Kaplan 2020)
    passes = 6 if values["gradient_checkpointing"] else 4
    work = tokens * passes * skeleton(config.model).num_parameters()
    overhead = 0.35 + 0.03 * values["gradient_accumulation_steps"]  # s, on an H100
    return steps * (overhead + work / (gpu.tflops * 1e12)) / 60


def skeleton(model: str, lora: dict[str, Any] | None = None) -> Any:
    """Returns a base model without weights, or its `PeftModel`; do not change it."""
    return build(model, json.dumps(lora, default=list))


@cache
def build(model: str, lora: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(model).is_dir()
    name = model.lower().rpartition("/")[2].removeprefix("meta-")
    known = None if folder else next(filter(name.startswith, KNOWN), None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warns, too
        try:
            if known:
                config = AutoConfig.for_model(**KNOWN[known])
            else:
                if not folder:
                    runtime.hub_reachable()  # if not, it looks into its cache alone
                config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            base = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UnknownArchitecture(f"{model}: {str(error)[:200]}") from error
        if lora == "null":
            return base
        settings = {**json.loads(lora), "task_type": "CAUSAL_LM"}
        settings["init_lora_weights"] = False  # first values would take time
        return get_peft_model(base, LoraConfig(**settings))


def estimate_memory(
    config: RunConfig, gpu: Gpu = T4, stage: Stage | None = None, shares: int = 1
) -> pd.Series:
    """Returns the peak reserved memory in GiB by part, of the stage that takes most.

    With `shares` it is each GPU's of so many that share SFT's weights; not measured.

    The peak is in the loss, with the activations of all layers waiting, or in the last
    layer's backward pass. With gradient checkpointing only the inputs of layers wait;
    Unsloth moves all but three of them to RAM. On a CPU all is fp32, and kept.
    """
    if stage is None:
        peaks = [estimate_memory(config, gpu, each, shares) for each in config.stages]
        return max(peaks, key=pd.Series.sum)
    base, values = skeleton(config.model), complete(config, stage)
    numbers = base.config.get_text_config()
    hidden, heads = numbers.hidden_size, numbers.num_attention_heads
    layers, vocab = numbers.num_hidden_layers, numbers.vocab_size
    trained, _ = skeleton(config.model, config.lora).get_nb_trainable_parameters()
    inner = getattr(numbers, "intermediate_size", None) or 4 * hidden  # GPT-2
    kv_heads = getattr(numbers, "num_key_value_heads", None) or heads
    width = kv_heads * (getattr(numbers, "head_dim", None) or hidden // heads)
    batch, length = values["per_device_train_batch_size"], config.max_length
    logit_rows = 256  # of TRL's chunked_nll; its GRPO takes all answers at once
    if stage == "grpo":
        length = values["max_completion_length"]
        logit_rows = batch * length
        length += config.max_prompt_length or 200
    tokens = batch * length
    on_cpu = gpu.name == CPU.name
    by_unsloth = config.engine != "transformers" and not on_cpu and shares == 1
    bits = config.weights.replace("auto", "16bit" if on_cpu else "4bit")
    embeddings = vocab * hidden * (1 if base.config.tie_word_embeddings else 2)
    inside = base.num_parameters() - embeddings
    # NF4 has a scale for 64 weights: in fp32, or in a byte with double quantisation
    full = 4 if on_cpu else 2
    sizes = {"4bit": 0.516 if config.double_quant else 0.5625, "8bit": 1, "16bit": full}
    state = 0 if "paged" in values["optim"] else 2 if "8bit" in values["optim"] else 8
    state = state if shares == 1 else 8
    if not by_unsloth:
        other = full if bits == "16bit" else 4  # PEFT casts the unquantised to fp32
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
    layer *= tokens * (20 * hidden + 8 * inner) * (CPU_FACTOR if on_cpu else 1)
    if on_cpu or not values["gradient_checkpointing"]:
        inputs = layers * (layer + KEPT_SCORE * scores)
    backward = layer + max(BACKWARD * layer, SCORE * scores)
    parts = {
        "weights": sizes[bits] * inside,
        "embeddings": other * embeddings,
        "LoRA and gradients": 8 * trained,
        "optimiser": state * trained,
        "activations": inputs,
        "loss or backward pass": max(loss, backward),
        "workspace": (PROCESS_GB if on_cpu else WORKSPACE_GB) * GIB,
    }
    if shares > 1:
        # each keeps the scales of NF4 whole, and gathers two layers and one embedding
        scales = (sizes[bits] - 0.5) * inside if bits == "4bit" else 0
        gathered = 2 * (parts["weights"] - scales) / layers + other * vocab * hidden
        parts["weights"] -= scales
        for name in ("weights", "embeddings", "LoRA and gradients", "optimiser"):
            parts[name] /= shares
        parts |= {"scales of the weights": scales, "gathered weights": gathered}
    if stage == "grpo" and not on_cpu:  # which samples from the model itself
        rounds = values["steps_per_generation"] or values["gradient_accumulation_steps"]
        cache = 4 * batch * rounds * length * layers * width
        copy = 2 * (base.num_parameters() - (embeddings if other == 2 else 0))
        copied = parts | {"16-bit copy to sample from": copy, "KV cache": cache}
        fits = sum(copied.values()) < gpu.memory_gb * GIB / 1.07  # its error
        if config.sampler == "copy" or (config.sampler == "auto" and fits):
            parts = copied
        elif by_unsloth:  # transformers frees it before the loss
            parts["KV cache"] = CACHE * cache
    return pd.Series(parts) / GIB
