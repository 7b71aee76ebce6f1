"""Loads model, tokenizer and saved adapters, with Unsloth or plain transformers."""

import re
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.config import RunConfig
from helpers.errors import ModelError
from helpers.masking.templates import Tokenizer, prepare_tokenizer, stop_token_ids
from helpers.models.hub import Model, find_model, unknown_model


def resolve_weights(weights: str) -> str:
    if weights != "auto":
        return weights
    return "4bit" if runtime.find_machine().device == "cuda" else "16bit"


def options(config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of `load_model` that a config decides."""
    names = {"engine", "weights", "double_quant", "dtype", "max_length"}
    return config.model_dump(include=names | {"template", "pad_token"})


def load_tokenizer(
    name: str, *, template: str = "own", pad_token: str | None = None
) -> Tokenizer:
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
) -> tuple[Model, Tokenizer]:
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
        from unsloth import FastLanguageModel as Loader
    else:
        from transformers import AutoModelForCausalLM as Loader
    from transformers import BitsAndBytesConfig

    runtime.free_memory()  # of models that are no longer in use
    machine = runtime.find_machine()
    arithmetic, _ = runtime.choose_dtype(machine, dtype)
    arguments: dict[str, Any] = {"dtype": arithmetic}
    bits = {f"load_in_{weights}": True} if weights != "16bit" else {}
    if weights == "4bit":
        bits["bnb_4bit_use_double_quant"] = double_quant
    if bits:
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": arithmetic}
        arguments["quantization_config"] = BitsAndBytesConfig(**bits, **four)
    if engine == "transformers":
        arguments["device_map"] = {"": 0} if machine.device == "cuda" else None
    else:
        arguments |= {f"load_in_{w}": w == weights for w in ("4bit", "8bit", "16bit")}
        # else a hub name stands for Unsloth's copy, made with double_quant
        arguments["use_exact_model_name"] = not double_quant
        arguments["max_seq_length"] = max_length
    try:
        model = Loader.from_pretrained(find_model(name), **arguments)
    except (OSError, ValueError) as error:
        raise unknown_model(name, error) from error
    model = model[0] if engine == "unsloth" else model
    loaded = model.config.to_dict().get("quantization_config", {})
    if not bits.items() <= loaded.items():
        raise ModelError(f"{engine} cannot load {weights=} with {double_quant=} here")
    tokenizer = load_tokenizer(name, template=template, pad_token=pad_token)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) >= rows:
        raise ModelError(f"{name} has more tokens than rows of its embedding, {rows}")
    for module in model.modules():
        # else bitsandbytes repacks 4-bit weights at inference: gradients are wrong then
        module.support_avx512bf16_for_cpu = False
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    model.generation_config.max_length = None  # callers give max_new_tokens
    model.requires_grad_(False)
    if adapter is not None:
        model = load_adapter(model, adapter, engine=engine)
    return model, tokenizer


def load_adapter(
    model: Model,
    adapter: str | Path,
    *,
    engine: str = "auto",
    trainable: bool = False,
    seed: int = 3407,
    checkpointing: bool = True,
) -> Model:
    """Returns the base with an adapter of whatever kind, as PEFT itself loads it."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import set_seed

    unsloth = runtime.resolve_engine(engine) == "unsloth"
    if not unsloth and getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, False)
    set_seed(seed)
    tuned = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    set_adapter_weights(tuned, adapter)
    if unsloth and runtime.find_machine().device == "cuda":
        from unsloth import FastLanguageModel

        mode = "unsloth" if trainable and checkpointing else False
        tuned = FastLanguageModel.patch_peft_model(tuned, mode)
    return tuned


def set_adapter_weights(model: Model, adapter: str | Path) -> None:
    """Puts a saved adapter's matrices into a model; ModelError if they do not fit."""
    from peft import load_peft_weights, set_peft_model_state_dict

    state = load_peft_weights(str(adapter), device="cpu")
    result = set_peft_model_state_dict(model, state)
    added = re.compile(r"lora_|\.modules_to_save\.|trainable_tokens_delta")
    extra, own = result.unexpected_keys, dict(model.named_parameters())
    # among the own, shared ones are by their first name only
    missing = [n for n in result.missing_keys if n in own and added.search(n)]
    if extra or missing or not any(tensor.any() for tensor in state.values()):
        text = f"{len(missing)} matrices missing, {len(extra)} too many, or all zero"
        raise ModelError(f"the adapter at {adapter} does not fit this model: {text}")
