"""Tests of data.sources: any file name, any encoding that says so, no cache."""

import gzip
import json
from types import SimpleNamespace

import pytest

from helpers import runtime
from helpers.config import Source
from helpers.data.sources import content_of, load_rows, open_rows
from helpers.errors import DataError
from tests.rows import ROWS, pair, write

LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CUT = gzip.compress(LINES.encode(), mtime=0)[:-30]
MANY = [pair(f"{i}?") for i in range(200)]


def save(path, content):
    """Writes a file and returns its path as a source."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS),
    ],
)
def test_json_is_told_by_what_is_in_the_file(tmp_path, name, text):
    assert load_rows(save(tmp_path / name, text)) == ROWS
    assert load_rows(save(tmp_path / name, gzip.compress(text.encode()))) == ROWS


def test_parquet_is_read_with_any_types(tmp_path):
    import pandas

    path = tmp_path / "rows.parquet"
    table = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["x", "x"]})
    table["completion"] = table["completion"].astype("category")
    table.index = pandas.Index([7, 9])
    table.to_parquet(path)
    rows = [pair("a", "x"), pair("b", "x")]
    index = [{"__index_level_0__": number} for number in (7, 9)]
    assert load_rows(str(path)) == [rows[0] | index[0], rows[1] | index[1]]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("sign", [";", "\t", "|", ","])
def test_a_table_is_cut_by_the_sign_that_cuts_its_header(tmp_path, name, sign):
    text = f'prompt{sign}completion\n"a{sign} ""b""\n?"{sign}c\n'
    assert load_rows(save(tmp_path / name, text)) == [pair(f'a{sign} "b"\n?', "c")]


def test_the_text_of_a_cell_stays_text(tmp_path):
    cells = ["None", "NA", "null", "nan", "007", "1.0", "true", "", " x ", "[]"]
    cells.append("b" * 200_000)
    text = "prompt,completion\n" + "".join(f"q,{cell}\n" for cell in cells)
    rows = load_rows(save(tmp_path / "rows.csv", text))
    assert [row["completion"] for row in rows] == cells


def test_spaces_after_separators_do_not_count_where_the_header_has_them(tmp_path):
    text = 'prompt, completion\n"a", "b, c"\nd, e\n   \n'
    path = save(tmp_path / "rows.csv", text)
    assert load_rows(path) == [pair("a", "b, c"), pair("d", "e")]
    assert load_rows(save(tmp_path / "rows.csv", "prompt,completion\na, b\n")) == [
        pair("a", " b")
    ]


@pytest.mark.parametrize("line", ["[1] Why?", '"Why" is asked.', "{name}, why?", "42"])
def test_a_text_file_may_begin_like_json(tmp_path, line):
    path = save(tmp_path / "prompts.txt", f"{line}\nHow?\n")
    assert load_rows(path) == [line, "How?"]


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_encoding_that_shows_itself_is_read(tmp_path, encoding, name):
    text = "prompt,completion\nCafé?,Ja.\n"
    if name == "rows.jsonl":
        text = json.dumps(pair("Café?", "Ja."), ensure_ascii=False)
    path = save(tmp_path / name, text.encode(encoding))
    assert load_rows(path) == [pair("Café?", "Ja.")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "empty.jsonl holds no rows$"),
        ("empty.json", "[]", "empty.json holds no rows$"),
        ("header.csv", "prompt,completion\n", "header.csv holds no rows$"),
        ("a.jsonl.gz", CUT, "a.jsonl.gz is damaged: "),
        ("a.json", json.dumps(ROWS)[:-9], "a.json, row 1: broken JSON: "),
        ("a.json", '[{"a": 1}, {"b": 1, "b": 2}]', "broken JSON: two values .* of b,"),
        ("a.jsonl", '{"a": 1}\n{"b": 1, "b": 2}', "row 2: broken JSON: two values"),
        ("a.jsonl", '{"a": 1}\n\n{"a": oops}', "row 2: broken JSON: .*from line 3 on"),
        ("a.txt", '{"prompt": "a",}\n', "broken JSON"),
        ("a.csv", "q\nCafé, ja".encode("cp1252"), "must be saved as UTF-8: .* 0xe9 in"),
        ("a.csv", "a,b\n1,2\n1,2,3", "row 2: the number of cells: 3 in a row, 2 in"),
        ("a.csv", 'a,b\n1,2\n"a"x,b', "a.csv is damaged: .*expected after"),
        ("a.csv", 'a,b\n1,2\nc,"d\ne,f', "a.csv is damaged: unexpected end of data"),
        ("a.csv", "a,a\n1,2", "a.csv is damaged: two columns of one name: a, a"),
        ("a.zst", b"\x28\xb5\x2f\xfd", "a.zst must be saved as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_words(
    tmp_path, name, content, reason
):
    with pytest.raises(DataError, match=reason):
        load_rows(save(tmp_path / name, content))


def test_a_row_that_cannot_be_read_spoils_no_other(tmp_path):
    path = save(tmp_path / "a.jsonl", '{"a": oops}\n{"a": 1}\n{"a": oops}\n')
    (_, first), second, (number, third) = open_rows(path)
    assert isinstance(first, DataError) and isinstance(third, DataError)
    assert (second, number) == ((2, {"a": 1}), 3)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("gone.jsonl", f"no file gone.jsonl .*{runtime.ROOT}.*give a path"),
        ("my rows", "no file my rows .*give a path, or a name on the hub"),
        (
            "nobody/no-such-set:train",
            "^nobody/no-such-set:train .* no such file is here, and the hub cannot",
        ),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, reason):
    with pytest.raises((DataError, FileNotFoundError), match=reason):
        load_rows(source)
    assert content_of(source) is None


@pytest.mark.parametrize(
    "name",
    [
        *("a[1].jsonl", "a*.jsonl", "a?rows=5.jsonl", "a%20b.jsonl", "a::b.jsonl"),
        *("Öl für 1 €.jsonl", "~a.jsonl", "v=1/[2]#3/a.jsonl"),
    ],
)
def test_a_name_is_a_file_whatever_signs_are_in_it(tmp_path, name):
    other = write(tmp_path / "a1.jsonl", [pair("another file?")])
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert load_rows(write(path, ROWS)) == ROWS
    assert content_of(str(path)) != content_of(other)


def test_a_path_is_looked_for_in_the_working_folder_then_in_the_project(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert len(load_rows("data_samples/alpaca.jsonl")) == 12
    (tmp_path / "data_samples").mkdir()
    write(tmp_path / "data_samples" / "alpaca.jsonl", ROWS)
    assert load_rows("data_samples/alpaca.jsonl") == ROWS


@pytest.mark.parametrize("name", ["saved", "a [1]#b"])
def test_a_folder_that_save_to_disk_wrote_is_read(tmp_path, name):
    import datasets

    rows = datasets.Dataset.from_list([pair(f"{i}?") for i in range(5)])
    rows.save_to_disk(str(tmp_path / name))
    assert load_rows(str(tmp_path / name)) == list(rows)
    assert len(list(open_rows(str(tmp_path / name), limit=2, seed=1))) == 2
    both = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    assert load_rows(str(tmp_path / "both")) == list(rows)
    assert load_rows(str(tmp_path / "both" / "test")) == [rows[0]]
    with pytest.raises(DataError, match="could not be read: .*neither a `Dataset`"):
        load_rows(str(tmp_path))


def test_a_limit_takes_the_first_rows_or_draws_by_a_seed(tmp_path):
    path = write(tmp_path / "rows.jsonl", MANY)
    assert load_rows(path, limit=2) == MANY[:2]
    assert load_rows(path, limit=999) == MANY
    assert [row for _, row in open_rows(path, limit=999, seed=1)] == MANY
    drawn = list(open_rows(path, limit=20, seed=1))
    numbers = [number for number, _ in drawn]
    assert numbers == sorted(set(numbers)) != list(range(1, 21))
    assert drawn == [(number, MANY[number - 1]) for number in numbers]
    assert list(open_rows(path, limit=20, seed=2)) != drawn
    source = Source(path=path, rows=4)
    assert [len(load_rows(source, limit)) for limit in (None, 2, 7)] == [4, 2, 4]
    stream = Source(path=path, stream=True)
    assert list(open_rows(stream, 3, seed=1)) == list(enumerate(MANY[:3], 1))


def test_of_a_hub_dataset_the_revision_decides_and_is_the_one_that_is_read(monkeypatch):
    import datasets
    import huggingface_hub

    def load(*names, **options):
        assert (names, options["split"]) == (("owner/name", "main"), "test")
        return [pair(f"of {options['revision']}?")]

    def info(api, name, **options):
        return SimpleNamespace(sha=f"sha-of-{name}")

    monkeypatch.setattr("helpers.runtime.hub_reachable", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # to be put back
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = "owner/name/main:test"
    assert content_of(source) == "sha-of-owner/name"
    assert load_rows(source) == [pair("of sha-of-owner/name?")]
