"""Loads model and tokenizer, attaches LoRA, puts adapters on.

Unsloth on a CUDA machine, plain transformers + PEFT elsewhere or on request.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import runtime
from helpers.errors import ModelError, nearest
from helpers.models.hub import find_model, unknown_model
from helpers.runtime import resolve_engine, use_engine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.config import RunConfig

CAUSAL = "CAUSAL_LM"
WITNESS = "trained_logits.npz"
# of the largest logit, by what is computed in
TOLERANCE = {"float32": 1e-4, "half": 2e-2, "8bit": 0.1}
# bytes a weight, with what loading needs beside the weights
WEIGHT_BYTES = {"4bit": 0.6, "8bit": 1.1, "16bit": 2.1}


class Witness(NamedTuple):
    """Rows on which a saved adapter is compared with the model that was trained."""

    ids: Tensor
    """Token ids, (rows, seq)."""
    half: Any = None
    """The dtype that autocast computes in, None without."""


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


def half_of(config: RunConfig) -> Any:
    """Returns the dtype that a run's training autocasts to, None on a CPU."""
    machine = runtime.find_machine()
    if machine.device == "cpu":
        return None
    return runtime.choose_dtype(machine, config.dtype)[0]


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

    from helpers.masking.templates import prepare_tokenizer

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
    from safetensors import SafetensorError

    chosen, bits = use_engine(engine), resolve_weights(weights)
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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "out of memory" in str(error):
            raise
        raise unknown_model(name, error) from error
    check_weights(model, bits, double_quant)
    keep_trainable(model)
    tokenizer = load_tokenizer(name, template=template, pad_token=pad_token)
    check_vocabulary(model, tokenizer, name)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.max_length = None  # callers give max_new_tokens
    model.requires_grad_(False)
    if adapter is not None:
        model = load_adapter(model, adapter, engine=chosen)
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


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Raises ModelError when a tokenizer gives ids that the model has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {name} gives ids up to {highest} ({token!r}), but the "
            f"model's embedding has {rows} rows; take the model's own tokenizer, or "
            "save the model after model.resize_token_embeddings(len(tokenizer))"
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
        ModelError: a setting names what the model does not have, or its result could
            not be loaded again.
    """
    import torch

    recompute = torch.cuda.is_available() and checkpointing is not False
    check_lora(model, lora)
    try:
        if resolve_engine(engine) == "unsloth":
            from unsloth import FastLanguageModel

            tuned = FastLanguageModel.get_peft_model(
                model,
                **{"bias": "none", "lora_dropout": 0, **lora},
                use_gradient_checkpointing="unsloth" if recompute else False,
                random_state=seed,
                max_seq_length=max_length,
            )
        else:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed)
            model = prepare_quantised(model, recompute)
            tuned = get_peft_model(model, LoraConfig(**{"task_type": CAUSAL, **lora}))
    except (ValueError, TypeError, LookupError, NotImplementedError) as error:
        message = str(error.args[0] if error.args else error)[:300]
        raise ModelError(f"LoRA cannot be attached as configured: {message}") from error
    check_attached(tuned, lora)
    if rewrites_base(lora):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        tuned.initial_lora = {
            name: t.detach().cpu().clone() for name, t in state.items()
        }
    return tuned


def prepare_quantised(model: PreTrainedModel, recompute: bool) -> PreTrainedModel:
    """Returns a 4- or 8-bit model ready to train LoRA on; others as they are."""
    from peft import prepare_model_for_kbit_training

    if not is_quantised(model):
        return model
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def is_quantised(model: PreTrainedModel) -> bool:
    """Returns whether a model's weights are in 4 or 8 bit."""
    return any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8))


def rewrites_base(lora: dict[str, Any]) -> bool:
    """Returns whether an initialisation takes its start out of the base weights.

    >>> rewrites_base({"init_lora_weights": "pissa_niter_4"}), rewrites_base({"r": 8})
    (True, False)
    """
    start = str(lora.get("init_lora_weights")).lower()
    return start == "olora" or start.startswith("pissa")


def check_lora(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that name absent modules or cannot come back."""
    import torch

    modules = dict(model.named_modules())
    linear = {
        name.rpartition(".")[2]
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
    }
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = lora.get(field) or []
        ends = [] if isinstance(names, str) else [str(name) for name in names]
        absent = [
            end
            for end in ends
            if end not in modules and not any(m.endswith(f".{end}") for m in modules)
        ]
        if absent:
            every = {name.rpartition(".")[2] for name in modules}
            raise ModelError(
                f"{field} {', '.join(absent)} do not exist in this model"
                f"{nearest(absent[0], every)}; it has {', '.join(sorted(linear))}"
            )
        if isinstance(names, str) and names != "all-linear":  # as PEFT matches it
            try:
                matches = any(re.fullmatch(names, module) for module in modules)
            except re.error as error:
                raise ModelError(
                    f"{field}: {names} is no regular expression: {error}"
                ) from error
            if not matches:
                raise ModelError(
                    f"{field}: no module matches {names}; a text is a regular "
                    "expression of whole names, a list holds their ends: "
                    f"{', '.join(sorted(linear))}"
                )
    layers = lora.get("layers_to_transform")
    count = model.config.get_text_config().num_hidden_layers
    numbers = [layers] if isinstance(layers, int) else layers or []
    if beyond := [n for n in numbers if not 0 <= n < count]:
        raise ModelError(
            f"layers_to_transform names layer {beyond[0]}; the model's layers are 0 to "
            f"{count - 1}"
        )
    for field, value in (("lora_alpha", 0), ("lora_dropout", 1)):
        if lora.get(field) == value:
            raise ModelError(
                f"{field}={value} takes away all that the matrices add, so that "
                "nothing is learnt; give another value"
            )
    start = lora.get("init_lora_weights")
    if isinstance(start, str):
        plain = start.lower() in ("gaussian", "orthogonal", "mica")
        if not plain and not rewrites_base(lora):
            raise ModelError(
                f"init_lora_weights={start!r} needs data or quantises the base weights "
                "anew, so that a saved adapter would not fit the model it is loaded "
                "on; use true, 'gaussian', 'orthogonal', 'olora' or 'pissa'"
            )
        if rewrites_base(lora) and is_quantised(model):
            raise ModelError(
                f"init_lora_weights={start!r} changes the base weights, which a "
                "quantised model rounds: a saved adapter would compute something else "
                "once loaded; train with weights='16bit', or set it to true"
            )
    if lora.get("layer_replication"):
        raise ModelError(
            "layer_replication makes another model than the base, which cannot be "
            "merged or exported; remove it"
        )


def check_attached(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that no module of the tuned model follows."""
    targets = list(model.base_model.targeted_module_names)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(field) or {}:  # matched as PEFT does
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                raise ModelError(
                    f"{field} {pattern!r} matches no target module, such as "
                    f"{targets[0]!r}; correct or remove it"
                )
    if not targets:
        raise ModelError(
            "no module is adapted, only target_parameters, which cannot be checked "
            "once saved; name modules in target_modules"
        )
    if lora.get("lora_bias") and any(
        getattr(model.get_submodule(f"base_model.model.{n}").base_layer, "bias", None)
        is None
        for n in targets
    ):
        raise ModelError(
            "lora_bias=True trains a bias that the model's layers do not have, so that "
            "it cannot be merged into them; remove it"
        )


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    *,
    engine: str = "auto",
    trainable: bool = False,
    seed: int = 3407,
    checkpointing: bool | None = None,
) -> PreTrainedModel:
    """Returns the base model with a saved adapter on it, as PEFT itself loads it.

    Args:
        model: the base, from `load_model`.
        adapter: a folder or hub id that PEFT can read, of whatever kind and settings.
        engine: as for `load_model`.
        trainable: train on from it; else it is only used.
        seed: for initialisations that draw numbers before the saved values are set.
        checkpointing: as for `add_lora`.

    Raises:
        ModelError: there is no adapter, or its matrices do not fit this model.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    recompute = trainable and torch.cuda.is_available() and checkpointing is not False
    unsloth = resolve_engine(engine) == "unsloth"
    if not unsloth:
        model = prepare_quantised(model, recompute)
    torch.manual_seed(seed)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except torch.OutOfMemoryError:  # of the machine, not of the adapter
        raise
    except (RuntimeError, TypeError, LookupError, SafetensorError) as error:
        raise unfit_adapter(adapter, error) from error
    except (OSError, ValueError) as error:
        if (Path(adapter) / "adapter_model.safetensors").exists():
            raise unfit_adapter(adapter, error) from error
        raise ModelError(
            f"no adapter at {adapter} (adapter_config.json and "
            f"adapter_model.safetensors are needed): {str(error)[:200]}"
        ) from error
    set_adapter_weights(tuned, adapter)
    if unsloth:
        from unsloth import FastLanguageModel

        if hasattr(FastLanguageModel, "patch_peft_model"):  # not on a CPU
            mode = "unsloth" if recompute else False
            tuned = FastLanguageModel.patch_peft_model(tuned, mode)
    return tuned


def unfit_adapter(adapter: str | Path, error: Exception) -> ModelError:
    """Returns the error for an adapter that cannot be put on a model."""
    return ModelError(
        f"the adapter at {adapter} cannot be put on this model: {str(error)[:200]}"
    )


def set_adapter_weights(model: PreTrainedModel, adapter: str | Path) -> None:
    """Puts a saved adapter's matrices into a model that has LoRA of the same shape.

    Raises:
        ModelError: the matrices do not fit this model, or are all zero.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        state = load_peft_weights(str(adapter), device="cpu")
        result = set_peft_model_state_dict(model, state)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise unfit_adapter(adapter, error) from error
    strange = list(getattr(result, "unexpected_keys", []))
    parts = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
    missing = getattr(result, "missing_keys", [])
    own = dict(model.named_parameters())  # a shared one by its first name only
    empty = [k for k in missing if k in own and any(part in k for part in parts)]
    if strange or empty or not any(t.abs().sum() > 0 for t in state.values()):
        raise ModelError(
            f"the adapter at {adapter} does not fit this model: {len(strange)} "
            f"matrices have no place, {len(empty)} places got none; load the base "
            "model it was trained on (named in its adapter_config.json)"
        )


def save_adapter(
    model: PreTrainedModel, folder: Path, witness: Witness | None = None
) -> None:
    """Writes a model's adapter to a folder, which is complete or as it was before.

    An adapter whose start was taken out of the base weights (PiSSA, OLoRA) is written
    as the plain LoRA that does the same on the base as everybody has it.

    Args:
        model: with the adapter.
        folder: where to.
        witness: keep the model's logits there too, for `compare_saved`.
    """
    scratch = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(scratch)
    if initial := getattr(model, "initial_lora", None):
        make_plain(scratch, initial)
    if witness is not None:
        import numpy as np

        logits = last_logits(model, witness.ids, witness.half)
        np.savez(scratch / WITNESS, ids=witness.ids.numpy(), logits=logits.numpy())
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns an ordinary model that computes what a PEFT model does.

    Where embedding and head share a weight and the adapter changes one of them alone,
    they are parted first: PEFT would change both.
    """
    import torch

    def plain(module: Any) -> Any:
        return getattr(module, "base_layer", getattr(module, "original_module", module))

    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    embedding, head = map(plain, ends)
    if [embedding, head] != ends and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), False)
    return model.merge_and_unload()


def make_plain(folder: Path, initial: dict[str, Tensor]) -> None:
    """Rewrites a saved adapter as plain LoRA of twice the rank.

    It was trained on W - s B0 A0, s being the scaling; on W, s (B A - B0 A0) does the
    same. PEFT's own conversion needs a second adapter on the live model, and drops
    `modules_to_save`.

    Args:
        folder: of the adapter.
        initial: its weights before training, by their names in the file.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name, start in initial.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], start.to(state[name])], dim=0)
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -start.to(state[name])], dim=1)
    save_file({k: v.contiguous() for k, v in state.items()}, file, {"format": "pt"})
    config = LoraConfig.from_pretrained(folder)
    growth = 2**0.5 if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: growth * v for k, v in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.save_pretrained(folder)


def compare_saved(
    model: PreTrainedModel, folder: Path, half: Any = None, bits: str = "16bit"
) -> dict[str, float] | None:
    """Returns how far a reloaded adapter's logits are from the trained model's.

    `difference` is the largest one, `logits` the largest logit, for the scale. None
    where the folder holds no logits of the trained model.

    Args:
        model: the base with the adapter on it, or merged, loaded anew.
        folder: of the trained adapter, from `save_adapter` with a witness.
        half: as in the witness.
        bits: of the weights in training; in 8 bit activations are rounded too.

    Raises:
        ModelError: they differ by more than arithmetic explains.
    """
    import numpy as np
    import torch

    if not (folder / WITNESS).exists():
        return None
    with np.load(folder / WITNESS) as kept:
        ids, trained = (torch.from_numpy(kept[name]) for name in ("ids", "logits"))
    reloaded = last_logits(model, ids, half)
    largest = trained.abs().max().item()
    difference = (reloaded - trained).abs().max().item()
    name = "8bit" if bits == "8bit" else "half" if half else "float32"
    if not difference <= TOLERANCE[name] * largest:
        raise ModelError(
            f"the adapter at {folder}, loaded again, does not compute what was "
            f"trained: logits of up to {largest:.3g} differ by up to {difference:.3g}. "
            "The checkpoints are kept; train with plainer settings of lora (r, "
            "lora_alpha, target_modules), and report these settings"
        )
    return {"difference": float(f"{difference:.3g}"), "logits": float(f"{largest:.3g}")}


def last_logits(model: PreTrainedModel, ids: Tensor, half: Any = None) -> Tensor:
    """Returns the logits after each row, float32 on the CPU, (rows, vocab).

    Args:
        ids: token ids, (rows, seq).
        half: the dtype that autocast computes in, as in training; None without.
    """
    import torch

    from helpers.inference.generation import inference

    # Unsloth keeps a frozen embedding on the CPU, by which model.device goes
    device = next((p.device for p in model.parameters() if p.is_cuda), model.device)
    with inference(model), torch.autocast(device.type, half, enabled=half is not None):
        return model(input_ids=ids.to(device)).logits[:, -1].float().cpu()


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Returns the numbers of trainable and of all parameters (4-bit ones unpacked)."""
    trainable, total = model.get_nb_trainable_parameters()
    return trainable, total


def adapter_size(folder: Path) -> str:
    """Returns what an adapter folder holds, for a notebook's last line."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    rank = f"rank {config['r']}, " if "r" in config else ""  # not every kind has one
    return f"{folder}: {rank}{size / 2**20:.1f} MiB"
