"""Loads model, tokenizer and saved adapters, with Unsloth or plain transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from helpers import runtime
from helpers.errors import ModelError
from helpers.masking.templates import prepare_tokenizer
from helpers.models.hub import find_model, unknown_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.config import RunConfig

ADDED = ("lora_", ".modules_to_save.", "trainable_tokens_delta")  # by an adapter


def resolve_weights(weights: str) -> str:
    """Returns `4bit`, `8bit` or `16bit`; `auto` is 4bit on a GPU, else 16bit."""
    on_gpu = runtime.find_machine().device == "cuda"
    return weights if weights != "auto" else "4bit" if on_gpu else "16bit"


def options(config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of `load_model` that a config decides."""
    names = {"engine", "weights", "double_quant", "dtype", "max_length"}
    return config.model_dump(include=names | {"template", "pad_token"})


def half_of(config: RunConfig) -> Any:
    """Returns the dtype that a run's training autocasts to, None on a CPU."""
    machine = runtime.find_machine()
    dtype, _ = runtime.choose_dtype(machine, config.dtype)
    return dtype if machine.device == "cuda" else None


def load_tokenizer(
    name: str, *, template: str = "own", pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Returns a model's tokenizer, ready to train with.

    Args:
        name: hub id, folder, or `smollm2-135m-offline`.
        template, pad_token: as for `masking.prepare_tokenizer`.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(find_model(name))
    except (OSError, ValueError) as error:
        raise unknown_model(name, error) from error
    prepare_tokenizer(tokenizer, template, pad_token)
    return tokenizer


def load_model(
    name: str,
    *,
    engine: str = "auto",
    weights: str = "auto",
    double_quant: bool = True,
    dtype: str = "auto",
    max_length: int = 1024,
    template: str = "own",
    pad_token: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a base model, frozen, and its tokenizer.

    Args:
        name, template, pad_token: as for `load_tokenizer`.
        engine: `auto`, `unsloth` or `transformers`.
        weights: `auto`, `4bit` (NF4), `8bit` or `16bit` (fp32 on a CPU).
        double_quant: with `4bit`, quantise the scales too.
        dtype: of arithmetic: `auto`, `float16` or `bfloat16`, if the GPU supports it.
        max_length: the longest row of the training, in tokens.
        adapter: a saved adapter: a folder or hub id that PEFT can read.

    Raises:
        ModelError: there is no such model, or the adapter does not fit it.
    """
    engine, weights = runtime.resolve_engine(engine), resolve_weights(weights)
    if engine == "unsloth":
        from unsloth import FastLanguageModel
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arithmetic, _ = runtime.choose_dtype(runtime.find_machine(), dtype)
    arguments: dict[str, Any] = {"dtype": arithmetic}
    if fields := quantization(weights, arithmetic, double_quant):
        arguments["quantization_config"] = BitsAndBytesConfig(**fields)
    if engine == "transformers":
        load = AutoModelForCausalLM.from_pretrained
        arguments["device_map"] = {"": 0} if torch.cuda.is_available() else None
    else:
        load = FastLanguageModel.from_pretrained
        bits = {f"load_in_{w}": w == weights for w in ("4bit", "8bit", "16bit")}
        # else a hub name stands for Unsloth's copy, made with double_quant
        exact = {"use_exact_model_name": not double_quant}
        arguments |= {"max_seq_length": max_length, **bits, **exact}
    try:
        model = load(find_model(name), **arguments)
    except torch.OutOfMemoryError:  # a RuntimeError, which says enough
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unknown_model(name, error) from error
    if engine == "unsloth":
        model, _ = model
    if weights != "16bit" and not getattr(model, f"is_loaded_in_{weights}", False):
        raise ModelError(
            f"weights={weights!r} cannot be loaded here: Unsloth without a GPU loads "
            "16bit instead; choose engine='transformers' or other weights"
        )
    if weights == "4bit":
        scales = model.config.to_dict()["quantization_config"]
        if scales.get("bnb_4bit_use_double_quant", double_quant) != double_quant:
            warnings.warn(f"{double_quant=} is not followed by {engine}", stacklevel=2)
    tokenizer = load_tokenizer(name, template=template, pad_token=pad_token)
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokenizer.get_vocab().values())) >= rows:
        raise ModelError(
            f"the tokenizer of {name} gives ids up to {highest}, but the model's "
            f"embedding has {rows} rows; take the model's own tokenizer"
        )
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights for CPUs with AVX512-BF16 at the
        # first inference; gradients through repacked weights are wrong
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_length = None  # callers give max_new_tokens
    model.requires_grad_(False)
    if adapter is not None:
        model = load_adapter(model, adapter, engine=engine)
    return model, tokenizer


def quantization(weights: str, dtype: Any, double_quant: bool) -> dict[str, Any] | None:
    """Returns the fields of `BitsAndBytesConfig`, None for `16bit`."""
    if weights == "4bit":
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        }
    return {"load_in_8bit": True} if weights == "8bit" else None


def prepare_quantised(model: PreTrainedModel, recompute: bool) -> PreTrainedModel:
    """Returns a 4- or 8-bit model ready to train LoRA on; others as they are."""
    from peft import prepare_model_for_kbit_training

    if not getattr(model, "is_quantized", False):
        return model
    return prepare_model_for_kbit_training(model, recompute, {"use_reentrant": False})


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    *,
    engine: str = "auto",
    trainable: bool = False,
    seed: int = 3407,
    checkpointing: bool | None = None,
) -> PreTrainedModel:
    """Returns the base with an adapter of whatever kind, as PEFT itself loads it."""
    import torch
    from peft import PeftModel

    recompute = trainable and torch.cuda.is_available() and checkpointing is not False
    unsloth = runtime.resolve_engine(engine) == "unsloth"
    if not unsloth:
        model = prepare_quantised(model, recompute)
    torch.manual_seed(seed)
    tuned = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    set_adapter_weights(tuned, adapter)
    if unsloth:
        from unsloth import FastLanguageModel

        if hasattr(FastLanguageModel, "patch_peft_model"):  # not on a CPU
            mode = "unsloth" if recompute else False
            tuned = FastLanguageModel.patch_peft_model(tuned, mode)
    return tuned


def set_adapter_weights(model: PreTrainedModel, adapter: str | Path) -> None:
    """Puts a saved adapter's matrices into a model; ModelError if they do not fit."""
    from peft import load_peft_weights, set_peft_model_state_dict

    state = load_peft_weights(str(adapter), device="cpu")
    result = set_peft_model_state_dict(model, state)
    own = dict(model.named_parameters())  # a shared one by its first name only
    added = [name for name in own if any(part in name for part in ADDED)]
    empty = set(result.missing_keys).intersection(added)
    if result.unexpected_keys or empty or not any(t.any() for t in state.values()):
        raise ModelError(
            f"the adapter at {adapter} does not fit this model: "
            f"{len(result.unexpected_keys)} matrices have no place, {len(empty)} "
            "places got none; load the base model named in its adapter_config.json"
        )
