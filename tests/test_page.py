"""Tests of helpers.evaluation.page: the report of a run as one page."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from helpers import recipes, runs
from helpers.config import changed
from helpers.data import preparation as data
from helpers.evaluation import evaluator as evaluation
from helpers.evaluation import page
from helpers.evaluation.stats import proportion

ANSWER = {"question": "How many?", "gold": "7", "tokens": 4, "stopped": True}
LOADING = ("src", "href", "data", "action", "srcset", "poster")


class Elements(HTMLParser):
    """Collects the elements of a page and checks that they are closed in order."""

    EMPTY = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def items(output, correct):
    verdicts = dict.fromkeys(
        ("correct", "strict_match", "flexible_extract", "strict_format"), correct
    )
    return [{"id": f"test-{n}", "output": output, **ANSWER, **verdicts} for n in "12"]


@pytest.fixture
def run(runs_home):
    """A run with every part of a report, its numbers made up."""
    from matplotlib.figure import Figure

    run = runs.save_run(changed(recipes.load("smoke"), stages=["sft"]))
    run.write_part("environment", {"device": "cpu: x86_64", "versions": {"trl": "1"}})
    prints = {"train": "aaaa1111bbbb", "test": "cccc2222dddd"}
    counts = {"train": 2424, "test": 2, "fingerprints": prints}
    run.write_part("data", counts | {"sources": {"rows.jsonl": {"format": "gsm8k"}}})
    run.write_part("sft", {"steps": 120, "seconds": 90.0, "peak_memory_gb": 2.5})
    values = {"seconds": 60.0, "peak_memory_gb": 1.5}
    for label, (output, k) in {"base": ("six", 0), "sft": ("seven", 2)}.items():
        rows = items(output, k == 2)
        data.write_rows(run.path / "eval" / label / "test.jsonl", rows)
        values = {"accuracy": proportion(k, 2), **values}
        run.write_part("eval", run.report().get("eval", {}) | {label: values})
        values.pop("accuracy")
    evaluation.compare(run, "base", "sft")
    run.write_part("export", {"merged": {"greedy_agreement": 0.9375}})
    (run.path / "sft").mkdir()
    Figure().savefig(run.path / "sft" / "curves.png")
    return run


def titles(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


@pytest.fixture
def text(run):
    return page.write(run).read_text(encoding="utf-8")


def test_the_page_is_written_beside_the_report(run):
    assert page.write(run) == run.path / "report.html"


def test_the_page_is_well_formed(text):
    elements = Elements(text)
    assert elements.open == []
    assert elements.named("html") == [{"lang": "en"}]


def test_every_part_of_the_report_has_a_section(text):
    assert titles(text) == [
        "Results",
        "Models in pairs",
        "Answers side by side",
        "Training: SFT",
        "Export",
        "Data",
        "Environment",
    ]


def test_the_numbers_of_the_report_are_on_the_page(text):
    assert "2/2 = 100.0 % [34.2, 100.0]" in text
    assert "base -&gt; after SFT" in text
    assert "+100.0 points" in text
    assert "0.9375" in text
    assert "2,424" in text and "aaaa1111bbbb" in text
    assert "cpu: x86_64" in text


def test_the_whole_config_is_on_the_page(text):
    assert "&#34;max_steps&#34;: 4" in text


def test_answers_of_the_first_and_the_last_model_stand_side_by_side(text):
    assert "after SFT: better than base in 2, worse in 0, equal in 0 of 2" in text
    assert ">six</del>" in text and ">seven</ins>" in text


def test_nothing_is_loaded_from_anywhere(text):
    loaded = [
        value or ""
        for _, attributes in Elements(text).found
        for name, value in attributes.items()
        if name in LOADING
    ]
    assert len(loaded) == 2
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_pictures_are_embedded_whole_and_say_what_they_show(run, text):
    pictures = {p["alt"]: p["src"] for p in Elements(text).named("img")}
    assert list(pictures) == ["the models: results", "SFT: curves"]
    held = base64.b64decode(pictures["SFT: curves"].partition(",")[2])
    assert held == (run.path / "sft" / "curves.png").read_bytes()


def test_the_page_follows_the_light_or_dark_of_its_reader(text):
    assert "color-scheme: light dark" in text
    colours = re.findall(r"(?:background|color):\s*([^;}\"]+)", text)
    fixed = {c.strip() for c in colours if not c.strip().startswith("rgba(")}
    # a picture has its own black on white
    assert fixed == {"Canvas", "CanvasText", "inherit", "white"}


def test_what_stands_in_the_data_is_escaped(run):
    evil = "<script>alert(1)</script>"
    data.write_rows(run.path / "eval" / "sft" / "test.jsonl", items(evil, True))
    run.write_part("environment", {"device": evil})
    run.write_part("data", {"sources": {evil: {"rows": 2}}})
    text = page.write(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


def test_curves_that_were_never_drawn_are_drawn_from_the_history(run):
    (run.path / "sft" / "curves.png").unlink()
    history = [{"step": n, "loss": 1 / n} for n in (1, 2, 3)]
    runs.write_json(run.path / "sft" / "history.json", history)
    text = page.write(run).read_text(encoding="utf-8")
    assert 'alt="SFT: curves"' in text
    assert (run.path / "sft" / "curves.png").exists()


def test_ratings_by_people_are_on_the_page(run):
    marks = {"coherent": {"base": proportion(1, 2), "sft": proportion(2, 2)}}
    counts = {"rated": 2, "wins": proportion(1, 2), "losses": 1, "ties": 0}
    counts |= {"a_wins": proportion(1, 2), "marks": marks, "models": ["base", "sft"]}
    run.write_part("blind", {"base_sft": counts})
    text = page.write(run).read_text(encoding="utf-8")
    assert "Rated by people, blind" in titles(text)
    assert "2 pairs rated blind, 0 about the same" in text


def test_what_judges_said_is_on_the_page_with_its_picture(run):
    from matplotlib.figure import Figure

    part = run.report()["eval"]
    part["sft"] |= {"mt_bench": {"score": 3.25}, "test_against_base": {"missing": 2}}
    run.write_part("eval", part)
    Figure().savefig(run.path / "eval" / "mt_bench.png")
    text = page.write(run).read_text(encoding="utf-8")
    assert "Judged by a model" in titles(text)
    assert "after SFT: mt bench" in text and "3.25" in text
    assert 'alt="judged: mt bench"' in text


@pytest.mark.parametrize("name", ["alpaca_eval", "alpaca_eval_90", "a_later_bench"])
def test_a_run_that_was_judged_and_not_evaluated_has_a_page(runs_home, name):
    run = runs.save_run(recipes.load("smoke"))
    run.write_part("eval", {"base": {name: {"win_rate": 12.5}}})
    text = page.write(run).read_text(encoding="utf-8")
    assert titles(text) == ["Judged by a model"]
    assert f"base: {name.replace('_', ' ')}" in text and "12.5" in text


def test_what_an_evaluation_measured_is_not_taken_for_a_judges(run):
    part = run.report()["eval"]
    measured = dict.fromkeys(("test", "test_new", "test_chat", "eval_text"), {})
    part["sft"] |= measured | {"accuracy_new": proportion(1, 2)}
    run.write_part("eval", part)
    assert "Judged by a model" not in titles(page.write(run).read_text("utf-8"))


def test_a_run_that_is_only_prepared_has_a_page_of_its_data(runs_home):
    run = runs.save_run(recipes.load("smoke"))
    run.write_part("data", {"train": 24, "fingerprints": {"train": "aaaa1111bbbb"}})
    assert titles(page.write(run).read_text(encoding="utf-8")) == ["Data"]


def test_models_whose_answers_are_not_there_are_not_set_side_by_side(run):
    (run.path / "eval" / "sft" / "test.jsonl").unlink()
    text = page.write(run).read_text(encoding="utf-8")
    assert "Results" in titles(text)
    assert "Answers side by side" not in titles(text)


def test_the_command_writes_the_page_and_prints_where(run, capsys):
    page.main(["smoke"])
    assert capsys.readouterr().out.strip() == str(run.path / "report.html")


def test_the_command_ends_with_a_word_on_a_run_that_is_not_there(runs_home):
    with pytest.raises(SystemExit, match="ConfigError: .*nowhere"):
        page.main(["nowhere"])


def test_lists_flags_and_missing_values_are_readable():
    values = {"by": ["a", "b"], "done": True, "tokens_seen": 21261, "loss": None}
    assert page.flatten({"sft": values}) == [
        ["sft by", "a, b"],
        ["sft done", "True"],
        ["sft tokens seen", "21,261"],
        ["sft loss", "None"],
    ]
