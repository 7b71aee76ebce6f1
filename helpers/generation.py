"""Batched and streaming generation, used by evaluation, live samples and chat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.formats import Messages
from helpers.templates import render, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """One completion."""

    text: str
    tokens: int
    """Generated tokens, the stop token included."""
    stopped: bool
    """False when it was cut at `max_new_tokens`."""


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into inference mode, and back into training if it was there."""
    import torch

    training = model.training
    model.for_inference() if hasattr(model, "for_inference") else model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.for_training() if hasattr(model, "for_training") else model.train()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    sampling: dict[str, Any] | None = None,
    streamer: Any = None,
) -> list[Answer]:
    """Returns one answer a prompt, in the prompts' order.

    Prompts are batched by length, so that little is spent on padding. A batch that
    does not fit into GPU memory is halved.

    Args:
        prompts: conversations that end in a user turn.
        max_new_tokens: answers are cut here.
        batch_size: prompts a batch; None is 16 on a CPU, where long batches wait for
            their longest answer, and 64 on a GPU, where they cost little.
        sampling: `temperature`, `top_p`, ... of `generate`, and `max_new_tokens`, as
            `inference` in a config; greedy without any but the latter.
        streamer: of transformers, for a single prompt.
    """
    import torch

    texts = [render(tokenizer, p, for_generation=True) for p in prompts]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    stops = stop_token_ids(tokenizer)
    arguments: dict[str, Any] = {"do_sample": False, "temperature": None}
    arguments |= {"top_p": None, "top_k": None}
    drawn = dict(sampling or {})
    max_new_tokens = drawn.pop("max_new_tokens", max_new_tokens)
    if drawn:
        arguments = {"do_sample": True, **drawn}
    batch_size = batch_size or (64 if model.device.type == "cuda" else 16)
    answers: dict[int, Answer] = {}
    start = 0
    with inference(model):
        while start < len(order):
            batch = order[start : start + batch_size]
            rows = [{"input_ids": encoded[i]} for i in batch]
            inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            try:
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stops,
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                    **arguments,
                )
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
                torch.cuda.empty_cache()
                continue
            width = inputs["input_ids"].shape[1]
            for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
                answers[i] = cut_answer(tokenizer, ids, stops)
            start += len(batch)
    return [answers[i] for i in range(len(prompts))]


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]
) -> Answer:
    """Returns the answer in generated ids, which go on with padding after the stop."""
    end = next((n for n, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    tokens = len(ids) if end is None else end + 1
    return Answer(text.strip(), tokens, end is not None)


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    system_prompt: str = "",
    stream: bool = False,
    **options: Any,
) -> str:
    """Returns the model's answer to one prompt, greedy unless `sampling` is given.

    Args:
        prompt: what the user says.
        system_prompt: a system turn before it.
        stream: print the words as they come.
        options: `max_new_tokens` and `sampling` of `generate`.
    """
    from transformers import TextStreamer

    from helpers.data import ask

    if stream:
        options["streamer"] = TextStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True
        )
    return generate(model, tokenizer, [ask(prompt, system_prompt)], **options)[0].text
