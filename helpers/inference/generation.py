"""Batched and streaming generation, used by evaluation, live samples and chat."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, NamedTuple

from helpers.data.formats import Messages, ask
from helpers.masking.templates import Tokenizer, render, stop_token_ids

Prompt = Messages | str
LOCK = Lock()  # an adapter is switched on and off for all threads


class Answer(NamedTuple):
    text: str
    tokens: int  # with the stop token
    stopped: bool  # by such a token


@contextmanager
def inference(model: Any) -> Iterator[None]:
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
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any
) -> list[Answer]:
    """Returns one answer a prompt, in the prompts' order.

    Args:
        model, tokenizer: any causal model, and what `load_tokenizer` returns.
        prompts: conversations that end in a user turn, or texts to continue.
        options: `max_new_tokens`; `batch_size`, by default what fits; `sampling`,
            fields of transformers' `GenerationConfig`, greedy at temperature 0.
    """
    batches = generate_batches(model, tokenizer, prompts, **options)
    answers = {index: answer for batch in batches for index, answer in batch.items()}
    return [answers[index] for index in range(len(prompts))]


def generate_batches(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    sampling: dict[str, Any] | None = None,
    streamer: Any = None,
) -> Iterator[dict[int, Answer]]:
    """Yields each batch's answers by their prompts' indices, longest prompts first."""
    import torch

    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    drawing = dict(sampling or {})
    max_new_tokens = drawing.pop("max_new_tokens", max_new_tokens)
    options = decoding(tokenizer, drawing)
    options |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
    stops = options["eos_token_id"]
    while order:
        longest = len(encoded[order[0]]) + max_new_tokens
        size = batch_size or fitting_rows(model.config, longest, model.device.type)
        batch = order[:size]
        rows = [encoded[i] for i in batch]
        try:
            with inference(model):
                start, cache = read_start(model, [row[:-1] for row in rows])
                if cache is not None:
                    cache.batch_repeat_interleave(len(rows))
                form = pad_rows(rows, start, tokenizer.pad_token_id)
                form = {name: ids.to(model.device) for name, ids in form.items()}
                past = {} if cache is None else {"past_key_values": cache}
                output = model.generate(**form, **past, **options)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = len(batch) // 2
            continue
        order = order[size:]
        outputs = output[:, form["input_ids"].shape[1] :].tolist()
        answers = [cut_answer(tokenizer, ids, stops) for ids in outputs]
        yield dict(zip(batch, answers, strict=True))


def read_start(model: Any, rows: list[list[int]]) -> tuple[int, Any]:
    """Reads what all rows begin with once; returns its length, and its cache or None.

    A CPU's time goes by tokens, and instructions or solved examples are the same in all
    prompts. A GPU, and a model whose attention has windows or states, reads whole rows.
    """
    import torch
    from transformers import DynamicCache

    start = os.path.commonprefix(rows) if len(rows) > 1 else []
    cache = DynamicCache(config=model.config)
    plain = not any([*cache.is_sliding, *cache.is_linear])
    if not start or model.device.type != "cpu" or not plain:
        return 0, None
    model(input_ids=torch.tensor([start]), past_key_values=cache, logits_to_keep=1)
    return len(start), cache


def pad_rows(rows: list[list[int]], start: int, pad: int) -> dict[str, Any]:
    """Returns ids and attention mask, (rows, width), padded behind their start."""
    import torch

    gaps = [max(map(len, rows)) - len(row) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    ids = [row[:start] + [pad] * gap + row[start:] for row, gap in pairs]
    seen = [[1] * start + [0] * gap + [1] * (len(row) - start) for row, gap in pairs]
    values = {"input_ids": ids, "attention_mask": seen}
    return {name: torch.tensor(value) for name, value in values.items()}


def decoding(tokenizer: Tokenizer, drawing: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a model's `generate`; the length is not among them."""
    # greedy, whatever the model's own settings are
    own = "temperature top_p top_k repetition_penalty no_repeat_ngram_size"
    greedy = {"do_sample": False} | dict.fromkeys(own.split())
    is_drawn = drawing.get("do_sample", True) and drawing.get("temperature", drawing)
    options: dict[str, Any] = {"do_sample": True, **drawing} if is_drawn else greedy
    options["eos_token_id"] = stop_token_ids(tokenizer)
    return options | {"pad_token_id": tokenizer.pad_token_id}


def stream_answer(
    model: Any,
    tokenizer: Tokenizer,
    messages: Messages,
    sampling: dict[str, Any],
    adapter: bool = True,
) -> Iterator[str]:
    """Yields an answer's text so far, once a token; to close it stops the model.

    Greedy at `temperature` 0, or with `max_new_tokens` alone; without `adapter` the
    base answers. ValueError if the conversation is longer than the model reads.
    """
    import torch

    prompt, drawing = encode(tokenizer, messages), dict(sampling)
    numbers = model.config.get_text_config()
    limit = getattr(numbers, "max_position_embeddings", None) or float("inf")
    if len(prompt) >= limit:
        text = f"the conversation has {len(prompt)} tokens, the model reads {limit} at"
        raise ValueError(f"{text} most: start a new one, or shorten the message")
    count = min(drawing.pop("max_new_tokens", 256), limit - len(prompt))
    options = decoding(tokenizer, drawing) | {"max_new_tokens": count}
    inputs = tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt")
    ids, closed = SimpleQueue[Any](), Event()

    def look(rows: Any, scores: Any, **_: Any) -> Any:
        ids.put(rows[0, -1].item())
        return torch.full((1,), closed.is_set(), device=rows.device)

    def answer() -> None:
        base = nullcontext() if adapter else model.disable_adapter()
        with LOCK, inference(model), base:
            form = inputs.to(model.device)
            model.generate(**form, **options, stopping_criteria=[look])

    tokens: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(answer)
        future.add_done_callback(lambda _: ids.put(None))
        try:
            while (token := ids.get()) is not None:
                tokens.append(token)
                if token not in options["eos_token_id"]:
                    text = tokenizer.decode(tokens, skip_special_tokens=True)
                    yield text.rstrip("\ufffd").strip()  # part of a character
        finally:
            closed.set()
    future.result()


def fitting_rows(config: Any, tokens: int, device: str) -> int:
    """Returns the rows of so many tokens to answer at once: the same on any GPU."""
    if device != "cuda":
        return 32
    numbers = config.get_text_config()
    heads = numbers.num_attention_heads
    width = getattr(numbers, "head_dim", None) or numbers.hidden_size // heads
    width *= getattr(numbers, "num_key_value_heads", None) or heads
    row_bytes = 2 * 2 * numbers.num_hidden_layers * width * tokens
    # 2 GiB beside the weights; long batches wait for their longest answer
    return max(1, min(256, 2 * 2**30 // row_bytes))


def encode(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Returns the ids of a conversation as its template prints it, or of a text."""
    if not isinstance(prompt, str):
        text = render(tokenizer, prompt, for_generation=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    begun = prompt.startswith(tokenizer.bos_token or "\0")
    return tokenizer(prompt, add_special_tokens=not begun)["input_ids"]


def cut_answer(tokenizer: Tokenizer, ids: list[int], stops: list[int]) -> Answer:
    """Returns the answer in generated ids, which are padded after their stop."""
    end = next((n for n, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text.strip(), len(ids[:end]) + (end is not None), end is not None)


def reply(
    model: Any,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system_prompt: str = "",
    stream: bool = False,
    **options: Any,
) -> str:
    """Returns the model's answer to one prompt, greedy unless `sampling` is given.

    Args:
        model, tokenizer, options: as for `generate`.
        prompt: a user's message, or a conversation that ends with one.
        system_prompt: a system turn before a message.
        stream: print the words as they come.
    """
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, True, skip_special_tokens=True)
    if isinstance(prompt, str):
        prompt = ask(prompt, system_prompt)
    return generate(model, tokenizer, [prompt], **options)[0].text
