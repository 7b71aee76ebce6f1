"""Predicts peak GPU memory and minutes of a config before anything is loaded.

From the architecture's numbers alone. Peaks are of torch's *reserved* memory, in GiB
(2**30 bytes); the CUDA context lies outside of it and is stated apart. Bytes are
counted tensor by tensor from the code of transformers 5.17, PEFT 0.21, TRL 1.14 and
Unsloth 2026.10; what cannot be counted is fitted on the calibration half of
`results/memory.json`, whose other half checks it (`benchmarks/memory.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from helpers import shapes
from helpers.config import RunConfig, Stage, changed, complete
from helpers.gpus import CONTEXT_GB, T4, Gpu, this_gpu
from helpers.shapes import Architecture
from helpers.timing import (
    prompt_tokens,
    sampled_rows,
    training_minutes,
    uses_unsloth,
)

if TYPE_CHECKING:
    from helpers.evaluation.results import Table

GIB = 2**30
COPY = "16-bit copy to sample from"
MARGIN = 1.07  # room for most of the errors in results/memory.json


class Prediction(NamedTuple):
    """What a stage of a config will take on a GPU."""

    stage: Stage
    gpu: Gpu
    parts: dict[str, float]
    """GiB by component at the moment of the peak."""
    minutes: float | None
    """Training time, a rough estimate; None when the number of steps is not known."""
    context_gb: float = CONTEXT_GB
    """GiB that the CUDA context takes besides."""

    @property
    def peak_gb(self) -> float:
        """Peak of torch's reserved memory, in GiB."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what torch may reserve."""
        return self.peak_gb <= self.gpu.memory_gb


def predict(
    config: RunConfig,
    gpu: Gpu | None = None,
    stage: Stage | None = None,
    *,
    row_tokens: int | None = None,
    steps: int | None = None,
) -> Prediction:
    """Returns what training a stage takes: memory by component, and minutes.

    Args:
        config: the run.
        gpu: of the machine asked about; this machine's by default, a T4 without one.
        stage: `sft` or `grpo`; by default the config's hungriest.
        row_tokens: of the longest row (SFT) or prompt (GRPO); by default
            `max_length`, and what `timing.prompt_tokens` says.
        steps: optimiser steps, where the config counts epochs.

    Raises:
        UnknownArchitecture: the base model's numbers are not known.
    """
    gpu = gpu or this_gpu() or T4
    if stage is None:
        found = [predict(config, gpu, each) for each in config.stages]
        return max(found, key=lambda prediction: prediction.peak_gb)
    if stage == "grpo":
        config = settle_sampler(config, gpu, row_tokens)
    arch = shapes.find_architecture(config.model)
    parts = fixed_bytes(config, arch, stage)
    values, unsloth = complete(config, stage), uses_unsloth(config)
    batch = values["per_device_train_batch_size"]
    if stage == "sft":
        length = min(row_tokens or config.max_length, config.max_length)
        parts |= pass_bytes(config, arch, stage, batch, length)
    else:
        answer = values["max_completion_length"]
        length = answer + (row_tokens or prompt_tokens(config))
        parts |= pass_bytes(config, arch, stage, batch, length, answer)
        parts |= sampling_bytes(config, arch, sampled_rows(values), length)
        if config.sampler == "model" and not unsloth:  # freed before the loss
            parts["KV cache"] = max(0.0, parts["KV cache"] - parts["loss"])
    parts["workspace"] = (BASE_GB_UNSLOTH if unsloth else BASE_GB) * GIB
    gb = {name: size / GIB for name, size in parts.items()}
    return Prediction(stage, gpu, gb, training_minutes(config, gpu, stage, steps))


def settle_sampler(
    config: RunConfig, gpu: Gpu, row_tokens: int | None = None
) -> RunConfig:
    """Returns a config whose `sampler` is decided: `auto` is the copy where it fits.

    Args:
        config: the run.
        gpu: of the machine asked about.
        row_tokens: as for `predict`.
    """
    from helpers.rollout.sampler import unsupported

    if config.sampler != "auto":
        return config
    copied = changed(config, sampler="copy")
    model = shapes.adapt(config.model, config.lora)
    if not unsupported(config, model):
        peak_gb = predict(copied, gpu, "grpo", row_tokens=row_tokens).peak_gb
        if peak_gb <= gpu.memory_gb / MARGIN:
            return copied
    return changed(config, sampler="model")


def sampling_bytes(
    config: RunConfig, arch: Architecture, rows: int, length: int
) -> dict[str, float]:
    """Returns the bytes that sampling completions holds, by component.

    The copy (see `sampling`) shares what is not trained and lies in 16 bit already; its
    cache is of fixed size, and its graph keeps some fp32 rows of logits.

    Args:
        config: the run; `sampler` is decided.
        arch: its base model.
        rows: completions that are sampled together.
        length: tokens of the longest prompt and completion.
    """
    keys = 2 * arch.layers * arch.kv_heads * arch.head_dim * 2
    if config.sampler != "copy":
        return {"KV cache": CACHE * rows * length * keys}
    if bits_of(config) == "16bit":
        copied = shapes.count_lora(config.model, config.lora).folded
    else:
        copied = arch.linear if uses_unsloth(config) else arch.parameters
    return {
        # folding holds the largest matrix in 16 bit, and twice in fp32
        COPY: 2.0 * copied + 10 * arch.hidden * arch.intermediate,
        "KV cache": float(rows * (-(-length // 64) * 64) * keys),
        "sampling graph": GRAPH_LOGIT * rows * arch.vocab,
    }


def bits_of(config: RunConfig) -> str:
    """Returns the weights that a config loads on a GPU, where `auto` is 4bit."""
    return "4bit" if config.weights == "auto" else config.weights


def fixed_bytes(
    config: RunConfig, arch: Architecture, stage: Stage
) -> dict[str, float]:
    """Returns the bytes that stay from the first step to the last, by component.

    NF4 takes 4 bits a weight and a scale for every 64: one fp32, or with double
    quantisation one byte and an fp32 for every 256 of these (QLoRA, arXiv:2305.14314,
    section 3). `prepare_model_for_kbit_training` (PEFT) casts what is not quantised,
    embeddings and norms, to fp32; Unsloth does not. LoRA and its gradients are fp32.
    Adam keeps two numbers a parameter, of 4 bytes or of one (8-bit); paged ones lie in
    unified memory, which torch does not count.
    """
    bits = bits_of(config)
    scales = 1 / 64 + 4 / (64 * 256) if config.double_quant else 4 / 64
    each = {"4bit": 0.5 + scales, "8bit": 1.0, "16bit": 2.0}[bits]
    unsloth = uses_unsloth(config)
    cast = 2 if unsloth or bits == "16bit" else 4
    lora = shapes.count_lora(config.model, config.lora).trained
    optim = complete(config, stage)["optim"]
    state = 0 if "paged" in optim else 2 if "8bit" in optim else 8
    return {
        "weights": each * arch.linear + cast * (arch.parameters - arch.linear),
        "LoRA and gradients": (4 + (GRADIENT if unsloth else 4)) * lora,
        "optimiser": float(state * lora),
    }


def pass_bytes(
    config: RunConfig,
    arch: Architecture,
    stage: Stage,
    batch: int,
    length: int,
    answer: int = 0,
) -> dict[str, float]:
    """Returns the bytes of one forward and backward pass at its peak, by component.

    The peak is either in the loss, with the activations of all layers waiting, or in
    the backward pass of the last layer. With gradient checkpointing only the layers'
    inputs wait, and Unsloth moves these to RAM but for three.

    Args:
        config: the run.
        arch: its base model.
        stage: `sft` or `grpo`.
        batch: rows of a micro-batch.
        length: tokens of each, padding included.
        answer: of them, those that GRPO sampled.
    """
    tokens, hidden, inner = batch * length, arch.hidden, arch.intermediate
    values = complete(config, stage)
    recompute = values["gradient_checkpointing"]
    dequantised = 2.0 * hidden * inner  # the largest matrix, in fp16
    if uses_unsloth(config):
        layer = tokens * (HIDDEN * hidden + INNER * inner)
        waiting = 6 * tokens * hidden if recompute else arch.layers * layer
        if bits_of(config) == "8bit":
            logits = fused_logits(tokens, arch.vocab)
        else:  # unsloth_zoo's chunked_logprob_rows
            logits = LOGIT_UNSLOTH * max(512, tokens // 8) * arch.vocab
        loss = logits + 4 * tokens * hidden
        backward = BACKWARD * layer
    else:
        bits = bits_of(config)
        eight = INT8 if bits == "8bit" else 1
        # Without FlashAttention, grouped heads and no mask are left to SDPA's math
        # kernel, which makes the matrix of all scores; packed rows come with a mask.
        packed = values.get("packing")
        whole = arch.kv_heads != arch.heads and not packed
        scores = tokens * arch.heads * length if whole else 0
        layer = KEPT * eight * tokens * kept_a_token(config, arch)
        gradients = FEED_FORWARD * eight * tokens * inner
        if recompute:
            waiting = (2 if bits == "16bit" else 4) * arch.layers * hidden * tokens
            backward = layer + max(gradients, ATTENTION * scores)
        else:
            # fp32 scores, and fp32 copies of queries, keys and values
            layer += 4 * scores + (20 * tokens * hidden if whole else 0)
            waiting, backward = arch.layers * layer, gradients
        head = 0 if bits == "16bit" else 2 * arch.vocab * hidden  # cast to fp16
        # TRL's chunked_nll takes 256 rows at a time, its GRPO all that were sampled
        each, rows = (ANSWER_LOGIT, batch * answer) if answer else (LOGIT, 256)
        loss = each * rows * arch.vocab + head + 8 * tokens * hidden
    peak = max(loss, backward + dequantised)
    return {"activations": float(waiting), "loss": float(peak)}


def fused_logits(tokens: int, vocab: int) -> float:
    """Returns the bytes of logits in the loss that Unsloth takes with 8-bit weights.

    As many chunks, by fours, as keep 16 bytes a logit under 4 GiB (`get_chunk_size` in
    unsloth_zoo's `fused_losses/cross_entropy_loss.py`).

    >>> fused_logits(1024, 128256) < fused_logits(2048, 128256)
    True
    """
    share = 16 * tokens * vocab / (4 * GIB)
    if share <= 1:
        return LOGIT_FUSED * tokens * vocab
    return LOGIT_CHUNKED * tokens / (4 * math.ceil(share / 4)) * vocab


def kept_a_token(config: RunConfig, arch: Architecture) -> float:
    """Returns the bytes a token that a transformers layer keeps, on average.

    Two residuals in fp32; queries, keys, values and attention's output, and the MLP's
    gate, activation and up, in fp16; an fp16 copy of the input of each LoRA module.
    """
    lora = shapes.count_lora(config.model, config.lora).inputs / arch.layers
    attention = arch.heads * arch.head_dim
    return 8 * arch.hidden + 8 * attention + 6 * arch.intermediate + 2 * lora


# Fitted by least squares on the calibration half of results/memory.json
# (`python benchmarks/memory.py fit`). Bytes a token and layer, by width:
HIDDEN, INNER = 19.4, 3.36
BACKWARD = 1.63  # a layer's backward pass, in units of what it keeps
LOGIT_UNSLOTH, LOGIT, ANSWER_LOGIT = 2.83, 14.8, 9.93  # bytes a logit
GRADIENT = 5.68  # bytes a LoRA parameter
LOGIT_FUSED, LOGIT_CHUNKED = 5.44, 8.6  # bytes a logit of Unsloth's loss in 8 bit
KEPT, INT8 = 1.28, 6.34  # in units of `kept_a_token`
FEED_FORWARD = 10.8  # bytes a token and inner width of the MLP
ATTENTION = 14.8  # bytes a score
CACHE = 4.28  # grown by concatenation: blocks of every size stay reserved
GRAPH_LOGIT = 24.0  # bytes a logit of the copy, not fitted: six fp32 rows
BASE_GB_UNSLOTH, BASE_GB = 0.339, 0.286


def compare_weights(config: RunConfig, gpu: Gpu | None = None) -> Table:
    """Returns a table of 4, 8 and 16 bit weights: their size, and the peak of training.

    Of a model whose numbers are not known it says so.

    Args:
        config: the run; its own engine and weights do not count.
        gpu: as for `predict`.
    """
    from helpers.evaluation.results import Table

    gpu = gpu or this_gpu() or T4
    try:
        shapes.find_architecture(config.model)
    except shapes.UnknownArchitecture as error:
        return Table(["memory"], [[f"unknown: {error}"]])
    header = ["weights"]
    rows = [[bits] for bits in ("4bit", "8bit", "16bit")]
    for engine in ("unsloth", "transformers"):
        header += [f"{engine}: weights GiB", f"peak of {gpu.memory_gb:.1f} GiB"]
        for row in rows:
            tried = changed(config, engine=engine, weights=row[0])
            found = predict(tried, gpu)
            fits = "" if found.fits else ", does not fit"
            row += [f"{found.parts['weights']:.2f}", f"{found.peak_gb:.2f}{fits}"]
    return Table(header, rows)
