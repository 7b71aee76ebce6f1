"""Where rows come from: local files and hub datasets, with options after a `?`.

`mine.jsonl?format=alpaca&rows=500` is a source. Rows stay on disk: a set is
memory-mapped, or read over the network without being stored (`stream=true`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers import runtime
from helpers.config import nearest
from helpers.formats import DataError, Row, find_format

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Source(BaseModel):
    """An address, and how it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    format: str | None = None
    """A name of `formats.FORMATS`; None = detected from the rows."""
    rows: int | None = Field(None, ge=1)
    """At most so many are read."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Its part of the mix, against the other sources' weights."""
    stream: bool = False
    """Take the first rows and store none, for a set that the disk does not hold."""


def parse_source(text: str) -> Source:
    """Returns a source's address and options.

    >>> parse_source("mine.jsonl?format=alpaca&rows=500").rows
    500

    Raises:
        DataError: an option or a format is unknown, or a value is not what it takes.
    """
    path, _, query = text.partition("?")
    pairs = [option.partition("=")[::2] for option in query.split("&") if option]
    try:
        found = Source.model_validate({**dict(pairs), "path": path})
    except ValidationError as error:
        fault = error.errors()[0]
        known = [name for name in Source.model_fields if name != "path"]
        name = str(fault["loc"][0])
        if fault["type"] == "extra_forbidden":
            said = f"there is no option {name!r}{nearest(name, known)}"
        else:
            said = f"{name}={fault['input']!r}: {fault['msg']}"
        raise DataError(
            f"{text!r}: {said} (options after ?, joined by &: {', '.join(known)})"
        ) from None
    if found.format:
        find_format(found.format)
    return found


def open_rows(
    source: str, limit: int | None = None, seed: int | None = None
) -> Iterator[tuple[int, Row]]:
    """Returns a source's rows with their numbers, from 1, read when they are asked for.

    What cannot be opened is refused at once. Rows that are drawn come in the order of
    the source, which the disk reads fastest; `data.mix` shuffles.

    Args:
        source: a path to .jsonl, .json, .csv or .parquet (from the working folder or
            the project's), or a hub name `owner/name[/config][:split]`; options may
            follow, see `Source`.
        limit: at most this many rows.
        seed: draw them at random with it; without it the first ones are taken.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file or the hub dataset could not be read, or is empty.
    """
    asked = parse_source(source)
    limit = min((n for n in (limit, asked.rows) if n), default=None)
    rows = open_dataset(asked)
    if asked.stream:
        taken = rows if limit is None else rows.take(limit)
        return enumerate(receive(asked.path, taken), start=1)
    if len(rows) == 0:
        raise DataError(f"{asked.path} holds no rows")
    if limit is None or limit >= len(rows):
        return enumerate(rows, start=1)
    drawn = list(range(limit))
    if seed is not None:
        drawn = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return zip((number + 1 for number in drawn), rows.select(drawn), strict=True)


def open_dataset(source: Source) -> Any:
    """Returns the dataset of a source: its rows are on disk, or on the hub.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it could not be read, or is empty.
    """
    import datasets

    datasets.disable_progress_bars()
    path, suffix = source.path, Path(source.path).suffix.lower()
    if suffix in READERS:
        folders = dict.fromkeys([Path.cwd(), runtime.home()])
        files = (folder / path for folder in folders)
        place = next((file for file in files if file.is_file()), None)
        if place is None:
            looked = " and ".join(map(str, folders))
            hint = "; data_samples/ is in the repository alone, pip leaves it out"
            raise FileNotFoundError(
                f"no file {path} (looked in {looked}); "
                "give a path to a .jsonl, .json, .csv or .parquet file"
                + (hint if runtime.INSTALLED else "")
            )
        arguments: dict[str, Any] = {"path": READERS[suffix], "split": "train"}
        arguments |= {"data_files": str(place)}
    else:
        matched = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?", path)
        if matched is None:
            raise DataError(
                f"{path!r} is neither a .jsonl, .json, .csv or .parquet file nor a "
                "hub name like owner/name, owner/name/config or owner/name:split"
            )
        name, config, split = matched.groups()
        arguments = {"path": name, "name": config, "split": split or "train"}
    try:
        return datasets.load_dataset(**arguments, streaming=source.stream)
    except Exception as error:  # datasets raises many kinds; all mean "not readable"
        raise unreadable(path, error) from error


def receive(path: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the rows of a stream; what stops it is refused in words."""
    try:
        yield from rows
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> DataError:
    """Returns what to say of a source that `datasets` fails to read."""
    local = Path(path).suffix.lower() in READERS
    cause = error.__cause__ or error
    kind = type(cause).__name__
    nothing = kind in ("StopIteration", "EmptyDataError")
    if local and (nothing or "no data!" in str(cause)):
        return DataError(f"{path} holds no rows")
    return DataError(
        f"{path} could not be read: {kind}: {str(cause)[:300]}"
        + ("" if local else " (is the hub reachable from here?)")
    )


def load_rows(
    source: str, limit: int | None = None, seed: int | None = None
) -> list[Row]:
    """Returns the rows of `open_rows` as a list, without their numbers."""
    return [row for _, row in open_rows(source, limit, seed)]
