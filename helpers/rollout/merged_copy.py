"""The 16-bit copy of a model in training, with its adapter merged into the weights.

Merged anew, in place, from the trained model's own base weights, which are dequantised
each time: nothing drifts, no second copy is kept, and CUDA graphs stay valid.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION = "tunebook_grouped"


class MergedCopy:
    """A plain transformers model, `net`, with the outputs of a PEFT model.

    Weights that no adapter changes, and that are in the copy's dtype already, are
    shared with the model.
    """

    def __init__(self, model: PreTrainedModel, dtype: Any) -> None:
        """Makes the copy; the merged weights are empty until `refresh`.

        Args:
            model: with LoRA layers, its base in 4, 8 or 16 bit.
            dtype: of the copy.
        """
        import torch
        from accelerate import init_empty_weights
        from peft.utils.integrations import dequantize_module_weight
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, grouped_attention)
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # private, as AutoModelForCausalLM.from_config takes the class that is patched
        with init_empty_weights(include_buffers=False):
            net = original_class(base)._from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
        self.merged: list[tuple[Any, Tensor]] = []
        for name, parameter in list(net.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            source = base.get_submodule(owner)
            if leaf == "weight" and hasattr(source, "get_delta_weight"):
                value = torch.empty(parameter.shape, dtype=dtype, device=model.device)
                self.merged.append((source, value))
            else:
                source = getattr(source, "base_layer", source)
                value = getattr(source, leaf)
                if leaf == "weight":
                    value = dequantize_module_weight(source)
                value = value.detach().to(dtype)
            fixed = torch.nn.Parameter(value, requires_grad=False)
            setattr(net.get_submodule(owner), leaf, fixed)
        net.tie_weights()
        fuse_norms(net)
        self.net: PreTrainedModel = net.to(model.device).eval()

    def refresh(self) -> None:
        """Merges the adapter as it is now into the copy's weights, in place."""
        import torch
        from peft.utils.integrations import dequantize_module_weight

        with torch.no_grad():
            for layer, weight in self.merged:
                total = dequantize_module_weight(layer.base_layer).float()
                for adapter in layer.active_adapters:
                    total = total + layer.get_delta_weight(adapter)
                weight.copy_(total)


def fuse_norms(net: PreTrainedModel) -> None:
    """Gives a copy torch's own RMS norms, which are one kernel instead of seven.

    Norms of other definitions (Gemma's) name their epsilon otherwise and are left.
    """
    from torch import nn

    for name, module in list(net.named_modules()):
        if hasattr(module, "variance_epsilon"):
            fused = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            fused.weight = module.weight
            net.set_submodule(name, fused)


def original_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Returns a model's class as transformers wrote it.

    Unsloth replaces methods of the imported classes, so the module is executed anew.
    """
    name = type(model.config).__module__.replace(".configuration_", ".modeling_")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{name}, the module of {type(model)}, is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, type(model).__name__)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns attention of shape (batch, length, heads, width), and no weights.

    Heads that share keys are one matrix product: SDPA without FlashAttention repeats
    the keys in memory for each head instead.

    Args:
        module: unused, part of transformers' interface.
        query: (batch, heads, length, width).
        key: (batch, kv_heads, cache, width), and so `value`.
        value: as `key`.
        attention_mask: (batch, 1, length, seen), True = attend; what lies in the cache
            beyond `seen` is not read.
        scaling: of the scores.
    """
    import torch

    batch, heads, length, width = query.shape
    kv_heads, seen = key.shape[1], attention_mask.shape[-1]
    key, value = key[:, :, :seen], value[:, :, :seen]
    grouped = (query * scaling).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, seen)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed = weights.view(batch, kv_heads, -1, seen) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None
