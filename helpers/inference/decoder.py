"""Fast batched sampling: a static cache, and on a GPU one CUDA graph a token. Attention
faster than SDPA in decoding, and on a CPU in packed training.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.generation import logits_process as process
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers import runtime
from helpers.errors import ConfigError

log = logging.getLogger(__name__)

CPU_ATTENTION = "tunebook_cpu"
LOOK = 16  # tokens between two looks at whether all rows have ended
Ids = list[int]
Settings = tuple[float, int, float, float | None]  # temperature, top-k, top-p, min-p


class Decoder:
    """Samples completions from a model whose weights keep their addresses."""

    def __init__(self, net: nn.Module, *, compiled: bool = False) -> None:
        self.net, self.forward = net, net.forward
        self.compiled = compiled and net.device.type == "cuda"
        if self.compiled:
            self.forward = torch.compile(net.forward, dynamic=False)
        self.graph: Any = None
        self.cache: Any = None
        self.size: tuple[int, ...] = (0, 0, 0)  # of rows, their length, stop tokens
        self.settings: Settings = (1.0, 0, 1.0, None)

    def generate(
        self, prompts: list[Ids], limit: int, stops: Ids, settings: Settings | None
    ) -> tuple[list[Ids], list[list[float]]]:
        """Returns drawn or, without settings, likeliest tokens, with the stop token.

        Their log-probabilities are at the temperature, over all tokens, as TRL's.
        """
        count, widest, device = len(prompts), max(map(len, prompts)), self.net.device
        length = widest + limit
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            size = (count, -(-length // 64) * 64, len(stops))
            self.allocate(size, settings or self.settings)
            rows = prompts + prompts[-1:] * (self.size[0] - count)
            ids = torch.tensor([[-1] * (widest - len(r)) + r for r in rows]).to(device)
            ends = stops + stops[-1:] * (self.size[2] - len(stops))
            self.stops.copy_(torch.tensor(ends))
            self.greedy.fill_(settings is None)
            self.start(ids.clamp(min=0), ids >= 0)
            for number in range(1, limit):
                if number % LOOK == 0 and bool(self.ended.all()):
                    break
                self.token() if self.graph is None else self.graph.replay()
        completions = self.tokens[:count, widest:length].tolist()
        logps = self.logps[:count, widest:length].tolist()
        for row, values in zip(completions, logps, strict=True):
            end = next((n for n, i in enumerate(row, 1) if i in stops), len(row))
            del row[end:], values[end:]
        return completions, logps

    def allocate(self, need: tuple[int, ...], settings: Settings) -> None:
        """Makes cache, buffers and a GPU's graph where those of before do not fit."""
        size = tuple(map(max, need, self.size))
        if (size, settings) == (self.size, self.settings):
            return
        self.size, self.settings = size, settings
        rows, length, stops = size
        # give their memory back before the new ones take theirs: a capture cannot
        self.graph = self.cache = None
        runtime.free_memory()
        device = self.net.device
        self.cache = StaticCache(self.net.config, max_cache_len=length)
        if min(layer.max_cache_len for layer in self.cache.layers) < length:
            raise ConfigError(f"{length} tokens leave the window: shorten the prompts")
        numbers = {"dtype": torch.long, "device": device}
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.ended = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.greedy = torch.zeros(1, dtype=torch.bool, device=device)
        self.stops = torch.zeros(stops, **numbers)
        self.last, self.position = torch.zeros(2, rows, 1, **numbers)
        self.slot = torch.zeros(1, **numbers)
        self.tokens = torch.zeros(rows, length, **numbers)
        self.logps = torch.zeros(rows, length, device=device)
        if device.type == "cuda":
            with torch.random.fork_rng([device]):  # training's draws stay as they are
                self.capture()

    def capture(self) -> None:
        """Records one token as a CUDA graph."""
        self.start(self.last, self.last == 0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            try:
                for _ in range(3):  # libraries allocate, compilers compile
                    self.token()
            except RuntimeError as error:
                if not self.compiled:
                    raise
                log.info(f"torch.compile failed, sampling without it: {error}"[:300])
                self.forward = self.net.forward
                for _ in range(3):
                    self.token()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.token()
        self.graph = graph

    def start(self, ids: Tensor, mask: Tensor) -> None:
        """Reads the prompts (rows, width), padded on the left; draws a token."""
        width = ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        position, seen = (mask.long().cumsum(1) - 1).clamp(min=0), mask[:, None, None]
        self.cache.reset()
        self.ended.zero_()
        self.mask.zero_()
        self.mask[..., :width] = seen
        self.slot.fill_(width)
        self.position.copy_(position[:, -1:])
        self.draw(self.net, ids, causal & seen, position, logits_to_keep=1)

    def token(self) -> None:
        """Reads the last token of every row and draws the next: what is captured."""
        self.draw(self.forward, self.last, self.mask, self.position)

    def draw(
        self, forward: Any, ids: Tensor, mask: Tensor, position: Tensor, **options: Any
    ) -> None:
        """Writes the next token of every row, its log-probability and what it moves."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        options |= {"past_key_values": self.cache, "use_cache": True}
        logits = forward(**inputs, **options).logits[:, -1]
        temperature, top_k, top_p, min_p = self.settings
        scores = logits.float() / temperature
        logps = scores.log_softmax(-1)
        if top_k:
            scores = process.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = process.TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = process.MinPLogitsWarper(min_p)(None, scores)
        # the Gumbel-max trick: the largest of p / Exp(1) is a token with probability p
        noise = torch.empty_like(scores).exponential_().log()
        noise.masked_fill_(self.greedy, 0.0)
        token = (scores - noise).argmax(-1, keepdim=True)
        self.tokens.index_copy_(1, self.slot, token)
        self.logps.index_copy_(1, self.slot, logps.gather(-1, token))
        self.last.copy_(token)
        self.ended.logical_or_((token == self.stops).any(-1, keepdim=True))
        self.mask.index_fill_(3, self.slot, True)
        self.slot.add_(1)
        self.position.add_(1)


def set_attention(model: Any) -> None:
    """Gives a CPU's model with SDPA the same attention in less time."""
    plain = model.config._attn_implementation == "sdpa"  # private, and has no other
    if plain and model.device.type == "cpu" and not hasattr(model, "for_inference"):
        AttentionInterface.register(CPU_ATTENTION, attention)
        AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
        model.set_attn_implementation(CPU_ATTENTION)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Returns SDPA's attention: of new tokens without copies of their heads' keys, of
    packed rows a row at a time."""
    length, position = query.shape[2], options.get("position_ids")
    # to find rows would break a compiled layer's graph
    is_free = mask is not None and not torch.compiler.is_compiling()
    if is_free and length == 1:
        return grouped_attention(module, query, key, value, mask, **options)
    cuts: list[int] = []
    if is_free and position is not None and mask.shape[0] == len(query) == 1:
        cuts = (position[0, 1:] == 0).nonzero()[:, 0].tolist()
        alone = length == mask.shape[-1] and not mask[0, 0, 1:].diagonal()[cuts].any()
        cuts = cuts if alone else []
    if not cuts:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    ends, parts = [cut + 1 for cut in cuts], []
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
