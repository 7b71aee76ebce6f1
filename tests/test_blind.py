"""The blind form's real widgets, without a browser, and the table of what was said."""

import html

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.files import read_rows, write_rows
from helpers.widgets import BlindForm, blind_results

MODELS = ("base", "sft")
WORDS = {"base": "stone", "sft": "water"}
BUTTONS = {"A": 0, "B": 1, "tie": 2}


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
    return "A" if WORDS[label] in form.texts[1].value else "B"


def click(form, *verdicts):
    for verdict in verdicts:
        form.verdicts[BUTTONS[verdict]].click()


def mark(form, side, *names):
    for box in form.marks[BUTTONS[side]]:
        box.value = box.description in names


def test_the_form_shows_question_gold_and_both_answers_and_no_name_of_a_model(form):
    for pair in form.pairs:
        texts = [text.value for text in form.texts]
        assert f"{pair['question_first']}\nexpected: 7" in texts[0]
        outputs = {pair["output_first"], pair["output_second"]}
        assert {text.split(">")[1].split("<")[0] for text in texts[1:]} == outputs
        texts += [button.description for button in form.verdicts]
        words = "".join(texts)
        assert not any(n in words for n in ("base", "sft", "SFT", "first", "second"))
        click(form, "A")
    assert "Every pair is rated" in form.texts[0].value
    assert all(button.disabled for button in form.verdicts)


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
    assert not any(box.indent for box in form.marks[0])  # 90 pixels of a phone's 400
    mark(form, side_of(form, "sft"), "coherent", "creative")
    for label in ("sft", "base"):
        click(form, side_of(form, label))
    first, second = read_rows(form.path)
    assert (first["winner"], second["winner"]) == ("second", "first")
    assert first["marks"] == {"first": [], "second": ["coherent", "creative"]}
    assert second["marks"] == {"first": [], "second": []}


def test_every_rating_is_saved_at_once_and_another_session_goes_on(run, form):
    click(form, "A", "B")
    assert len(read_rows(form.path)) == 2
    again = BlindForm(run, MODELS, count=5)
    assert [p["id"] for p in again.pairs[:4]] == [p["id"] for p in form.pairs]
    assert "2 of 5 rated" in again.texts[0].value
    click(again, "A")
    click(form, "A")  # open twice: the later rating of a pair counts, none is lost
    assert len(read_rows(form.path)) == 4
    assert "3 of 4 rated" in BlindForm(run, MODELS, count=4).texts[0].value


def test_what_a_model_wrote_is_escaped(run):
    write_answers(run, "sft", "<img src=x>", gold="<b>")
    form = BlindForm(run, MODELS)
    text = "".join(text.value for text in form.texts)
    assert "<img" not in text and html.escape("<img src=x>") in text
    assert "expected: 7" in text


def test_wins_and_marks_are_counted_with_intervals_and_reported(run, form):
    assert blind_results(run, MODELS).empty
    assert "blind" not in run.report()
    for verdict in ("sft", "sft", "sft", "tie"):
        mark(form, side_of(form, "base"), *(["biased"] if verdict == "tie" else []))
        click(form, verdict if verdict == "tie" else side_of(form, verdict))
    table = blind_results(run, MODELS)
    wins = table.loc["wins (ties excluded)"]
    assert wins["base"] == "0" and wins["sft"].startswith("3/3 = 100.0 % [43.9, ")
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
    assert "0 of 4 rated" in again.texts[0].value
    click(again, "tie")
    assert len(read_rows(form.path)) == 3
    table = blind_results(run, MODELS)
    assert "wins (ties excluded)" not in table.index
    assert list(table.loc["rated pairs"]) == ["1", "1"]
