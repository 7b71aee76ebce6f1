"""Tests of helpers.sources: files, hub names, options; what is not there is named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from helpers import runtime
from helpers.formats import DataError
from helpers.sources import Source, load_rows, open_rows, parse_source
from tests.rows import ROWS, pair, write


def test_json_lines_are_read(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "rows.jsonl", ROWS)) == ROWS


def test_a_json_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    assert load_rows(str(path)) == ROWS


def test_csv_is_read_with_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert load_rows(str(path)) == ROWS


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert load_rows(str(path)) == ROWS


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "rows.jsonl", ROWS), limit=1) == ROWS[:1]


def test_a_limit_above_the_row_count_takes_all(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "rows.jsonl", ROWS), limit=99) == ROWS


def test_a_path_is_looked_for_in_the_working_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data_samples").mkdir()
    write(tmp_path / "data_samples" / "alpaca.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert load_rows("data_samples/alpaca.jsonl") == ROWS


def test_a_path_is_found_in_the_project_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_rows("data_samples/alpaca.jsonl")) == 12


def test_a_missing_file_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        FileNotFoundError, match=f"no file gone.jsonl .*{runtime.ROOT}.*give a path"
    ):
        load_rows("gone.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", ""),
        ("empty.json", "[]"),
        ("empty.csv", ""),
        ("header.csv", "prompt,completion\n"),
    ],
)
def test_a_file_without_rows_is_refused_in_words(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} holds no rows$"):
        load_rows(str(tmp_path / name))


def test_a_broken_json_line_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n')
    with pytest.raises(DataError, match="rows.jsonl could not be read: .* in row 1"):
        load_rows(str(path))


def test_a_source_that_is_neither_file_nor_hub_name_is_refused() -> None:
    with pytest.raises(DataError, match="'my rows' is neither a .jsonl, .* owner/name"):
        load_rows("my rows")


def test_an_unreachable_hub_name_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        DataError, match="^nobody-here/no-such-set:train could .*is the hub reachable"
    ):
        load_rows("nobody-here/no-such-set:train")
    assert time.monotonic() - start < 10


def test_a_limit_with_a_seed_draws_rows_and_keeps_their_order(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [pair(f"{i}?") for i in range(200)])
    drawn = [int(row["prompt"][:-1]) for row in load_rows(source, limit=20, seed=1)]
    assert drawn == sorted(set(drawn)) != list(range(20))
    assert len(drawn) == 20
    again = [int(row["prompt"][:-1]) for row in load_rows(source, limit=20, seed=2)]
    assert again != drawn


def test_drawn_rows_keep_the_numbers_that_they_have_in_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [pair(f"{i}?") for i in range(200)])
    for number, row in open_rows(source, limit=20, seed=1):
        assert row["prompt"] == f"{number - 1}?"


def test_rows_of_a_source_are_capped_by_its_own_option(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [pair(f"{i}?") for i in range(9)])
    assert len(load_rows(f"{source}?rows=4")) == 4
    assert len(load_rows(f"{source}?rows=4", limit=2)) == 2
    assert len(load_rows(f"{source}?rows=4", limit=7)) == 4


@pytest.mark.parametrize("limit", [None, 3])
def test_a_stream_gives_the_first_rows_with_their_numbers(
    tmp_path: Path, limit: int | None
) -> None:
    rows = [pair(f"{i}?") for i in range(9)]
    source = write(tmp_path / "rows.jsonl", rows)
    found = list(open_rows(f"{source}?stream=true", limit, seed=1))
    assert found == list(enumerate(rows[:limit], start=1))


def test_a_broken_line_of_a_stream_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n')
    with pytest.raises(DataError, match="rows.jsonl could not be read: "):
        load_rows(f"{path}?stream=true")


# options


def test_a_source_without_options_is_its_path() -> None:
    assert parse_source("owner/name/main:train") == Source(path="owner/name/main:train")


def test_options_follow_a_question_mark() -> None:
    assert parse_source("a.csv?format=dolly&rows=5&weight=0.5&stream=true") == Source(
        path="a.csv", format="dolly", rows=5, weight=0.5, stream=True
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.csv?fromat=dolly", "no option 'fromat'; did you mean 'format'. .*weight"),
        ("a.csv?rows=many", "rows='many': Input should be a valid integer"),
        ("a.csv?rows=0", "rows='0': Input should be greater than or equal to 1"),
        ("a.csv?weight=-1", "weight='-1': Input should be greater than 0"),
        ("a.csv?weight=inf", "weight='inf': Input should be a finite number"),
        ("a.csv?path=b.csv&rows", "rows='': Input should be a valid integer"),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_in_words(
    source: str, said: str
) -> None:
    with pytest.raises(DataError, match=rf"a.csv.*: (there is )?{said}"):
        parse_source(source)
