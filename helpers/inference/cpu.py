"""What transformers does slowly on a CPU: attention, greedy answers of many rows."""

from __future__ import annotations

import inspect
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Ids = list[int]
ATTENTION = "tunebook_cpu"


def set_attention(model: Any) -> None:
    """Gives a model that computes attention with SDPA the same in less time."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Returns SDPA's attention: of new tokens without copies of their heads' keys, of
    packed rows a row at a time."""
    length, parts, cuts = query.shape[2], [], list[int]()
    if mask is not None and length == 1:
        return grouped_attention(module, query, key, value, mask, **options)
    position = options.get("position_ids")
    if mask is not None and position is not None and mask.shape[0] == len(query) == 1:
        cuts = (position[0, 1:] == 0).nonzero()[:, 0].tolist()
        alone = length == mask.shape[-1] and not mask[0, 0, 1:].diagonal()[cuts].any()
        cuts = cuts if alone else []
    if not cuts:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    ends = [cut + 1 for cut in cuts]
    for start, end in zip([0, *ends], [*ends, length], strict=True):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        seen = mask[:, :, start:end, start:end]
        parts.append(grouped_attention(module, q, k, v, seen, **options)[0])
    return torch.cat(parts, 1), None


def grouped_attention(
    _: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Returns attention of shape (batch, length, heads, width), and no weights.

    Heads that share keys are one matrix product, where SDPA would repeat the keys.
    """
    batch, heads, length, width = query.shape
    kv_heads, seen = key.shape[1], mask.shape[-1]
    key, value = key[:, :, :seen], value[:, :, :seen]
    grouped = (query * options["scaling"]).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, length, seen)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed = weights.view(batch, kv_heads, -1, seen) @ value
    return mixed.view(batch, heads, length, width).transpose(1, 2), None


class Layer(DynamicLayer):
    """Keys and values with room to grow: transformers copies all at every token."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        start, self.stores = self.keys.shape[2], getattr(self, "stores", [])
        end = start + keys.shape[2]
        same = self.stores and self.stores[0].data_ptr() == self.keys.data_ptr()
        if not same or self.stores[0].shape[2] < end:
            room = (0, 0, 0, end + 32 - start)
            pair = self.keys, self.values
            self.stores = [torch.nn.functional.pad(x, room) for x in pair]
        for store, new in zip(self.stores, (keys, values), strict=True):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values


def can_decode(model: Any) -> bool:
    """Returns whether `decode` knows a model: on a CPU, every token sees all before."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    peft = getattr(model, "active_peft_config", None)  # virtual tokens are PEFT's
    base = model.get_base_model() if peft else model
    takes = inspect.signature(base.forward).parameters.keys()
    is_plain = {*kinds} <= {"full_attention"} and not hasattr(model, "for_inference")
    is_plain &= takes >= {"position_ids", "logits_to_keep", "past_key_values"}
    is_plain &= not getattr(peft, "is_prompt_learning", False)
    return is_plain and model.device.type == "cpu"


def merge_adapter(model: Any) -> Any:
    """Returns a model to read from, on a CPU in fp32 without LoRA's small products."""
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if exact and hasattr(model, "merge_and_unload") and can_decode(model):
        return model.merge_and_unload()
    return model


def decode(model: Any, prompts: list[Ids], limit: int, stops: Ids) -> list[Ids]:
    """Returns the likeliest tokens after prompts, to a stop token or the limit.

    What prompts share at their start is read once, and rows that end are dropped.
    """
    shared = min(len(commonprefix(prompts)), *(len(p) - 1 for p in prompts))
    widest, cache = max(map(len, prompts)), Cache(layer_class_to_replicate=Layer)
    rows = [p[:shared] + [-1] * (widest - len(p)) + p[shared:] for p in prompts]
    ids = torch.tensor(rows)
    mask = (ids >= 0).long()
    position, ids = (mask.cumsum(1) - 1)[:, shared:], ids.clamp(min=0)[:, shared:]
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if shared:
        model(input_ids=torch.tensor([prompts[0][:shared]]), **options)
        cache.batch_repeat_interleave(len(prompts))
    tokens, active = [list[int]() for _ in prompts], torch.arange(len(prompts))
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(limit):
        form = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        ids = model(**form, **options).logits[:, -1].argmax(-1, keepdim=True)
        for number, token in zip(active.tolist(), ids[:, 0].tolist(), strict=True):
            tokens[number].append(token)
        ended |= torch.isin(ids[:, 0], torch.tensor(stops))
        if ended.all():
            break
        if ended.sum() * 8 >= len(ended):  # to drop rows copies the others' keys
            rest = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(rest)
            state = active, ended, ids, mask, position
            active, ended, ids, mask, position = (x[rest] for x in state)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        position = position[:, -1:] + 1
    return tokens
