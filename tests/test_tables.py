"""Tables and bars of reports, of one run and of several."""

from typing import Any

import pytest

from benchmarks import publish, sft_speed
from helpers import recipes, runs
from helpers.config import changed
from helpers.evaluation import metrics, tables

Report = dict[str, Any]


@pytest.fixture
def report():
    """The report of a run with three evaluated models, and one that was judged only."""
    report = {"sft": {"seconds": 150.0, "peak_memory_gb": 2.25}, "eval": {}}
    for label, k, k_new in (("base", 10, 5), ("sft", 90, 20), ("mine", 0, 99)):
        rate = metrics.proportion(k, 200)
        report["eval"][label] = {
            "test": {"correct": rate, "strict_format": rate, "stop_rate": 0.5},
            "test_new": {"correct": metrics.proportion(k_new, 100), "stop_rate": 0.5},
            "eval_loss": 1.2346,
            "seconds": 90.0,
            "peak_memory_gb": 1.5,
        }
    report["eval"]["judged"] = {"mt_bench": {"score": 5.0}}
    return report


@pytest.fixture
def chats():
    """The report of a run that holds conversations out and no problems."""
    costs = {"seconds": 60.0, "peak_memory_gb": 1.0}
    losses = {"base": 2.5, "sft": 1.75}
    parts = {
        label: {"eval_loss": loss, "test_chat": {"loss": loss + 0.1}, **costs}
        for label, loss in losses.items()
    }
    return {"eval": parts}


def test_the_results_table_has_accuracies_losses_and_costs(report, chats):
    table = tables.results_table(report)
    assert list(table.index) == ["base", "after SFT", "mine"]
    assert table.loc["after SFT"].to_dict() == {
        "test: right [95 %]": "90/200 = 45.0 % [38.3, 51.9]",
        "test_new: right [95 %]": "20/100 = 20.0 % [13.3, 28.9]",
        "eval loss": 1.2346,
        "train min": "2.5",
        "eval min": "1.5",
        "peak GB": 2.25,
    }
    assert list(table["train min"]) == ["-", "2.5", "-"]
    assert list(table["peak GB"]) == [1.5, 2.25, 1.5]
    table = tables.results_table(chats)  # only what was measured has a column
    assert list(table) == ["eval loss", "test_chat loss", "eval min", "peak GB"]
    assert list(table["test_chat loss"]) == [2.6, 1.85]


def test_the_scores_table_has_every_verdict_and_metric_of_every_model(report, chats):
    table = tables.scores_table(report)
    sets = [(m, s) for m in ("base", "after SFT", "mine") for s in ("test", "test_new")]
    assert list(table.index) == sets
    row = table.loc[("after SFT", "test")]
    assert row["strict_format"].startswith("90/200 = 45.0 % [")
    assert row["stop_rate"] == 0.5
    assert table.loc[("base", "test_new"), "strict_format"] == "-"
    assert "rougeL" not in table
    rouge = {"mean": 0.5, "n": 2, "low": 0.0, "high": 1.0}
    chats["eval"]["sft"]["test_chat"] |= {"rougeL": rouge, "bleu": {"score": 7.25}}
    chats["eval"]["base"]["eval_text"] = {"macro_f1": 0.25, "no_label": 1}
    table = tables.scores_table(chats)
    names = ["loss", "macro_f1", "no_label", "rougeL", "bleu"]
    assert {place: list(row[names]) for place, row in table.iterrows()} == {
        ("base", "test_chat"): [2.6, *"----"],
        ("base", "eval"): ["-", 0.25, 1, "-", "-"],
        ("after SFT", "test_chat"): [1.85, "-", "-", "0.500 [0.000, 1.000]", "7.2"],
    }


def test_differences_are_shown_set_by_set():
    right = metrics.paired_difference([False, True], [True, True])
    gain = {"only_first": 0, "only_second": 1}
    rouge = {"difference": 0.125, "n": 8, "low": -0.01, "high": 0.25}
    sets = {"test": {"by format": gain, "correct": right}, "test_chat": {"r": rouge}}
    table = tables.differences_table({"comparisons": {"base -> sft": sets}})
    names = ["only_first", "only_second", "difference", "low", "high", "p"]
    assert {index: list(row[names]) for index, row in table.iterrows()} == {
        ("base -> sft", "test", "by format"): [0, 1, "-", "-", "-", "-"],
        ("base -> sft", "test", "correct"): [0, 1, 0.5, 0.0, 1.0, "1"],
        ("base -> sft", "test_chat", "r"): ["-", "-", 0.125, -0.01, 0.25, "-"],
    }
    assert "1.0" not in table["only_second"].to_string()  # counts stay whole numbers
    assert len(tables.differences_table({})) == len(tables.results_table({})) == 0


def heights(axes):
    """The heights of the bars of each model."""
    groups = [group for group in axes.containers if hasattr(group, "patches")]
    return [[bar.get_height() for bar in group] for group in groups]


def test_the_plot_has_a_bar_with_its_interval_for_every_model_and_set(
    report, chats, tmp_path
):
    axes = tables.plot_results(report, tmp_path / "results.png").axes[0]
    assert heights(axes) == [[5.0, 5.0], [45.0, 20.0], [0.0, 99.0]]
    assert (tmp_path / "results.png").stat().st_size > 0
    errors = [group for group in axes.containers if not hasattr(group, "patches")]
    ends = errors[1].lines[2][0].get_segments()[0][:, 1]
    interval = report["eval"]["sft"]["test"]["correct"]
    assert ends == pytest.approx([100 * interval["low"], 100 * interval["high"]])
    axes = tables.plot_results(chats, tmp_path / "results.png").axes[0]
    assert heights(axes) == [[2.5, 2.6], [1.75, 1.85]]
    assert "lower is better" in axes.get_ylabel()


def make_run(name, recipe="smoke", **parts):
    """Makes a run whose SFT stage is trained and evaluated, with other values."""
    run = runs.save_run(changed(recipes.load(recipe), name=name))
    measured = {"eval_loss": 0.787, "test": {"correct": metrics.proportion(45, 100)}}
    values = {
        "environment": {"device": "cuda: Tesla T4"},
        "data": {"fingerprints": {"train": name, "eval": "e1", "test": "t1"}},
        "sft": {"steps": 40, "seconds": 3053.8, "loss_last": 0.75},
        "eval": {"sft": measured},
    }
    for part, value in (values | parts).items():
        if value:
            run.write_part(part, value)


def test_every_stage_of_every_trained_run_has_a_row(runs_home):
    assert len(tables.runs_table()) == 0
    published = "finetome-llama32-3b-b"
    make_run("b", published, grpo={"steps": 8, "reward_first": 0.25})
    make_run("a", eval=None)
    make_run("c", sft=None)
    table = tables.runs_table()
    right = "45/100 = 45.0 % [35.6, 54.8]"
    names = ["steps", "loss_last", "reward_first", "train min"]
    names += ["test: right [95 %]", "eval loss"]
    assert {index: list(row[names]) for index, row in table.iterrows()} == {
        ("b", "after SFT"): [40, 0.75, "-", "50.9", right, 0.787],
        ("b", "after GRPO"): [8, "-", 0.25, "-", "-", "-"],
        ("a", "after SFT"): [40, 0.75, "-", "50.9", "-", "-"],
        (f"{published}, published", "after SFT"): ["-", "-", "-", "50.9", "-", "-"],
    }


def test_other_machines_and_other_held_out_rows_are_seen(runs_home):
    make_run("a")
    make_run("b", environment={"device": "cpu: 2 cores"})
    make_run("c", data={"fingerprints": {"eval": "e2", "test": "t1"}})
    table = tables.runs_table()
    a, b, c = table["held-out rows"]
    assert a == b != c
    assert list(table["device"]) == ["cuda: Tesla T4", "cpu: 2 cores", "cuda: Tesla T4"]


def test_a_ratio_to_stock_has_the_spread_of_both():
    stock = {"tokens_per_second": 1000, "s_step": 2.0, "s_step_repeats": [1.0, 3.0]}
    row = {"tokens_per_second": 4000, "s_step": 0.5, "s_step_repeats": [0.5, 0.5]}
    assert sft_speed.times_stock(row, stock) == (4.0, 2.0, 6.0)
    row["first_step_s"] = 10.0
    assert sft_speed.run_seconds(row) == 10.0 + 199 * 0.5


def test_a_way_that_failed_has_a_row_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sft_speed, "RESULT", tmp_path / "sft_speed.json")
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    sft_speed.write_errors("one GPU", "1b", "compiled", "chat,long", "no Triton")
    text = "\n".join(publish.speed_section())
    assert "| 1b | chat | compiled | failed: no Triton |" in text
    assert "| 1b | long | compiled | failed: no Triton |" in text
    again = tmp_path / "again.json"
    again.write_text(sft_speed.RESULT.read_text())
    sft_speed.merge([str(again)])
    assert len(publish.sft_rows()) == 2


def test_the_page_on_scaling_has_the_measured_speedups():
    page = (publish.ROOT / "docs" / "scaling.md").read_text("utf-8")
    rows = publish.read(publish.RESULTS / "scale.json")["rows"]
    lines = {}
    for row in [r for r in rows if r["part"] == "sft" and r["gpus"] > 1]:
        place = 2 * (row["rows"] == "in_all") + (row["gpus"] > 2)
        start = f"| {row['shape']}, {row['engine']}, {row['rows_a_step']} |"
        cells = lines.setdefault(start, ["-"] * 4)
        cells[place] = f"{row['speedup']:.2f}"
    assert lines
    for start, cells in lines.items():
        assert f"{start} {' | '.join(cells)} |" in page


def test_the_page_on_reliability_has_what_a_gpu_gave():
    page = (publish.ROOT / "docs" / "reliability.md").read_text("utf-8")
    values = publish.read(publish.RESULTS / "gpu_kills.json")
    assert {row["largest_difference"] for row in values["sft"]} == {0.0}
    assert sum(row["killed"] for row in values["sft"]) == 6
    assert "six SFT runs of 60 steps were killed" in page
    (row,) = values["grpo"]
    assert f"used {row['used_s']:.1f} of its {row['budget_s']:.0f} seconds" in page
