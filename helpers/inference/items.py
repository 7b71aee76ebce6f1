"""The models of a run and their answers, written batch by batch. A row is answered
again only if what decides its answer has changed; verdicts are always computed anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from helpers import runtime
from helpers.config import RunConfig
from helpers.data.formats import Row
from helpers.files import content_hash, fingerprint, write_rows
from helpers.inference.generation import Answer, Prompt
from helpers.masking.templates import template_text
from helpers.models import load as models
from helpers.runs import Run

# the fields of an item besides its verdicts
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
    path: Path,
    rows: list[Row],
    settings: str,
    generate: Callable[[list[Prompt]], Iterator[dict[int, Answer]]],
    judge: Callable[[str, Row], Row],
) -> list[Row]:
    """Returns one item a row, in the order of the rows, and writes them to a file.

    Until all are answered the file is `<name>.part.jsonl`, synced after every batch.
    `settings` is a fingerprint of all but the prompt that decides an answer.
    """
    keys = [fingerprint(settings, row["id"], row["prompt"]) for row in rows]
    part = path.with_suffix(".part.jsonl")
    former = read_items(path) | read_items(part)
    items = {key: former[key] for key in keys if key in former}
    missing = [place for place, key in enumerate(keys) if key not in items]
    write_rows(part, items.values())  # without a torn last line
    started = time.perf_counter()
    with part.open("a", encoding="utf-8") as file:
        for batch in generate([rows[place]["prompt"] for place in missing]):
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            for number, answer in batch.items():
                row, key = rows[missing[number]], keys[missing[number]]
                values = (row["id"], row["prompt"], *answer, seconds, key)
                items[key] = dict(zip(FIELDS, values, strict=True))
                file.write(json.dumps(items[key], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            started = time.perf_counter()
    judged = [
        {name: items[key][name] for name in FIELDS} | judge(items[key]["output"], row)
        for key, row in zip(keys, rows, strict=True)
    ]
    write_rows(path, judged)
    part.unlink()
    return judged


def read_items(path: Path) -> dict[str, Row]:
    """Returns the items of a file by their `made_from`, without torn or other lines."""
    items: dict[str, Row] = {}
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n")[:-1]:  # a last line without its end is torn
        with suppress(json.JSONDecodeError, KeyError, TypeError):
            item = json.loads(line)
            items[item["made_from"]] = item
    return items
