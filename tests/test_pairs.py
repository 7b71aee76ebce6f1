"""Tests of helpers.llm_judge.pairwise: pairs, winners, and answers side by side."""

from __future__ import annotations

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import DataError
from helpers.llm_judge import pairwise as pairs


def item(n, output, correct=None, **more):
    """An item as an evaluation writes it."""
    known = {} if correct is None else {"correct": correct, "gold": "7"}
    question = {"id": f"test-{n}", "question": f"How many, {n}?"}
    return {**question, "output": output, **known, **more}


def write_items(run, label, *items, part="test"):
    data.write_rows(run.path / "eval" / label / f"{part}.jsonl", list(items))


@pytest.fixture
def run(runs_home):
    """A run whose base model and SFT model have answered four problems."""
    run = runs.save_run(recipes.load("smoke"))
    base = [(1, "5 eggs", False), (2, "7", True), (3, "9", False), (4, "1", False)]
    sft = [(1, "7 eggs", True), (2, "8", False), (3, "7", True), (4, "2", False)]
    write_items(run, "base", *(item(*values) for values in base))
    write_items(run, "sft", *(item(*values) for values in sft))
    return run


MODELS = ("base", "sft")


def test_answers_are_paired_by_the_id_of_their_question(run):
    backwards = data.read_rows(run.path / "eval/sft/test.jsonl")[::-1]
    write_items(run, "sft", *backwards)
    found = pairs.read_pairs(run, MODELS)
    assert [p.first["id"] for p in found] == [p.second["id"] for p in found]
    assert found[0].id == "test-1"
    assert (found[0].question, found[0].gold) == ("How many, 1?", "7")


def test_a_question_that_only_one_model_answered_is_in_no_pair(run):
    write_items(run, "sft", item(2, "x", True), item(9, "y", True))
    assert [p.id for p in pairs.read_pairs(run, MODELS)] == ["test-2"]


def test_a_reference_is_expected_where_there_is_no_gold_number(run):
    for label in MODELS:
        write_items(run, label, item(1, "a", reference="a cat"), part="test_chat")
    assert pairs.read_pairs(run, MODELS, "test_chat")[0].gold == "a cat"


def test_models_without_a_question_in_common_are_refused(run):
    write_items(run, "sft", item(9, "y", True))
    with pytest.raises(DataError, match="base and sft share no question of test"):
        pairs.read_pairs(run, MODELS)


def test_another_question_under_the_same_id_is_refused(run):
    other = {**item(1, "y", True), "question": "Another one?"}
    write_items(run, "sft", other)
    with pytest.raises(DataError, match="test-1 of test is another question for sft"):
        pairs.read_pairs(run, MODELS)


def test_models_that_answered_no_set_in_common_are_refused(run):
    write_items(run, "new", item(1, "y"), part="test_chat")
    with pytest.raises(DataError, match="base and new answered no set in common"):
        pairs.read_pairs(run, ("base", "new"))


def test_a_model_that_was_not_evaluated_is_named_with_the_notebook_to_run(run):
    with pytest.raises(runs.MissingInput, match="eval/grpo is missing.*04_evaluation"):
        pairs.read_pairs(run, ("base", "grpo"))


def test_the_higher_value_wins_and_equal_values_tie(run):
    found = pairs.read_pairs(run, MODELS)
    expected = ["second", "first", "second", "tie"]
    assert pairs.find_winners(found, "correct") == expected


def test_an_item_without_the_value_has_no_winner(run):
    found = pairs.read_pairs(run, MODELS)
    assert pairs.find_winners(found, "rougeL") == [None] * 4


def test_a_graded_value_decides_by_size():
    rows = item(1, "a", rougeL=0.25), item(1, "b", rougeL=0.5)
    pair = pairs.Pair("1", "?", "", *rows)
    assert pairs.find_winners([pair], "rougeL") == ["second"]


def test_wins_are_a_share_of_the_decided_pairs():
    counts = pairs.count_wins(["second"] * 3 + ["first"] + ["tie"] * 6 + [None])
    assert (counts["wins"]["k"], counts["wins"]["n"]) == (3, 4)
    assert (counts["losses"], counts["ties"], counts["missing"]) == (1, 6, 1)
    # statsmodels' proportion_confint(3, 4, method="wilson")
    assert counts["wins"]["low"] == pytest.approx(0.3006, abs=1e-4)
    assert counts["wins"]["high"] == pytest.approx(0.9544, abs=1e-4)


def test_without_a_decided_pair_there_is_no_share_of_wins():
    assert pairs.count_wins(["tie", None])["wins"] is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", ""),
        ("", "a b"),
        ("the cat sat.\n#### 5", "the dog sat.\n#### 7"),
        ("  two   spaces ", "two spaces"),
        ("größer als 3,5 €", "kleiner als 3,5 €"),
    ],
)
def test_the_pieces_of_a_text_make_up_the_text(first, second):
    sides = pairs.word_differences(first, second)
    assert ["".join(text for text, _ in side) for side in sides] == [first, second]


def test_equal_texts_have_no_differing_piece():
    sides = pairs.word_differences("a b\nc", "a b\nc")
    assert sides == ([("a b\nc", False)], [("a b\nc", False)])


def test_a_changed_word_is_marked_on_both_sides_and_nothing_else():
    first, second = pairs.word_differences("the cat sat", "the dog sat")
    assert [text for text, differs in first if differs] == ["cat"]
    assert [text for text, differs in second if differs] == ["dog"]


def test_an_added_word_is_marked_on_its_side_alone():
    first, second = pairs.word_differences("12 eggs", "12 fresh eggs")
    assert not any(differs for _, differs in first)
    assert [text.strip() for text, differs in second if differs] == ["fresh"]


def test_the_summary_counts_every_pair_whatever_is_shown(run):
    table = pairs.side_by_side(run, MODELS, count=1)
    said = "after SFT: better than base in 2, worse in 1, equal in 1 of 4"
    assert table.summary() == f"{said}, by right answers"
    assert len(table.shown()) == 1


def test_only_the_losses_can_be_shown(run):
    table = pairs.side_by_side(run, MODELS, only="first")
    assert [row["question"] for row in table.shown()] == ["How many, 2?"]
    assert "better than base in 2" in table.summary()


def test_the_table_says_which_answer_is_better(run):
    said = [row["better"] for row in pairs.side_by_side(run, MODELS).shown()]
    assert said == ["after SFT", "base", "after SFT", "equal"]


def test_answers_that_nothing_measures_are_shown_undecided(run):
    for label in MODELS:
        write_items(run, label, item(1, "a"), part="test_chat")
    table = pairs.side_by_side(run, MODELS, "test_chat")
    assert table.shown()[0]["better"] == "-"
    assert table.summary() == "base and after SFT: nothing decides which is better"


def judged(n, winner, **changed):
    """A line of a judge's file, as `duels` writes it."""
    base, sft = ("5 eggs", "7", "9", "1"), ("7 eggs", "8", "7", "2")
    said = {"first": base[n - 1], "second": sft[n - 1]}
    return {"id": f"test-{n}", "winner": winner, **said, **changed}


def test_a_judge_decides_by_the_verdicts_of_duels(run):
    rows = [judged(1, "first"), judged(2, "tie"), judged(3, None)]
    write_items(run, "sft", *rows, part="test_against_base")
    table = pairs.side_by_side(run, MODELS, by="judge")
    assert table.winners == ["first", "tie", None, None]


def test_a_judges_verdict_on_answers_that_changed_does_not_count(run):
    rows = [judged(1, "first", second="8 eggs"), judged(2, "second")]
    write_items(run, "sft", *rows, part="test_against_base")
    table = pairs.side_by_side(run, MODELS, by="judge")
    assert table.winners == [None, "second", None, None]
    assert table.summary().endswith("of 4, undecided 3, by a judge")


def test_texts_are_decided_by_rouge_where_there_is_no_right_answer(run):
    for label, value in zip(MODELS, (0.5, 0.25), strict=True):
        row = item(1, label, reference="a cat", rougeL=value)
        write_items(run, label, row, part="test_chat")
    table = pairs.side_by_side(run, MODELS, "test_chat")
    assert table.winners == ["first"]
    assert table.summary().endswith("by ROUGE-L")


def test_a_judge_who_has_not_compared_the_models_is_missing(run):
    with pytest.raises(runs.MissingInput, match="test_against_base.jsonl is missing"):
        pairs.side_by_side(run, MODELS, by="judge")


def test_models_of_two_runs_are_named_with_their_runs(run):
    other = runs.save_run(changed(recipes.load("smoke"), name="other"))
    write_items(other, "sft", item(1, "7 hens", True), item(4, "7", True))
    table = pairs.side_by_side(run, ("sft", "sft"), other=other)
    assert table.names == ("smoke after SFT", "other after SFT")
    assert table.winners == ["tie", "second"]


def test_in_a_terminal_every_answer_is_whole(run):
    text = repr(pairs.side_by_side(run, MODELS, count=1))
    assert "How many, 1? (expected: 7)" in text
    assert "base: 5 eggs" in text and "after SFT: 7 eggs" in text


def test_in_a_notebook_the_words_that_differ_are_marked(run):
    html = pairs.side_by_side(run, MODELS, count=1)._repr_html_()
    assert ">5</del> eggs" in html and ">7</ins> eggs" in html
    assert "overflow:auto" in html and 'tabindex="0"' in html


def test_what_a_model_wrote_is_escaped(run):
    write_items(run, "sft", item(1, "<script>alert(1)</script>", True))
    html = pairs.side_by_side(run, MODELS)._repr_html_()
    assert "<script" not in html
    assert "&lt;" in html
