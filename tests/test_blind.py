"""The blind form's real widgets, without a browser, and the table of what was said."""

from __future__ import annotations

import html

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.files import read_rows, write_rows
from helpers.widgets import BlindForm, blind_results

MODELS = ("base", "sft")
WORDS = {"base": "stone", "sft": "water"}


def write_answers(run, label, word, **more):
    rows = [
        {"id": f"test-{n}", "question": f"What is {n}?", "output": f"{word} {n}"}
        for n in range(40)
    ]
    write_rows(run.path / "eval" / label / "test.jsonl", [row | more for row in rows])


@pytest.fixture
def run(runs_home):
    """A run whose models answered forty problems, each in its own words."""
    run = runs.save_run(recipes.load("smoke"))
    for label in MODELS:
        write_answers(run, label, WORDS[label], gold="7")
    return run


@pytest.fixture
def form(run):
    return BlindForm(run, MODELS, count=4)


def side_of(form, label):
    """The side on which a model's answer is, by its words."""
    return next(s for s, text in form.texts.items() if WORDS[label] in text.value)


def click(form, *verdicts):
    for verdict in verdicts:
        form.verdicts[verdict].click()


def test_the_form_shows_question_gold_and_both_answers_and_no_name_of_a_model(form):
    for pair in form.pairs:
        assert pair["question"] in form.question.value
        assert "expected: 7" in form.question.value
        answers = "".join(text.value for text in form.texts.values())
        assert pair["output_first"] in answers and pair["output_second"] in answers
        texts = form.question.value + answers
        texts += "".join(b.description for b in form.verdicts.values())
        assert not any(n in texts for n in ("base", "sft", "SFT", "first", "second"))
        click(form, "A")
    assert "Every pair is rated" in form.question.value
    assert all(button.disabled for button in form.verdicts.values())


def test_both_models_are_on_both_sides_by_the_seed(run):
    sides = []
    for seed in (1, 1, 2):
        seeded = runs.Run(run.path, changed(run.config, seed=seed))
        form = BlindForm(seeded, MODELS, count=40)
        form.path = form.path.with_name(f"{len(sides)}.jsonl")
        sides.append([])
        for pair in form.pairs:
            sides[-1].append((pair["id"], side_of(form, "base")))
            click(form, "tie")
    assert sides[0] == sides[1] != sides[2]
    assert 8 < [side for _, side in sides[0]].count("A") < 32


def test_winner_and_marks_are_saved_with_their_model_and_emptied(form):
    for mark in ("coherent", "creative"):
        form.marks[side_of(form, "sft")][mark].value = True
    for label in ("sft", "base"):
        click(form, side_of(form, label))
    first, second = read_rows(form.path)
    assert (first["winner"], second["winner"]) == ("second", "first")
    assert first["marks"] == {"first": [], "second": ["coherent", "creative"]}
    assert second["marks"] == {"first": [], "second": []}


def test_every_rating_is_saved_at_once_and_another_session_goes_on(run, form):
    click(form, "A", "B")
    assert [row["verdict"] for row in read_rows(form.path)] == ["A", "B"]
    again = BlindForm(run, MODELS, count=5)
    assert again.pairs[:4] == form.pairs  # a larger count keeps the former ones
    assert again.place == 2 and "2 of 5 rated" in again.question.value
    click(again, "A")
    click(form, "A")  # open twice: the later rating of a pair counts, none is lost
    assert len(read_rows(form.path)) == 4
    assert BlindForm(run, MODELS, count=4).place == 3


def test_what_a_model_wrote_is_escaped(run):
    write_answers(run, "sft", "<img src=x>", gold="<b>")
    form = BlindForm(run, MODELS)
    text = form.question.value + "".join(text.value for text in form.texts.values())
    assert "<img" not in text and html.escape("<img src=x>") in text
    assert "expected: 7" in text


def test_equal_answers_are_not_rated(run):
    write_answers(run, "sft", WORDS["base"], gold="7")
    form = BlindForm(run, MODELS)
    assert "gave the same answers" in form.question.value
    assert all(button.disabled for button in form.verdicts.values())


def test_wins_and_marks_are_counted_with_intervals_and_reported(run, form):
    assert blind_results(run, MODELS).empty
    assert "blind" not in run.report()
    for verdict in ("sft", "sft", "sft", "tie"):
        form.marks[side_of(form, "base")]["biased"].value = verdict == "tie"
        click(form, verdict if verdict == "tie" else side_of(form, verdict))
    table = blind_results(run, MODELS)
    wins = table.loc["wins (ties excluded)"]
    assert wins["base"] == "0/3" and wins["sft"].startswith("3/3 = 100.0 % [43.9, ")
    assert list(table.loc["biased"].str[:3]) == ["1/4", "0/4"]
    part = run.report()["blind"]["base_sft"]
    assert (part["models"], part["rated"]) == (list(MODELS), 4)
    assert (part["losses"], part["ties"], part["missing"]) == (0, 1, 0)
    assert [share["k"] for share in part["marks"]["biased"]] == [1, 0]


def test_ratings_of_answers_that_changed_are_kept_and_not_counted(run, form):
    click(form, "A", "A")
    write_answers(run, "sft", "anew", gold="7")
    assert blind_results(run, MODELS).empty
    again = BlindForm(run, MODELS, count=4)
    assert again.place == 0
    click(again, "tie")
    assert len(read_rows(form.path)) == 3
    table = blind_results(run, MODELS)
    assert "wins (ties excluded)" not in table.index
    assert list(table.loc["rated pairs"]) == ["1", "1"]
