"""Tests of data.preparation: rows are filtered, mixed, split and written; no leaks."""

import logging
import os
import tracemalloc
from collections.abc import Callable

import pytest

from helpers import files
from helpers.config import SETS
from helpers.data import preparation as data
from helpers.data.preparation import assert_disjoint, place_of, split
from helpers.data.reading import Reader, to_conversations
from helpers.errors import DataError
from helpers.runs import Run
from tests.rows import ROWS, pair, problem, to_problems, turns, write

MakeRun = Callable[..., Run]
CHATS_ONLY = {"stages": ["sft"], "best_by": "loss", "sft__eval_strategy": "no"}
NO_SETS = (*SETS, "train_rows")
CHATS_ONLY |= {f"data__{name}": None for name in NO_SETS}


def read_all(run):
    paths = sorted((run.path / "data").glob("*"))
    return {path.stem: files.read_rows(path) for path in paths}


def questions(run, part="train"):
    """Returns the first questions of a part."""
    rows = files.read_rows(run.path / "data" / f"{part}.jsonl")
    return [data.questions_of(row)[0] for row in rows]


@pytest.fixture(autouse=True)
def messages(caplog):
    caplog.set_level(logging.INFO, "helpers")
    return caplog


@pytest.fixture
def own_files(tmp_path):
    """A few problems in files, as the fields that a config takes."""

    def source(part, count):
        rows = [problem(f"{part} {i}: how many?", i) for i in range(count)]
        return write(tmp_path / f"{part}.jsonl", rows)

    train = source("train", 12)
    return {
        "data__train": [train],
        "data__problems": train,
        "data__eval": source("eval", 6),
        "data__test": source("test", 8),
        "data__test_new": source("test_new", 5),
        **{f"data__{part}_rows": None for part in ("train", "eval", "test")},
    }


@pytest.fixture
def two_files(tmp_path):
    """Sources of 100 and 30 rows."""
    return [
        write(tmp_path / f"{word}.jsonl", [pair(f"{word} {i}?") for i in range(count)])
        for word, count in (("big", 100), ("small", 30))
    ]


def test_all_bad_rows_are_counted_by_reason_and_the_first_three_shown():
    rows = [*ROWS, *[pair("a", None)] * 5, {"title": "a"}, "c", DataError("broken: b")]
    with pytest.raises(DataError, match="^mine: 8 of 10 rows cannot be used") as error:
        to_conversations(rows, source="mine")
    assert str(error.value).count("row ") == 3
    chats, left_out = to_conversations(rows, drop_unusable=True)
    assert (len(chats), {n: part["rows"] for n, part in left_out.items()}) == (
        2,
        {
            "the assistant turn is not text": 5,
            "no 'completion'": 1,
            "a row or turn is not an object": 1,
            "broken": 1,
        },
    )
    with pytest.raises(DataError, match="^mine: 1 of 1 rows .*; row 1: empty answer"):
        to_conversations([pair("a", " ")], source="mine")


def test_what_cannot_teach_is_always_left_out_and_counted_by_reason():
    rows = [*ROWS, pair("a", " "), ROWS[0], pair("long?", "c" * 1234)]
    rows += [pair("d") | {"weight": 0}, pair("d", "1"), pair("d", "2")]
    kept, left_out = to_conversations(rows, max_chars=1000)
    assert [m[-1]["content"] for m in kept[2:]] == ["1", "2"]
    assert {reason: part["examples"] for reason, part in left_out.items()} == {
        "empty answer": ["row 3: empty answer"],
        "duplicate": ["row 4: duplicate: Say hi, twice."],
        "over-long": ["row 5: over-long: 1,239 characters: long?"],
        "no answer is learnt": ["row 6: no answer is learnt: the row is marked so"],
    }


@pytest.mark.parametrize(
    ("answer", "gold", "text"),
    [
        ("So 1,080.\n#### 1,080", "1080", "So 1,080.\n#### 1,080"),
        (" 1,080\n", "1080", "#### 1,080"),
        (0, "0", "#### 0"),
        (2.5, "5/2", "#### 2.5"),
        ("-3", "-3", "#### -3"),
    ],
)
def test_a_problem_carries_its_gold_number(answer, gold, text):
    row = {"id": "p1", "question": "How many?", "answer": answer}
    assert to_problems([row]) == [row | {"gold": gold, "answer": text}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *[
            ({"question": "b", "answer": answer}, "no gold number: the answer ends in")
            for answer in ("#### five", "Many.", True, "It is late.\n#### 8:30")
        ],
        (problem("  "), "no question or answer: the row has"),
        ({"question": "b", "answer": None}, "no question or answer"),
        ({"question": "b", "solution": "5"}, "no question or answer"),
        ({"question": turns("b"), "answer": "5"}, "question "),
        (problem("a", 6), "two gold answers to one question: a"),
        ("c", "a row or turn is not an object"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_or_dropped(row, reason):
    rows = [problem("a"), row]
    with pytest.raises(DataError, match=f"^mine: 1 of 2 rows .*; row 2: {reason}"):
        to_problems(rows, "mine")
    reader = Reader(drop_unusable=True)
    assert len(list(reader.read(enumerate(rows, 1), problems=True))) == 1
    assert [part["rows"] for part in reader.left_out.values()] == [1]


def test_problems_are_told_apart_by_their_ids_or_questions():
    rows = [problem("a"), problem("b"), problem("a")]
    first, second, third = [row["id"] for row in to_problems(rows)]
    assert first == third != second
    rows = to_problems([row | {"id": 1} for row in rows[:2]])
    assert rows[0]["id"] == "1" != rows[1]["id"]


SHARES = {"test_chat": 0.1, "eval": 0.05}


def splits_of(asked, shares):
    """Returns the questions of each split."""
    parts = {}
    for q, name in zip(asked, split(map(place_of, asked), shares), strict=True):
        parts.setdefault(name, []).append(q)
    return parts


def test_a_row_keeps_its_split_when_data_or_shares_change():
    asked = [f"Question {n}?" for n in range(4000)]
    parts = splits_of(asked, SHARES)
    assert len(parts["test_chat"]) == pytest.approx(400, abs=60)
    assert len(parts["eval"]) == pytest.approx(200, abs=45)
    before = splits_of(asked[300::-1], SHARES)
    assert all(set(part) <= set(parts[name]) for name, part in before.items())
    other = splits_of(asked, {**SHARES, "eval": 0.2})
    assert parts["test_chat"] == other["test_chat"]


def test_white_space_in_a_question_does_not_count():
    assert place_of(" \tSame?\n") == place_of("Same?") != place_of("same")
    with pytest.raises(DataError, match="^1 questions of test are in .*, like 'Same"):
        assert_disjoint({place_of(" \tSame?\n")}, "test", ["Same?", "y"])


def test_a_small_set_leaves_no_split_empty():
    asked = [f"Question {n // 3}?" for n in range(36)]
    parts = splits_of(asked, {"test_chat": 0.001, "eval": 0.001})
    assert sorted(map(len, parts.values())) == [3, 3, 30]
    with pytest.raises(
        DataError, match="^different questions: 2, too few, as test_chat, eval, tr"
    ):
        splits_of(["a", "b"], SHARES)


def test_preparing_writes_what_the_next_notebooks_read(run):
    report = data.prepare(run)
    parts = read_all(run)
    # train: 24 rows of the problems, and the two sample files of 12 rows
    counts = {"train": 48, "eval": 4, "problems": 2400, "test": 6, "test_new": 4}
    counts["general"] = 4
    assert {n: len(p) for n, p in parts.items()} == counts
    assert {n: report[n] for n in counts} == counts
    assert set(parts["train"][0]) == set(parts["eval"][0]) == {"id", "messages"}
    assert set(parts["test"][0]) == {"id", "question", "answer", "gold"}
    assert run.report()["data"] == report
    part = report["sources"]["data_samples/sharegpt.jsonl"]
    assert part["why"] == "the rows have conversations"
    assert (part["format"], part["read"], part["rows"]) == ("sharegpt", 12, 12)


@pytest.mark.parametrize("part", ["eval", "test", "test_new", "general"])
@pytest.mark.parametrize("where", ["train", "problems"])
def test_a_held_out_question_that_is_trained_on_stops_the_preparation(
    run_factory, own_files, tmp_path, part, where
):
    rows = [problem("fresh?"), problem("leaky?")]
    source = write(tmp_path / "more.jsonl", rows)
    own_files[f"data__{where}"] = [source] if where == "train" else source
    held = [problem("new?"), problem(" leaky? ")]
    own_files[f"data__{part}"] = write(tmp_path / "held.jsonl", held)
    run = run_factory(**own_files)
    with pytest.raises(DataError, match=f"^1 questions of {part} are in the training"):
        data.prepare(run)
    assert not (run.path / "data").exists()


def test_one_source_for_problems_and_eval_is_cut_in_two(
    run_factory, own_files, tmp_path
):
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", ROWS)]
    own_files |= {"data__eval": own_files["data__problems"], "data__eval_rows": 4}
    run = run_factory(**own_files)
    data.prepare(run)
    asked = [f"train {i}: how many?" for i in range(12)]
    assert questions(run, "eval") == asked[8:]
    assert [row["question"] for row in read_all(run)["problems"]] == asked[:8]
    with pytest.raises(DataError, match="0 of 0 rows .* problems"):
        data.prepare(run_factory(**own_files | {"data__eval_rows": 12}))


def test_shares_of_the_training_rows_are_held_out_and_capped(
    run_factory, own_files, tmp_path
):
    again = [{"messages": turns(f"train {i}: how many?", "So.")} for i in range(12)]
    sources = [*own_files["data__train"], write(tmp_path / "again.jsonl", again)]
    shares = {"data__eval_share": 0.2, "data__test_share": 0.3}
    values = {**CHATS_ONLY, "data__train": sources, **shares}
    run = run_factory(**values, data__eval_rows=None, data__test_rows=1)
    report = data.prepare(run)
    parts = {name: set(questions(run, name)) for name in read_all(run)}
    assert sorted(parts) == ["eval", "test_chat", "train"]
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) < 12
    assert (report["eval"] > 1, report["test_chat"]) == (True, 1)


def test_a_run_has_the_parts_of_its_config_and_no_others(run_factory, own_files):
    data.prepare(run_factory(**own_files))
    values = {**own_files, "data__train": [], "data__eval": None}
    run = run_factory(**values, stages=["grpo"])
    report = data.prepare(run)
    parts = ["general", "problems", "test", "test_new"]
    assert sorted(read_all(run)) == sorted(report["sources"]) == parts


def test_a_turn_that_is_not_learnt_keeps_its_mark_and_is_part_of_the_prompt(
    run_factory, tmp_path
):
    chat = turns("a?", "wrong", "again?", "right", "and?", "yes")
    chat[1]["weight"] = 0
    source = write(tmp_path / "c.jsonl", [{"messages": chat}])
    data.prepare(run := run_factory(**{**CHATS_ONLY, "data__train": [source]}))
    (row,) = read_all(run)["train"]
    assert row["messages"] == chat
    (prompt,) = data.to_prompts(run.config, [row])
    assert prompt["prompt"] == turns("a?", "wrong", "again?")
    assert prompt["reference"] == "right"


def test_bad_rows_are_refused_by_the_source_or_dropped_and_ignored_by_choice(
    run_factory, own_files, tmp_path, messages
):
    rows = [problem("new?"), {"question": "b", "answer": "#### 8:30"}]
    own_files["data__test"] = write(tmp_path / "bad.jsonl", rows)
    row = {"messages": turns("a?", "b"), "tools": [{"name": "look"}], "context": "c"}
    source = write(tmp_path / "chat.jsonl", [row])
    own_files["data__train"] = [source]
    with pytest.raises(DataError, match="chat.jsonl: 1 of 1 rows .*field 'tools'"):
        data.prepare(run_factory(**own_files))
    own_files["data__ignore"] = ["messages.tools"]
    with pytest.raises(DataError, match="bad.jsonl: 1 of 2 .*#### 8:30"):
        data.prepare(run_factory(**own_files))
    report = data.prepare(run_factory(**own_files, data__drop_unusable=True))
    assert report["test"] == report["left_out"]["test"]["no gold number"]["rows"] == 1
    assert report["sources"][source]["unused"] == {"context": 1}
    assert f"{source}: unused: {{'context': 1}}" in messages.text


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ([{}, {}], (100, 30)),
        ([{"weight": 1}, {"weight": 2}], (15, 30)),
        ([{"rows": 40}, {"rows": 5}], (40, 5)),
    ],
)
def test_sources_are_mixed_by_count_or_weight_and_shuffled(
    run_factory, two_files, options, counts
):
    sources = [{"path": p} | o for p, o in zip(two_files, options, strict=True)]
    run = run_factory(**{**CHATS_ONLY, "data__train": sources})
    report = data.prepare(run)
    words = [question.split()[0] for question in questions(run)]
    assert (words.count("big"), words.count("small")) == counts
    assert len(set(questions(run))) == sum(counts)
    assert tuple(part["rows"] for part in report["sources"].values()) == counts
    # in order there would be one change from source to source
    assert sum(a != b for a, b in zip(words, words[1:], strict=False)) > 5


def test_a_row_of_two_sources_is_trained_on_once(run_factory, two_files):
    sources = [{"path": two_files[0], "rows": rows} for rows in (20, 80)]
    run = run_factory(**{**CHATS_ONLY, "data__train": sources})
    report = data.prepare(run)
    assert [part["read"] for part in report["sources"].values()] == [20, 80]
    asked = questions(run)
    assert len(set(asked)) == len(asked) >= 80
    again = list(report["left_out"].values())[1]["duplicate"]
    assert again["rows"] == 100 - len(asked) > 0


def test_a_conversation_that_asks_later_what_is_held_out_is_not_trained_on(
    run_factory, two_files, tmp_path
):
    values = {**CHATS_ONLY, "data__eval_share": 0.1}
    first = run_factory(**values, data__train=two_files[:1])
    data.prepare(first)
    (question, *_) = questions(first, "eval")
    chats = [turns("Begin!", "Yes?", question.replace(" ", "  "), "Yes.")]
    chats.append(turns("Hello!", "Yes?", "Something else?", "Yes."))
    more = write(tmp_path / "more.jsonl", [{"messages": chat} for chat in chats])
    second = run_factory(**values, data__train=[two_files[0], more])
    report = data.prepare(second)
    trained = questions(second)
    assert "Begin!" not in trained and "Hello!" in trained
    leaks = {"rows": 1, "examples": ["Begin!"]}
    assert report["left_out"]["the mix"] == {"asks what is held out": leaks}


def test_a_problem_that_a_share_of_the_training_rows_holds_out_is_not_learnt(
    run_factory, own_files
):
    own_files |= {"data__eval": None, "data__eval_share": 0.2, "data__test_share": 0.2}
    run = run_factory(**own_files)
    report = data.prepare(run)
    held = {*questions(run, "eval"), *questions(run, "test_chat")}
    assert held and held.isdisjoint(questions(run, "problems"))
    assert report["left_out"]["the mix"]["asks what is held out"]["rows"] == len(held)


def test_missing_or_other_data_are_prepared_with_a_note_and_good_ones_left(
    run_factory, own_files, messages, monkeypatch
):
    run, hashed = run_factory(**own_files), list[str]()
    monkeypatch.setattr(data, "content_of", lambda source: hashed.append(source))
    assert data.ensure_data(run) == run.require("data/test_new.jsonl").parent
    assert len(hashed) == len(set(hashed)) > 3  # once each
    assert "is prepared now" in messages.text and "changed" not in messages.text
    messages.clear()
    data.ensure_data(run_factory(**own_files, sft__max_steps=3, max_length=300))
    assert messages.text == ""
    run = run_factory(**{**own_files, "data__train_rows": 5})
    data.ensure_data(run)
    assert "changed: its settings" in messages.text
    assert run.report()["data"]["train"] == 5


@pytest.mark.parametrize("part", ["train", "eval", "problems"])
def test_a_file_that_was_edited_is_noticed_by_its_content_and_named(
    run_factory, own_files, tmp_path, messages, part
):
    path = tmp_path / "edited.jsonl"
    value = [str(path)] if part == "train" else str(path)
    run = run_factory(**own_files | {f"data__{part}": value})
    write(path, [problem("was this here before?"), problem("and this, before?")])
    data.prepare(run)
    times = path.stat()
    write(path, [problem("is this here by now?"), problem("and this, by now?")])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    data.ensure_data(run)
    assert f"is prepared now; changed: {path}" in messages.text
    assert "by now?" in (run.path / "data" / f"{part}.jsonl").read_text()


def test_the_memory_of_preparing_does_not_grow_with_the_data(run_factory, tmp_path):
    peaks = []
    for count in (200, 2000):
        rows = [pair(f"Question {n}?", f"{n} " + "so " * 3000) for n in range(count)]
        source = write(tmp_path / f"{count}.jsonl", rows)
        run = run_factory(**CHATS_ONLY | {"data__train": [source]})
        del rows
        tracemalloc.start()
        data.prepare(run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 2,000 rows are 18 MB of text; what is known of each is half a kilobyte
    assert peaks[1] - peaks[0] < 2e6


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "1", "messages": turns("Zoë\u2028?", "a\nb 🎉")}, {"id": "2"}]
    count, fingerprint = files.write_rows(path, iter(rows))
    assert (files.read_rows(path), count) == (rows, 2)
    assert files.write_rows(path, rows)[1] == fingerprint
    with pytest.raises(TypeError):
        files.write_rows(path, [{"id": "2"}, {"id": object()}])
    assert files.read_rows(path) == rows
    assert list(tmp_path.iterdir()) == [path]
