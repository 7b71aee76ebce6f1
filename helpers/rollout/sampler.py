"""Samples GRPO's completions from a 16-bit copy of the model, where that pays.

A token takes a 4-bit model with LoRA hundreds of small kernels, launched one by one; a
copy with the adapter in its weights takes one CUDA graph.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from helpers import runtime
from helpers.config import RunConfig, complete, defaults
from helpers.errors import ConfigError
from helpers.files import write_json
from helpers.inference.generation import Answer, Prompt, cut_answer, encode
from helpers.masking.templates import stop_token_ids
from helpers.rollout.decoder import Completion, Decoder, Settings
from helpers.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ATTENTION = "tunebook_grouped"
COMPILE_MINUTES, COMPILE_STEPS = 10, 200  # from which on compiling pays
CHECK_STEPS = 10  # optimiser steps between two comparisons with the trained model
COPY_SHARE = 0.5  # of free memory; the rest is for cache and training step


class Sampler:
    """A `rollout_func` of TRL's: samples from a merged copy of the trained model.

    Args:
        model: a PEFT model that is trained, on its device.
        compiled: fuse the copy's small kernels, which takes half a minute once.
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
        settings = settings_of(vars(trainer))
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
    """Logs how far a completion's log-probabilities are from the trained model's."""
    # two private methods of TRL's: both engines score by the first an unpadded row
    # alike, and only the second logs beside TRL's metrics
    device, length = trainer.accelerator.device, len(completion.ids)
    ids = torch.tensor([prompt + completion.ids], device=device)
    with torch.no_grad():
        trained = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), length
        )[0]
    sampled = torch.tensor([completion.logps], device=device)
    difference = trained[:, -length:].float() - sampled
    size, ratio = difference.abs().mean().item(), difference.exp().mean().item()
    trainer._log_metric("sampling/sampling_logp_difference/mean", size)
    trainer._log_metric("sampling/importance_sampling_ratio/mean", ratio)


def choose_sampler(run: Run, model: PreTrainedModel) -> Sampler | None:
    """Returns what samples for a run: its `sampler`, or what suits the machine.

    None is TRL's own sampling from the trained model. `grpo/sampler.json` has the
    reason.

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
    source = f"the trained model: {fault}" if fault else "a 16-bit copy of the model"
    log.info(f"GRPO samples from {source}")
    if fault:
        return None
    steps = complete(config, "grpo")["max_steps"]
    is_long = not 0 < steps < COMPILE_STEPS
    if config.grpo_minutes:
        is_long = config.grpo_minutes >= COMPILE_MINUTES
    return Sampler(model, compiled=is_long)


def no_room(model: PreTrainedModel) -> str:
    """Returns why a GPU cannot hold the copy beside training, or an empty string."""
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


class MergedCopy:
    """A plain transformers model, `net`, with the outputs of a PEFT model.

    Merged weights are empty until `refresh` and stay in place, for CUDA graphs; others
    are shared.
    """

    def __init__(self, model: PreTrainedModel, dtype: Any) -> None:
        from accelerate import init_empty_weights
        from peft.utils.integrations import dequantize_module_weight
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, grouped_attention)
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # private, as AutoModelForCausalLM.from_config takes the class that is patched
        with init_empty_weights(include_buffers=False):
            net = original_class(base)._from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
        self.merged: list[tuple[Any, Tensor]] = []
        for name, parameter in list(net.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            source = base.get_submodule(owner)
            if leaf == "weight" and hasattr(source, "get_delta_weight"):
                value = torch.empty(parameter.shape, dtype=dtype, device=model.device)
                self.merged.append((source, value))
            else:
                source = getattr(source, "base_layer", source)
                value = getattr(source, leaf)
                if leaf == "weight":
                    value = dequantize_module_weight(source)
                value = value.detach().to(dtype)
            fixed = torch.nn.Parameter(value, requires_grad=False)
            setattr(net.get_submodule(owner), leaf, fixed)
        net.tie_weights()
        fuse_norms(net)
        self.net: PreTrainedModel = net.to(model.device).eval()

    def refresh(self) -> None:
        """Merges the adapter as it is now into the copy's weights, in place."""
        from peft.utils.integrations import dequantize_module_weight

        with torch.no_grad():
            for layer, weight in self.merged:
                total = dequantize_module_weight(layer.base_layer).float()
                for adapter in layer.active_adapters:
                    total = total + layer.get_delta_weight(adapter)
                weight.copy_(total)


def fuse_norms(net: PreTrainedModel) -> None:
    """Gives a copy torch's own RMS norms, which are one kernel instead of seven."""
    for name, module in list(net.named_modules()):
        if hasattr(module, "variance_epsilon"):  # not Gemma's, which differs
            fused = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            fused.weight = module.weight
            net.set_submodule(name, fused)


def original_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Returns a model's class as transformers wrote it; Unsloth patches it."""
    name = type(model.config).__module__.replace(".configuration_", ".modeling_")
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, type(model).__name__)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns attention of shape (batch, length, heads, width), and no weights.

    Heads that share keys are one matrix product: SDPA without FlashAttention repeats
    the keys in memory. The mask is of shape (batch, 1, length, seen).
    """
    batch, heads, length, width = query.shape
    kv_heads, seen = key.shape[1], attention_mask.shape[-1]
    key, value = key[:, :, :seen], value[:, :, :seen]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, seen)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed = weights.view(batch, kv_heads, -1, seen) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None
