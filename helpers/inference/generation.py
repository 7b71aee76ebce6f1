"""Batched and streaming generation, used by evaluation, live samples and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.data.formats import Messages
from helpers.masking.templates import render, stop_token_ids

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

Prompt = Messages | str
CPU_ROWS, MOST_ROWS = 32, 256
CACHE_GB = 2.0  # of keys and values, beside the weights


class Answer(NamedTuple):
    """One completion."""

    text: str
    tokens: int
    """Generated tokens, the stop token included."""
    stopped: bool
    """False when it was cut at `max_new_tokens`."""


Answering = Callable[..., list[Answer]]  # `generate` of some model and tokenizer


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
    prompts: Sequence[Prompt],
    **options: Any,
) -> list[Answer]:
    """Returns one answer a prompt, in the prompts' order.

    Args:
        model: any causal model, and its tokenizer.
        tokenizer: as `load_tokenizer` prepares it.
        prompts: conversations that end in a user turn, or texts to continue.
        options: see `generate_batches`.
    """
    answers: dict[int, Answer] = {}
    for batch in generate_batches(model, tokenizer, prompts, **options):
        answers |= batch
    return [answers[index] for index in range(len(prompts))]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    sampling: dict[str, Any] | None = None,
    until: Sequence[str] = (),
    streamer: Any = None,
) -> Iterator[dict[int, Answer]]:
    """Yields the answers of one batch after another, by their prompts' indices.

    The longest prompts come first, in batches of similar length, so that little is
    spent on padding. A batch that does not fit into GPU memory is halved.

    Args:
        model: as for `generate`, and so `tokenizer` and `prompts`.
        tokenizer: of the model.
        prompts: conversations or texts.
        max_new_tokens: answers are cut here.
        batch_size: prompts a batch; by default what `fitting_rows` says.
        sampling: fields of transformers' `GenerationConfig`, such as `temperature` and
            `max_new_tokens`; greedy without any but the latter.
        until: texts that end an answer, and are cut off, besides the stop tokens.
        streamer: of transformers, for a single prompt.
    """
    import torch

    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    stops = stop_token_ids(tokenizer)
    drawing = dict(sampling or {})
    max_new_tokens = drawing.pop("max_new_tokens", max_new_tokens)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    arguments: dict[str, Any] = {"do_sample": True, **drawing} if drawing else greedy
    if until:
        arguments |= {"stop_strings": list(until), "tokenizer": tokenizer}
    start = 0
    while start < len(order):
        longest = len(encoded[order[start]]) + max_new_tokens
        size = batch_size or fitting_rows(model.config, longest, model.device.type)
        batch = order[start : start + size]
        rows = [{"input_ids": encoded[i]} for i in batch]
        inputs = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        try:
            with inference(model):
                output = model.generate(
                    **inputs.to(model.device),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stops,
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                    **arguments,
                )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        width = inputs["input_ids"].shape[1]
        start += len(batch)
        yield {
            i: cut_answer(tokenizer, ids, stops, until)
            for i, ids in zip(batch, output[:, width:].tolist(), strict=True)
        }


def fitting_rows(config: PretrainedConfig, tokens: int, device: str) -> int:
    """Returns the number of rows answered at once: on a GPU, what `CACHE_GB` holds.

    Batches do not depend on free memory, so they are the same on any GPU. On a CPU
    long batches wait for their longest answer. `tokens` are a row's, answer included.
    """
    if device != "cuda":
        return CPU_ROWS
    numbers = config.get_text_config()
    heads = numbers.num_attention_heads
    width = getattr(numbers, "head_dim", None) or numbers.hidden_size // heads
    cached = getattr(numbers, "num_key_value_heads", None) or heads
    row_bytes = 2 * 2 * numbers.num_hidden_layers * cached * width * tokens
    return max(1, min(MOST_ROWS, int(CACHE_GB * 2**30 / row_bytes)))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Returns the ids of a conversation as its template prints it, or of a text.

    A text gets the special tokens that the tokenizer puts before any text, unless it
    begins with BOS already.
    """
    if not isinstance(prompt, str):
        text, special = render(tokenizer, prompt, for_generation=True), False
    else:
        bos = tokenizer.bos_token
        text, special = prompt, not (bos and prompt.startswith(bos))
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def cut_answer(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    stops: list[int],
    until: Sequence[str] = (),
) -> Answer:
    """Returns the answer in generated ids, which are padded after their stop."""
    end = next((n for n, token in enumerate(ids) if token in stops), None)
    if end is None and until:  # a row that a text stopped is padded, without a stop
        while ids and ids[-1] == tokenizer.pad_token_id:
            ids = ids[:-1]
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    tokens = len(ids) if end is None else end + 1
    stopped = end is not None or any(stop in text for stop in until)
    for stop in until:
        text = text.split(stop)[0]
    return Answer(text.strip(), tokens, stopped)


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    system_prompt: str = "",
    stream: bool = False,
    **options: Any,
) -> str:
    """Returns the model's answer to one prompt, greedy unless `sampling` is given.

    Args:
        model: any causal model, and its tokenizer.
        tokenizer: as `load_tokenizer` prepares it.
        prompt: a user's message, or a conversation that ends with one.
        system_prompt: a system turn before a message.
        stream: print the words as they come.
        options: `max_new_tokens` and `sampling` of `generate`.
    """
    from transformers import TextStreamer

    if stream:
        options["streamer"] = TextStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True
        )
    if isinstance(prompt, str):
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        prompt = [*system, {"role": "user", "content": prompt}]
    return generate(model, tokenizer, [prompt], **options)[0].text
