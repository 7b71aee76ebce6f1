"""LoRA adapters: attached, saved, compared with the trained model, merged.

Each setting of PEFT survives all of it or is refused before; `benchmarks/adapters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.errors import ModelError, nearest
from helpers.inference.generation import inference
from helpers.models.hub import new_folder
from helpers.models.load import prepare_quantised
from helpers.runtime import resolve_engine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WITNESS = "trained_logits.npz"
# of the largest logit, by the arithmetic; in 8 bit activations are rounded too
TOLERANCE = {"float32": 1e-4, "half": 2e-2, "8bit": 0.1}


class Witness(NamedTuple):
    """Token ids, (rows, seq), to compare adapters on, and the dtype of autocast."""

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
    """Returns the model with fresh LoRA matrices, `lora` being fields of `LoraConfig`.

    `checkpointing` (None: yes) recomputes activations on a GPU, for less memory.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    recompute = torch.cuda.is_available() and checkpointing is not False
    check_lora(model, lora)
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
        tuned = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
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
    last = model.config.get_text_config().num_hidden_layers - 1
    layers = lora.get("layers_to_transform") or []
    for n in [layers] if isinstance(layers, int) else layers:
        if not 0 <= n <= last:
            raise ModelError(f"layers_to_transform={n}: the layers are 0 to {last}")
    if lora.get("lora_alpha") == 0 or lora.get("lora_dropout") == 1:
        raise ModelError("nothing is learnt with lora_alpha=0 or lora_dropout=1")
    start = lora.get("init_lora_weights")
    drawn = str(start).lower() in ("gaussian", "orthogonal", "mica")
    plain = drawn or not isinstance(start, str)
    rounded = getattr(model, "is_quantized", False)
    if not plain and (rounded or not rewrites_base(lora)):
        raise ModelError(
            f"init_lora_weights={start!r} needs data or changes the base, and a saved "
            "adapter would not fit; use true, 'gaussian' or 'orthogonal', or with "
            "weights='16bit' 'olora' or 'pissa'"
        )
    if lora.get("layer_replication"):
        raise ModelError("layer_replication cannot be merged or exported; remove it")


def check_attached(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Raises ModelError for settings that no module of the tuned model follows."""
    targets = list(model.base_model.targeted_module_names)
    for field in ("rank_pattern", "alpha_pattern"):
        require_matches(field, list(lora.get(field) or []), targets)
    bases = [model.get_base_model().get_submodule(t).base_layer for t in targets]
    if lora.get("lora_bias") and any(getattr(b, "bias", None) is None for b in bases):
        raise ModelError("lora_bias=True cannot be merged into layers without a bias")


def require_matches(field: str, names: str | Iterable[Any], modules: list[str]) -> None:
    """Raises ModelError for names without a module: ends, or a regular expression."""
    for name in [names] if isinstance(names, str) else map(str, names):
        # as PEFT matches them
        pattern = name if isinstance(names, str) else rf"(.*\.)?({name})"
        try:
            matches = any(re.fullmatch(pattern, module) for module in modules)
        except re.error as error:
            raise ModelError(f"{field} {name} is no pattern: {error}") from error
        if not matches:
            ends = {module.rpartition(".")[2] for module in modules}
            known = ", ".join(sorted(end for end in ends if not end.isdigit()))
            raise ModelError(
                f"{field} {name} do not exist in this model{nearest(name, ends)}; it "
                f"has {known} (a text is a regular expression of whole names)"
            )


def save_adapter(
    model: PreTrainedModel, folder: Path, witness: Witness | None = None
) -> None:
    """Writes a model's adapter, and its logits on a witness, to a folder as a whole."""
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
    """Returns an ordinary model with the same outputs as a PEFT model."""
    import torch

    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in ends]
    embedding, head = plain
    # PEFT would change both where the adapter changes one of them alone
    if plain != ends and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), False)
    return model.merge_and_unload()


def compare_saved(
    model: PreTrainedModel, folder: Path, half: Any = None, bits: str = "16bit"
) -> dict[str, float] | None:
    """Returns the distance of a reloaded model's logits from a folder's witness.

    Raises ModelError where arithmetic does not explain the difference.
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
            f"trained: logits of up to {largest:.3g} differ by up to {difference:.3g}; "
            "train with plainer lora settings"
        )
    return {"difference": float(f"{difference:.3g}"), "logits": float(f"{largest:.3g}")}


def last_logits(model: PreTrainedModel, ids: Tensor, half: Any = None) -> Tensor:
    """Returns the logits after each row, (rows, vocab); `half` is autocast's dtype."""
    import torch

    # Unsloth keeps a frozen embedding on the CPU, by which model.device goes
    device = next((p.device for p in model.parameters() if p.is_cuda), model.device)
    with inference(model), torch.autocast(device.type, half, enabled=half is not None):
        return model(input_ids=ids.to(device)).logits[:, -1].float().cpu()
