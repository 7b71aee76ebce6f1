"""Answers with a run's model or any other: a file of prompts, or a conversation."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from helpers.data.formats import Messages, Row, ask
from helpers.data.reading import Reader
from helpers.data.sources import open_rows
from helpers.errors import DataError
from helpers.files import content_hash, fingerprint
from helpers.inference.generation import generate_batches, reply
from helpers.inference.items import answer_rows
from helpers.models.load import load_model, options
from helpers.runs import open_run, runs_folder

log = logging.getLogger(__name__)


def generate_command(
    model: str,
    *,
    adapter: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
) -> None:
    """Answers the prompts of a file into another, or those typed in a chat."""
    loading, sampling = dict[str, Any](), dict[str, Any]()
    # a model's folder has a config.json too, a run's name is not a path
    if Path(model).name == model and (runs_folder() / model / "config.json").exists():
        run = open_run(model)
        stages = run.config.stages
        trained = [s for s in stages if (run.path / s / "adapter").exists()]
        adapter = adapter or (trained[-1] if trained else run.config.sft_adapter)
        if adapter in stages:
            adapter = str(run.require(f"{adapter}/adapter"))
        model, loading = run.config.model, options(run.config)
        sampling = dict(run.config.inference)
        system = run.config.system_prompt if system is None else system
    changes = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    sampling |= {k: v for k, v in changes.items() if v is not None}
    if temperature == 0:  # greedy
        sampling = {k: v for k, v in sampling.items() if k == "max_new_tokens"}
    loading["adapter"] = None if adapter == "none" else adapter
    # read before minutes of loading
    rows = read_prompts(file, system or "") if file else []
    loaded = load_model(model, **loading)
    if out is None:
        return chat(*loaded, system or "", sampling)
    settings = fingerprint(model, loading, sampling, content_hash(loading["adapter"]))
    limits: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size}
    generate = partial(generate_batches, *loaded, **limits)
    answer_rows(out, rows, settings, generate, lambda text, row: {})
    log.info("%d answers in %s", len(rows), out)
    return None


def read_prompts(path: Path, system_prompt: str) -> list[Row]:
    """Returns `{"id", "prompt"}` rows, the prompt being a conversation."""
    rows, reader = [], Reader(str(path), system_prompt=system_prompt)
    for number, row in open_rows(str(path)):
        try:
            prompt = reader.to_prompt(row)
        except DataError as error:
            raise DataError(
                f"{path}, row {number} is not a prompt: {error}; expected a text, or "
                "an object as in training that ends with the user"
            ) from None
        key = row.get("id", number) if isinstance(row, dict) else number
        rows.append({"id": key, "prompt": prompt})
    reader.report()
    return rows


def chat(model: Any, tokenizer: Any, system: str, sampling: dict[str, Any]) -> None:
    """Answers what is typed, printing words as they come, until /quit or the end."""
    print("/new starts a new conversation, /quit ends.")  # noqa: T201
    turns: Messages = []
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            return
        if message == "/quit":
            return
        if message == "/new":
            turns = []
        elif message:
            turns = [*turns, *ask(message, "" if turns else system)]
            text = reply(model, tokenizer, turns, stream=True, sampling=sampling)
            turns.append({"role": "assistant", "content": text})
