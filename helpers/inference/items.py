"""Answers of a run's models or any other: to rows of a set or file, or in a chat."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from helpers import runtime
from helpers.config import Gguf, RunConfig, Stage
from helpers.data.formats import Messages, Row, ask
from helpers.data.reading import Reader
from helpers.data.sources import open_rows
from helpers.errors import ConfigError, DataError, MissingInput
from helpers.files import content_hash, fingerprint, read_rows, write_rows
from helpers.inference import chat, generation
from helpers.inference.generation import Answer, Prompt, generate_batches
from helpers.masking.templates import template_text
from helpers.models import load as models
from helpers.runs import Run, is_run, open_run

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
    if wrong := {*(labels or [])} - {"base", *get_args(Stage)}:
        raise ConfigError(f"no model {min(wrong)!r}: expected base, sft or grpo")
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
    part, former = path.with_suffix(".part.jsonl"), dict[str, Row]()
    for item in [i for f in (path, part) if f.exists() for i in read_rows(f)]:
        with suppress(KeyError, TypeError):  # it is no item
            former[item["made_from"]] = {name: item[name] for name in FIELDS}
    pairs = [(fingerprint(settings, r["id"], r["prompt"]), r) for r in rows]
    items = {key: former[key] for key, _ in pairs if key in former}
    missing = [(key, row) for key, row in pairs if key not in items]
    write_rows(part, items.values())  # without a torn last line
    started, name = time.perf_counter(), f"{path.parent.name}/{path.stem}"
    bar = runtime.progress(None, name, total=len(pairs), done=len(items))
    with bar, part.open("a", encoding="utf-8") as file:
        for batch in generate([row["prompt"] for _, row in missing]):
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            for number, answer in batch.items():
                key, row = missing[number]
                values = (row["id"], row["prompt"], *answer, seconds, key)
                items[key] = dict(zip(FIELDS, values, strict=True))
                file.write(json.dumps(items[key], ensure_ascii=False) + "\n")
            if not part.exists():
                raise MissingInput(f"{part} is gone: start again")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
            started = time.perf_counter()
    results = [items[key] | judge(items[key]["output"], row) for key, row in pairs]
    write_rows(path, results)
    part.unlink()
    return results


def resolve_model(
    model: str,
    adapter: str | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> tuple[str, Row, Row, str]:
    """Returns a model, how to load it, its sampling and system prompt, or a run's."""
    loading, sampling = Row(), Row()
    if is_run(model):
        run = open_run(model)
        config, labels = run.config, ["sft" if run.config.sft_adapter else "none"]
        labels += [s for s in config.stages if (run.path / s / "adapter").exists()]
        adapter = adapter or labels[-1]
        if adapter == "none":
            log.info("run %r: the base model answers, without an adapter", model)
        if adapter in ("sft", "grpo"):
            adapter = str(find_adapters(run, [adapter])[adapter])
        model, loading = config.model, models.options(config)
        sampling = config.inference
        system = config.system_prompt if system is None else system
    loading["adapter"] = None if adapter == "none" else adapter
    changes = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    sampling = sampling | {k: v for k, v in changes.items() if v is not None}
    return model, loading, sampling, system or ""


def generate_command(
    model: str, *, file: Path, out: Path, batch_size: int | None = None, **options: Any
) -> None:
    """Answers the prompts of a file into another; options as of `resolve_model`."""
    if out.exists():
        raise ConfigError(f"{out} exists: name another file, or move it away")
    model, loading, sampling, system = resolve_model(model, **options)
    rows, reader = [], Reader(str(file), system_prompt=system)
    for number, row in open_rows(str(file)):  # before slow loading
        try:
            prompt = reader.to_prompt(row)
        except DataError as error:
            raise DataError(f"{file}, row {number} is not a prompt: {error}") from None
        key = row.get("id", number) if isinstance(row, dict) else number
        rows.append({"id": key, "prompt": prompt})
    loaded = models.load_model(model, **loading)
    reader.report()
    prints = map(content_hash, (model, loading["adapter"]))
    settings = fingerprint(*prints, loading, sampling)
    more: Row = {"sampling": sampling, "batch_size": batch_size}
    generate = partial(generate_batches, *loaded, **more)
    answer_rows(out, rows, settings, generate, lambda text, row: {})
    log.info("%d answers in %s", len(rows), out)


def chat_command(
    model: str,
    *,
    backend: Literal["auto", "transformers", "gguf"] = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    terminal: bool = False,
    **options: Any,
) -> None:
    """Serves a chat's page, by default to this machine alone, or chats in the terminal.

    On a CPU `auto` is the fastest GGUF that passed its checks, if there is one.
    """
    if not terminal:  # before slow loading
        chat.require("gradio")
    name, loading, sampling, system = resolve_model(model, **options)
    file = find_gguf(model, loading["adapter"])
    if backend == "gguf" and not file:
        remedy = f"python -m helpers export {model} --format gguf:q4_k_m"
        raise MissingInput(f"no GGUF of this adapter passed its checks: {remedy}")
    slow = runtime.find_machine().device != "cpu" or not find_spec("xllamacpp")
    if backend == "transformers" or (backend == "auto" and slow):
        file = None
    with chat.open_gguf(file) if file else nullcontext("") as url:
        if file:
            stream = partial(chat.stream_gguf, url)
            note = f"{file.parent.name}/{file.name}, llama.cpp"
        else:
            loaded = models.load_model(name, **loading)
            stream = partial(generation.stream_answer, *loaded)
            note = f"{name}, {loaded[0].dtype}, adapter: {loading['adapter']}"
        if terminal:
            return chat_in_terminal(stream, system, sampling)
        settings = {"title": model, "system_prompt": system, "sampling": sampling}
        compare = bool(loading["adapter"] and not file)
        page = chat.build_page(stream, note, settings, compare)
        return chat.launch(page, server_name=host, server_port=port)


def find_gguf(model: str, adapter: str | None) -> Path | None:
    """Returns the fastest GGUF that a run exported with an adapter and found sound."""
    if not is_run(model):
        return None
    run, known = open_run(model), {"faults": [], "adapter": content_hash(adapter)}
    rows = run.report().get("export", {})
    for name in reversed(get_args(Gguf)):  # the smallest first
        file = run.path / "export" / name.replace(":", "-") / "model.gguf"
        if known.items() <= rows.get(name, {}).items() and file.exists():
            return file
    return None


def chat_in_terminal(stream: chat.Stream, system: str, sampling: Row) -> None:
    """Answers what is typed, printing words as they come, until /quit or the end."""
    print("/new starts a new conversation, /quit ends.")  # noqa: T201
    turns: Messages = []
    with suppress(EOFError, KeyboardInterrupt):
        while (message := input("> ").strip()) != "/quit":
            if message == "/new":
                turns = []
            elif message:
                asked, text = [*turns, *ask(message, "" if turns else system)], ""
                try:
                    for longer in stream(asked, sampling):
                        print(longer[len(text) :], end="", flush=True)  # noqa: T201
                        text = longer
                except ValueError as error:  # too long, or an unknown setting
                    log.error("%s", error)
                    continue
                turns = [*asked, {"role": "assistant", "content": text}]
                print()  # noqa: T201
