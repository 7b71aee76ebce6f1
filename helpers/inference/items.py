"""Answers of a run's models or any other: to rows of a set or file, or in a chat."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from helpers import runtime
from helpers.config import RunConfig
from helpers.data.formats import Messages, Row, ask
from helpers.data.reading import Reader
from helpers.data.sources import open_rows
from helpers.errors import DataError
from helpers.files import content_hash, fingerprint, write_rows
from helpers.inference.generation import Answer, Prompt, generate_batches, reply
from helpers.masking.templates import template_text
from helpers.models import load as models
from helpers.runs import Run, open_run, runs_folder

log = logging.getLogger(__name__)
Generate = Callable[[list[Prompt]], Iterator[dict[int, Answer]]]
Judge = Callable[[str, Row], Row]
FIELDS = ("id", "prompt", "output", "tokens", "stopped", "seconds", "made_from")


def model_print(config: RunConfig, adapter: Path | str | None) -> str:
    """Returns the fingerprint of a model as it answers: weights, adapter, template."""
    options = models.options(config) | {
        "engine": runtime.resolve_engine(config.engine),
        "weights": models.resolve_weights(config.weights),
        "dtype": str(runtime.choose_dtype(runtime.find_machine(), config.dtype)[0]),
        "max_length": None,
        "template": template_text(config.template),
    }
    return fingerprint(content_hash(config.model), options, content_hash(adapter))


def find_adapters(run: Run, labels: list[str] | None) -> dict[str, Path | str | None]:
    """Returns the adapter of each label, by default of all models of a run."""
    adapters: dict[str, Path | str | None] = {}
    for label in labels or ["base", *run.config.stages]:
        adapters[label] = run.config.sft_adapter if label == "sft" else None
        if label != "base" and not adapters[label]:
            adapters[label] = run.require(f"{label}/adapter")
    return adapters


def answer_rows(
    path: Path, rows: list[Row], settings: str, generate: Generate, judge: Judge
) -> list[Row]:
    """Returns one item a row, and writes them; till all are, to `<name>.part.jsonl`.

    `settings` is a fingerprint of all but the prompt that decides an answer: only what
    has changed is answered again. Verdicts are always computed anew.
    """
    part = path.with_suffix(".part.jsonl")
    texts = [f.read_text("utf-8", errors="replace") for f in (path, part) if f.exists()]
    former: dict[str, Row] = {}
    for line in "\n".join(texts).split("\n"):
        with suppress(json.JSONDecodeError, KeyError, TypeError):  # torn, or no item
            item = json.loads(line)
            former[item["made_from"]] = item
    pairs = [(fingerprint(settings, r["id"], r["prompt"]), r) for r in rows]
    items = {key: former[key] for key, _ in pairs if key in former}
    missing = [(key, row) for key, row in pairs if key not in items]
    write_rows(part, items.values())  # without a torn last line
    started = time.perf_counter()
    with part.open("a", encoding="utf-8") as file:
        for batch in generate([row["prompt"] for _, row in missing]):
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            for number, answer in batch.items():
                key, row = missing[number]
                values = (row["id"], row["prompt"], *answer, seconds, key)
                items[key] = dict(zip(FIELDS, values, strict=True))
                file.write(json.dumps(items[key], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            started = time.perf_counter()
    judged = []
    for key, row in pairs:
        item = {name: items[key][name] for name in FIELDS}
        judged.append(item | judge(item["output"], row))
    write_rows(path, judged)
    part.unlink()
    return judged


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
        config, labels = run.config, ["sft" if run.config.sft_adapter else "none"]
        labels += [s for s in config.stages if (run.path / s / "adapter").exists()]
        adapter = adapter or labels[-1]
        if adapter == "none":
            log.info("run %r: no stage is trained, the base model answers", model)
        if adapter in ("sft", "grpo"):
            adapter = str(find_adapters(run, [adapter])[adapter])
        model, loading = config.model, models.options(config)
        sampling = config.inference
        system = config.system_prompt if system is None else system
    loading["adapter"] = None if adapter == "none" else adapter
    changes = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    sampling = sampling | {k: v for k, v in changes.items() if v is not None}
    if temperature == 0:  # greedy
        sampling = {k: v for k, v in sampling.items() if k == "max_new_tokens"}
    rows, reader = [], Reader(str(file), system_prompt=system or "")
    for number, row in open_rows(str(file)) if file else []:  # before slow loading
        try:
            prompt = reader.to_prompt(row)
        except DataError as error:
            raise DataError(f"{file}, row {number} is not a prompt: {error}") from None
        key = row.get("id", number) if isinstance(row, dict) else number
        rows.append({"id": key, "prompt": prompt})
    loaded = models.load_model(model, **loading)
    if out is None:
        return chat(*loaded, system or "", sampling)
    reader.report()
    settings = fingerprint(*map(content_hash, (model, adapter)), loading, sampling)
    options: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size}
    generate = partial(generate_batches, *loaded, **options)
    answer_rows(out, rows, settings, generate, lambda text, row: {})
    log.info("%d answers in %s", len(rows), out)
    return None


def chat(model: Any, tokenizer: Any, system: str, sampling: Row) -> None:
    """Answers what is typed, printing words as they come, until /quit or the end."""
    print("/new starts a new conversation, /quit ends.")  # noqa: T201
    turns: Messages = []
    with suppress(EOFError):
        while (message := input("> ").strip()) != "/quit":
            if message == "/new":
                turns = []
            elif message:
                turns = [*turns, *ask(message, "" if turns else system)]
                text = reply(model, tokenizer, turns, stream=True, sampling=sampling)
                turns.append({"role": "assistant", "content": text})
