"""Tests of what helpers.evaluation.results shows of a report."""

from __future__ import annotations

import pytest

from helpers.evaluation import results
from helpers.evaluation import stats as intervals


def part(k: int, k_new: int, **changes):
    """One model's part of a report, as `evaluate` writes it."""
    strict = {"strict_format": intervals.proportion(k, 200)}
    return {
        "accuracy": intervals.proportion(k, 200),
        "accuracy_new": intervals.proportion(k_new, 100),
        "eval_loss": 1.23456,
        "perplexity": 3.437,
        "test": strict,
        "test_new": strict,
        "seconds": 90.0,
        "peak_memory_gb": 1.5,
    } | changes


@pytest.fixture
def report():
    return {
        "run": {"name": "mine", "recipe": "demo"},
        "sft": {"seconds": 150.0, "peak_memory_gb": 2.25},
        "eval": {"base": part(10, 5), "sft": part(90, 20), "mine": part(0, 100)},
    }


def test_a_percentage_comes_with_its_counts_and_its_interval():
    found = results.percent({"k": 1, "n": 8, "low": 0.02242, "high": 0.47089})
    assert found == "1/8 = 12.5 % [2.2, 47.1]"


def test_a_table_is_aligned_in_a_terminal():
    table = results.Table(["a", "long"], [["wide cell", "x"], ["b", "y"]])
    assert repr(table) == "a          long\nwide cell  x\nb          y"


def test_a_table_without_rows_shows_its_header():
    assert repr(results.Table(["a", "b"], [])) == "a  b"


def test_a_table_is_html_in_a_notebook():
    html = results.Table(["a", "b"], [["1", "2"]])._repr_html_()
    left = ' style="text-align:left"'
    head = f"<tr><th{left}>a</th><th{left}>b</th></tr>"
    cell = ' style="text-align:left;white-space:pre-wrap"'
    body = f"<tr><td{cell}>1</td><td{cell}>2</td></tr>"
    assert html == f"<table>{head}{body}</table>"


def test_a_table_escapes_what_a_model_wrote():
    html = results.Table(["<h>"], [["<script>a & b</script>"]])._repr_html_()
    assert "<script>" not in html and "<h>" not in html
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in html


def test_the_notes_of_a_table_stand_below_it_and_are_escaped():
    table = results.Table(["a"], [["1"]], ["x < y"])
    assert repr(table) == "a\n1\nx < y"
    assert table._repr_html_().endswith("</table><div>x &lt; y</div>")


def test_a_template_with_a_value_that_is_absent_is_refused():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="'table' is undefined"):
        results.render("table.html")


def test_the_rates_table_has_every_verdict_of_every_model_and_set(report):
    strict = {"strict_match": intervals.proportion(80, 200), "truncated": 3}
    report["eval"]["sft"]["test"] |= strict
    table = results.rates_table(report)
    assert [row[:2] for row in table.rows[:3]] == [
        ["base", "test"],
        ["base", "test_new"],
        ["after SFT", "test"],
    ]
    shown = dict(zip(table.header, table.rows[2], strict=True))
    assert shown["right"].startswith("90/200 = 45.0 % [")
    assert shown["strict match"].startswith("80/200 = 40.0 % [")
    assert shown["format"].startswith("90/200")
    assert (shown["flexible extract"], shown["cut off"]) == ("-", "3")


def test_a_model_that_was_only_judged_is_no_row(report):
    report["eval"]["other"] = {"mt_bench": {"score": 5.0}}
    assert len(results.results_table(report).rows) == 3
    assert len(results.rates_table(report).rows) == 6


def test_text_metrics_have_their_intervals(chats):
    from helpers.evaluation import text_metrics as metrics

    texts = [("a cat sat", "a cat sat"), ("a dog", "a bird flew away")]
    rows = [{"output": o, "reference": r, **metrics.score(o, r)} for o, r in texts]
    chats["eval"]["sft"]["test_chat"] |= metrics.summarise(rows)
    table = results.texts_table(chats)
    assert len(table.rows) == 1
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert (shown["model"], shown["set"]) == ("after SFT", "test_chat")
    assert shown["exact match"] == "0.500 [0.000, 1.000]"
    assert float(shown["chrF"]) > 0


def test_rates_of_labels_have_a_table_of_their_own(chats):
    from helpers.evaluation import text_metrics as metrics

    items = [{"output": o, "reference": "a"} for o in ("a", "b", "so: a")]
    rates = metrics.classify(items, ["a", "b"])
    chats["eval"]["sft"]["test_chat"] = {"loss": 1.0, "labels": rates}
    table = results.labels_table(chats)
    share = results.percent(rates["accuracy"])
    assert table.rows == [["after SFT", "test_chat", share, "0.250", "1"]]
    assert results.texts_table(chats).rows == []


def test_a_run_without_problems_has_no_rates(chats):
    assert results.rates_table(chats).rows == []


def test_the_results_table_has_one_row_a_model_in_the_order_of_the_report(report):
    table = results.results_table(report)
    assert [row[0] for row in table.rows] == ["base", "after SFT", "mine"]
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_the_results_table_gives_counts_with_intervals_and_the_loss(report):
    row = results.results_table(report).rows[1]
    assert row[1].startswith("90/200 = 45.0 % [38.")
    assert row[2].startswith("20/100 = 20.0 % [13.")
    assert row[3] == "1.235"


def test_the_results_table_gives_minutes_and_a_dash_for_an_untrained_model(report):
    rows = results.results_table(report).rows
    assert [row[4] for row in rows] == ["-", "2.5", "-"]
    assert [row[5] for row in rows] == ["1.5"] * 3


def test_the_peak_is_the_higher_one_of_training_and_evaluation(report):
    rows = results.results_table(report).rows
    assert [row[6] for row in rows] == ["1.50", "2.25", "1.50"]


def test_the_drawing_is_a_png_file(report, tmp_path):
    path = tmp_path / "results.png"
    results.draw_results(report, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_drawing_has_a_bar_for_every_model_and_set(report, tmp_path):
    figure = results.draw_results(report, tmp_path / "results.png")
    heights = [[bar.get_height() for bar in group] for group in bars(figure)]
    assert heights == [[5.0, 5.0], [45.0, 20.0], [0.0, 100.0]]


def test_the_drawing_names_every_model(report, tmp_path):
    figure = results.draw_results(report, tmp_path / "results.png")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["base", "after SFT", "mine"]


def test_the_error_bars_are_the_intervals(report, tmp_path):
    figure = results.draw_results(report, tmp_path / "results.png")
    segments = bars(figure)[1].errorbar.lines[2][0].get_segments()
    expected = intervals.proportion(90, 200)
    assert segments[0][:, 1] == pytest.approx(
        [100 * expected["low"], 100 * expected["high"]]
    )


def bars(figure):
    from matplotlib.container import BarContainer

    return [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]


@pytest.fixture
def chats():
    """The report of a run that holds conversations out and no problems."""

    def measured(loss):
        test_chat = {"loss": loss + 0.1, "perplexity": 1.0}
        times = {"seconds": 60.0, "peak_memory_gb": 1.0}
        return {"eval_loss": loss, "perplexity": 1.0, "test_chat": test_chat, **times}

    run = {"name": "mine", "recipe": "dolly-llama2-7b"}
    return {"run": run, "eval": {"base": measured(2.5), "sft": measured(1.75)}}


def test_the_results_table_has_columns_for_what_was_measured_only(chats):
    table = results.results_table(chats)
    assert table.header[:3] == ["model", "eval loss", "test_chat loss"]
    assert [row[:3] for row in table.rows] == [
        ["base", "2.500", "2.600"],
        ["after SFT", "1.750", "1.850"],
    ]


def test_a_model_without_a_value_that_others_have_gets_a_dash(chats):
    chats["eval"]["sft"]["accuracy"] = intervals.proportion(1, 2)
    column = [row[1] for row in results.results_table(chats).rows]
    assert column[0] == "-" and column[1].startswith("1/2")


def test_losses_are_drawn_where_no_problems_are_held_out(chats, tmp_path):
    figure = results.draw_results(chats, tmp_path / "results.png")
    heights = [[bar.get_height() for bar in group] for group in bars(figure)]
    assert heights == [[2.5, pytest.approx(2.6)], [1.75, pytest.approx(1.85)]]
    assert "lower is better" in figure.axes[0].get_ylabel()


def test_one_kind_of_problems_alone_is_drawn_alone(report, tmp_path):
    for part in report["eval"].values():
        del part["accuracy_new"]
    figure = results.draw_results(report, tmp_path / "results.png")
    heights = [[bar.get_height() for bar in group] for group in bars(figure)]
    assert heights == [[5.0], [45.0], [0.0]]
