"""The config form in JupyterLab, driven in a headless Chromium as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WAIT_S = 120  # busy cores may take a minute for what takes them five seconds at rest

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)

SHOW = """\
from helpers import runs, widgets

form = widgets.ConfigForm(runs.open_run(), "sft")
form"""
READ = "print(form.config.sft['max_steps'])"


@pytest.fixture
def notebook(runs_home: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a notebook with the form's cell, open in a JupyterLab."""
    pytest.importorskip("jupyterlab")
    cells = [nbformat.v4.new_code_cell(source) for source in (SHOW, READ)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    content = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(content, tmp_path / "form.ipynb")
    # on its first start JupyterLab asks in a window whether it may fetch news
    news = tmp_path / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token="]
    command += ["--ip=127.0.0.1", f"--port={port}"]
    environment = os.environ | {"TUNEBOOK_RUN": "smoke", "PYTHONPATH": str(ROOT)}
    for name in ("LAB_WORKSPACES", "LAB_SETTINGS", "_CONFIG", "_RUNTIME"):
        environment[f"JUPYTER{name}_DIR"] = str(tmp_path)
    lab = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + WAIT_S
        while lab.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/form.ipynb"
    finally:
        lab.terminate()
        lab.wait()


@pytest.fixture
def page(notebook: str) -> Iterator[object]:
    """The notebook in a page of 1280 x 1250 pixels."""
    driver = pytest.importorskip("playwright.sync_api")
    driver.expect.set_options(timeout=1000 * WAIT_S)
    with driver.sync_playwright() as play:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = play.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1280, "height": 1250})
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(notebook)
        # a cell that is run before the kernel answers is lost
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        yield page
        browser.close()


def run_cell(page, number):
    """Runs a cell by the toolbar; returns its output area."""
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.locator(".jp-InputPrompt").click()
    page.locator('[data-command="notebook:run-cell-and-select-next"]').first.click()
    return cell.locator(".jp-OutputArea")


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
