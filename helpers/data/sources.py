"""Reads rows from local files and hub datasets, one at a time.

A local path is taken to the letter, whatever signs are in its name, and read anew each
time: no cache can return rows of before. Only a JSON list is held in memory.
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
from collections.abc import Iterable, Iterator
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
# a text may begin with `[1]` or `"Why`, and is no broken JSON
JSON_BEGINS = re.compile(r'\s*(?:\[\s*(?:$|[\["{])|\{\s*(?:$|"))')
BLANK = re.compile(r"\s*")
# of these columns a list of objects is one row, not several
ONE_ROW = {form.columns[0] for form in FORMATS.values()}


def open_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Returns a source's rows with their numbers, from 1, read as they are needed.

    A row that cannot be read is a `DataError` in the place of the row. Drawn rows come
    in the order of the source.

    Args:
        source: a path (from the working folder or the project's), a folder that
            `save_to_disk` wrote, or a hub name `owner/name[/config][:split]`.
        limit: at most this many rows.
        seed: draw them at random with it; without it the first ones are taken.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file or the hub dataset could not be read, or is empty.
    """
    source = Source(path=source) if isinstance(source, str) else source
    limit = min((n for n in (limit, source.rows) if n), default=None)
    path = find_path(source.path)
    table = read_dataset(source, path) if path is None or path.is_dir() else None

    def read() -> Iterator[Any]:
        return read_file(path) if table is None else receive(source.path, table)  # type: ignore[arg-type]

    rows = read()
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.path} holds no rows")
    rows = chain([first], rows)
    if limit is None or seed is None or source.stream:
        return enumerate(islice(rows, limit), start=1)
    count = sum(1 for _ in rows) if table is None else len(table)
    numbers = sorted(random.Random(seed).sample(range(count), min(limit, count)))
    if table is not None:
        return zip((n + 1 for n in numbers), table.select(numbers), strict=True)
    drawn = set(numbers)
    return ((n, row) for n, row in enumerate(read(), start=1) if n - 1 in drawn)


def load_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> list[Any]:
    """Returns the rows of `open_rows` as a list, without their numbers.

    Raises:
        DataError: a row cannot be read.
    """
    rows = []
    for number, row in open_rows(source, limit, seed):
        if isinstance(row, DataError):
            raise DataError(f"{source}, row {number}: {row}")
        rows.append(row)
    return rows


def find_path(path: str) -> Path | None:
    """Returns the file or folder that a path names, None for a name of the hub.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        DataError: it is neither.
    """
    folders = dict.fromkeys([Path.cwd(), runtime.home()])
    for local in [folder / path for folder in folders]:
        if local.is_file() or local.is_dir():
            return local
    if path.lower().endswith(SUFFIXES):
        hint = "; data_samples/ is in the repository alone, pip leaves it out"
        raise MissingInput(
            f"no file {path} (looked in {' and '.join(map(str, folders))}); "
            f"give a path to {KNOWN}" + (hint if runtime.INSTALLED else "")
        )
    if HUB_NAME.fullmatch(path) is None:
        raise DataError(
            f"no file {path!r}, which is neither {KNOWN} nor a hub name like "
            "owner/name, owner/name/config or owner/name:split; options are fields: "
            '{"path": "mine.jsonl", "rows": 5}'
        )
    return None


def content_of(source: str | Source) -> str | None:
    """Returns a hash of a source's files, its revision on the hub, None if unknown."""
    try:
        path = find_path(str(source))
    except (FileNotFoundError, DataError):
        return None
    if path is None:
        return find_revision(str(source))
    files = [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
    digest = hashlib.sha256()
    for name in sorted(files):
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# the hub, and datasets saved from it


def find_revision(path: str) -> str | None:
    """Returns the commit of a hub dataset, None where the hub does not answer."""
    if not runtime.hub_reachable():
        return None
    from huggingface_hub import HfApi

    try:
        name = HUB_NAME.fullmatch(path)[1]  # type: ignore[index]
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # of requests or httpx; `load_dataset` gives the reason
        return None


def read_dataset(source: Source, path: Path | None) -> Any:
    """Returns a dataset of the hub, or one (its train split) saved in a folder."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path is None:
            name, config, split = HUB_NAME.fullmatch(source.path).groups()  # type: ignore[union-attr]
            return datasets.load_dataset(
                name,
                config,
                split=split or "train",
                revision=find_revision(source.path),
                streaming=source.stream,
            )
        inside = sorted(child.name for child in path.iterdir())
        parts = [n for n in inside if (path / n / "state.json").is_file()]
        whole = set(inside) <= {*parts, "dataset_dict.json"}
        if whole and (len(parts) == 1 or "train" in parts):
            path = path / ("train" if "train" in parts else parts[0])
        elif "state.json" not in inside:
            raise DataError(
                f"{path} is a folder, not a file or one dataset of `save_to_disk`; "
                f"name one of what is in it: {', '.join(inside[:9])}"
            )
        return datasets.load_from_disk(str(path))
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds; all mean "not readable"
        raise unreadable(source.path, error) from error


def receive(path: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Yields rows of `datasets`; an error of theirs becomes ours."""
    try:
        yield from rows
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> DataError:
    """Returns the error for a dataset that `datasets` fails to read."""
    cause = error.__cause__ or error
    hint = "" if Path(path).exists() else " (is the hub reachable from here?)"
    return DataError(
        f"{path} could not be read: {type(cause).__name__}: {str(cause)[:300]}{hint}"
    )


# local files


def read_file(path: Path) -> Iterator[Any]:
    """Yields the rows of a file: JSON values, cells of a table, or lines of a text.

    Raises:
        DataError: the file is damaged, or in another encoding.
    """
    import pyarrow

    name = path.name.lower()
    try:
        with path.open("rb") as packed:
            zipped = packed.peek(2)[:2] == b"\x1f\x8b"  # whatever its name says
            file: Any = gzip.open(packed) if zipped else packed
            head = file.peek(4)[:4]
            if head == b"PAR1":
                yield from read_parquet(file)
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
        before = error.object[max(0, error.start - 20) : error.start]
        raise DataError(
            f"{path} is not {error.encoding} text (after {before!r} comes the byte "
            f"0x{error.object[error.start]:02x}): save it as UTF-8. The encoding of "
            "Windows is cp1252: iconv -f cp1252 -t utf-8 OLD > NEW"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {str(error)[:300]}") from None


def check_names(names: list[str]) -> None:
    """Raises DataError when two columns have one name."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"two columns are named {name!r}; rename one")


def read_parquet(file: IO[bytes]) -> Iterator[Any]:
    """Yields the rows of a Parquet file."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    check_names(table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_table(file: IO[str]) -> Iterator[Any]:
    """Yields the rows of a CSV table, every cell as the text that it is.

    Cells are separated by what cuts the header into most names.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default 128 KiB
    header = next((line for line in file if line.strip()), "")

    def cut(**options: Any) -> list[str]:
        return next(csv.reader([header], **options), [])

    options: dict[str, Any] = {
        "delimiter": max(",;\t|", key=lambda sign: len(cut(delimiter=sign)))
    }
    # `a, "b"`: quotes after a space would be text
    options["skipinitialspace"] = any(n.startswith(" ") for n in cut(**options))
    names = [name.strip() for name in cut(**options)]
    check_names(names)
    rows = csv.reader(file, strict=True, **options)
    while True:
        line = rows.line_num + 2  # the header is line 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):  # it has taken in all rows that follow
                raise DataError(
                    f"broken quotes: one that opens in the row of line {line} is "
                    "never closed"
                ) from None
            yield DataError(f"broken quotes: {error} (line {rows.line_num + 1})")
            continue
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        elif "".join(cells).strip():
            yield DataError(
                f"the number of cells: {len(cells)} in a row, {len(names)} in the "
                f"header, separated by {options['delimiter']!r}"
            )


def read_json(file: IO[str], plain: bool) -> Iterator[Any]:
    """Yields the values of a JSON list or of JSON lines, told apart by what is there.

    Args:
        file: the text.
        plain: lines that do not begin like JSON are texts themselves.
    """
    lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    start = list(islice(lines, 2))
    if not start:
        return
    sign, first = start[0][1].lstrip()[0], parse_line(*start[0])
    broken = isinstance(first, DataError)
    if plain and (sign not in '{["' or broken and not JSON_BEGINS.match(start[0][1])):
        yield from (line.strip() for _, line in chain(start, lines))
        return
    if not broken and sign != "[" and len(start) == 1:
        yield from rows_in(first)
        return
    if sign == "[" or broken and sign == "{":
        # a list, or values over several lines; if it is neither, its lines are broken
        start += lines
        try:
            yield from parse_all("".join(line for _, line in start).strip())
            return
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            if sign == "[":
                raise DataError(f"broken JSON: {error}") from None
    yield from (parse_line(*line) for line in chain(start, lines))


def parse_line(number: int, line: str) -> Any:
    """Returns the value of a JSON line, or a DataError."""
    try:
        return json.loads(line, object_pairs_hook=to_fields)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error} (line {number} of the file)")


def to_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """Returns the fields of a JSON object; an error where a key has two values."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return DataError(f"the key {twice!r} stands twice in an object")


def parse_all(text: str) -> list[Any]:
    """Returns the rows of a text that is a JSON list, or objects one after another."""
    decoder, values, at = json.JSONDecoder(object_pairs_hook=to_fields), [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        at = BLANK.match(text, at).end()  # type: ignore[union-attr]
        values.append(value)
    if len(values) > 1:
        return values
    return values[0] if isinstance(values[0], list) else rows_in(values[0])


def rows_in(value: Any) -> list[Any]:
    """Returns the only value of a file as its row, or the rows under one of its keys.

    Raises:
        DataError: there are rows under several keys.
    """
    if not isinstance(value, dict) or ONE_ROW & set(value):
        return [value]
    lists = {
        key: rows
        for key, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows)
    }
    if len(lists) > 1:
        keys = " and ".join(map(repr, lists))
        raise DataError(f"there are rows under {keys}; give each a file of its own")
    return next(iter(lists.values()), [value])
