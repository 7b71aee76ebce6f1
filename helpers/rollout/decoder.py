"""Fast batched sampling from a plain transformers model: static cache, CUDA graph.

One graph is a whole token: the model, the drawing, the bookkeeping. On a CPU the same
code runs without a graph.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from helpers import runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LOOK = 16  # tokens between two looks at whether all rows have ended


class Settings(NamedTuple):
    """How a token is drawn; the temperature is over 0."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Completion(NamedTuple):
    """Sampled tokens of one prompt, the stop token included."""

    ids: list[int]
    logps: list[float]  # at the temperature, over the whole vocabulary, as TRL's


class Decoder:
    """Samples completions from a model whose weights keep their addresses."""

    def __init__(self, net: PreTrainedModel, *, compiled: bool = False) -> None:
        self.net, self.forward = net, net.forward
        self.compiled = compiled and net.device.type == "cuda"
        if self.compiled:
            self.forward = torch.compile(net.forward, dynamic=False)
        self.graph: Any = None
        self.cache: Any = None
        self.rows = self.length = self.room = 0
        self.settings = Settings()

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stops: list[int],
        settings: Settings | None,
    ) -> list[Completion]:
        """Returns a completion of each prompt; without settings, the likeliest."""
        widest = max(map(len, prompts))
        device = self.net.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            length = widest + max_new_tokens
            self.prepare(len(prompts), length, stops, settings or self.settings)
            rows = prompts + prompts[-1:] * (self.rows - len(prompts))
            padded = torch.tensor([[-1] * (widest - len(r)) + r for r in rows])
            padded = padded.to(device)
            self.greedy.fill_(settings is None)
            self.start(padded.clamp(min=0), padded >= 0)
            for count in range(1, max_new_tokens):
                if count % LOOK == 0 and bool(self.ended.all()):
                    break
                self.token() if self.graph is None else self.graph.replay()
        drawn = self.tokens[: len(prompts), :max_new_tokens].tolist()
        logps = self.logps[: len(prompts), :max_new_tokens].tolist()
        completions = []
        for ids, values in zip(drawn, logps, strict=True):
            end = next((n for n, i in enumerate(ids, 1) if i in stops), len(ids))
            completions.append(Completion(ids[:end], values[:end]))
        return completions

    def prepare(
        self, rows: int, length: int, stops: list[int], settings: Settings
    ) -> None:
        """Makes buffers and the graph where those of before do not fit."""
        fits = rows <= self.rows and length <= self.length and len(stops) <= self.room
        if not fits or settings != self.settings:
            self.rows = max(rows, self.rows)
            self.length = max(-(-length // 64) * 64, self.length)
            self.room, self.settings = max(len(stops), self.room), settings
            self.allocate()
        padded = stops + stops[-1:] * (self.room - len(stops))
        self.stops.copy_(torch.tensor(padded))

    def allocate(self) -> None:
        """Makes cache, buffers and, on a GPU, the graph."""
        from transformers import StaticCache

        # give their memory back before the new ones take theirs: a capture cannot
        self.graph = self.cache = None
        runtime.free_memory()
        rows, length, device = self.rows, self.length, self.net.device
        self.cache = StaticCache(self.net.config, max_cache_len=length)
        flags = {"dtype": torch.bool, "device": device}
        numbers = {"dtype": torch.long, "device": device}
        self.mask = torch.zeros(rows, 1, 1, length, **flags)
        self.ended = torch.zeros(rows, 1, **flags)
        self.greedy = torch.zeros(1, **flags)
        self.stops = torch.zeros(self.room, **numbers)
        self.last = torch.zeros(rows, 1, **numbers)
        self.position = torch.zeros(rows, 1, **numbers)
        self.slot = torch.zeros(1, **numbers)
        self.count = torch.zeros(1, **numbers)
        self.tokens = torch.zeros(rows, length, **numbers)
        self.logps = torch.zeros(rows, length, device=device)
        if device.type == "cuda":
            with torch.random.fork_rng([device]):  # training's draws stay as they are
                self.capture()

    def capture(self) -> None:
        """Records one token as a CUDA graph."""
        one = torch.zeros(self.rows, 1, dtype=torch.long, device=self.net.device)
        self.start(one, one == 0)
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
        self.cache.reset()
        for buffer in (self.mask, self.count, self.ended):
            buffer.zero_()
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self.net(
            input_ids=ids,
            attention_mask=causal & mask[:, None, None, :],
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.mask[..., :width] = mask[:, None, None, :]
        self.slot.fill_(width)
        self.position.copy_(position[:, -1:] + 1)
        self.draw(logits[:, -1])

    def token(self) -> None:
        """Reads the last token of every row and draws the next: what is captured."""
        self.mask.index_fill_(3, self.slot, True)
        logits = self.forward(
            input_ids=self.last,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.slot.add_(1)
        self.position.add_(1)
        self.draw(logits[:, -1])

    def draw(self, logits: Tensor) -> None:
        """Writes a token drawn from logits (rows, vocabulary), and its likelihood."""
        from transformers.generation import logits_process as process

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
        self.tokens.index_copy_(1, self.count, token)
        self.logps.index_copy_(1, self.count, logps.gather(-1, token))
        self.last.copy_(token)
        self.ended.logical_or_((token == self.stops).any(-1, keepdim=True))
        self.count.add_(1)
