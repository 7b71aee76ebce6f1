"""The blind form in a real JupyterLab, answered by keyboard alone."""

from __future__ import annotations

import pytest
import test_config_form_browser as browser
from test_config_form_browser import notebook, page, run_cell  # noqa: F401

from helpers import recipes, runs
from helpers.data import preparation as data
from helpers.widgets import ratings

pytestmark = browser.pytestmark

SHOW = """\
from helpers import blind, runs

run = runs.open_run()
form = blind.form(run, ("base", "sft"))
form"""
READ = """\
from helpers import ratings

ratings.result(run, ("base", "sft"))"""
MODELS = ("base", "sft")


@pytest.fixture(autouse=True)
def cells(runs_home, monkeypatch):
    """Puts the form's cells into the notebook, over the answers of two models."""
    monkeypatch.setattr(browser, "SHOW", SHOW)
    monkeypatch.setattr(browser, "READ", READ)
    run = runs.save_run(recipes.load("smoke"))
    for label in MODELS:
        rows = [
            {"id": f"test-{n}", "question": f"{n}?", "output": f"{label[::-1]} {n}"}
            for n in range(6)
        ]
        data.write_rows(run.path / "eval" / label / "test.jsonl", rows)
    return run


def test_pairs_are_rated_by_keys_by_buttons_and_by_tab_and_space(page, cells):  # noqa: F811
    from playwright.sync_api import expect

    form = run_cell(page, 0)
    keys = form.get_by_label("keys")
    keys.click()
    page.keyboard.type("q1", delay=150)
    expect(form.get_by_text("1 of 6 rated")).to_be_visible()
    page.keyboard.type("23", delay=20)
    expect(form.get_by_text("3 of 6 rated")).to_be_visible()

    form.get_by_role("button", name="A is better").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(form.get_by_text("4 of 6 rated")).to_be_visible()

    form.get_by_label("creative (e)").focus()
    page.keyboard.press("Space")
    form.get_by_role("button", name="about the same").click()
    expect(form.get_by_text("5 of 6 rated")).to_be_visible()

    page.screenshot(path=browser.ARTIFACTS / "blind.png")
    rows = data.read_rows(ratings.path_of(cells, MODELS))
    assert [row["verdict"] for row in rows] == ["A", "B", "tie", "B", "tie"]
    marks = [sum(row["marks"].values(), []) for row in rows]
    assert marks == [["coherent"], [], [], [], ["creative"]]
    expect(run_cell(page, 1)).to_contain_text("5 pairs rated blind, 2 about the same")
