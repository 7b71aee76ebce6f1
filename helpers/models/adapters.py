"""LoRA adapters: attached, saved, compared with the trained model, merged.

Each setting of PEFT survives saving, loading and merging, or is refused before the
training; `benchmarks/adapters.py` measures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.errors import ModelError, nearest
from helpers.inference.generation import inference
from helpers.models.hub import new_folder
from helpers.models.load import prepare_quantised, resolve_engine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WITNESS = "trained_logits.npz"
# of the largest logit, by the arithmetic
TOLERANCE = {"float32": 1e-4, "half": 2e-2, "8bit": 0.1}


class Witness(NamedTuple):
    """Token ids (rows, seq) on which a saved adapter is compared with the trained one.

    `half` is the dtype that autocast computes in, None without.
    """

    ids: Tensor
    half: Any = None


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
        max_length: the longest row of the training, in tokens.
        checkpointing: recompute activations in the backward pass, for a third more
            time and much less memory; None does on a GPU. Never on a CPU.

    Raises:
        ModelError: the model or a saved adapter cannot follow a setting.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

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
            torch.manual_seed(seed)
            model = prepare_quantised(model, recompute)
            fields = {"task_type": "CAUSAL_LM", **lora}
            tuned = get_peft_model(model, LoraConfig(**fields))
    except (ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise ModelError(f"LoRA cannot be attached as configured: {error}") from error
    check_attached(tuned, lora)
    if rewrites_base(lora):
        state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        tuned.initial_lora = {k: t.detach().cpu().clone() for k, t in state.items()}
    return tuned


def rewrites_base(lora: dict[str, Any]) -> bool:
    """Returns whether an initialisation takes its start out of the base weights."""
    return str(lora.get("init_lora_weights")).lower().startswith(("olora", "pissa"))


def check_lora(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that name absent modules or cannot come back."""
    modules = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if lora.get(field) != "all-linear":
            require_matches(field, lora.get(field) or [], modules)
    count = model.config.get_text_config().num_hidden_layers
    layers = lora.get("layers_to_transform") or []
    for layer in [layers] if isinstance(layers, int) else layers:
        if not 0 <= layer < count:
            raise ModelError(
                f"layers_to_transform names layer {layer}; the model's layers are 0 to "
                f"{count - 1}"
            )
    if lora.get("lora_alpha") == 0 or lora.get("lora_dropout") == 1:
        raise ModelError("nothing is learnt with lora_alpha=0 or lora_dropout=1")
    start, rewrites = lora.get("init_lora_weights"), rewrites_base(lora)
    safe = rewrites or str(start).lower() in ("gaussian", "orthogonal", "mica")
    if isinstance(start, str) and not safe:
        raise ModelError(
            f"init_lora_weights={start!r} needs data or quantises the base weights "
            "anew: a saved adapter would not fit the model it is loaded on; use true, "
            "'gaussian', 'orthogonal', 'olora' or 'pissa'"
        )
    if rewrites and getattr(model, "is_quantized", False):
        raise ModelError(
            f"init_lora_weights={start!r} changes the base weights, which a quantised "
            "model rounds: a saved adapter would compute something else; train with "
            "weights='16bit', or set it to true"
        )
    if lora.get("layer_replication"):
        raise ModelError("layer_replication cannot be merged or exported; remove it")


def check_attached(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that no module of the tuned model follows."""
    targets = list(model.base_model.targeted_module_names)
    if not targets:
        raise ModelError(
            "only target_parameters are adapted, which cannot be checked once saved; "
            "name modules in target_modules"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        require_matches(field, list(lora.get(field) or []), targets)
    bases = [model.get_base_model().get_submodule(t).base_layer for t in targets]
    if lora.get("lora_bias") and any(getattr(b, "bias", None) is None for b in bases):
        raise ModelError(
            "lora_bias=True trains a bias that the model's layers do not have, so that "
            "it cannot be merged into them; remove it"
        )


def require_matches(field: str, names: str | Iterable[Any], modules: list[str]) -> None:
    """Raises ModelError for names without a module: ends, or a regular expression."""
    whole = isinstance(names, str)
    for name in [names] if whole else map(str, names):
        pattern = name if whole else rf"(.*\.)?({name})"  # as PEFT matches them
        try:
            matches = any(re.fullmatch(pattern, module) for module in modules)
        except re.error as error:
            raise ModelError(
                f"{field} {name}: no regular expression: {error}"
            ) from error
        if not matches:
            ends = {module.rpartition(".")[2] for module in modules}
            known = ", ".join(sorted(end for end in ends if not end.isdigit()))
            raise ModelError(
                f"{field} {name} do not exist in this model{nearest(name, ends)}; it "
                f"has {known} (a list holds ends of names, a text is a regular "
                "expression of whole names)"
            )


def save_adapter(
    model: PreTrainedModel, folder: Path, witness: Witness | None = None
) -> None:
    """Writes a model's adapter to a folder, which is complete or as it was before.

    With a witness the model's logits are kept there too, for `compare_saved`.
    """
    import numpy as np

    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        if initial := getattr(model, "initial_lora", None):
            make_plain(scratch, initial)
        if witness is not None:
            logits = last_logits(model, witness.ids, witness.half).numpy()
            np.savez(scratch / WITNESS, ids=witness.ids.numpy(), logits=logits)


def make_plain(folder: Path, initial: dict[str, Tensor]) -> None:
    """Rewrites a saved adapter (PiSSA, OLoRA) as plain LoRA of twice the rank.

    It was trained on W - s B0 A0, B0 and A0 being `initial` and s the scaling; on W,
    s (B A - B0 A0) does the same. PEFT's conversion drops `modules_to_save`.
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
    save_file(state, file, {"format": "pt"})
    config = LoraConfig.from_pretrained(folder)
    growth = 2**0.5 if config.use_rslora else 2  # keeps alpha / r, or alpha / sqrt(r)
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: growth * v for k, v in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.save_pretrained(folder)


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns an ordinary model with the same outputs as a PEFT model.

    Where embedding and head share a weight and the adapter changes one of them alone,
    they are parted first: PEFT would change both.
    """
    import torch

    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in ends]
    embedding, head = plain
    if plain != ends and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), False)
    return model.merge_and_unload()


def compare_saved(
    model: PreTrainedModel, folder: Path, half: Any = None, bits: str = "16bit"
) -> dict[str, float] | None:
    """Returns a reloaded adapter's largest difference of logits, and the largest logit.

    None where the trained adapter's folder holds no witness. `bits` are those of the
    weights in training: in 8 bit activations are rounded too.

    Raises:
        ModelError: they differ by more than arithmetic explains.
    """
    import numpy as np
    import torch

    if not (folder / WITNESS).exists():
        return None
    with np.load(folder / WITNESS) as file:
        ids, trained = (torch.from_numpy(file[name]) for name in ("ids", "logits"))
    largest = trained.abs().max().item()
    difference = (last_logits(model, ids, half) - trained).abs().max().item()
    arithmetic = "8bit" if bits == "8bit" else "half" if half else "float32"
    if not difference <= TOLERANCE[arithmetic] * largest:
        raise ModelError(
            f"the adapter at {folder}, loaded again, does not compute what was "
            f"trained: logits of up to {largest:.3g} differ by up to {difference:.3g}. "
            "The checkpoints are kept; train with plainer settings of lora (r, "
            "lora_alpha, target_modules), and report these settings"
        )
    return {"difference": float(f"{difference:.3g}"), "logits": float(f"{largest:.3g}")}


def last_logits(model: PreTrainedModel, ids: Tensor, half: Any = None) -> Tensor:
    """Returns the logits after each row, (rows, vocab); `half` is autocast's dtype."""
    import torch

    # Unsloth keeps a frozen embedding on the CPU, by which model.device goes
    device = next((p.device for p in model.parameters() if p.is_cuda), model.device)
    with inference(model), torch.autocast(device.type, half, enabled=half is not None):
        return model(input_ids=ids.to(device)).logits[:, -1].float().cpu()
