"""Chooses how GRPO samples its completions; without vLLM, from a 16-bit copy.

A token takes a 4-bit model with LoRA hundreds of small kernels, started one by one. A
copy with the adapter in its weights (see `folding`) answers in one CUDA graph a token
(see `decoding`). `Sampler` is a `rollout_func` of TRL's GRPOTrainer, which Unsloth's
trainer keeps.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from helpers import estimate, runtime
from helpers.config import RunConfig, changed, complete, defaults
from helpers.errors import ConfigError, UnknownArchitecture
from helpers.inference.generation import Answer, Prompt, cut_answer, encode
from helpers.masking.templates import stop_token_ids
from helpers.rollout.decoder import Completion, Decoder, Settings
from helpers.rollout.merged_copy import FoldedCopy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPILE_MINUTES, COMPILE_STEPS = 10, 200  # from which on compiling pays
CHECK_STEPS = 10  # optimiser steps between two comparisons with the trained model


class Choice(NamedTuple):
    """How the completions of a run are sampled."""

    name: Literal["copy", "model", "vllm"]
    reason: str
    rollout: Sampler | None
    """For GRPOTrainer's `rollout_func`."""
    arguments: dict[str, Any]
    """For GRPOConfig."""


def choose(config: RunConfig, model: PreTrainedModel) -> Choice:
    """Returns how a run samples: what its config asks for, or what suits the machine.

    Args:
        config: the run.
        model: with LoRA attached, from `train.load_for_training`.

    Raises:
        ConfigError: what is asked for does not work with this model or machine.
    """
    asked = config.sampler
    if asked == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "sampler='vllm' but vLLM is not installed: `pip install vllm` on a GPU "
                "newer than a T4, or choose 'auto', which needs nothing more"
            )
        arguments = {"use_vllm": True, "vllm_mode": "colocate"}
        return Choice("vllm", "the config asks for it", None, arguments)
    if asked == "model":
        return Choice("model", "the config asks for it", None, {})
    fault = unsupported(config, model)
    if asked == "copy":
        if fault:
            raise ConfigError(f"sampler='copy' does not work: {fault}; choose 'model'")
        sampler = Sampler(model, compiled=is_long(config))
        return Choice("copy", "the config asks for it", sampler, {})
    if runtime.find_machine().device != "cuda":
        return Choice("model", "a copy is faster only on a GPU", None, {})
    fault = fault or no_room(config)
    if fault:
        return Choice("model", fault, None, {})
    sampler = Sampler(model, compiled=is_long(config))
    return Choice("copy", "the GPU holds a 16-bit copy", sampler, {})


def is_long(config: RunConfig) -> bool:
    """Returns whether a run is long enough for compiling the sampler, half a minute.

    >>> from helpers import recipes
    >>> is_long(changed(recipes.load("demo"), grpo_minutes=60))
    True
    """
    if config.grpo_minutes:
        return config.grpo_minutes >= COMPILE_MINUTES
    return not 0 < complete(config, "grpo")["max_steps"] < COMPILE_STEPS


def no_room(config: RunConfig) -> str:
    """Returns why a GPU cannot hold the copy beside training, or an empty string."""
    gpu = estimate.this_gpu() or estimate.T4
    copied = changed(config, sampler="copy")
    try:
        need_gb = estimate.estimate_memory(copied, gpu, "grpo").peak_gb
    except UnknownArchitecture as error:
        return f"it is not known what a copy takes: {error}"
    if need_gb <= gpu.safe_gb:
        return ""
    return f"with a copy it would take {need_gb:.1f} of {gpu.memory_gb:.1f} GiB"


def unsupported(config: RunConfig, model: PreTrainedModel) -> str:
    """Returns why a run cannot be sampled from a copy, or an empty string."""
    others = ["generation_kwargs", "repetition_penalty"]
    usual = defaults("grpo")
    for name in [*others, "use_transformers_continuous_batching"]:
        if config.grpo.get(name, usual[name]) != usual[name]:
            return f"it does not know grpo.{name}"
    return unsupported_model(model)


def unsupported_model(model: PreTrainedModel) -> str:
    """Returns why a model cannot be sampled from a copy, or an empty string."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"the model's layers are of the kinds {', '.join(sorted(kinds))}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "the model's position encoding changes with the length"
    odd = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not re.search(r"\.lora_[AB]\.\w+\.weight$", name)
    ]
    if odd:
        return f"{odd[0]} is trained besides LoRA matrices"
    return ""


class Sampler:
    """Samples completions from a folded copy of the model that is trained.

    Holds the copy, its cache and its graph's memory for as long as it lives.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        """Makes the copy; nothing is folded or captured yet.

        Args:
            model: a PEFT model that is trained, on its device.
            compiled: fuse the copy's small kernels with torch.compile, which takes
                half a minute once.
        """
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is experimental
        self.model = model
        dtype, _ = runtime.choose_dtype(runtime.find_machine())
        self.copy = FoldedCopy(model, dtype)
        self.decoder = Decoder(self.copy.net, compiled=compiled)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Returns TRL's rollout of prompts: their ids, completions, log-probabilities.

        Args:
            prompts: one for each completion, as TRL repeats them.
            trainer: TRL's or Unsloth's, whose arguments say how to sample.
        """
        ids = trainer._tokenize_prompts(prompts)[0]
        settings = settings_of({n: getattr(trainer, n) for n in Settings._fields})
        self.copy.refresh()
        found = self.decoder.generate(
            ids, trainer.max_completion_length, trainer.eos_token_ids, settings
        )
        step = trainer.state.global_step
        if trainer.model.training and step % CHECK_STEPS == 0:
            row = step // CHECK_STEPS % len(ids)
            agreement(trainer, ids[row], found[row])
        return {
            "prompt_ids": ids,
            "completion_ids": [completion.ids for completion in found],
            "logprobs": [completion.logps for completion in found],
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
        """Returns the model's answers as `generation.generate` does, but faster.

        Args:
            tokenizer: of the model.
            prompts: conversations that end in a user turn, or texts.
            batch_size: prompts a batch.
            max_new_tokens: answers are cut here.
            sampling: as there; greedy without.
        """
        drawn = dict(sampling or {})
        max_new_tokens = drawn.pop("max_new_tokens", max_new_tokens)
        settings = settings_of(drawn) if drawn else None
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        stops = stop_token_ids(tokenizer)
        self.copy.refresh()
        answers = []
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            found = self.decoder.generate(batch, max_new_tokens, stops, settings)
            answers += [cut_answer(tokenizer, each.ids, stops) for each in found]
        return answers


def settings_of(values: dict[str, Any]) -> Settings:
    """Returns how tokens are drawn, of values named as transformers does.

    >>> settings_of({"temperature": 0.7, "top_k": 0, "min_p": None})
    Settings(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0)
    """
    given = {name: values.get(name) for name in Settings._fields}
    return Settings(**{n: value for n, value in given.items() if value is not None})


def agreement(trainer: Any, prompt: list[int], completion: Completion) -> None:
    """Logs how far a completion's log-probabilities are from the trained model's.

    Under TRL's names for vLLM. One row alone: unpadded rows are scored alike by both
    trainers, and the forward pass costs little.
    """
    import torch

    device = trainer.accelerator.device
    ids = torch.tensor([prompt + completion.ids], device=device)
    length = len(completion.ids)
    with torch.no_grad():
        trained = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), length
        )[0]
    sampled = torch.tensor([completion.logps], device=device)
    difference = trained[:, -length:].float() - sampled
    mean = difference.abs().mean().item()
    name = "sampling/"
    trainer._log_metric(name + "sampling_logp_difference/mean", mean)
    ratio = difference.exp().mean().item()
    trainer._log_metric(name + "importance_sampling_ratio/mean", ratio)
