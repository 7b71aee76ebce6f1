"""Estimates the peak GPU memory and the minutes of a config, with nothing loaded.

Closed formulas over the architecture's numbers. The memory is within 15 % of what was
measured (`benchmarks/memory.py`), the minutes within a factor of two.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import fields, runtime
from helpers.config import RunConfig, Stage, changed
from helpers.errors import UnknownArchitecture

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

GIB = 2**30
COPY = "16-bit copy to sample from"
ROW_TOKENS, PROMPT_TOKENS = 400, 200  # of a chat row, of a GSM8K prompt
NAMES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
NAMES += " intermediate_size vocab_size max_position_embeddings tie_word_embeddings"
KNOWN: dict[str, dict[str, Any]] = {  # fields of LlamaConfig, for use offline
    name: dict(zip(NAMES.split(), values, strict=True))
    for name, values in {
        "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, 131072, True),
        "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, 131072, True),
        "llama-2-7b": (4096, 32, 32, 32, 128, 11008, 32000, 4096, False),
        "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, 8192, True),
    }.items()
}


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
    values = fields.complete(config, stage)
    rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return rows * int(os.environ.get("WORLD_SIZE", "1"))


def sampled_rows(config: RunConfig) -> int:
    """Returns the completions that one process of GRPO samples at a time."""
    values = fields.complete(config, "grpo")
    rounds = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    return values["per_device_train_batch_size"] * rounds


def count_steps(config: RunConfig, stage: Stage, rows: int | None = None) -> int | None:
    """Returns the optimiser steps of a stage, None where they cannot be known.

    Args:
        config: the run.
        stage: `sft` or `grpo`.
        rows: conversations or problems to train on. How many go into a packed row is
            not known.
    """
    values = fields.complete(config, stage)
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
    """Returns the minutes that SFT takes, roughly; None where its steps are not known.

    A token costs two operations a weight forward, two backward (frozen weights get no
    gradient) and two more where activations are recomputed (Kaplan et al.,
    arXiv:2001.08361, section 2.1). `rows` is as in `count_steps`.

    Raises:
        UnknownArchitecture: the base model's numbers are not known.
    """
    values, steps = fields.complete(config, "sft"), count_steps(config, "sft", rows)
    if steps is None:
        return None
    tokens = config.max_length if values["packing"] else ROW_TOKENS
    tokens = step_rows(config, "sft") * min(tokens, config.max_length)
    passes = 6 if values["gradient_checkpointing"] else 4
    work = tokens * passes * skeleton(config.model).num_parameters()
    launches = 0.35 + 0.03 * values["gradient_accumulation_steps"]  # s, on an H100
    return steps * (launches + work / (gpu.tflops * 1e12)) / 60


def find_config(model: str) -> PreTrainedConfig:
    """Returns a base model's config: known here, of its folder, or of the hub.

    Raises:
        UnknownArchitecture: there is none, or transformers cannot read it.
    """
    # the hub is asked once; a folder may change
    look_up = read_config.__wrapped__ if Path(model).is_dir() else read_config
    config = look_up(model)
    if isinstance(config, str):
        raise UnknownArchitecture(config)
    return config


@cache
def read_config(model: str) -> PreTrainedConfig | str:
    """Returns a base model's config, or the reason for having none."""
    from transformers import AutoConfig

    if not Path(model).is_dir():
        name = model.lower().rpartition("/")[2].removeprefix("meta-")
        for known in filter(name.startswith, KNOWN):
            return AutoConfig.for_model("llama", **KNOWN[known])
        if not runtime.hub_reachable():
            return f"{model!r} is not known offline and the model hub cannot be reached"
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        return f"{model}: {str(error)[:200]}"


@cache
def build(config: str, lora: str) -> PreTrainedModel | PeftModel:
    """Returns a model without weights, with LoRA where asked for; both are JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warns, too
        try:
            numbers = AutoConfig.for_model(**json.loads(config))
            model = AutoModelForCausalLM.from_config(numbers)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UnknownArchitecture(str(error)[:200]) from error
        if lora == "null":
            return model
        # the first values of the matrices do not count, and take time
        settings = {**json.loads(lora), "init_lora_weights": False}
        settings["task_type"] = "CAUSAL_LM"
        return get_peft_model(model, LoraConfig(**settings))


def skeleton(model: str, lora: dict[str, Any] | None = None) -> Any:
    """Returns a base model without weights, on torch's meta device; do not change it.

    Args:
        model: hub id or folder.
        lora: fields of PEFT's `LoraConfig`; with them the result is a `PeftModel`.

    Raises:
        UnknownArchitecture: its config is not known, or transformers cannot build it.
        ValueError: PEFT refuses the fields; PEFT also lets other errors pass.
    """
    return build(find_config(model).to_json_string(), json.dumps(lora, default=list))


class Shape(NamedTuple):
    """A decoder with LoRA in numbers; widths, and numbers of parameters."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    parameters: int  # of the base model, a tied head counted once
    linear: int  # of them, in the layers: what quantisation shrinks
    trained: int  # by LoRA, `modules_to_save` included
    lora_inputs: int  # widths of the adapted matrices' inputs, added up


def read_shape(model: str, lora: dict[str, Any]) -> Shape:
    """Returns a base model and its LoRA in numbers; raises like `skeleton`."""
    base, tuned = skeleton(model), skeleton(model, lora)
    config = base.config.get_text_config()
    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        layers, vocab = config.num_hidden_layers, config.vocab_size
    except AttributeError as error:
        raise UnknownArchitecture(f"{model}: {error}") from error
    matrices = 1 if config.tie_word_embeddings else 2
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        # GPT-2 has no name for it
        inner=getattr(config, "intermediate_size", None) or 4 * hidden,
        vocab=vocab,
        parameters=base.num_parameters(),
        linear=base.num_parameters() - matrices * vocab * hidden,
        trained=tuned.get_nb_trainable_parameters()[0],
        lora_inputs=sum(
            weight.shape[1] for n, weight in tuned.named_parameters() if "lora_A" in n
        ),
    )


class MemoryEstimate(NamedTuple):
    """The peak of torch's reserved memory while a stage trains."""

    stage: Stage
    parts: dict[str, float]  # GiB by component at the moment of the peak

    @property
    def peak_gb(self) -> float:
        """All parts together, in GiB."""
        return sum(self.parts.values())


# Fitted by least squares to the calibration half of results/memory.json
KEPT = {"unsloth": 0.59, "transformers": 1.35}  # times what a layer keeps at least
INT8 = 5.6  # the same, of transformers' 8-bit layers
BACKWARD = 0.67  # gradients of a layer, times what it keeps
SCORE, KEPT_SCORE = 14.5, 5.0  # bytes an attention score: at the peak, and kept
LOGIT = {"unsloth": 3.4, "transformers": 10.0}  # bytes a logit
CACHE = 4.4  # transformers' cache grows by copying: blocks of all sizes stay reserved
BASE = 0.32 * GIB


def estimate_memory(
    config: RunConfig, gpu: Gpu = T4, stage: Stage | None = None
) -> MemoryEstimate:
    """Returns the peak memory of a stage, within about 15 %.

    Args:
        config: the run.
        gpu: decides about `sampler="auto"`, which is the copy where it fits.
        stage: `sft` or `grpo`; by default the one with the highest peak.

    Raises:
        UnknownArchitecture: the base model's numbers are not known.
    """
    if stage is None:
        each = [estimate_memory(config, gpu, stage) for stage in config.stages]
        return max(each, key=lambda estimate: estimate.peak_gb)
    if stage == "grpo" and config.sampler == "auto":
        copied = estimate_memory(changed(config, sampler="copy"), gpu, stage)
        if copied.peak_gb <= gpu.safe_gb:
            return copied
    shape = read_shape(config.model, config.lora)
    unsloth, bits = (
        config.engine != "transformers",
        config.weights.replace("auto", "4bit"),
    )
    # NF4 is half a byte, and for 64 weights an fp32 scale, or a byte and a share of one
    scales = 1 / 64 + 4 / (64 * 256) if config.double_quant else 4 / 64
    size = {"4bit": 0.5 + scales, "8bit": 1.0, "16bit": 2.0}[bits]
    # PEFT casts what is not quantised to fp32, Unsloth does not
    other = 2 if unsloth or bits == "16bit" else 4
    optim = fields.complete(config, stage)["optim"]
    state = 0 if "paged" in optim else 2 if "8bit" in optim else 8
    parts = {
        "weights": size * shape.linear + other * (shape.parameters - shape.linear),
        "LoRA and gradients": 8 * shape.trained,
        "optimiser": state * shape.trained,
        "workspace": BASE,
        **training_bytes(config, shape, stage),
    }
    if stage == "grpo":
        parts |= sampling_bytes(config, shape)
        if config.sampler != "copy" and not unsloth:  # freed before the loss
            parts["KV cache"] = max(0.0, parts["KV cache"] - parts["loss"])
    return MemoryEstimate(stage, {name: bytes / GIB for name, bytes in parts.items()})


def row_tokens(config: RunConfig, stage: Stage) -> int:
    """Returns the tokens of the longest row: in GRPO of prompt and completion."""
    if stage == "sft":
        return config.max_length
    answer = fields.complete(config, stage)["max_completion_length"]
    return answer + (config.max_prompt_length or PROMPT_TOKENS)


def training_bytes(config: RunConfig, shape: Shape, stage: Stage) -> dict[str, float]:
    """Returns the bytes of activations and loss at the peak of a micro-batch.

    The peak is in the loss, with the activations of all layers waiting, or in the
    backward pass of the last layer. With gradient checkpointing only the layers'
    inputs wait; Unsloth moves all but three of them to RAM.
    """
    values, bits = fields.complete(config, stage), config.weights
    batch, length = values["per_device_train_batch_size"], row_tokens(config, stage)
    tokens, hidden = batch * length, shape.hidden
    # two residuals in fp32, attention's and the MLP's tensors in fp16, LoRA's inputs
    attention = shape.heads * shape.head_dim
    kept = 8 * hidden + 8 * attention + 6 * shape.inner
    kept += 2 * shape.lora_inputs / shape.layers
    if config.engine != "transformers":
        layer, scores = KEPT["unsloth"] * tokens * kept, 0
        rows = 1024 + tokens // 2 if bits == "8bit" else max(512, tokens // 8)
        loss = LOGIT["unsloth"] * rows * shape.vocab + 8 * tokens * hidden
        inputs = 6 * tokens * hidden
    else:
        layer = KEPT["transformers"] * tokens * kept * (INT8 if bits == "8bit" else 1)
        # Without FlashAttention grouped heads and no mask are left to SDPA's math
        # kernel, which makes the matrix of all scores; packed rows come with a mask.
        whole = shape.kv_heads != shape.heads and not values.get("packing")
        scores = tokens * length * shape.heads if whole else 0
        # TRL's chunked_nll takes 256 rows at a time, its GRPO all that were sampled
        rows = batch * values["max_completion_length"] if stage == "grpo" else 256
        head = 0 if bits == "16bit" else 2 * shape.vocab * hidden  # cast to fp16
        loss = LOGIT["transformers"] * rows * shape.vocab + head + 8 * tokens * hidden
        inputs = (2 if bits == "16bit" else 4) * shape.layers * tokens * hidden
    backward = max(BACKWARD * layer, SCORE * scores) + 2 * hidden * shape.inner
    if values["gradient_checkpointing"]:
        waiting = inputs
        backward += layer
    else:
        waiting = shape.layers * (layer + KEPT_SCORE * scores)
    return {"activations": waiting, "loss": max(loss, backward)}


def sampling_bytes(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Returns the bytes that sampling completions holds."""
    tokens = sampled_rows(config) * row_tokens(config, "grpo")
    cache = 4.0 * tokens * shape.layers * shape.kv_heads * shape.head_dim
    if config.sampler != "copy":
        return {"KV cache": CACHE * cache}
    # what is not trained and lies in 16 bit already is shared
    shared = config.engine != "transformers" or config.weights == "16bit"
    copied = 2.0 * (shape.linear if shared else shape.parameters)
    return {COPY: copied + 4 * shape.hidden * shape.inner, "KV cache": cache}
