"""Reads rows from local files and hub datasets, one at a time.

A local path is taken to the letter, whatever signs are in its name, and read anew each
time: no cache can return rows of before.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from helpers import runtime
from helpers.config import Source
from helpers.data.formats import FORMATS
from helpers.errors import DataError, MissingInput

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz")
KNOWN = "a .jsonl, .json, .csv, .tsv or .parquet file (.gz too)"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?")
# how a text begins that is JSON; `[1] Why?` and `"Why" is asked.` are none
JSON_BEGINS = re.compile(r'\s*(?:\[\s*(?:$|[\["{])|\{\s*(?:$|"))')


def open_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Returns a source's rows with their numbers, from 1, read as they are needed.

    A row that cannot be read is a `DataError` in its place. At most `limit` rows: the
    first ones, or drawn with a seed, in the order of the source.
    """
    source = Source(path=source) if isinstance(source, str) else source
    limit = min((n for n in (limit, source.rows) if n), default=None)
    path, table = find_path(source.path), None
    read: Callable[[], Iterator[Any]]
    if path is not None and path.is_file():
        read = partial(read_file, path)
    else:
        table = read_dataset(source, path)
        read = partial(iter, table)
    rows = read()
    first = list(islice(rows, 1))
    if not first:
        raise DataError(f"{source} holds no rows")
    if limit is None or seed is None or source.stream:
        return enumerate(islice(chain(first, rows), limit), start=1)
    count = 1 + sum(1 for _ in rows) if table is None else len(table)
    drawn = sorted(random.Random(seed).sample(range(count), min(limit, count)))
    if table is not None:
        return zip((n + 1 for n in drawn), table.select(drawn), strict=True)
    numbers = {n + 1 for n in drawn}
    return ((n, row) for n, row in enumerate(read(), start=1) if n in numbers)


def load_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> list[Any]:
    """Returns the rows of a source as a list.

    Args:
        source: a path (from the working folder or the project's), a folder that
            `save_to_disk` wrote, or a hub name `owner/name[/config][:split]`.
        limit: at most this many rows.
        seed: draw them at random with it; without it the first ones are taken.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the source, or one of its rows, cannot be read, or it is empty.
    """
    rows = []
    for number, row in open_rows(source, limit, seed):
        if isinstance(row, DataError):
            raise DataError(f"{source}, row {number}: {row}")
        rows.append(row)
    return rows


def find_path(path: str) -> Path | None:
    """Returns the file or folder that a path names, None for a name of the hub."""
    if local := runtime.find_local(path):
        return local
    if HUB_NAME.fullmatch(path) and not path.lower().endswith(SUFFIXES):
        return None
    hint = "; data_samples/ is in the repository alone, pip leaves it out"
    raise MissingInput(
        f"no file {path} (looked in {Path.cwd()} and {runtime.HOME}); give a path to "
        f"{KNOWN}, or a hub name like owner/name, owner/name/config or owner/name:split"
        '; options are fields: {"path": "mine.jsonl", "rows": 5}'
        + (hint if runtime.INSTALLED else "")
    )


def content_of(source: str | Source) -> str | None:
    """Returns a hash of a source's files, its revision on the hub, None if unknown."""
    try:
        path = find_path(str(source))
    except MissingInput:
        return None
    if path is None:
        return find_revision(str(source))
    digest = hashlib.sha256()
    for name in sorted(filter(Path.is_file, [path, *path.rglob("*")])):
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_revision(path: str) -> str | None:
    """Returns the commit of a hub dataset, None where the hub does not answer."""
    if not runtime.hub_reachable():
        return None
    from huggingface_hub import HfApi

    try:
        name = path.partition(":")[0].split("/")
        return HfApi().dataset_info("/".join(name[:2]), timeout=10).sha
    except Exception:  # of requests or httpx; `load_dataset` gives the reason
        return None


def read_dataset(source: Source, path: Path | None) -> Any:
    """Returns a dataset of the hub, or one (its train split) saved in a folder."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path is None:
            name, config, split = HUB_NAME.fullmatch(source.path).groups()  # type: ignore[union-attr]
            options = {"split": split or "train", "streaming": source.stream}
            revision = find_revision(source.path)
            return datasets.load_dataset(name, config, revision=revision, **options)
        if not (path / "state.json").exists() and (path / "train").exists():
            path /= "train"
        return datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises many kinds
        hint = "is the hub reachable from here?"
        if path:
            inside = sorted(child.name for child in path.iterdir())
            hint = f"it is a folder; name one of what is in it: {', '.join(inside[:9])}"
        raise DataError(
            f"{source} could not be read: {str(error)[:300]} ({hint})"
        ) from error


# local files


def read_file(path: Path) -> Iterator[Any]:
    """Yields the rows of a file: JSON values, cells of a table, or lines of a text."""
    import pyarrow.parquet

    name = path.name.lower()
    try:
        with path.open("rb") as packed:
            zipped = packed.peek(2)[:2] == b"\x1f\x8b"  # whatever its name says
            file: Any = gzip.open(packed) if zipped else packed
            head = file.peek(4)[:4]
            if head == b"PAR1":
                table = pyarrow.parquet.ParquetFile(file)
                for batch in table.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
                return
            if not (name.endswith(SUFFIXES) or head[:1] in b"{["):
                raise DataError(f"not {KNOWN}")
            # told by the first two characters, which are ASCII in all that is read here
            text = io.TextIOWrapper(file, json.detect_encoding(head), newline="")
            if name.removesuffix(".gz").endswith((".csv", ".tsv")):
                yield from read_table(text)
            else:
                yield from read_json(text, name.removesuffix(".gz").endswith(".txt"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        around = error.object[max(0, error.start - 20) : error.end]
        raise DataError(
            f"{path} is not {error.encoding} text ({around!r}); save it as UTF-8, from "
            "Windows' encoding by: iconv -f cp1252 -t utf-8 OLD > NEW"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {str(error)[:300]}") from None


def read_table(file: IO[str]) -> Iterator[Any]:
    """Yields the rows of a CSV table, every cell as the text that it is.

    pandas would take `NA` for no value, fill short rows, and rename columns, silently.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default 128 KiB
    header = file.readline()
    sign, line = max(",;\t|", key=header.count), 1
    spaced = f"{sign} " in header  # `a, "b"`: quotes would be text
    rows = csv.reader(
        chain([header], file), delimiter=sign, skipinitialspace=spaced, strict=True
    )
    try:
        names = [name.strip() for name in next(rows, [])]
        for cells in rows:
            line = rows.line_num + 1
            if len(cells) == len(names):
                yield to_fields(list(zip(names, cells, strict=True)))
            elif "".join(cells).strip():
                yield DataError(
                    f"the number of cells: {len(cells)} in a row, {len(names)} in the "
                    f"header, separated by {sign!r}"
                )
    except csv.Error as error:  # what follows may be part of the cell
        raise DataError(f"broken quotes: {error}, after line {line - 1}") from None


def read_json(file: IO[str], plain: bool) -> Iterator[Any]:
    """Yields the values of a JSON list or of JSON lines, told apart by what is there.

    With `plain` lines that do not begin like JSON are texts themselves.
    """
    lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    start = list(islice(lines, 2))
    if plain and start and not JSON_BEGINS.match(start[0][1]):
        yield from (line.strip() for _, line in chain(start, lines))
        return
    listed = bool(start) and start[0][1].lstrip().startswith("[")
    if listed or len(start) < 2 or isinstance(parse_json(*start[0]), DataError):
        start += lines  # one value, over lines; or JSON lines of which one is broken
        value = parse_json(1, "".join(line for _, line in start))
        if listed or not isinstance(value, DataError):
            yield from rows_in(value)
            return
    yield from (parse_json(*line) for line in chain(start, lines))


def parse_json(number: int, text: str) -> Any:
    """Returns the value of JSON that begins in a line, or a DataError."""
    try:
        return json.loads(text, object_pairs_hook=to_fields)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error}, counted from line {number} on")


def to_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """Returns the fields of a row or an object; an error where a key has two values."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
    return DataError(f"a row has two columns or keys {name!r}; rename one")


def rows_in(value: Any) -> list[Any]:
    """Returns the rows of a file's one value: a list, a row, or rows under its key."""
    if isinstance(value, list):
        return value
    # of these columns a list of objects is one row, not several
    if not isinstance(value, dict) or {
        columns[0] for columns in FORMATS.values()
    } & set(value):
        return [value]
    lists = [of for of in value.values() if isinstance(of, list) and of]
    lists = [of for of in lists if all(isinstance(row, dict) for row in of)]
    if len(lists) > 1:
        keys = ", ".join(map(repr, value))
        raise DataError(f"rows under several keys of {keys}; give each a file")
    return lists[0] if lists else [value]
