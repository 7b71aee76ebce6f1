"""Tests of evaluation.comparison: models in pairs, and several runs in one table."""

from __future__ import annotations

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import DataError
from helpers.evaluation import comparison
from helpers.evaluation import evaluator as evaluation
from helpers.evaluation.stats import proportion


@pytest.fixture
def make_run(runs_home):
    """Makes a run whose SFT stage is trained and evaluated, with other values."""

    def make(name, recipe="smoke", **parts):
        config = changed(recipes.load(recipe), name=name, stages=["sft"])
        run = runs.save_run(config)
        trained = {"steps": 40, "seconds": 3053.8, "peak_memory_gb": 7.508}
        trained |= {"loss_first": 1.25, "loss_last": 0.75}
        values = {
            "environment": {"device": "cuda: Tesla T4"},
            "data": {"train": 15000, "fingerprints": {"eval": "e1", "test": "t1"}},
            "sft": trained,
            "eval": {"sft": {"eval_loss": 0.787, "accuracy": proportion(45, 100)}},
        }
        for part, found in (values | parts).items():
            if found:
                run.write_part(part, found)
        return run

    return make


def cells(table, row=0):
    return dict(zip(table.header, table.rows[row], strict=True))


def test_a_run_has_losses_accuracy_time_and_peak_memory(make_run):
    assert cells(comparison.runs_table([make_run("b")])) == {
        "run": "b",
        "model": "after SFT",
        "rows": "15,000",
        "steps": "40",
        "train loss": "1.250 to 0.750",
        "eval loss": "0.787",
        "test: right [95 %]": "45/100 = 45.0 % [35.6, 54.8]",
        "seconds": "3053.8",
        "peak GB": "7.51",
    }


def test_every_run_has_a_row_in_the_order_given(make_run):
    table = comparison.runs_table([make_run(name) for name in "cab"])
    assert [row[0] for row in table.rows] == ["c", "a", "b"]
    assert table.notes == []


def test_a_run_that_was_not_evaluated_shows_the_best_loss_of_training(make_run):
    run = make_run("b", eval=None)
    run.write_part("sft", run.report()["sft"] | {"eval_loss_best": 0.8125})
    shown = cells(comparison.runs_table([run]))
    assert shown["eval loss"] == "0.812"
    assert "test: right [95 %]" not in shown


def test_a_value_that_only_another_run_has_is_a_dash(make_run):
    table = comparison.runs_table([make_run("a", eval=None), make_run("b")])
    assert cells(table, 0)["eval loss"] == "-"
    assert cells(table, 1)["eval loss"] == "0.787"


def test_a_grpo_stage_has_a_row_with_its_reward(make_run):
    run = make_run("b")
    run = runs.save_run(changed(run.config, stages=["sft", "grpo"]))
    ends = {"reward_first": 0.25, "reward_last": 0.5}
    run.write_part("grpo", run.report()["sft"] | ends)
    table = comparison.runs_table([run])
    assert [row[1] for row in table.rows] == ["after SFT", "after GRPO"]
    assert cells(table, 1)["reward"] == "0.250 to 0.500"
    assert cells(table, 0)["reward"] == "-"


def test_other_held_out_rows_are_noted(make_run):
    prints = {"train": 15000, "fingerprints": {"eval": "e2", "test": "t1"}}
    table = comparison.runs_table([make_run("a"), make_run("b", data=prints)])
    assert table.notes == [
        "train and eval loss: the runs' held-out rows differ, do not compare"
    ]


def test_other_machines_are_noted(make_run):
    here = {"device": "cpu: x86_64, 2 cores"}
    table = comparison.runs_table([make_run("a"), make_run("b", environment=here)])
    assert len(table.notes) == 1
    assert "cpu: x86_64, 2 cores, cuda: Tesla T4" in table.notes[0]


def test_what_a_recipes_source_published_stands_below_the_runs(make_run):
    recipe = "finetome-llama32-3b-c"
    table = comparison.runs_table([make_run(n, recipe=recipe) for n in "ab"])
    assert [row[0] for row in table.rows] == ["a", "b", f"{recipe}, published"]
    assert cells(table, 2) == {
        "run": "finetome-llama32-3b-c, published",
        "model": "after SFT",
        "rows": "-",
        "steps": "40",
        "train loss": "-",
        "eval loss": "0.780",
        "test: right [95 %]": "-",
        "seconds": "2975.0",
        "peak GB": "7.97",
    }
    assert table.notes == [
        "published: the source's own run, of its held-out rows, on a T4"
    ]


PUBLISHED = [name for name in recipes.NAMES if "published" in recipes.describe(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_figure_has_a_cell(make_run, name):
    table = comparison.runs_table([make_run("mine", recipe=name)])
    said = [cell for cell in table.rows[1] if cell != "-"]
    assert len(said) == 3 + len(recipes.describe(name)["published"])


def test_runs_that_are_not_trained_are_named(make_run):
    with pytest.raises(DataError, match="no stage of a, b is trained"):
        comparison.runs_table([make_run("a", sft=None), make_run("b", sft=None)])


def test_the_trained_runs_of_the_folder_are_found(make_run):
    for name in "ba":
        make_run(name)
    make_run("c", sft=None)
    assert [run.config.name for run in comparison.trained_runs()] == ["a", "b"]


def test_a_run_with_an_unreadable_config_is_left_out_with_a_word(make_run, capsys):
    make_run("a")
    runs.write_json(make_run("b").path / "config.json", {"name": 5})
    assert [run.config.name for run in comparison.trained_runs()] == ["a"]
    assert "left out: " in capsys.readouterr().out


@pytest.fixture
def compared(runs_home):
    """The report of a run whose models were compared on five problems."""
    run = runs.save_run(recipes.load("smoke"))
    # right, strict match: the base model has a right number in another format
    base = [(True, False), (False, False), (False, False), (True, True), (False, False)]
    sft = [(True, True), (True, True), (True, True), (False, False), (False, False)]
    for label, found in (("base", base), ("sft", sft)):
        rows = [
            {
                "id": f"test-{n}",
                "question": f"{n}?",
                "correct": correct,
                "strict_match": strict,
                "flexible_extract": correct,
                "strict_format": strict,
            }
            for n, (correct, strict) in enumerate(found)
        ]
        data.write_rows(run.path / "eval" / label / "test.jsonl", rows)
    evaluation.compare(run, "base", "sft")
    return run.report()


def test_a_verdict_is_compared_item_by_item(compared):
    shown = cells(comparison.differences_table(compared))
    assert shown["models"] == "base -> after SFT"
    assert (shown["set"], shown["what"]) == ("test", "right")
    assert (shown["gained"], shown["lost"]) == ("2", "1")
    assert shown["difference [95 %]"].startswith("+20.0 points [")
    assert shown["McNemar's exact p"] == "1"


def test_every_verdict_has_a_row(compared):
    rows = comparison.differences_table(compared).rows
    assert [row[2] for row in rows] == [
        "right",
        "strict match",
        "flexible extract",
        "format",
    ]


def test_in_brief_only_right_answers_are_compared(compared):
    rows = comparison.differences_table(compared, brief=True).rows
    assert [row[2] for row in rows] == ["right"]


def test_a_gain_is_told_apart_into_format_and_reasoning(compared):
    shown = cells(comparison.gain_table(compared))
    assert shown["strict match"] == "+2"
    assert (shown["of it format"], shown["of it reasoning"]) == ("+1", "+1")


def test_a_text_metric_is_compared_by_its_mean():
    rouge = {"mean": 0.125, "n": 8, "low": -0.01, "high": 0.25}
    report = {"comparisons": {"base -> sft": {"test_chat": {"rougeL": rouge}}}}
    shown = cells(comparison.differences_table(report))
    assert shown["what"] == "ROUGE-L"
    assert shown["difference [95 %]"] == "+0.125 [-0.010, +0.250]"
    assert shown["gained"] == shown["McNemar's exact p"] == "-"


def test_a_report_without_comparisons_has_empty_tables():
    assert comparison.differences_table({}).rows == []
    assert comparison.gain_table({}).rows == []
