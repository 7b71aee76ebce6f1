"""The config form in JupyterLab, driven in a headless Chromium as a user would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import open_notebook, run_cell

SHOW = """\
from helpers import runs, widgets

form = widgets.ConfigForm(runs.open_run(), "sft")
form"""
READ = "print(form.config.sft['max_steps'])"


@pytest.fixture
def page(runs_home: Path, tmp_path: Path) -> Iterator[Any]:
    with open_notebook(tmp_path, SHOW, READ, TUNEBOOK_RUN="smoke") as page:
        yield page


def test_a_value_typed_into_the_page_is_what_the_next_cell_and_the_file_have(
    page, runs_home
):
    from playwright.sync_api import expect

    form = run_cell(page, 0)
    steps = form.get_by_label("sft.max_steps", exact=True)
    expect(steps).to_have_value("4")
    steps.fill("4.5")
    steps.press("Tab")
    expect(form.get_by_text("found 4.5; expected a valid integer")).to_be_visible()
    save = form.get_by_role("button", name="Save")
    expect(save).to_be_disabled()
    steps.fill("7")
    form.get_by_label("sft.per_device_train_batch_size", exact=True).fill("2")
    form.get_by_label("sft.gradient_accumulation_steps", exact=True).fill("3")
    form.get_by_label("sft.learning_rate", exact=True).click()
    expect(form.get_by_text("SFT: 6 rows a step")).to_be_visible()
    save.click()
    expect(form.get_by_text("saved to")).to_be_visible()

    expect(run_cell(page, 1)).to_have_text("7")
    saved = json.loads((runs_home / "smoke" / "config.json").read_text())
    assert saved["sft"]["max_steps"] == 7
    assert saved["sft"]["gradient_accumulation_steps"] == 3
