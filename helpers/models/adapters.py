"""LoRA adapters: attached, saved, and compared with the trained model."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from helpers.errors import ModelError, nearest
from helpers.files import new_folder
from helpers.inference.generation import inference
from helpers.models.load import Model
from helpers.runtime import find_machine, is_sharded, resolve_engine

WITNESS = "trained_logits.npz"
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2, "8bit": 0.1}  # of the largest logit


def add_lora(
    model: Model,
    lora: dict[str, Any],
    *,
    engine: str = "auto",
    seed: int = 3407,
    checkpointing: bool = True,
) -> Model:
    """Returns the model with fresh LoRA; `lora` holds fields of `LoraConfig`."""
    import peft
    from transformers import set_seed

    check_lora(model, lora)
    if resolve_engine(engine) == "unsloth":
        from unsloth import FastLanguageModel

        recompute = checkpointing and find_machine().device == "cuda"
        mode = {"use_gradient_checkpointing": "unsloth" if recompute else False}
        options = {"bias": "none", "lora_dropout": 0, **lora, "random_state": seed}
        tuned = FastLanguageModel.get_peft_model(model, **options, **mode)
    else:
        set_seed(seed)
        if getattr(model, "is_quantized", False):  # the trainer checkpoints
            model = peft.prepare_model_for_kbit_training(model, False)
        lora = {"task_type": "CAUSAL_LM", **lora}
        tuned = peft.get_peft_model(model, peft.LoraConfig(**lora))
    check_attached(tuned, lora)
    if str(lora.get("init_lora_weights")).lower().startswith(("olora", "pissa")):
        state = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
        tuned.initial_lora = {k: t.detach().cpu().clone() for k, t in state.items()}
    return tuned


def check_lora(model: Model, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that PEFT would ignore, or not bring back."""
    modules = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        require_matches(field, lora.get(field), modules)
    last = model.config.get_text_config().num_hidden_layers - 1
    for n in np.ravel(lora.get("layers_to_transform") or []):
        if not 0 <= n <= last:
            raise ModelError(f"layers_to_transform={n}: the layers are 0 to {last}")
    if lora.get("lora_alpha") == 0 or lora.get("lora_dropout") == 1:
        raise ModelError("nothing is learnt with lora_alpha=0 or lora_dropout=1")
    start = str(lora.get("init_lora_weights")).lower()
    exact = "" if getattr(model, "is_quantized", False) else "|olora|pissa.*"
    if not re.fullmatch(f"none|true|false|gaussian|orthogonal{exact}", start):
        text = f"init_lora_weights={start!r} needs data or changes the base; use true"
        raise ModelError(f"{text}, gaussian, orthogonal, or in 16bit olora or pissa")
    if lora.get("layer_replication"):
        raise ModelError("layer_replication cannot be merged or exported; remove it")


def check_attached(model: Model, lora: dict[str, Any]) -> None:
    targets = list(model.base_model.targeted_module_names)
    for field in ("rank_pattern", "alpha_pattern"):
        require_matches(field, lora.get(field), targets)
    bases = [model.get_base_model().get_submodule(t).base_layer for t in targets]
    if lora.get("lora_bias") and any(getattr(b, "bias", None) is None for b in bases):
        raise ModelError("lora_bias=True cannot be merged into layers without a bias")


def require_matches(field: str, names: Any, modules: list[str]) -> None:
    """Raises ModelError for names without a module: ends, or one regular expression."""
    whole = isinstance(names, str)
    for name in [names] if whole else names or []:
        try:
            pattern = re.compile(name if whole else rf"(.*\.)?({name})")
        except re.error as error:
            raise ModelError(f"{field} {name} is no pattern: {error}") from error
        if names != "all-linear" and not any(map(pattern.fullmatch, modules)):
            hint = nearest(name, {module.rpartition(".")[2] for module in modules})
            raise ModelError(f"{field} {name} do not exist in this model{hint}")


def whole(tensor: Any) -> Any:
    """Returns a tensor whose parts several processes hold; each has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_weights(model: Model) -> dict[str, Any]:
    named = model.named_parameters()
    return {name: whole(p.detach()) for name, p in named if p.requires_grad}


def save_adapter(model: Model, folder: Path, witness: Any = None) -> None:
    """Writes an adapter as a whole, with its logits on token ids, (rows, seq).

    Several processes all call it, and the first one writes.
    """
    state = trained_weights(model) if is_sharded() else None
    logits = [] if witness is None else last_logits(model, witness)
    if os.environ.get("RANK", "0") != "0":
        return
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch, state_dict=state)
        if initial := getattr(model, "initial_lora", None):
            make_plain(scratch, initial)
        if witness is not None:
            rounded = getattr(model, "is_loaded_in_8bit", False)
            limit = TOLERANCE["8bit" if rounded else find_machine().device]
            np.savez(scratch / WITNESS, ids=witness, logits=logits, limit=limit)


def make_plain(folder: Path, initial: dict[str, Any]) -> None:
    """Rewrites a saved PiSSA or OLoRA adapter, B A on W - B0 A0, as plain LoRA on W."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name, start in initial.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], start.to(state[name])])
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -start.to(state[name])], dim=1)
    save_file(state, file, {"format": "pt"})
    config = LoraConfig.from_pretrained(folder)
    growth = 2**0.5 if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: growth * v for k, v in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.save_pretrained(folder)


def compare_saved(model: Model, folder: Path) -> dict[str, float]:
    """Returns how far a reloaded model is from the trained one; ModelError if far."""
    with np.load(folder / WITNESS) as file:
        ids, trained, limit = (file[name] for name in ("ids", "logits", "limit"))
    difference = abs(last_logits(model, ids).numpy() - trained).max()
    largest = abs(trained).max()
    if not difference <= limit * largest:
        text = f"the adapter at {folder}, reloaded, does not compute what was trained"
        raise ModelError(f"{text}: logits to {largest:.3g} are off by {difference:.3g}")
    return {"difference": float(f"{difference:.3g}"), "logits": float(f"{largest:.3g}")}


def device_of(model: Any) -> Any:
    # Unsloth keeps a frozen embedding on the CPU, by which model.device goes
    return next((p.device for p in model.parameters() if p.is_cuda), model.device)


def last_logits(model: Model, ids: Any) -> Any:
    """Returns the logits after each row, (rows, vocab), autocast as in training."""
    import torch

    device = device_of(model)
    ids, gpu = torch.as_tensor(ids, device=device), device.type == "cuda"
    with inference(model), torch.autocast(device.type, model.config.dtype, enabled=gpu):
        return model(input_ids=ids).logits[:, -1].float().cpu()


def merge(tuned: Any) -> Any:
    """Returns the model with its adapter's products in the weights themselves."""
    ends = [tuned.get_input_embeddings(), tuned.get_output_embeddings()]
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in ends]
    # PEFT would change both of tied weights where the adapter changes one alone
    if plain != ends and plain[0].weight is plain[1].weight:
        plain[1].weight = copy.deepcopy(plain[1].weight)
    return tuned.merge_and_unload()
