"""Tests of data.preparation: sources are mixed, split and written; nothing leaks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import recipes, runs
from helpers.config import changed, read_config
from helpers.data import preparation as data
from helpers.errors import ConfigError, DataError, MissingInput
from helpers.runs import Run
from tests.rows import ROWS, messages_row, pair, problem, turns, write


def read_all(run: Run) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((run.path / "data").glob("*"))
    return {path.stem: data.read_rows(path) for path in paths}


@pytest.fixture
def own_files(tmp_path: Path) -> dict[str, Any]:
    """A few problems in files, as the fields that a config takes."""

    def source(part: str, count: int) -> str:
        rows = [problem(f"{part} {i}: how many?", i) for i in range(count)]
        return write(tmp_path / f"{part}.jsonl", rows)

    train = source("train", 12)
    return {
        "data__train": [train],
        "data__problems": train,
        "data__eval": source("eval", 6),
        "data__test": source("test", 8),
        "data__test_new": source("test_new", 5),
        "data__train_rows": None,
    }


def test_preparing_writes_five_files_with_the_counts_it_reports(run: Run) -> None:
    report = data.prepare(run)
    found = {name: len(rows) for name, rows in read_all(run).items()}
    assert found == {name: report[name] for name in found}
    # train: 24 rows of the problems, and the two sample files of 12 rows
    assert found == {
        "train": 48, "eval": 4, "problems": 2400, "test": 6, "test_new": 4
    }  # fmt: skip


def test_preparing_writes_its_part_of_the_report(run: Run) -> None:
    report = data.prepare(run)
    assert run.report()["data"] == report
    assert report["sources"]["data_samples/sharegpt.jsonl"] == {
        "format": "sharegpt",
        "why": "the rows have conversations",
        "read": 12,
        "rows": 12,
        "unused": {},
        "adjusted": {},
    }


def test_the_prepared_rows_have_the_fields_that_the_next_notebooks_read(
    run: Run,
) -> None:
    data.prepare(run)
    fields = {name: set(rows[0]) for name, rows in read_all(run).items()}
    asked = {"id", "question", "answer", "gold"}
    assert fields == {
        "train": {"id", "messages"},
        "eval": {"id", "messages"},
        "problems": asked,
        "test": asked,
        "test_new": asked,
    }


def test_preparing_twice_gives_the_same_fingerprints_and_bytes(
    run_factory: Callable[..., Run],
) -> None:
    first, second = run_factory(name="first"), run_factory(name="second")
    reports = [data.prepare(first), data.prepare(second)]
    assert reports[0]["fingerprints"] == reports[1]["fingerprints"]
    for path in (first.path / "data").iterdir():
        assert path.read_bytes() == (second.path / "data" / path.name).read_bytes()


def test_another_seed_draws_other_training_rows_and_the_same_test(
    run_factory: Callable[..., Run],
) -> None:
    reports = [data.prepare(run_factory(seed=seed)) for seed in (1, 2)]
    first, second = (report["fingerprints"] for report in reports)
    assert first["train"] != second["train"]
    assert first["test"] == second["test"]


def test_no_held_out_id_or_question_is_in_the_training_rows(run: Run) -> None:
    data.prepare(run)
    parts = read_all(run)
    trained = {row["id"] for row in parts["train"] + parts["problems"]}
    asked = {q for row in parts["train"] for q in data.questions_of(row["messages"])}
    asked |= {row["question"] for row in parts["problems"]}
    for name in ("test", "test_new"):
        assert trained.isdisjoint(row["id"] for row in parts[name])
        assert asked.isdisjoint(row["question"] for row in parts[name])
    assert trained.isdisjoint(row["id"] for row in parts["eval"])


def test_own_files_are_prepared_whole_when_nothing_is_capped(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    uncapped = {f"data__{part}_rows": None for part in ("eval", "test", "test_new")}
    report = data.prepare(run_factory(**own_files, **uncapped))
    names = ("train", "problems", "eval", "test", "test_new")
    assert [report[name] for name in names] == [12, 12, 6, 8, 5]


@pytest.mark.parametrize("part", ["eval", "test", "test_new"])
def test_a_held_out_question_among_the_training_rows_stops_the_preparation(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    tmp_path: Path,
    part: str,
) -> None:
    rows = [problem("fresh?"), problem("train 3:  how many?")]
    own_files[f"data__{part}"] = write(tmp_path / "leaky.jsonl", rows)
    run = run_factory(**own_files)
    with pytest.raises(DataError, match=f"^1 questions of {part} are in the training"):
        data.prepare(run)
    assert not (run.path / "data").exists()


def test_a_test_question_among_chat_rows_stops_the_preparation(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    row = {"messages": turns("test 1: how many?", "Five.", system="Be brief.")}
    own_files["data__train"].append(write(tmp_path / "chat.jsonl", [row]))
    with pytest.raises(DataError, match="1 questions of test are in the training rows"):
        data.prepare(run_factory(**own_files))


def test_a_test_question_among_the_problems_alone_stops_the_preparation(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__problems"] = write(
        tmp_path / "more.jsonl", [problem("fresh?"), problem("test 1: how many?")]
    )
    with pytest.raises(DataError, match="1 questions of test are in the training rows"):
        data.prepare(run_factory(**own_files))


def test_one_source_for_problems_and_eval_is_cut_in_two(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", ROWS)]
    own_files["data__eval"] = own_files["data__problems"]
    run = run_factory(**own_files)
    data.prepare(run)
    parts = read_all(run)
    evaluated = [data.questions_of(row["messages"])[0] for row in parts["eval"]]
    assert evaluated == [f"train {i}: how many?" for i in range(8, 12)]
    assert [row["question"] for row in parts["problems"]] == [
        f"train {i}: how many?" for i in range(8)
    ]


def test_one_source_that_eval_would_take_whole_is_refused(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", ROWS)]
    own_files["data__eval"] = own_files["data__problems"]
    with pytest.raises(DataError, match="has 12 rows .*eval_rows=12 leaves no problem"):
        data.prepare(run_factory(**own_files, data__eval_rows=12))


SHARED = {
    "data__eval": None,
    "data__eval_share": 0.2,
    "data__test_share": 0.3,
    "data__test": None,
    "data__test_new": None,
    "data__test_rows": None,
    "data__eval_rows": None,
}


def test_shares_of_the_training_rows_are_held_out(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    run = run_factory(**{**own_files, **SHARED, "data__problems": None}, stages=["sft"])
    report = data.prepare(run)
    parts = read_all(run)
    assert sorted(parts) == ["eval", "test_chat", "train"]
    assert sum(report[name] for name in parts) == 12
    questions = [
        data.questions_of(r["messages"])[0] for rows in parts.values() for r in rows
    ]
    assert len(set(questions)) == 12


def test_a_question_of_two_sources_is_on_one_side(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    again = [
        {"messages": turns(f"train {i}: how many?", "Some other words.")}
        for i in range(12)
    ]
    own_files["data__train"].append(write(tmp_path / "again.jsonl", again))
    run = run_factory(**{**own_files, **SHARED, "data__problems": None}, stages=["sft"])
    data.prepare(run)
    sides = [
        {data.questions_of(row["messages"])[0] for row in rows}
        for rows in read_all(run).values()
    ]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12


def test_held_out_shares_are_capped_like_other_held_out_sets(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    caps = {"data__eval_share": 0.3, "data__eval_rows": 1, "data__test_rows": 1}
    values = {**own_files, **SHARED, **caps, "data__problems": None}
    report = data.prepare(run_factory(**values, stages=["sft"]))
    assert (report["eval"], report["test_chat"]) == (1, 1)


def test_a_run_of_grpo_alone_has_problems_and_no_conversations(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    values = {**own_files, "data__train": [], "data__eval": None}
    run = run_factory(**values, stages=["grpo"])
    report = data.prepare(run)
    assert sorted(read_all(run)) == ["problems", "test", "test_new"]
    assert sorted(report["sources"]) == ["problems", "test", "test_new"]


def test_preparing_takes_away_what_the_config_no_longer_has(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    data.prepare(run_factory(**own_files))
    run = run_factory(**{**own_files, "data__test_new": None})
    data.prepare(run)
    assert sorted(read_all(run)) == ["eval", "problems", "test", "train"]


def test_data_without_a_part_that_the_config_has_is_prepared(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data.prepare(run_factory(**{**own_files, "data__test_new": None}))
    data.ensure_data(run_factory(**own_files))
    assert "preparing it now" in capsys.readouterr().out


def test_bad_rows_of_a_source_are_refused_by_the_sources_name(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.jsonl", [messages_row("user")])
    own_files["data__train"].append(bad)
    with pytest.raises(DataError, match="bad.jsonl: 1 of 1 rows cannot be used"):
        data.prepare(run_factory(**own_files))


def test_missing_data_is_prepared_with_a_word(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data.ensure_data(run)
    assert "01_data_prep makes it): preparing it now" in capsys.readouterr().out
    assert folder == run.require("data/test_new.jsonl").parent


def test_data_that_is_there_is_not_prepared_again(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_factory(**own_files)
    data.prepare(run)
    Path(own_files["data__test"]).unlink()
    data.ensure_data(run)
    assert capsys.readouterr().out == ""


def test_data_of_other_settings_are_prepared_anew_with_a_word(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data.prepare(run_factory(**own_files))
    run = run_factory(**{**own_files, "data__train_rows": 5})
    data.ensure_data(run)
    assert "made from other settings: preparing it anew" in capsys.readouterr().out
    assert run.report()["data"]["train"] == 5


def test_other_settings_that_data_do_not_depend_on_leave_them_alone(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data.prepare(run_factory(**own_files))
    data.ensure_data(run_factory(**own_files, sft__max_steps=3, max_length=300))
    assert capsys.readouterr().out == ""


def test_the_data_of_a_run_that_prepared_none_is_missing(run: Run) -> None:
    with pytest.raises(MissingInput, match="run notebook 01_data_prep"):
        run.require("data/train.jsonl")


@pytest.mark.parametrize("part", ["train", "eval", "problems", "test", "test_new"])
def test_a_file_that_was_edited_is_noticed_and_named(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    part: str,
) -> None:
    path = tmp_path / "edited.jsonl"
    value: Any = [str(path)] if part == "train" else str(path)
    run = run_factory(**own_files | {f"data__{part}": value})
    write(path, [problem("was this here before?", 2), problem("and this, before?", 3)])
    data.prepare(run)
    times = path.stat()
    write(path, [problem("is this here by now?", 2), problem("and this, by now?", 3)])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    data.ensure_data(run)
    assert f"{path} has changed: preparing it anew" in capsys.readouterr().out
    assert "by now?" in (run.path / "data" / f"{part}.jsonl").read_text()
    data.ensure_data(run)
    assert capsys.readouterr().out == ""


def test_the_inputs_of_a_run_are_its_files_by_their_content(
    run_factory: Callable[..., Run], own_files: dict[str, Any]
) -> None:
    run = run_factory(**own_files)
    report = data.prepare(run)
    paths = [own_files[f"data__{part}"] for part in ("eval", "test", "test_new")]
    assert sorted(report["inputs"]) == sorted([*own_files["data__train"], *paths])
    assert data.inputs(run) == report["inputs"]
    Path(paths[0]).write_text("{}")
    changed_now = {k for k, v in data.inputs(run).items() if v != report["inputs"][k]}
    assert changed_now == set(data.changed_inputs(run)) == {paths[0]}


def test_fields_that_are_not_used_are_reported_and_told(
    run_factory: Callable[..., Run],
    own_files: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "chat.jsonl", [pair("a?") | {"context": "b"}])
    run = run_factory(**own_files | {"data__train": [path]})
    data.ensure_data(run)
    assert run.report()["data"]["sources"][path]["unused"] == {"context": 1}
    assert f"{path}: unused: context (1)" in capsys.readouterr().out


def test_bad_problems_are_dropped_by_choice_and_counted_by_the_part(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    for part in ("problems", "test", "test_new"):
        rows = [problem(f"new {part}?"), {"question": "b", "answer": "#### 8:30"}]
        own_files[f"data__{part}"] = write(tmp_path / f"bad {part}.jsonl", rows)
    with pytest.raises(DataError, match="bad problems.jsonl: 1 of 2 .*#### 8:30"):
        data.prepare(run_factory(**own_files))
    report = data.prepare(run_factory(**own_files, data__drop_unusable=True))
    for part in ("problems", "test", "test_new"):
        assert report[part] == 1
        assert report["left_out"][part]["no gold number"]["rows"] == 1


def test_fields_are_ignored_by_choice(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    row: dict[str, Any] = {"messages": turns("a?", "b"), "tools": [{"name": "look"}]}
    row["messages"][1]["reasoning_content"] = "Hm."
    own_files["data__train"] = [write(tmp_path / "chat.jsonl", [row])]
    with pytest.raises(DataError, match="field 'tools' is not trained on"):
        data.prepare(run_factory(**own_files))
    ignore = ["tools", "messages.reasoning_content"]
    run = run_factory(**own_files, data__ignore=ignore)
    data.prepare(run)
    assert read_all(run)["train"][0]["messages"] == turns("a?", "b")


def test_an_answer_that_is_not_learnt_is_part_of_the_prompt_and_no_reference() -> None:
    messages = turns("a?", "wrong", "again?", "right", "and?", "yes")
    assert data.first_question(messages) == turns("a?")
    messages[1]["weight"] = 0
    assert data.first_question(messages) == turns("a?", "wrong", "again?")
    assert data.first_answer(messages) == turns("", "right")[1]


def test_a_turn_that_is_not_learnt_keeps_its_mark(
    run_factory: Callable[..., Run], own_files: dict[str, Any], tmp_path: Path
) -> None:
    messages = turns("a?", "wrong", "again?", "right")
    messages[1]["weight"] = 0
    own_files["data__train"] = [write(tmp_path / "c.jsonl", [{"messages": messages}])]
    run = run_factory(**own_files)
    data.prepare(run)
    assert read_all(run)["train"][0]["messages"] == messages


# mixing


CHATS_ONLY = {
    "stages": ["sft"],
    "best_by": "loss",
    "sft__eval_strategy": "no",
    "data__train_rows": None,
    "data__eval": None,
    "data__problems": None,
    "data__test": None,
    "data__test_new": None,
}


@pytest.fixture
def two_files(tmp_path: Path) -> list[str]:
    """Sources of 100 and 30 rows."""
    return [
        write(tmp_path / f"{word}.jsonl", [pair(f"{word} {i}?") for i in range(count)])
        for word, count in (("big", 100), ("small", 30))
    ]


def words(run: Run, part: str = "train") -> list[str]:
    """The first words of a part's questions, in order."""
    rows = data.read_rows(run.path / "data" / f"{part}.jsonl")
    return [data.questions_of(row["messages"])[0].split()[0] for row in rows]


def test_sources_are_mixed_whole_and_shuffled(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    run = run_factory(**{**CHATS_ONLY, "data__train": two_files})
    report = data.prepare(run)
    found = words(run)
    assert (found.count("big"), found.count("small")) == (100, 30)
    assert [part["rows"] for part in report["sources"].values()] == [100, 30]
    # in order there would be one change from source to source
    assert sum(a != b for a, b in zip(found, found[1:], strict=False)) > 20


def test_sources_are_mixed_by_weight_without_repeating_a_row(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    big, small = two_files
    sources = [{"path": big, "weight": 1}, {"path": small, "weight": 2}]
    run = run_factory(**{**CHATS_ONLY, "data__train": sources})
    report = data.prepare(run)
    found = words(run)
    assert (found.count("big"), found.count("small")) == (15, 30)
    assert [part["read"] for part in report["sources"].values()] == [100, 30]
    assert [part["rows"] for part in report["sources"].values()] == [15, 30]


def test_a_weight_draws_by_the_runs_seed(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    sources = [two_files[0], {"path": two_files[1], "weight": 2}]
    drawn = []
    for seed in (1, 1, 2):
        run = run_factory(**{**CHATS_ONLY, "data__train": sources}, seed=seed)
        data.prepare(run)
        rows = data.read_rows(run.path / "data" / "train.jsonl")
        drawn.append([row["id"] for row in rows])
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) != set(drawn[2])


def test_sources_are_mixed_by_their_own_counts(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    counts = zip(two_files, (40, 5), strict=True)
    sources = [{"path": path, "rows": rows} for path, rows in counts]
    run = run_factory(**{**CHATS_ONLY, "data__train": sources})
    data.prepare(run)
    found = words(run)
    assert (found.count("big"), found.count("small")) == (40, 5)
    assert found[:5] != ["big"] * 5 or "small" in found


def test_recipe_c_takes_as_many_rows_of_either_source(runs_home: Path) -> None:
    recipe = recipes.load("finetome-llama32-3b-c")
    run = runs.save_run(recipes.scaled(recipe, rows=1, samples=True))
    report = data.prepare(run)
    assert [(p["format"], p["rows"]) for p in report["sources"].values()] == [
        ("sharegpt", 8), ("wizardlm", 8)
    ]  # fmt: skip


def test_a_row_of_two_sources_is_trained_on_once(
    run_factory: Callable[..., Run], two_files: list[str], tmp_path: Path
) -> None:
    again = write(tmp_path / "again.jsonl", [pair("big 3?"), pair("new?")])
    run = run_factory(**{**CHATS_ONLY, "data__train": [two_files[0], again]})
    report = data.prepare(run)
    assert report["train"] == 101
    assert report["left_out"][again]["duplicate"] == {
        "rows": 1, "examples": ["row 1: big 3?"]
    }  # fmt: skip


def test_two_parts_of_one_source_are_both_reported(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    sources = [{"path": two_files[0], "rows": rows} for rows in (20, 80)]
    report = data.prepare(run_factory(**{**CHATS_ONLY, "data__train": sources}))
    assert [part["read"] for part in report["sources"].values()] == [20, 80]


def test_a_format_that_a_source_asks_for_is_taken(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    row = {**pair("a?"), "instruction": "b?", "response": "Yes."}
    source = write(tmp_path / "both.jsonl", [row])
    asked = {"path": source, "format": "prompt-completion"}
    run = run_factory(**{**CHATS_ONLY, "data__train": [asked]})
    report = data.prepare(run)
    assert words(run) == ["a?"]
    assert report["sources"][source]["why"] == "asked for"


def test_a_format_that_does_not_fit_is_refused_by_the_source(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    source = {"path": two_files[0], "format": "sharegpt"}
    run = run_factory(**{**CHATS_ONLY, "data__train": [source]})
    with pytest.raises(DataError, match="big.jsonl: 100 of 100 rows cannot be used as"):
        data.prepare(run)


def test_bad_rows_of_a_drawn_source_have_the_numbers_of_the_file(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    rows = [pair(f"{i}?") if i % 2 else messages_row("user") for i in range(40)]
    plain = [
        row if "prompt" in row else {"prompt": "", "completion": None} for row in rows
    ]
    source = write(tmp_path / "rows.jsonl", plain)
    values = {**CHATS_ONLY, "data__train": [source], "data__train_rows": 9}
    run = run_factory(**values, data__drop_unusable=True)
    report = data.prepare(run)
    (part,) = report["left_out"][source].values()
    numbers = [
        int(text.split(":")[0].removeprefix("row ")) for text in part["examples"]
    ]
    assert len(numbers) == 3
    assert all(number % 2 for number in numbers)
    assert report["train"] + part["rows"] == 9


def test_over_long_conversations_are_left_out_of_the_mix(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [pair("a?"), pair("b?", "b" * 99)])
    run = run_factory(**{**CHATS_ONLY, "data__train": [source]}, data__max_chars=50)
    report = data.prepare(run)
    assert report["train"] == 1
    assert report["left_out"][source]["over-long"]["rows"] == 1


def test_a_conversation_that_asks_later_what_is_held_out_is_not_trained_on(
    run_factory: Callable[..., Run], two_files: list[str], tmp_path: Path
) -> None:
    values = {**CHATS_ONLY, "data__eval_share": 0.1}
    first = run_factory(**values, data__train=two_files[:1])
    data.prepare(first)
    held_out = data.read_rows(first.path / "data" / "eval.jsonl")[0]["messages"]
    question = data.questions_of(held_out)[0]
    chat = turns("Begin!", "Yes?", question.replace(" ", "  "), "Yes.")
    other = turns("Hello!", "Yes?", "Something else?", "Yes.")
    more = write(tmp_path / "more.jsonl", [{"messages": chat}, {"messages": other}])
    second = run_factory(**values, data__train=[two_files[0], more])
    report = data.prepare(second)
    trained = {
        q for w in read_all(second)["train"] for q in data.questions_of(w["messages"])
    }
    assert "Begin!" not in trained
    assert "Something else?" in trained
    assert report["left_out"]["the mix"] == {
        "asks later what is held out": {"rows": 1, "examples": [question]}
    }


def test_a_held_out_row_never_becomes_a_training_row_when_data_grow(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    values = {**CHATS_ONLY, "data__eval_share": 0.1, "data__test_share": 0.1}
    rows = [pair(f"{i}?") for i in range(300)]
    parts = []
    for count in (150, 300):
        source = write(tmp_path / f"{count}.jsonl", rows[:count])
        run = run_factory(**values, data__train=[source], data__test_rows=None)
        data.prepare(run)
        parts.append({n: {r["id"] for r in part} for n, part in read_all(run).items()})
    for name in ("eval", "test_chat"):
        assert parts[0][name]
        assert parts[0][name].isdisjoint(parts[1]["train"])
    assert parts[0]["train"] <= parts[1]["train"]


def test_a_streamed_source_is_prepared_like_a_stored_one(
    run_factory: Callable[..., Run], two_files: list[str]
) -> None:
    found = []
    for stream in (False, True):
        sources = [{"path": path, "stream": stream} for path in two_files]
        values = {**CHATS_ONLY, "data__train": sources}
        found.append(data.prepare(run_factory(**values))["fingerprints"])
    assert found[0] == found[1]


# config


def test_a_config_with_options_comes_back_from_json(tmp_path: Path) -> None:
    sources = [
        {"path": "a.jsonl", "format": "alpaca", "rows": 5},
        {"path": "owner/name:train", "weight": 0.5},
        "b [1]&c?.csv",
    ]
    config = changed(recipes.load("demo"), data__train=sources, data__max_chars=9)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train", [{"path": "a", "fromat": "alpaca"}], "did you mean 'format'"),
        ("train", ["a", {"path": "b", "format": "alpacca"}], "did you mean 'alpaca'"),
        ("train", [{"rows": 5}], "Field required"),
        ("train", [{"path": "a", "rows": "many"}], "valid integer"),
        ("train", [{"path": "a", "weight": -1}], "greater than 0"),
        ("train", [{"path": "a", "weight": float("inf")}], "finite number"),
        ("train", [5], "valid dictionary"),
        ("eval", {"path": "a", "rows": 0}, "greater than or equal to 1"),
        ("test", {"path": "a", "weight": 2}, "a weight is of data.train alone"),
        ("max_chars", 0, "greater than or equal to 1"),
    ],
)
def test_a_source_that_cannot_be_read_so_is_refused_by_the_config(
    field: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^data.{field}[\w.]*:? .*{said}"):
        changed(recipes.load("demo"), **{f"data__{field}": value})


# memory

MEASURED = """
import sys, threading, time

def anonymous_mb():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["RssAnon"].split()[0]) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous_mb())
        time.sleep(0.005)

from helpers import data, runs
import datasets
peak = [anonymous_mb()]
threading.Thread(target=watch, daemon=True).start()
data.prepare(runs.open_run("test"))
print(peak[0])
"""
# Freed memory goes back to the system at once: by default Arrow's allocator and
# glibc's arenas keep up to 30 MB of it, more or less from run to run.
AT_ONCE = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
def test_the_memory_of_preparing_does_not_grow_with_the_data(
    run_factory: Callable[..., Run], tmp_path: Path, run_python: Any
) -> None:
    peaks, sizes = [], []
    for count in (4_000, 12_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                row = pair(f"Question {number}?", f"{number} " + "because " * 1000)
                file.write(json.dumps(row) + "\n")
        values = {**CHATS_ONLY, "data__train": [str(path)], "data__eval_share": 0.05}
        run_factory(**values)
        cache = {"HF_DATASETS_CACHE": str(tmp_path / f"cache-{count}")}
        peaks.append(float(run_python("-c", MEASURED, **cache, **AT_ONCE).stdout))
        sizes.append(path.stat().st_size / 2**20)
    print(
        f"{sizes[0]:.0f} MB of rows: {peaks[0]:.0f} MB; {sizes[1]:.0f}: {peaks[1]:.0f}"
    )
    assert sizes[1] - sizes[0] > 60
    assert peaks[1] - peaks[0] < 25


# files


def test_writing_tells_the_number_of_rows_and_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = data.write_rows(path, iter([{"id": "1"}, {"id": "2"}]))
    assert first[0] == 2
    assert data.write_rows(path, [{"id": "1"}, {"id": "2"}]) == first
    assert data.write_rows(path, [{"id": "1"}, {"id": "3"}]) != first


def test_rows_that_fail_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data.write_rows(path, [{"id": "1"}])
    with pytest.raises(TypeError):
        data.write_rows(path, [{"id": "2"}, {"id": object()}])
    assert data.read_rows(path) == [{"id": "1"}]
    assert list(tmp_path.iterdir()) == [path]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"id": "1", "messages": turns("Zoë\u2028?", "a\nb 🎉")}, {"id": "2"}]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    assert data.read_rows(tmp_path / "rows.jsonl") == rows
