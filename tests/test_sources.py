"""Tests of helpers.data.sources: any file name, any encoding that says so, no cache."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import runtime
from helpers.config import Source
from helpers.data.sources import content_of, load_rows, open_rows
from helpers.errors import DataError
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


def test_a_broken_json_line_is_an_error_in_the_place_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": oops}\n{"prompt": "c"}\n')
    rows = list(open_rows(str(path)))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert isinstance(rows[1][1], DataError)
    assert rows[2][1] == {"prompt": "c"}
    with pytest.raises(DataError, match="rows.jsonl, row 2: broken JSON: .*line 3 of"):
        load_rows(str(path))


def test_a_first_line_that_is_broken_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": oops}\n{"prompt": "b"}\n')
    (_, first), second = open_rows(str(path))
    assert isinstance(first, DataError)
    assert second == (2, {"prompt": "b"})


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
    path = write(tmp_path / "rows.jsonl", [pair(f"{i}?") for i in range(9)])
    source = Source(path=path, rows=4)
    assert len(load_rows(source)) == 4
    assert len(load_rows(source, limit=2)) == 2
    assert len(load_rows(source, limit=7)) == 4


@pytest.mark.parametrize("limit", [None, 3])
def test_a_stream_gives_the_first_rows_with_their_numbers(
    tmp_path: Path, limit: int | None
) -> None:
    rows = [pair(f"{i}?") for i in range(9)]
    source = Source(path=write(tmp_path / "rows.jsonl", rows), stream=True)
    assert list(open_rows(source, limit, seed=1)) == list(enumerate(rows[:limit], 1))


# names


@pytest.mark.parametrize(
    "name",
    [
        "a[1].jsonl", "a*.jsonl", "a?.jsonl", "a?rows=5.jsonl", "a#b.jsonl",
        "a&b.jsonl", "a=b.jsonl", "a%20b.jsonl", "a b.jsonl", "Öl für 1 €.jsonl",
        "{a}.jsonl", "a,b.jsonl", "hf:a.jsonl", "a::b.jsonl", "~a.jsonl",
        "v=1/[2]#3/a.jsonl",
    ],
)  # fmt: skip
def test_a_name_is_a_file_whatever_signs_are_in_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a1.jsonl", [pair("another file?")])
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert load_rows(write(path, ROWS)) == ROWS
    assert content_of(str(path)) != content_of(str(tmp_path / "a1.jsonl"))


@pytest.mark.parametrize("path", ["mine.jsonl?rows=5&weight=2", "a/b:train?rows=5"])
def test_options_after_a_question_mark_are_refused_with_the_new_spelling(
    path: str,
) -> None:
    with pytest.raises(DataError, match='no file .*write a source: .*"rows": 5'):
        load_rows(path)


@pytest.mark.parametrize("name", ["saved", "a [1]#b"])
def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path: Path, name: str) -> None:
    import datasets

    rows = datasets.Dataset.from_list([pair(f"{i}?") for i in range(5)])
    rows.save_to_disk(str(tmp_path / name))
    assert load_rows(str(tmp_path / name)) == list(rows)
    assert len(load_rows(str(tmp_path / name), limit=2, seed=1)) == 2
    both = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    assert load_rows(str(tmp_path / "both")) == list(rows)
    assert load_rows(str(tmp_path / "both" / "test")) == [rows[0]]
    with pytest.raises(DataError, match="is a folder, .*name one .*both"):
        load_rows(str(tmp_path))


def test_another_folder_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="is a folder, .*name one .*: rows.jsonl"):
        load_rows(str(tmp_path))


# what is in a file, whatever its name says


def test_a_packed_file_is_read_whatever_its_name_says(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("rows.jsonl.gz", "rows.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert load_rows(str(tmp_path / name)) == ROWS


def test_a_packed_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    text = "".join(json.dumps(pair(f"{i}?")) + "\n" for i in range(99))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode())[:-60])
    with pytest.raises(DataError, match="rows.jsonl.gz is damaged: "):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        json.dumps({"version": 1, "data": ROWS, "tags": ["a"]}, indent=1),
        json.dumps({"rows": ROWS}),
    ],
    ids=["list", "wide list", "lines", "wide objects", "under a key", "key in a line"],
)
def test_json_is_told_by_what_is_in_the_file(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_rows(str(tmp_path / name)) == ROWS


def test_a_file_of_one_conversation_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi?"}]}
    (tmp_path / "rows.json").write_text(json.dumps(row, indent=1))
    assert load_rows(str(tmp_path / "rows.json")) == [row]


def test_rows_under_several_keys_are_refused_by_the_keys(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(DataError, match="rows under 'train' and 'test'; give each"):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("listed", [False, True])
def test_a_key_with_two_values_is_refused_by_its_row(
    tmp_path: Path, listed: bool
) -> None:
    rows = ['{"prompt": "a"}', '{"prompt": "b", "prompt": "c"}']
    text = f"[{', '.join(rows)}]" if listed else "\n".join(rows)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="row 2: the key 'prompt' stands twice"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_json_list_that_was_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS)[:-9])
    with pytest.raises(DataError, match="rows.json: broken JSON: "):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_encoding_that_shows_itself_is_read(
    tmp_path: Path, encoding: str, name: str
) -> None:
    text = "prompt,completion\nCafé?,Ja.\n"
    if name == "rows.jsonl":
        text = json.dumps(pair("Café?", "Ja."), ensure_ascii=False)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert load_rows(str(tmp_path / name)) == [pair("Café?", "Ja.")]


def test_another_encoding_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("prompt,completion\nCafé?,Ja.".encode("cp1252"))
    with pytest.raises(DataError, match="not utf-8 .*Caf.*byte 0xe9.*UTF-8.*cp1252"):
        load_rows(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("sign", [";", "\t", "|", ","])
def test_a_table_is_cut_by_the_sign_that_cuts_its_header(
    tmp_path: Path, name: str, sign: str
) -> None:
    text = f'prompt{sign}completion\n"a{sign} b?"{sign}c\n'
    (tmp_path / name).write_text(text)
    assert load_rows(str(tmp_path / name)) == [pair(f"a{sign} b?", "c")]


@pytest.mark.parametrize("content", [b"PK\x03\x04\0\0", b"\x28\xb5\x2f\xfd", b"a,b"])
def test_a_file_of_another_kind_is_refused_with_those_that_are_read(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "rows.xlsx").write_bytes(content)
    with pytest.raises(DataError, match="rows.xlsx: not a .jsonl, .json, .csv"):
        load_rows(str(tmp_path / "rows.xlsx"))


def test_text_of_a_cell_stays_text(tmp_path: Path) -> None:
    cells = ["None", "NA", "null", "N/A", "nan", "007", "1.0", "true", "", " x ", "[]"]
    text = "prompt,completion\n" + "".join(f"q,{cell}\n" for cell in cells)
    (tmp_path / "rows.csv").write_text(text)
    rows = load_rows(str(tmp_path / "rows.csv"))
    assert [row["completion"] for row in rows] == cells


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a,b,c", "row 2: the number of cells: 3 in a row, 2 in the header"),
        ("a", "row 2: the number of cells: 1 in a row, 2 in the header"),
        ('"a"x,b', "row 2: broken quotes: .*line 3"),
    ],
)
def test_a_line_that_is_no_row_of_the_table_is_refused(
    tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "rows.csv").write_text(f"prompt,completion\na,b\n{line}")
    with pytest.raises(DataError, match=reason):
        load_rows(str(tmp_path / "rows.csv"))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"prompt,completion\na,{'b' * 200_000}\n")
    assert len(load_rows(str(tmp_path / "rows.csv"))[0]["completion"]) == 200_000


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    path.write_text("prompt,prompt\na,b\n")
    if name == "rows.parquet":
        table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
        pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=f"{name}: two columns are named 'prompt'"):
        load_rows(str(path))


def test_parquet_is_read_with_any_types(tmp_path: Path) -> None:
    import pandas

    table = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["x", "x"]})
    table["completion"] = table["completion"].astype("category")
    table.index = pandas.Index([7, 9])
    table.to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    index = [{"__index_level_0__": number} for number in (7, 9)]
    assert rows == [pair("a", "x") | index[0], pair("b", "x") | index[1]]


def test_a_huge_number_and_rows_of_different_types_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": 10**30}, {"id": "x"}, {"id": [1]}, {"no": 2.5}]
    assert load_rows(write(tmp_path / "rows.jsonl", rows)) == rows


# content decides


def test_rows_are_those_of_the_file_now_even_with_its_old_time_stamp(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [pair("old?")])
    times = path.stat()
    before = content_of(str(path))
    assert load_rows(str(path)) == [pair("old?")]
    write(path, [pair("new?")])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_rows(str(path)) == [pair("new?")]
    assert content_of(str(path)) != before


def test_of_what_is_not_there_no_content_is_known() -> None:
    assert content_of("gone.jsonl") is None
    assert content_of("nobody-here/no-such-set:train") is None


def test_of_a_hub_dataset_the_revision_decides_and_is_the_one_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    def load(*names: str, **options: Any) -> list[dict[str, str]]:
        assert (names, options["split"]) == (("owner/name", "main"), "test")
        return [pair(f"of {options['revision']}?")]

    def info(api: Any, name: str, **options: Any) -> Any:
        return SimpleNamespace(sha=f"sha-of-{name}")

    monkeypatch.setattr(runtime, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = "owner/name/main:test"
    assert content_of(source) == "sha-of-owner/name"
    assert load_rows(source) == [pair("of sha-of-owner/name?")]


def test_a_parquet_file_may_be_packed(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert load_rows(str(path)) == ROWS


def test_spaces_after_separators_do_not_count_where_the_header_has_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt, completion\n"a", "b, c"\nd, e\n   \n')
    assert load_rows(str(path)) == [pair("a", "b, c"), pair("d", "e")]
    path.write_text("prompt,completion\na, b\n")
    assert load_rows(str(path)) == [pair("a", " b")]


@pytest.mark.parametrize("line", ["[1] Why?", '"Why" is asked.', "{name}, why?", "42"])
def test_a_text_file_may_begin_like_json(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{line}\nHow?\n")
    assert load_rows(str(path)) == [line, "How?"]


@pytest.mark.parametrize("text", ['[\n{"a": 1,}\n]', '{"prompt": "a",}\n'])
def test_broken_json_in_a_text_file_is_not_taken_for_prompts(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(DataError, match="broken JSON"):
        load_rows(str(path))


def test_a_quote_that_is_never_closed_stops_the_file_and_is_no_single_row(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\nc,"d\ne,f\ng,h\n')
    rows = open_rows(str(path))
    assert next(rows) == (1, pair("a", "b"))
    with pytest.raises(DataError, match="opens in the row of line 3 is never closed"):
        list(rows)
