"""Tests of helpers.widgets.blind_form: the form's real widgets, without a browser."""

from __future__ import annotations

import pytest

from helpers import recipes, runs
from helpers.data import preparation as data
from helpers.errors import DataError
from helpers.widgets import blind_form as blind
from helpers.widgets import ratings

MODELS = ("base", "sft")


@pytest.fixture
def run(runs_home):
    """A run whose models answered six problems, each in its own words."""
    run = runs.save_run(recipes.load("smoke"))
    for label in MODELS:
        rows = [
            {
                "id": f"test-{n}",
                "question": f"What is {n} + 1?",
                "gold": str(n + 1),
                "output": f"{'stone' if label == 'base' else 'water'} {n}",
            }
            for n in range(6)
        ]
        data.write_rows(run.path / "eval" / label / "test.jsonl", rows)
    return run


@pytest.fixture
def form(run):
    return blind.form(run, MODELS, count=4)


def saved(form):
    """The lines of the file, by the id of the pair."""
    return {row["id"]: row for row in data.read_rows(form.path)}


def shown(form):
    """What a person sees: the texts of all widgets."""
    texts = [form.status, form.question, *form.texts.values(), form.keys]
    buttons = [*form.verdicts.values(), form.back, *form.marks.values()]
    return " ".join([*(t.value for t in texts), *(b.description for b in buttons)])


def side_of(form, label):
    """The side on which a model's answer stands, by its words."""
    word = "stone" if label == "base" else "water"
    return next(side for side, text in form.texts.items() if word in text.value)


def press(form, text):
    """Type into the field for keys, letter by letter, as the browser sends it."""
    for letter in text:
        form.keys.value += letter


def test_the_form_shows_question_gold_and_both_answers(form):
    pair = form.pairs[0]
    assert pair.question in form.question.value
    assert f"expected: {pair.gold}" in form.question.value
    both = "".join(text.value for text in form.texts.values())
    assert pair.first["output"] in both and pair.second["output"] in both


def test_no_name_of_a_model_is_shown_at_any_time(form):
    while form.place < len(form.pairs):
        for name in ("base", "sft", "SFT", "first", "second"):
            assert name not in shown(form)
        form.verdicts["A"].click()
    assert "base" not in shown(form) and "sft" not in shown(form)


def test_both_models_stand_on_both_sides(run):
    form = blind.form(run, MODELS, count=6)
    sides = set()
    while form.place < len(form.pairs):
        sides.add(side_of(form, "base"))
        form.verdicts["tie"].click()
    assert sides == {"A", "B"}


@pytest.mark.parametrize("label", MODELS)
def test_the_winner_is_the_model_whose_words_stood_on_the_chosen_side(form, label):
    while form.place < len(form.pairs):
        form.verdicts[side_of(form, label)].click()
    winners = {row["winner"] for row in saved(form).values()}
    assert winners == {"first" if label == "base" else "second"}


def test_a_tie_has_no_winner(form):
    form.verdicts["tie"].click()
    assert [row["winner"] for row in saved(form).values()] == ["tie"]


def test_every_verdict_is_written_at_once(form):
    for number, pair in enumerate(form.pairs, start=1):
        form.verdicts["B"].click()
        assert len(saved(form)) == number
        assert saved(form)[pair.id]["verdict"] == "B"


def test_the_marks_are_saved_with_the_model_that_they_were_given_to(form):
    side = side_of(form, "sft")
    form.marks[side, "coherent"].value = True
    form.marks[side, "creative"].value = True
    form.verdicts[side].click()
    marks = next(iter(saved(form).values()))["marks"]
    assert marks == {"first": [], "second": ["coherent", "creative"]}


def test_the_marks_are_empty_for_the_next_pair(form):
    for box in form.marks.values():
        box.value = True
    form.verdicts["A"].click()
    assert not any(box.value for box in form.marks.values())


def test_another_session_goes_on_where_one_stopped(run, form):
    form.verdicts["A"].click()
    form.verdicts["B"].click()
    again = blind.form(run, MODELS, count=4)
    assert again.place == 2
    assert "2 of 4 rated" in again.status.value
    again.verdicts["A"].click()
    assert len(saved(again)) == 3


def test_a_form_that_is_open_twice_loses_no_verdict(run, form):
    again = blind.form(run, MODELS, count=4)
    form.verdicts["A"].click()
    form.verdicts["A"].click()
    again.verdicts["B"].click()
    verdicts = [saved(form)[pair.id]["verdict"] for pair in form.pairs[:2]]
    assert verdicts == ["B", "A"]
    assert again.place == 2


def test_an_answer_that_changed_is_rated_again_and_the_old_rating_kept(run, form):
    form.verdicts["A"].click()
    path = run.path / "eval/sft/test.jsonl"
    rows = [row | {"output": "anew"} for row in data.read_rows(path)]
    data.write_rows(path, rows)
    again = blind.form(run, MODELS, count=4)
    assert "0 of 4 rated" in again.status.value
    again.verdicts["A"].click()
    assert len(data.read_rows(form.path)) == 2
    assert len(ratings.read_ratings(run, MODELS)) == 1


def test_back_shows_the_pair_before_with_its_marks(form):
    form.marks["A", "biased"].value = True
    before = form.question.value
    form.verdicts["A"].click()
    form.back.click()
    assert form.question.value == before
    assert form.marks["A", "biased"].value is True
    assert form.marks["B", "biased"].value is False


def test_a_new_verdict_replaces_the_old_one_and_goes_on_to_the_next_unrated(form):
    first = form.pairs[0].id
    form.verdicts["A"].click()
    form.verdicts["A"].click()
    form.back.click()
    form.back.click()
    form.verdicts["B"].click()
    assert saved(form)[first]["verdict"] == "B"
    assert len(saved(form)) == 2
    assert form.place == 2


def test_there_is_nothing_before_the_first_pair(form):
    assert form.back.disabled
    form.back.click()
    assert form.place == 0


def test_after_the_last_pair_nothing_can_be_rated(form):
    for _ in form.pairs:
        form.verdicts["A"].click()
    assert "Every pair is rated" in form.question.value
    assert all(button.disabled for button in form.verdicts.values())
    form.verdicts["A"].click()
    press(form, "1")
    assert len(saved(form)) == 4


def test_from_the_end_one_can_go_back(form):
    for _ in form.pairs:
        form.verdicts["A"].click()
    form.back.click()
    assert form.place == 3
    assert not form.verdicts["A"].disabled


def test_keys_rate_as_they_are_typed(form):
    press(form, "123")
    verdicts = [saved(form)[pair.id]["verdict"] for pair in form.pairs[:3]]
    assert verdicts == ["A", "B", "tie"]


def test_keys_tick_and_clear_the_marks_of_either_side(form):
    press(form, "qfF")
    assert form.marks["A", "coherent"].value is True
    assert form.marks["B", "biased"].value is False
    press(form, "f")
    assert form.marks["B", "biased"].value is True


def test_a_key_goes_back(form):
    press(form, "10")
    assert form.place == 0


def test_keys_that_arrive_together_count_one_by_one(form):
    form.keys.value = "q1"
    form.keys.value = "q1w2"
    rows = [saved(form)[pair.id] for pair in form.pairs[:2]]
    assert [row["verdict"] for row in rows] == ["A", "B"]
    assert sorted(sum(rows[0]["marks"].values(), [])) == ["coherent"]
    assert sorted(sum(rows[1]["marks"].values(), [])) == ["relevant"]


def test_deleting_what_was_typed_does_nothing(form):
    press(form, "11")
    form.keys.value = "1"
    form.keys.value = ""
    assert len(saved(form)) == 2
    press(form, "2")
    assert len(saved(form)) == 3


def test_other_keys_do_nothing(form):
    press(form, "x 9?")
    assert form.place == 0
    assert not form.path.exists()


def test_what_a_model_wrote_is_escaped(run):
    path = run.path / "eval/sft/test.jsonl"
    rows = [row | {"output": "<img src=x>"} for row in data.read_rows(path)]
    data.write_rows(path, rows)
    form = blind.form(run, MODELS)
    both = "".join(text.value for text in form.texts.values())
    assert "<img" not in both and "&lt;img src=x&gt;" in both


def test_of_models_with_the_same_answers_there_is_nothing_to_rate(run):
    rows = data.read_rows(run.path / "eval/base/test.jsonl")
    data.write_rows(run.path / "eval/sft/test.jsonl", rows)
    form = blind.form(run, MODELS)
    assert "gave the same answers" in form.question.value
    press(form, "123")
    assert not form.path.exists()


def test_models_without_a_question_in_common_are_refused(run):
    rows = [
        row | {"id": "x"} for row in data.read_rows(run.path / "eval/sft/test.jsonl")
    ]
    data.write_rows(run.path / "eval/sft/test.jsonl", rows)
    with pytest.raises(DataError, match="base and sft share no question"):
        blind.form(run, MODELS)


def test_the_form_is_shown_by_naming_it_last_in_a_cell(form, monkeypatch):
    import IPython.display

    displayed = []
    monkeypatch.setattr(IPython.display, "display", displayed.append)
    form._ipython_display_()
    assert displayed == [form.widget]
