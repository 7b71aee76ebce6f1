"""Loads model and tokenizer, attaches LoRA, puts adapters on.

Unsloth on a CUDA machine, plain transformers + PEFT elsewhere or on request. Unsloth
must be imported before transformers, trl and peft, so load the model first.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers import runtime
from helpers.hub import ModelError, find_model, unknown_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.config import RunConfig

Engine = Literal["unsloth", "transformers"]
# bytes a weight, with what loading needs beside the weights
WEIGHT_BYTES = {"4bit": 0.6, "8bit": 1.1, "16bit": 2.1}


def resolve_engine(engine: str) -> Engine:
    """Returns the engine that `auto` means here, or the one asked for.

    Raises:
        ModelError: Unsloth is asked for and not installed.
    """
    installed = importlib.util.find_spec("unsloth") is not None
    if engine == "auto":
        import torch

        return "unsloth" if installed and torch.cuda.is_available() else "transformers"
    if engine == "unsloth" and not installed:
        raise ModelError(
            "engine='unsloth' but Unsloth is not installed: run `make setup`, or "
            "choose engine='transformers'"
        )
    return engine  # type: ignore[return-value]


def resolve_weights(weights: str) -> str:
    """Returns `4bit`, `8bit` or `16bit`; `auto` is 4bit on a GPU, else 16bit."""
    if weights != "auto":
        return weights
    return "4bit" if runtime.find_machine().device == "cuda" else "16bit"


def options(config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of `load_model` that a config decides."""
    names = ["engine", "weights", "double_quant", "dtype", "max_length"]
    names += ["template", "pad_token"]
    return {name: getattr(config, name) for name in names}


def load_tokenizer(
    name: str, *, template: str = "own", pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Returns a model's tokenizer, fit to train with (see `templates`).

    Args:
        name: as for `load_model`.
        template: see `templates.template_text`.
        pad_token: a token of the vocabulary; None chooses one.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
        TemplateError: the tokenizer has no such pad token, or none to pad with.
    """
    from transformers import AutoTokenizer

    from helpers.templates import prepare_tokenizer

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

    `load_model(config.model, **options(config))` is the model of a config.

    Args:
        name: hub id, folder, or `smollm2-135m-offline`.
        engine: `auto`, `unsloth` or `transformers`.
        weights: `auto`, `4bit` (NF4), `8bit` or `16bit` (this machine's own dtype,
            fp32 on a CPU).
        double_quant: with `4bit`, quantise the scales too.
        dtype: of arithmetic: `auto`, `float16` or `bfloat16`, where the machine has it.
        max_length: the longest row that will be trained on, in tokens.
        template: as for `load_tokenizer`, and so `pad_token`.
        pad_token: what to pad with.
        adapter: put on the model, see `load_adapter`.

    Raises:
        ModelError: there is no such model or adapter, or the hub cannot be reached.
        MemoryError: the GPU is too small for it.
    """
    chosen, bits = resolve_engine(engine), resolve_weights(weights)
    machine = runtime.prepare_device()
    arithmetic, _ = runtime.choose_dtype(machine, dtype)
    place = find_model(name)
    check_size(place, bits, machine)
    try:
        if chosen == "unsloth":
            from unsloth import FastLanguageModel  # before transformers

            quantised = quantization(bits, arithmetic, double_quant)
            model, _ = FastLanguageModel.from_pretrained(
                place,
                max_seq_length=max_length,
                dtype=arithmetic,
                load_in_4bit=bits == "4bit",
                load_in_8bit=bits == "8bit",
                load_in_16bit=bits == "16bit",
                # else a hub name stands for Unsloth's copy, made with double_quant
                use_exact_model_name=not double_quant,
                **({"quantization_config": quantised} if quantised else {}),
            )
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=arithmetic,
                device_map={"": 0} if machine.device == "cuda" else None,
                quantization_config=quantization(bits, arithmetic, double_quant),
            )
    except (OSError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        raise unknown_model(name, error) from error
    check_weights(model, bits, double_quant)
    keep_trainable(model)
    tokenizer = load_tokenizer(name, template=template, pad_token=pad_token)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.max_length = None  # callers give max_new_tokens
    model.requires_grad_(False)
    if adapter is not None:
        model = load_adapter(model, adapter, engine=chosen, max_length=max_length)
    return model, tokenizer


def quantization(bits: str, dtype: Any, double_quant: bool = True) -> Any:
    """Returns the bitsandbytes config for `4bit` or `8bit`, None for `16bit`."""
    from transformers import BitsAndBytesConfig

    if bits == "16bit":
        return None
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def check_weights(model: PreTrainedModel, bits: str, double_quant: bool) -> None:
    """Raises ModelError when a model was loaded in other weights than asked for.

    Unsloth's CPU backend loads 16 bit for 8, and always quantises the scales of 4 bit:
    the latter changes no result to speak of and is only said.
    """
    if bits != "16bit" and not getattr(model, f"is_loaded_in_{bits}", False):
        raise ModelError(
            f"weights={bits!r} cannot be loaded here: Unsloth without a GPU loads "
            "16bit instead; choose engine='transformers' or other weights"
        )
    if bits != "4bit":
        return
    found = model.config.quantization_config  # Unsloth leaves a dict on a GPU
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("bnb_4bit_use_double_quant", double_quant) != double_quant:
        warnings.warn(
            f"double_quant={double_quant} is not followed: the weights were loaded "
            f"with double_quant={not double_quant}",
            stacklevel=3,
        )


def keep_trainable(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for CPUs with AVX512-BF16.

    It does so on the first answer or evaluation and never takes it back; gradients
    through the repacked weights are wrong, so that training goes on but learns nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_size(place: str, bits: str, machine: runtime.Machine) -> None:
    """Raises MemoryError when a local model's weights alone exceed the GPU."""
    files = list(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    if files and machine.device == "cuda":
        stored_gb = sum(file.stat().st_size for file in files) / 2**30
        need = stored_gb * WEIGHT_BYTES[bits] / 2.0
        runtime.require_memory(need, f"{place} in {bits}", machine)


def add_lora(
    model: PreTrainedModel,
    lora: dict[str, Any],
    *,
    engine: str = "auto",
    seed: int = 3407,
    max_length: int = 1024,
    checkpointing: bool | None = None,
) -> PreTrainedModel:
    """Returns the model with fresh LoRA matrices to train; the base stays frozen.

    Args:
        model: from `load_model`, with the same engine.
        lora: fields of PEFT's `LoraConfig`, unchanged.
        engine: `auto`, `unsloth` or `transformers`.
        seed: for the matrices' first values.
        max_length: the longest row that will be trained on, in tokens.
        checkpointing: recompute activations in the backward pass, for a third more
            time and much less memory; None does on a GPU. Never on a CPU.

    Raises:
        ModelError: a target module does not exist in the model.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    recompute = on_gpu and checkpointing is not False
    targets = lora.get("target_modules", [])
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    absent = [t for t in targets if t not in names] if isinstance(targets, list) else []
    if absent:
        linear = sorted(
            {
                n.rpartition(".")[2]
                for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear)
            }
        )
        raise ModelError(
            f"target modules {', '.join(absent)} do not exist in this model; it has "
            f"{', '.join(linear)}"
        )
    if resolve_engine(engine) == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            **{"bias": "none", "lora_dropout": 0, **lora},
            use_gradient_checkpointing="unsloth" if recompute else False,
            random_state=seed,
            max_seq_length=max_length,
        )
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(seed)
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(
        model, "is_loaded_in_8bit", False
    )
    if quantised:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def load_adapter(
    model: PreTrainedModel, adapter: str | Path, *, engine: str = "auto", **lora: Any
) -> PreTrainedModel:
    """Returns the base model with a saved adapter on it, ready to use or train on.

    Args:
        model: the base, from `load_model`.
        adapter: a folder or hub id that PEFT can read.
        engine: as for `load_model`.
        lora: more arguments of `add_lora` (`seed`, `max_length`, `checkpointing`).

    Raises:
        ModelError: there is no adapter, or its matrices do not fit this model.
    """
    from peft import LoraConfig

    try:
        saved = LoraConfig.from_pretrained(str(adapter))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no adapter at {adapter} (adapter_config.json and "
            f"adapter_model.safetensors are needed): {str(error)[:200]}"
        ) from error
    fields = {
        "r": saved.r,
        "lora_alpha": saved.lora_alpha,
        "lora_dropout": saved.lora_dropout,
        "bias": saved.bias,
        "use_rslora": saved.use_rslora,
        "target_modules": sorted(saved.target_modules or []),
    }
    tuned = add_lora(model, fields, engine=engine, **lora)
    set_adapter_weights(tuned, adapter)
    return tuned


def set_adapter_weights(model: PreTrainedModel, adapter: str | Path) -> None:
    """Puts a saved adapter's matrices into a model that has LoRA of the same shape.

    Raises:
        ModelError: the matrices do not fit this model, or are all zero.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        state = load_peft_weights(str(adapter), device="cpu")
        result = set_peft_model_state_dict(model, state)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the adapter at {adapter} cannot be put on this model: {str(error)[:200]}"
        ) from error
    strange = list(getattr(result, "unexpected_keys", []))
    empty = [k for k in getattr(result, "missing_keys", []) if "lora_" in k]
    if strange or empty or not any(t.abs().sum() > 0 for t in state.values()):
        raise ModelError(
            f"the adapter at {adapter} does not fit this model: {len(strange)} "
            f"matrices have no place, {len(empty)} places got none; load the base "
            "model it was trained on (named in its adapter_config.json)"
        )


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Returns the numbers of trainable and of all parameters (4-bit ones unpacked)."""
    trainable, total = model.get_nb_trainable_parameters()
    return trainable, total


def adapter_size(folder: Path) -> str:
    """Returns what an adapter folder holds, for a notebook's last line."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    return f"{folder}: rank {config['r']}, {size / 2**20:.1f} MiB"
