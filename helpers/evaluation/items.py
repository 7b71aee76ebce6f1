"""The items of an evaluation: a JSON line each, written while they are answered.

A kill costs the batch that was being answered. What is there is not answered again, as
long as nothing changed that decides the answer; verdicts are always given anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.data.formats import Row
from helpers.data.preparation import write_rows
from helpers.inference.generation import Answer, Prompt
from helpers.runs import fingerprint, write_text

# of an item, without verdicts: those of former settings do not stay
ANSWER = ("id", "prompt", "output", "tokens", "stopped", "seconds", "made_from")
Generate = Callable[[list[Prompt]], Iterator[dict[int, Answer]]]


def answer_rows(
    path: Path,
    rows: list[Row],
    settings: str,
    generate: Generate,
    judge: Callable[[str, Row], Row],
) -> list[Row]:
    """Returns one item a row, in the rows' order, and writes them to a file.

    While it is being made the file is `<name>.part.jsonl`, every batch synced to disk.
    An item's `seconds` are its share of its batch's.

    Args:
        path: the file.
        rows: `id` and `prompt` each, and what `judge` needs.
        settings: a fingerprint of all that decides an answer, its prompt aside.
        generate: answers prompts, batch after batch, by their places.
        judge: returns what else an item says, from the answer's text and the row.
    """
    keys = [fingerprint(settings, row["id"], row["prompt"]) for row in rows]
    part = path.with_suffix(".part.jsonl")
    found = {**read_items(path), **read_items(part)}
    done = {key: found[key] for key in keys if key in found}
    missing = [place for place, key in enumerate(keys) if key not in done]
    write_text(part, "".join(map(to_line, done.values())))  # without a torn last line
    started = time.perf_counter()
    with part.open("a", encoding="utf-8") as file:
        for batch in generate([rows[place]["prompt"] for place in missing]):
            seconds = (time.perf_counter() - started) / len(batch)
            for number, answer in batch.items():
                place = missing[number]
                item = {
                    "id": rows[place]["id"],
                    "prompt": rows[place]["prompt"],
                    "output": answer.text,
                    "tokens": answer.tokens,
                    "stopped": answer.stopped,
                    "seconds": round(seconds, 4),
                    "made_from": keys[place],
                }
                done[keys[place]] = item
                file.write(to_line(item))
            file.flush()
            os.fsync(file.fileno())
            started = time.perf_counter()
    items = [
        {name: value for name, value in done[key].items() if name in ANSWER}
        | judge(done[key]["output"], row)
        for key, row in zip(keys, rows, strict=True)
    ]
    write_rows(path, items)
    part.unlink()
    return items


def to_line(item: Row) -> str:
    """Returns an item as a line of its file."""
    return json.dumps(item, ensure_ascii=False) + "\n"


def read_items(path: Path) -> dict[str, Row]:
    """Returns the items of a file by what they were made from; a torn line is none."""
    found: dict[str, Row] = {}
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[:-1]:  # what follows the last line end is torn
            try:
                item: Any = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(item, dict) and "made_from" in item:
                found[item["made_from"]] = item
    return found
