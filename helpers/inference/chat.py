"""A chat with a model, streamed: the web page of a run, and the app of a Space.

It imports nothing of this project: exported, the same file is a folder's `app.py`.
"""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

# Llama-3.x templates print today's date; training fixed it
FIXED = {"date_string": "26 Jul 2024", "strftime_now": date(2024, 7, 26).strftime}
MARK = "\U000f0000"  # in neither data nor templates
# fields of transformers' GenerationConfig, as llama.cpp calls them, off by default
LLAMA_CPP = {"top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
LLAMA_CPP |= {"temperature": "temperature", "max_new_tokens": "max_tokens"}
LLAMA_CPP |= {"repetition_penalty": "repeat_penalty", "seed": "seed"}
OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "repeat_penalty": 1}
LOCK = threading.Lock()  # an adapter is switched on and off for all threads


def render(tokenizer: Any, messages: list[dict], *, for_generation: bool) -> str:
    options = {"tokenize": False, "add_generation_prompt": for_generation, **FIXED}
    text = tokenizer.apply_chat_template(messages, **options)
    bos = tokenizer.bos_token or ""
    if text.startswith(bos) or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return text
    return bos + text


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Returns the ids that end an answer: EOS, and what the template puts."""
    turns = [{"role": "user", "content": MARK}]
    turns += [{"role": "assistant", "content": MARK * 2}]
    text = render(tokenizer, turns, for_generation=False)
    closing = text.rpartition(MARK * 2)[2].strip()
    ids = tokenizer(closing, add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({tokenizer.eos_token_id, *special.intersection(ids)})


def stream_answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict],
    sampling: dict[str, Any],
    stop: threading.Event | None = None,
    adapter: bool = True,
) -> Iterator[str]:
    """Yields the text of an answer so far, once a token.

    Args:
        model, tokenizer: of transformers, PEFT or Unsloth.
        messages: a conversation that ends in a user turn.
        sampling: fields of `GenerationConfig`; greedy without more than
            `max_new_tokens`.
        stop: ends the answer when it is set.
        adapter: False has the base of a PEFT model answer.

    Raises:
        ValueError: the conversation is longer than the model's context.
    """
    import torch

    text = render(tokenizer, messages, for_generation=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    length, drawing = inputs["input_ids"].shape[1], dict(sampling)
    limit = model.config.get_text_config().max_position_embeddings
    if length >= limit:
        raise ValueError(too_long(length, limit))
    count = min(drawing.pop("max_new_tokens", 256), limit - length)
    greedy = {"do_sample": False} | dict.fromkeys(["temperature", "top_p", "top_k"])
    options: dict[str, Any] = {"do_sample": True, **drawing} if drawing else greedy
    stops, closed = stop_token_ids(tokenizer), threading.Event()
    options |= {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    ids = queue.SimpleQueue[Any]()

    def look(rows: Any, scores: Any, **_: Any) -> Any:
        ids.put(rows[0, -1].item())
        ended = closed.is_set() or (stop is not None and stop.is_set())
        return torch.full((1,), ended, device=rows.device)

    def work() -> None:
        getattr(model, "for_inference", model.eval)()
        with LOCK, nullcontext() if adapter else model.disable_adapter():
            form = inputs.to(model.device)
            model.generate(
                **form, **options, max_new_tokens=count, stopping_criteria=[look]
            )

    tokens: list[int] = []
    with running(work, ids):
        try:
            while (token := ids.get()) is not None and token not in stops:
                if isinstance(token, Exception):
                    raise token
                tokens.append(token)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                yield text.rstrip("\ufffd").strip()  # half of a character
        finally:
            closed.set()


@contextmanager
def running(work: Callable[[], None], items: queue.SimpleQueue) -> Iterator[None]:
    """Runs a function in a thread; its error, or None, is the last of its items."""

    def run() -> None:
        try:
            work()
            items.put(None)
        except Exception as error:
            items.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def too_long(length: int, limit: int) -> str:
    text = f"the conversation has {length} tokens, the model reads {limit} at most"
    return f"{text}: start a new conversation, or shorten the message"


@contextmanager
def open_gguf(
    path: Path | str, *, context: int = 4096, parallel: int = 1
) -> Iterator[str]:
    """Yields the address of a llama.cpp server in this process, on loopback alone.

    Args:
        path: a GGUF file.
        context: tokens a conversation and its answer may have.
        parallel: conversations answered at the same time.

    Raises:
        ImportError, ValueError: xllamacpp is missing, or cannot load the file.
    """
    try:
        import xllamacpp
    except ImportError:
        text = "xllamacpp, which reads GGUF files, is not installed"
        raise ImportError(f"{text}: pip install xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = context * parallel, parallel
    params.verbosity, params.sse_ping_interval = -1, 1
    params.ui = params.endpoint_slots = params.endpoint_props = False
    params.cors_origins = "http://127.0.0.1"  # no page of another site may read answers
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ValueError(f"llama.cpp cannot load {path}: {error}") from None
    try:
        yield server.listening_address
    finally:
        del server


def stream_gguf(
    url: str,
    messages: list[dict],
    sampling: dict[str, Any],
    stop: threading.Event | None = None,
) -> Iterator[str]:
    """Yields the text of an answer so far, once a token, of `open_gguf`'s server.

    Args and errors are as for `stream_answer`.
    """
    if unknown := sampling.keys() - LLAMA_CPP:
        raise ValueError(f"llama.cpp has no {', '.join(sorted(unknown))}")
    options: dict[str, Any] = {LLAMA_CPP[name]: v for name, v in sampling.items()}
    drawn = options.keys() - {"max_tokens"}
    options = OFF | {"temperature": 1.0 if drawn else 0.0} | options
    options |= {"messages": messages, "stream": True, "timings_per_token": True}
    form = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(options).encode(), form
    )
    try:
        response = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        fault = json.load(error)["error"]
        if fault["type"] != "exceed_context_size_error":
            raise ValueError(fault["message"]) from None
        length, limit = fault["n_prompt_tokens"], fault["n_ctx"]
        raise ValueError(too_long(length, limit)) from None
    text, tokens = "", 0
    with response:
        for line in response:  # a ping every second, where there is no token
            if stop is not None and stop.is_set():
                break
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line.removeprefix(b"data: "))
            if "error" in part:
                raise ValueError(part["error"]["message"])
            choice = part["choices"][0]
            text += choice["delta"].get("content") or ""
            if choice["finish_reason"] is None:
                for _ in range(tokens, part["timings"]["predicted_n"]):
                    yield text.strip()
                tokens = part["timings"]["predicted_n"]
