"""Where rows come from: local files and hub datasets, read one row at a time.

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
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from helpers import runtime
from helpers.config import Source
from helpers.data.formats import FORMATS
from helpers.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz")
KNOWN = "a .jsonl, .json, .csv, .tsv or .parquet file (.gz too)"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?")
# a text may begin with `[1]` or `"Why`, and is no broken JSON
JSON_BEGINS = re.compile(r'\s*(?:\[\s*(?:$|[\["{])|\{\s*(?:$|"))')
BLANK = re.compile(r"\s*")
TURNS = {form.columns[0] for form in FORMATS}  # of these no list is one of rows


def open_rows(
    source: str | Source, limit: int | None = None, seed: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Returns a source's rows with their numbers, from 1, read when they are asked for.

    What cannot be opened is refused at once; a row that cannot be read is a
    `DataError` in the place of the row, for `reading.Reader`. Rows that are drawn come
    in the order of the source; `data.mix` shuffles.

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
    place = find_place(source.path)
    table: Any = None
    if place is None:
        table = read_hub(source)
    elif place.is_dir():
        table = read_folder(place)

    def read() -> Iterator[Any]:
        if place is not None and table is None:
            return read_file(place)
        return receive(source.path, table)

    rows = read()
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source.path} holds no rows")
    rows = chain([first], rows)
    if limit is None or seed is None or source.stream:
        return enumerate(islice(rows, limit), start=1)
    count = sum(1 for _ in rows) if table is None else len(table)
    if limit >= count:
        return enumerate(read(), start=1)
    drawn = sorted(random.Random(seed).sample(range(count), limit))
    if table is not None:
        return zip((number + 1 for number in drawn), table.select(drawn), strict=True)
    wanted = set(drawn)
    return (
        (number, row) for number, row in enumerate(read(), 1) if number - 1 in wanted
    )


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


def find_place(path: str) -> Path | None:
    """Returns the file or folder that a path names, None for a name of the hub.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        DataError: it is neither.
    """
    folders = dict.fromkeys([Path.cwd(), runtime.home()])
    for place in [folder / path for folder in folders]:
        if place.is_file() or place.is_dir():
            return place
    head, mark, options = path.partition("?")
    if mark:
        pairs = re.findall(r"(\w+)=([^&]*)", options)
        fields = {"path": head} | {k: int(v) if v.isdigit() else v for k, v in pairs}
        raise DataError(
            f"no file {path!r}; if what follows the ? are options, write a source: "
            f"{json.dumps(fields)} in JSON, with = for : in TOML"
        )
    if path.lower().endswith(SUFFIXES):
        hint = "; data_samples/ is in the repository alone, pip leaves it out"
        raise FileNotFoundError(
            f"no file {path} (looked in {' and '.join(map(str, folders))}); "
            f"give a path to {KNOWN}" + (hint if runtime.INSTALLED else "")
        )
    if HUB_NAME.fullmatch(path) is None:
        raise DataError(
            f"{path!r} is neither {KNOWN} nor a hub name like owner/name, "
            "owner/name/config or owner/name:split"
        )
    return None


def content_of(source: str | Source) -> str | None:
    """Returns a hash of what a source holds, None where that is not known.

    Of files it is their SHA-256, of a hub dataset its revision.
    """
    try:
        place = find_place(str(source))
    except (FileNotFoundError, DataError):
        return None
    if place is None:
        return revision_of(str(source))
    files = [place] if place.is_file() else filter(Path.is_file, place.rglob("*"))
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# the hub, and datasets saved from it


def revision_of(path: str) -> str | None:
    """Returns the commit that a hub dataset is at, None where nothing answers."""
    matched = HUB_NAME.fullmatch(path)
    if matched is None or not runtime.hub_reachable():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(matched[1], timeout=10).sha
    except Exception:  # of requests or httpx; `load_dataset` says what is the matter
        return None


def read_hub(source: Source) -> Any:
    """Returns a dataset of the hub: its rows are on disk, or still on the hub.

    Raises:
        DataError: it could not be read.
    """
    import datasets

    datasets.disable_progress_bars()
    name, config, split = HUB_NAME.fullmatch(source.path).groups()  # type: ignore[union-attr]
    try:
        return datasets.load_dataset(
            name,
            config,
            split=split or "train",
            revision=revision_of(source.path),
            streaming=source.stream,
        )
    except Exception as error:  # datasets raises many kinds; all mean "not readable"
        raise unreadable(source.path, error) from error


def read_folder(place: Path) -> Any:
    """Returns the dataset that `save_to_disk` wrote to a folder, or its train split.

    Raises:
        DataError: there is none, or several and no train split.
    """
    import datasets

    inside = {path.name: path for path in place.iterdir()}
    inside.pop("dataset_dict.json", None)
    splits = [path for path in inside.values() if (path / "state.json").is_file()]
    if "state.json" in inside:
        home = place
    elif (
        splits
        and len(splits) == len(inside)
        and (len(splits) == 1 or "train" in inside)
    ):
        home = inside.get("train", splits[0])
    else:
        raise DataError(
            f"{place} is a folder, not a file or one dataset of `save_to_disk`; name "
            f"one of what is in it: {', '.join(sorted(inside)[:9])}"
        )
    try:
        return datasets.load_from_disk(str(home))
    except Exception as error:  # as above
        raise unreadable(str(home), error) from error


def receive(path: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Yields rows of `datasets`; what stops them is refused in words."""
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


@contextmanager
def open_bytes(place: Path) -> Iterator[IO[bytes]]:
    """Opens a file, unpacked where it is packed by gzip, whatever its name says."""
    with place.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if packed else file as content:
            yield content  # type: ignore[misc]


def read_file(place: Path) -> Iterator[Any]:
    """Yields the rows of a file: JSON values, cells of a table, or lines of a text.

    Raises:
        DataError: the file is damaged, or in another encoding.
    """
    import pyarrow

    suffix = Path(place.name.lower().removesuffix(".gz")).suffix
    try:
        with open_bytes(place) as file:
            head = file.read(4)
            file.seek(0)
            if head == b"PAR1":
                yield from read_parquet(file)
                return
            if not (place.name.lower().endswith(SUFFIXES) or head[:1] in b"{["):
                raise DataError(f"not {KNOWN}")
            # of the first two characters, which are ASCII in all that is read here
            encoding = json.detect_encoding(head)
            text = io.TextIOWrapper(file, encoding, newline="")  # type: ignore[arg-type]
            if suffix in (".csv", ".tsv"):
                yield from read_table(text)
            else:
                yield from read_json(text, plain=suffix == ".txt")
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start]
        raise DataError(
            f"{place} is not {error.encoding} text (after {before!r} comes the byte "
            f"0x{error.object[error.start]:02x}): save it as UTF-8. The encoding of "
            "Windows is cp1252: iconv -f cp1252 -t utf-8 OLD > NEW"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{place} is damaged: {str(error)[:300]}") from None


def read_parquet(file: IO[bytes]) -> Iterator[Any]:
    """Yields the rows of a Parquet file."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    check_names(table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_table(file: IO[str]) -> Iterator[Any]:
    """Yields the rows of a table in text, every cell as the text that it is.

    Cells are separated by what cuts the header into most names.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may be longer than the default 128 KiB
    header = next((line for line in file if line.strip()), "")
    names, separator = [""], ","
    for sign in ",;\t|":
        cells = next(csv.reader([header], delimiter=sign), [""])
        if len(cells) > len(names):
            names, separator = cells, sign
    # `a, "b"`: quotes after a space would be text
    spaced = any(name.startswith(" ") for name in names)
    options: dict[str, Any] = {"delimiter": separator, "skipinitialspace": spaced}
    names = [name.strip() for name in next(csv.reader([header], **options), [])]
    check_names(names)
    rows = csv.reader(file, strict=True, **options)
    while True:
        begin = rows.line_num + 2  # the header is line 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):  # it has taken in all rows that follow
                raise DataError(
                    f"broken quotes: one that opens in the row of line {begin} is "
                    "never closed"
                ) from None
            yield DataError(f"broken quotes: {error} (line {rows.line_num + 1})")
            continue
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        elif "".join(cells).strip():
            yield DataError(
                f"the number of cells: {len(cells)} in a row, {len(names)} in the "
                f"header, separated by {separator!r}"
            )


def check_names(names: list[str]) -> None:
    """Raises DataError when two columns have one name."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"two columns are named {twice[0]!r}; rename one")


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
    broken = isinstance(first, DataError) and not JSON_BEGINS.match(start[0][1])
    if plain and (broken or sign not in '{["'):
        yield from (line.strip() for _, line in chain(start, lines))
        return
    if sign != "[" and not isinstance(first, DataError):
        if len(start) == 1:
            yield from rows_in(first)
            return
    elif sign in "[{":
        # a list, or values over several lines; if it is neither, its lines are broken
        rest = [*start, *lines]
        text = "".join(line for _, line in rest)
        try:
            yield from whole(text)
            return
        except DataError:  # it says what is the matter
            raise
        except (ValueError, RecursionError) as error:
            if sign == "[":
                raise DataError(f"broken JSON: {error}") from None
        start, lines = rest, iter(())  # type: ignore[assignment]
    yield from (parse_line(*line) for line in chain(start, lines))


def parse_line(number: int, line: str) -> Any:
    """Returns the value of a JSON line, or a DataError."""
    try:
        return json.loads(line, object_pairs_hook=to_object)
    except (ValueError, RecursionError) as error:
        return DataError(f"broken JSON: {error} (line {number} of the file)")


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """Returns the object of JSON's pairs; an error where a key has two values."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return DataError(f"the key {twice!r} stands twice in an object")


def whole(text: str) -> list[Any]:
    """Returns the rows of a text that is a JSON list, or objects one after another."""
    decoder, values = json.JSONDecoder(object_pairs_hook=to_object), []
    text, at = text.strip(), 0
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
    if not isinstance(value, dict) or TURNS & set(value):
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
