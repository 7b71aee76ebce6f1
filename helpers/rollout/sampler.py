"""Chooses how GRPO samples its completions: from a 16-bit copy where that pays.

A token takes a 4-bit model with LoRA hundreds of small kernels, launched one by one. A
copy with the adapter in its weights (`merged_copy`) answers in one CUDA graph a token
(`decoder`). `Sampler` is a `rollout_func` of TRL's GRPOTrainer, which Unsloth's keeps.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from helpers import runtime
from helpers.config import RunConfig, complete, defaults
from helpers.errors import ConfigError
from helpers.inference.generation import Answer, Prompt, cut_answer, encode
from helpers.masking.templates import stop_token_ids
from helpers.rollout.decoder import Completion, Decoder, Settings
from helpers.rollout.merged_copy import MergedCopy
from helpers.runs import Run, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

COMPILE_MINUTES, COMPILE_STEPS = 10, 200  # from which on compiling pays
CHECK_STEPS = 10  # optimiser steps between two comparisons with the trained model
COPY_SHARE = 0.5  # of free memory; the rest is for cache and training step


def choose_sampler(run: Run, model: PreTrainedModel) -> Sampler | None:
    """Returns what samples for a run: its `sampler`, or what suits the machine.

    None is TRL's own sampling from the trained model. The reason is logged, and kept
    in `grpo/sampler.json`.

    Args:
        run: whose config is gone by.
        model: with LoRA attached, from `load_for_training`.

    Raises:
        ConfigError: a copy that is asked for does not work with this model.
    """
    config, fault = run.config, unsupported(run.config, model)
    if config.sampler == "copy":
        if fault:
            raise ConfigError(f"sampler='copy' does not work: {fault}; choose 'model'")
    elif config.sampler == "model":
        fault = "the config asks for it"
    elif model.device.type != "cuda":
        fault = "a copy is faster only on a GPU"
    else:
        fault = fault or no_room(model)
    note = {"name": "model" if fault else "copy", "reason": fault}
    write_json(run.path / "grpo" / "sampler.json", note)
    if fault:
        log.info(f"GRPO samples from the trained model: {fault}")
        return None
    log.info("GRPO samples from a 16-bit copy of the model")
    steps = complete(config, "grpo")["max_steps"]
    is_long = not 0 < steps < COMPILE_STEPS
    if config.grpo_minutes:
        is_long = config.grpo_minutes >= COMPILE_MINUTES
    return Sampler(model, compiled=is_long)


def no_room(model: PreTrainedModel) -> str:
    """Returns why a GPU cannot hold the copy beside training, or an empty string.

    The cache of keys and values is as large without a copy, so it does not count.
    """
    import torch

    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    need_gb = sum(2 * m.in_features * m.out_features for m in layers) / 2**30
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    free_gb = (torch.cuda.mem_get_info()[0] + reserved - allocated) / 2**30
    free_gb = min(free_gb, runtime.memory_cap_gb() - allocated / 2**30)
    if need_gb <= COPY_SHARE * free_gb:
        return ""
    return f"a copy would take {need_gb:.1f} of {free_gb:.1f} GiB of free memory"


def unsupported(config: RunConfig, model: PreTrainedModel) -> str:
    """Returns why a run cannot be sampled from a copy, or an empty string."""
    usual = defaults("grpo")
    others = ["generation_kwargs", "repetition_penalty", "use_vllm"]
    for name in [*others, "use_transformers_continuous_batching"]:
        if config.grpo.get(name, usual[name]) != usual[name]:
            return f"it does not know grpo.{name}"
    numbers = model.config.get_text_config()
    kinds = set(getattr(numbers, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"the model's layers are of the kinds {', '.join(sorted(kinds))}"
    rope = getattr(numbers, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "the model's position encoding changes with the length"
    for name, parameter in model.named_parameters():
        is_lora = re.search(r"\.lora_[AB]\.\w+\.weight$", name)
        if parameter.requires_grad and not is_lora:
            return f"{name} is trained besides LoRA matrices"
    return ""


class Sampler:
    """Samples completions from a merged copy of the model that is trained.

    Holds the copy, its cache and its graph's memory for as long as it lives.

    Args:
        model: a PEFT model that is trained, on its device.
        compiled: fuse the copy's small kernels with torch.compile, which takes half a
            minute once.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        # TRL's switch for its warning that rollout_func is experimental
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        dtype, _ = runtime.choose_dtype(runtime.find_machine())
        self.copy = MergedCopy(model, dtype)
        self.decoder = Decoder(self.copy.net, compiled=compiled)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Returns TRL's rollout: ids of prompts and completions, log-probabilities."""
        ids = [encode(trainer.processing_class, prompt) for prompt in prompts]
        settings = settings_of({n: getattr(trainer, n) for n in Settings._fields})
        self.copy.refresh()
        completions = self.decoder.generate(
            ids, trainer.max_completion_length, trainer.eos_token_ids, settings
        )
        step = trainer.state.global_step
        if trainer.model.training and step % CHECK_STEPS == 0:
            row = step // CHECK_STEPS % len(ids)
            log_drift(trainer, ids[row], completions[row])
        return {
            "prompt_ids": ids,
            "completion_ids": [completion.ids for completion in completions],
            "logprobs": [completion.logps for completion in completions],
        }

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
    ) -> list[Answer]:
        """Returns the model's answers as `generation.generate` does, but faster."""
        drawn = dict(sampling or {})
        max_new_tokens = drawn.pop("max_new_tokens", max_new_tokens)
        settings = settings_of(drawn) if drawn else None
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        stops = stop_token_ids(tokenizer)
        self.copy.refresh()
        answers = []
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            rows = self.decoder.generate(batch, max_new_tokens, stops, settings)
            answers += [cut_answer(tokenizer, row.ids, stops) for row in rows]
        return answers


def settings_of(values: dict[str, Any]) -> Settings:
    """Returns how tokens are drawn, of values named as transformers does."""
    names = [n for n in Settings._fields if values.get(n) is not None]
    return Settings(**{name: values[name] for name in names})


def log_drift(trainer: Any, prompt: list[int], completion: Completion) -> None:
    """Logs how far a completion's log-probabilities are from the trained model's.

    Under TRL's names for vLLM. One row alone: unpadded rows are scored alike by both
    trainers, and the forward pass costs little. Two private methods of TRL's trainer:
    only the first scores as both engines train, only the second logs beside TRL's
    metrics.
    """
    import torch

    device, length = trainer.accelerator.device, len(completion.ids)
    ids = torch.tensor([prompt + completion.ids], device=device)
    with torch.no_grad():
        trained = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), length
        )[0]
    sampled = torch.tensor([completion.logps], device=device)
    difference = trained[:, -length:].float() - sampled
    name, mean = "sampling/sampling_logp_difference/mean", difference.abs().mean()
    trainer._log_metric(name, mean.item())
    name = "sampling/importance_sampling_ratio/mean"
    trainer._log_metric(name, difference.exp().mean().item())
