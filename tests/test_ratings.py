"""Tests of helpers.widgets.ratings: what is rated, and how it is counted."""

from __future__ import annotations

import pytest

from helpers import recipes, runs
from helpers.data import preparation as data
from helpers.llm_judge.pairwise import Pair
from helpers.widgets import ratings

MODELS = ("base", "sft")


def pair(n, first="a", second="b"):
    return Pair(f"test-{n}", f"{n}?", "7", {"output": first}, {"output": second})


def rating(winner, verdict, first=(), second=()):
    marks = {"first": list(first), "second": list(second)}
    return {"winner": winner, "verdict": verdict, "marks": marks}


def test_the_drawn_pairs_are_the_same_for_the_same_seed():
    found = [pair(n) for n in range(30)]
    drawn = ratings.choose_pairs(found, 10, seed=3)
    assert drawn == ratings.choose_pairs(found, 10, seed=3)
    assert drawn != ratings.choose_pairs(found, 10, seed=4)
    assert len({p.id for p in drawn}) == 10


def test_a_larger_count_keeps_the_pairs_of_a_smaller_one():
    found = [pair(n) for n in range(30)]
    drawn = ratings.choose_pairs(found, 5, seed=3)
    assert ratings.choose_pairs(found, 20, seed=3)[:5] == drawn


def test_equal_answers_are_not_rated():
    found = [pair(1, "a", "a"), pair(2)]
    assert ratings.choose_pairs(found, 10, seed=0) == [pair(2)]


def test_the_sides_are_decided_by_seed_and_question_about_evenly():
    sides = [ratings.on_side_a(pair(n), seed=0) for n in range(400)]
    assert sides == [ratings.on_side_a(pair(n), seed=0) for n in range(400)]
    assert 160 < sides.count("first") < 240
    assert sides != [ratings.on_side_a(pair(n), seed=1) for n in range(400)]


def test_a_rating_belongs_to_the_question_and_to_both_answers():
    keys = {
        ratings.key_of(p)
        for p in (pair(1), pair(2), pair(1, "c"), pair(1, "a", "c"), pair(1, "b", "a"))
    }
    assert len(keys) == 5


def test_wins_are_those_of_the_second_model_ties_apart():
    rows = [rating("second", "A")] * 6 + [rating("first", "B")] * 2
    rows += [rating("tie", "tie")] * 4
    counts = ratings.count(rows, MODELS)
    assert (counts["wins"]["k"], counts["wins"]["n"]) == (6, 8)
    assert (counts["losses"], counts["ties"], counts["rated"]) == (2, 4, 12)
    # R: binom::binom.wilson(6, 8)
    assert counts["wins"]["low"] == pytest.approx(0.4093, abs=1e-4)
    assert counts["wins"]["high"] == pytest.approx(0.9285, abs=1e-4)


def test_the_share_of_side_a_shows_whether_a_side_was_preferred():
    rows = [rating("second", "A"), rating("first", "A"), rating("second", "B")]
    counts = ratings.count([*rows, rating("tie", "tie")], MODELS)
    assert (counts["a_wins"]["k"], counts["a_wins"]["n"]) == (2, 3)


def test_marks_are_a_share_of_all_rated_pairs_of_each_model():
    rows = [
        rating("second", "A", ["biased"], ["coherent", "relevant"]),
        rating("tie", "tie", [], ["coherent"]),
    ]
    marks = ratings.count(rows, MODELS)["marks"]
    assert list(marks) == ["coherent", "relevant", "creative", "biased"]
    found = {m: [(v[x]["k"], v[x]["n"]) for x in MODELS] for m, v in marks.items()}
    assert found["coherent"] == [(0, 2), (2, 2)]
    assert found["relevant"] == [(0, 2), (1, 2)]
    assert found["biased"] == [(1, 2), (0, 2)]


def test_without_ratings_nothing_is_claimed():
    counts = ratings.count([], MODELS)
    assert (counts["wins"], counts["a_wins"], counts["marks"]) == (None, None, {})
    table = ratings.table(counts, MODELS)
    assert table.rows == []
    assert table.notes == ["0 pairs rated blind, 0 about the same"]


def test_ties_alone_give_no_share_of_wins():
    table = ratings.table(ratings.count([rating("tie", "tie")], MODELS), MODELS)
    assert [row[0] for row in table.rows] == list(ratings.MARKS)
    assert table.notes == ["1 pairs rated blind, 1 about the same"]


def test_the_table_has_a_column_for_each_model():
    rows = [rating("second", "A", [], ["creative"])] * 3
    table = ratings.table(ratings.count(rows, MODELS), MODELS)
    assert table.header == ["by people", "base", "after SFT"]
    assert table.rows[0][:2] == ["better, of the decided", "0/3"]
    assert table.rows[0][2].startswith("3/3 = 100.0 % [")
    assert table.rows[3][2].startswith("3/3 = 100.0 % [")


@pytest.fixture
def run(runs_home):
    """A run whose two models answered three questions, of which one is rated."""
    run = runs.save_run(recipes.load("smoke"))
    for label in MODELS:
        rows = [
            {"id": f"test-{n}", "question": f"{n}?", "output": f"{label} {n}"}
            for n in range(3)
        ]
        data.write_rows(run.path / "eval" / label / "test.jsonl", rows)
    now = Pair("test-0", "0?", "", {"output": "base 0"}, {"output": "sft 0"})
    row = {"id": "test-0", "answers": ratings.key_of(now), **rating("second", "A")}
    data.write_rows(ratings.path_of(run, MODELS), [row])
    return run


def test_ratings_of_answers_that_changed_are_not_counted(run):
    assert len(ratings.read_ratings(run, MODELS)) == 1
    path = run.path / "eval/sft/test.jsonl"
    rows = [row | {"output": "trained anew"} for row in data.read_rows(path)]
    data.write_rows(path, rows)
    assert ratings.read_ratings(run, MODELS) == []
    assert len(data.read_rows(ratings.path_of(run, MODELS))) == 1


def test_the_result_goes_into_the_report(run):
    table = ratings.result(run, MODELS)
    assert table.rows[0][1] == "0/1"
    part = run.report()["blind"]["base_sft"]
    assert (part["rated"], part["wins"]["k"], part["models"]) == (1, 1, list(MODELS))


def test_before_the_first_rating_nothing_is_written_to_the_report(run):
    ratings.path_of(run, MODELS).unlink()
    assert ratings.result(run, MODELS).rows == []
    assert "blind" not in run.report()
