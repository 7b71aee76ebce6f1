"""Tests of what helpers.evaluation computes and shows without a model."""

from __future__ import annotations

import math

import pytest

from helpers import evaluation

Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(k: int, n: int) -> tuple[float, float]:
    """The interval by its closed formula, without scipy."""
    p = k / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def part(k: int, k_new: int, **changes):
    """One model's part of a report, as `evaluate` writes it."""
    strict = {"strict_format": evaluation.proportion(k, 200)}
    return {
        "accuracy": evaluation.proportion(k, 200),
        "accuracy_new": evaluation.proportion(k_new, 100),
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


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (45, 100), (1, 7), (180, 400)]
)
def test_a_proportion_has_the_wilson_interval(k, n):
    low, high = wilson(k, n)
    found = evaluation.proportion(k, n)
    assert (found["k"], found["n"]) == (k, n)
    assert found["low"] == pytest.approx(low, abs=6e-5)
    assert found["high"] == pytest.approx(high, abs=6e-5)


def test_a_proportion_has_the_published_interval_of_81_of_263():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, score method
    found = evaluation.proportion(81, 263)
    assert (found["low"], found["high"]) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_four_times_the_problems_halve_the_interval():
    few, many = evaluation.proportion(45, 100), evaluation.proportion(180, 400)
    ratio = (few["high"] - few["low"]) / (many["high"] - many["low"])
    assert ratio == pytest.approx(2, rel=0.05)


def test_a_percentage_comes_with_its_counts_and_its_interval():
    found = evaluation.percent({"k": 1, "n": 8, "low": 0.02242, "high": 0.47089})
    assert found == "1/8 = 12.5 % [2.2, 47.1]"


def test_a_table_is_aligned_in_a_terminal():
    table = evaluation.Table(["a", "long"], [["wide cell", "x"], ["b", "y"]])
    assert repr(table) == "a          long\nwide cell  x\nb          y"


def test_a_table_without_rows_shows_its_header():
    assert repr(evaluation.Table(["a", "b"], [])) == "a  b"


def test_a_table_is_html_in_a_notebook():
    html = evaluation.Table(["a", "b"], [["1", "2"]])._repr_html_()
    head, body = "<tr><th>a</th><th>b</th></tr>", "<tr><td>1</td><td>2</td></tr>"
    assert html == f"<table>{head}{body}</table>"


def test_a_table_escapes_what_a_model_wrote():
    html = evaluation.Table(["<h>"], [["<script>a & b</script>"]])._repr_html_()
    assert "<script>" not in html and "<h>" not in html
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in html


def test_the_results_table_has_one_row_a_model_in_the_order_of_the_report(report):
    table = evaluation.results_table(report)
    assert [row[0] for row in table.rows] == ["base", "after SFT", "mine"]
    assert {len(row) for row in table.rows} == {len(table.header)}


def test_the_results_table_gives_counts_with_intervals_and_the_loss(report):
    row = evaluation.results_table(report).rows[1]
    assert row[1].startswith("90/200 = 45.0 % [38.")
    assert row[2].startswith("20/100 = 20.0 % [13.")
    assert row[3] == "1.235"


def test_the_results_table_gives_minutes_and_a_dash_for_an_untrained_model(report):
    rows = evaluation.results_table(report).rows
    assert [row[4] for row in rows] == ["-", "2.5", "-"]
    assert [row[5] for row in rows] == ["1.5"] * 3


def test_the_peak_is_the_higher_one_of_training_and_evaluation(report):
    rows = evaluation.results_table(report).rows
    assert [row[6] for row in rows] == ["1.50", "2.25", "1.50"]


def test_a_summary_counts_answers_formats_stops_and_tokens():
    verdicts = [(True, True, True, 10), (True, False, True, 20), (False, True, True, 5)]
    verdicts.append((False, False, False, 64))
    keys = ("correct", "strict_format", "stopped", "tokens")
    items = [dict(zip(keys, verdict, strict=True)) for verdict in verdicts]
    assert evaluation.summarise(items) == {
        "accuracy": evaluation.proportion(2, 4),
        "strict_format": evaluation.proportion(2, 4),
        "stop_rate": 0.75,
        "tokens": 99,
    }


def test_the_drawing_is_a_png_file(report, tmp_path):
    path = tmp_path / "results.png"
    evaluation.draw_results(report, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_drawing_has_a_bar_for_every_model_and_set(report, tmp_path):
    figure = evaluation.draw_results(report, tmp_path / "results.png")
    heights = [[bar.get_height() for bar in group] for group in bars(figure)]
    assert heights == [[5.0, 5.0], [45.0, 20.0], [0.0, 100.0]]


def test_the_drawing_names_every_model(report, tmp_path):
    figure = evaluation.draw_results(report, tmp_path / "results.png")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["base", "after SFT", "mine"]


def test_the_error_bars_are_the_intervals(report, tmp_path):
    figure = evaluation.draw_results(report, tmp_path / "results.png")
    segments = bars(figure)[1].errorbar.lines[2][0].get_segments()
    expected = evaluation.proportion(90, 200)
    assert segments[0][:, 1] == pytest.approx(
        [100 * expected["low"], 100 * expected["high"]]
    )


def bars(figure):
    from matplotlib.container import BarContainer

    return [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]
