"""Reads rows from files, to the letter and without a cache, and from hub datasets."""

import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from helpers import runtime
from helpers.config import Source
from helpers.errors import DataError, MissingInput
from helpers.files import fingerprint, hash_file

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz")
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?(?::(\w+))?")
# how a text begins that is JSON; `[1] Why?` and `"Why" is asked.` are none
JSON_BEGINS = re.compile(r'\s*(?:\[\s*(?:$|[\["{])|\{\s*(?:$|"))')


def open_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Returns numbers from 1 and rows, read as needed; a broken one is a DataError."""
    source = Source(path=source) if isinstance(source, str) else source
    limit = min((n for n in (limit, source.rows) if n), default=None)
    path: Any = find_path(source.path)
    is_file = path is not None and path.is_file()
    table = None if is_file else read_dataset(source, path)
    read = partial(read_file, path) if is_file else partial(iter, table)
    rows: Iterator[Any] = read()
    first = list(islice(rows, 1))
    if not first:
        raise DataError(f"{source} holds no rows")
    if limit is None or seed is None or source.stream:
        return enumerate(islice(chain(first, rows), limit), start=1)
    count = 1 + sum(1 for _ in rows) if table is None else len(table)
    drawn = sorted(random.Random(seed).sample(range(count), min(limit, count)))
    if table is not None:  # which finds its rows without reading the others
        return zip((n + 1 for n in drawn), table.select(drawn), strict=True)
    places = set(drawn)
    return ((n, row) for n, row in enumerate(read(), start=1) if n - 1 in places)


def load_rows(source: str | Source, limit: int | None = None) -> list[Any]:
    """Returns the rows of a source as a list.

    Args:
        source: a path (from the working folder or the project's), a folder that
            `save_to_disk` wrote, or a hub name `owner/name[/config][:split]`.
        limit: at most so many rows, the first ones.

    Raises:
        FileNotFoundError, DataError: there is no such file, or it cannot be read.
    """
    rows = list(open_rows(source, limit))
    for number, row in rows:
        if isinstance(row, DataError):
            raise DataError(f"{source}, row {number}: {row}")
    return [row for _, row in rows]


def find_path(path: str) -> Path | None:
    """Returns the file or folder that a path names, None for a name of the hub."""
    local = runtime.find_local(path)
    if local or (HUB_NAME.fullmatch(path) and not path.lower().endswith(SUFFIXES)):
        return local
    places = " and ".join(dict.fromkeys(map(str, (Path.cwd(), runtime.HOME))))
    advice = "give a path, or a name on the hub like owner/name[/config][:split]"
    raise MissingInput(f"no file {path} (looked in {places}); {advice}")


def content_of(source: str | Source) -> str | None:
    """Returns a hash of a source's files, its commit on the hub, None if unknown."""
    from huggingface_hub import HfApi

    try:
        path = find_path(str(source))
        if path is None:
            name = HUB_NAME.fullmatch(str(source))[1]  # type: ignore[index]
            known = runtime.hub_reachable()
            return HfApi().dataset_info(name, timeout=10).sha if known else None
    except Exception:  # of many kinds; reading the source gives the reason
        return None
    files = filter(Path.is_file, [path, *path.rglob("*")])
    return fingerprint(*map(hash_file, sorted(files)))


def read_dataset(source: Source, path: Path | None) -> Any:
    """Returns a dataset of the hub, or one (its train split) saved in a folder."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path is None:
            name, config, split = HUB_NAME.fullmatch(source.path).groups()  # type: ignore[union-attr]
            options = {"split": split or "train", "streaming": source.stream}
            revision = content_of(source)
            datasets.config.HF_HUB_OFFLINE = not runtime.hub_reachable()
            return datasets.load_dataset(name, config, revision=revision, **options)
        if not (path / "state.json").exists() and (path / "train").exists():
            path /= "train"
        return datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises many kinds
        reason = f"{error!s:.300}"
        if path is None and not runtime.hub_reachable():
            reason = "no such file is here, and the hub cannot be reached"
        raise DataError(f"{source} could not be read: {reason}") from error


def read_file(path: Path) -> Iterator[Any]:
    """Yields the rows of a file: JSON values, cells of a table, or lines of a text."""
    import pyarrow.parquet

    try:
        with path.open("rb") as packed:
            zipped = packed.peek(2)[:2] == b"\x1f\x8b"  # whatever its name says
            file: Any = gzip.open(packed) if zipped else packed
            head = file.peek(4)[:4]
            if head == b"PAR1":
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64):
                    yield from batch.to_pylist()
                return
            # told by the first two characters, which are ASCII in all that is read here
            text = io.TextIOWrapper(file, json.detect_encoding(head), newline="")
            name = path.name.lower().removesuffix(".gz")
            is_table = name.endswith((".csv", ".tsv"))
            yield from read_table(text) if is_table else read_values(text, name)
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error!s:.300}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be saved as UTF-8: {error}") from None


def read_table(file: IO[str]) -> Iterator[Any]:
    # pandas would take `NA` for no value, fill short rows and rename columns, silently
    csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default 128 KiB
    header = file.readline()
    sign = max(",;\t|", key=header.count)
    spaced = f"{sign} " in header  # `a, "b"`: quotes would be text
    lines = chain([header], file)
    rows = csv.reader(lines, delimiter=sign, skipinitialspace=spaced, strict=True)
    names = [name.strip() for name in next(rows, [])]
    if len(set(names)) < len(names):
        raise csv.Error(f"two columns of one name: {', '.join(names)}")
    for cells in rows:
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        elif "".join(cells).strip():
            counts = f"{len(cells)} in a row, {len(names)} in the header"
            yield DataError(f"the number of cells: {counts}, separated by {sign!r}")


def read_values(file: IO[str], name: str) -> Iterator[Any]:
    """Yields the values of a JSON list or JSON lines, or the lines of a plain .txt."""
    lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    first = list(islice(lines, 1))
    start = "".join(line for _, line in first)
    if name.endswith(".txt") and not JSON_BEGINS.match(start):
        yield from (line.strip() for _, line in chain(first, lines))
        return
    listed = start.lstrip().startswith("[")
    if listed or isinstance(parse_json(1, start), DataError):
        first += lines  # one value, over lines; or JSON lines of which one is broken
        value = parse_json(1, "".join(line for _, line in first))
        if listed or not isinstance(value, DataError):
            yield from value if isinstance(value, list) else [value]
            return
    yield from (parse_json(*line) for line in chain(first, lines))


def parse_json(number: int, text: str) -> Any:
    """Returns the value of JSON that begins in a line, or a DataError."""
    try:
        return json.loads(text, object_pairs_hook=to_fields)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error}, counted from line {number} on")


def to_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise DataError(f"two values of one key, which is one of {', '.join(fields)}")
    return fields
