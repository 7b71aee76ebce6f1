"""Samples GRPO's completions from a 16-bit copy of the model, where that pays: a token
takes a 4-bit model with LoRA hundreds of kernels, and a merged copy one CUDA graph.
"""

import copy
import importlib.util
import logging
import os
import re
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import gather_object
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AttentionInterface

from helpers import runtime
from helpers.config import RunConfig, complete, defaults
from helpers.errors import ConfigError
from helpers.files import write_json
from helpers.inference.decoder import Decoder, Ids, grouped_attention
from helpers.inference.generation import Answer, cut_answer, encode
from helpers.masking.templates import stop_token_ids
from helpers.runs import Run

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

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        # TRL's switch for its warning that rollout_func is experimental
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        net, self.merged = copy_model(model)
        self.decoder = Decoder(net, compiled=compiled)

    def refresh(self) -> None:
        """Merges the adapter as it is now into the copy's weights, in place."""
        with torch.no_grad():
            for layer, weight in self.merged:
                total = dequantize_module_weight(layer.base_layer).float()
                for adapter in layer.active_adapters:
                    total = total + layer.get_delta_weight(adapter)
                weight.copy_(total)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Returns TRL's rollout: ids of prompts and completions, log-probabilities."""
        settings = (trainer.temperature, trainer.top_k, trainer.top_p, trainer.min_p)
        ids = [encode(trainer.processing_class, prompt) for prompt in prompts]
        self.refresh()
        length, stops = trainer.max_completion_length, trainer.eos_token_ids
        completions, logps = self.decoder.generate(ids, length, stops, settings)
        if trainer.model.training and trainer.state.global_step % CHECK_STEPS == 0:
            log_drift(trainer, ids[0], completions[0], logps[0])
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logps}

    def generate(
        self, tokenizer: Any, prompts: list[Any], batch_size: int, max_new_tokens: int
    ) -> list[Answer]:
        """Returns greedy answers as `generation.generate` does, but faster."""
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        stops = stop_token_ids(tokenizer)
        self.refresh()
        rows: list[list[int]] = []
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            rows += self.decoder.generate(batch, max_new_tokens, stops, None)[0]
        return [cut_answer(tokenizer, row, stops) for row in rows]


def log_drift(trainer: Any, prompt: Ids, completion: Ids, logps: list[float]) -> None:
    """Logs how far a completion's log-probabilities are from the trained model's."""
    # private of TRL's: one scores as training does, the other logs beside its metrics
    ids = torch.tensor([prompt + completion], device=trainer.accelerator.device)
    score, length = trainer._get_per_token_logps_and_entropies, len(completion)
    with torch.no_grad():
        trained = score(trainer.model, ids, torch.ones_like(ids), length)[0]
    difference = trained[0, -length:].float().cpu() - torch.tensor(logps)
    size, ratio = difference.abs().mean().item(), difference.exp().mean().item()
    trainer._log_metric("sampling/sampling_logp_difference/mean", size)
    trainer._log_metric("sampling/importance_sampling_ratio/mean", ratio)


def choose_sampler(run: Run, model: nn.Module) -> Sampler | None:
    """Returns what samples for a run, by its config and the machine.

    None is TRL's own sampling from the trained model; why is in `grpo/sampler.json`.

    Args:
        run, model: with the config field `sampler`; with LoRA attached.

    Raises:
        ConfigError: a copy that is asked for does not work with this model.
    """
    config, reasons = run.config, gather_object([reason_against(run.config, model)])
    reason = next(filter(None, reasons), "")  # of any process
    if reason and config.sampler == "copy":
        raise ConfigError(f"sampler='copy' does not work: {reason}; choose 'model'")
    note = {"name": "model" if reason else "copy", "reason": reason}
    write_json(run.path / "grpo" / "sampler.json", note)
    source = f"the trained model: {reason}" if reason else "a 16-bit copy of the model"
    log.info(f"GRPO samples from {source}")
    if reason:
        return None
    is_long = not 0 < complete(config, "grpo")["max_steps"] < COMPILE_STEPS
    if config.grpo_minutes:
        is_long = config.grpo_minutes >= COMPILE_MINUTES
    return Sampler(model, compiled=is_long)


def reason_against(config: RunConfig, model: nn.Module) -> str:
    """Returns why a run is not sampled from a copy, or an empty string."""
    if config.sampler == "model":
        return "the config asks for it"
    if config.sampler == "auto" and model.device.type != "cuda":
        return "a copy is faster only on a GPU"
    unknown = {"generation_kwargs", "repetition_penalty", "use_vllm"}
    unknown.add("use_transformers_continuous_batching")
    for name in unknown & config.grpo.keys():
        if config.grpo[name] != defaults("grpo")[name]:
            return f"it does not know grpo.{name}"
    numbers = model.config.get_text_config()
    kinds = {*(getattr(numbers, "layer_types", None) or [])} - {"full_attention"}
    longest = config.max_prompt_length or 10**9
    longest += complete(config, "grpo")["max_completion_length"]
    if longest <= (getattr(numbers, "sliding_window", None) or 0):
        kinds.discard("sliding_attention")  # nothing leaves the window
    rope = getattr(numbers, "rope_parameters", None) or {}
    # position encodings that change with the length
    kinds |= {rope.get("rope_type")} & {"dynamic", "longrope"}
    if kinds:
        return f"it does not know the model's {', '.join(sorted(kinds))}"
    for name, parameter in model.named_parameters():
        is_lora = re.search(r"\.lora_[AB]\.\w+\.weight$", name)
        if parameter.requires_grad and not is_lora:
            return f"{name} is trained besides LoRA matrices"
    if config.sampler == "copy":
        return ""
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    need_gb = sum(2 * m.in_features * m.out_features for m in layers) / 2**30
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    free_gb = (torch.cuda.mem_get_info()[0] + reserved - allocated) / 2**30
    free_gb = min(free_gb, runtime.memory_cap_gb() - allocated / 2**30)
    text = f"a copy would take {need_gb:.1f} of {free_gb:.1f} GiB of free memory"
    return text if need_gb > COPY_SHARE * free_gb else ""


def copy_model(model: nn.Module) -> tuple[nn.Module, list[Any]]:
    """Returns a plain copy of a PEFT model, and its merged layers with the weights."""
    AttentionInterface.register(ATTENTION, grouped_attention)
    dtype, _ = runtime.choose_dtype(runtime.find_machine())
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)
    # the class as transformers wrote it, of a module that Unsloth has not patched
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = getattr(module, type(base).__name__)
    # private, as AutoModelForCausalLM.from_config takes the class that is patched
    with init_empty_weights(include_buffers=False):
        net = plain._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    merged = []
    for name, parameter in list(net.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        source = base.get_submodule(owner)
        if leaf == "weight" and hasattr(source, "get_delta_weight"):
            # until `refresh`, and never moved, for CUDA graphs; others are shared
            value = torch.empty(parameter.shape, dtype=dtype, device=model.device)
            merged.append((source, value))
        else:
            source = getattr(source, "base_layer", source)
            value = getattr(source, leaf)
            if leaf == "weight":
                value = dequantize_module_weight(source)
        fixed = nn.Parameter(value.detach().to(dtype), requires_grad=False)
        setattr(net.get_submodule(owner), leaf, fixed)
    net.tie_weights()
    for name, norm in list(net.named_modules()):
        # an RMS norm of seven kernels; torch's is one, but not Gemma's, which differs
        if hasattr(norm, "variance_epsilon"):
            fused = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            fused.weight = norm.weight
            net.set_submodule(name, fused)
    return net.to(model.device).eval(), merged
