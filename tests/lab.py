"""A notebook in JupyterLab, open in a headless Chromium."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WAIT_S = 120  # busy cores may take a minute for what takes them five seconds at rest


@contextmanager
def open_notebook(folder, *cells, **variables):
    """Yields Playwright's page, 1280 x 1250 pixels, of a notebook with these cells.

    `variables` are of the environment. Without a browser the test is skipped.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    driver = pytest.importorskip("playwright.sync_api")
    driver.expect.set_options(timeout=1000 * WAIT_S)
    with serve(folder, cells, variables) as address, driver.sync_playwright() as play:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = play.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1280, "height": 1250})
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(address)
        # a cell that is run before the kernel answers is lost
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        yield page
        browser.close()


@contextmanager
def serve(folder, cells, variables):
    """Yields the address of a notebook in a JupyterLab."""
    pytest.importorskip("jupyterlab")
    sources = [nbformat.v4.new_code_cell(source) for source in cells]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    content = nbformat.v4.new_notebook(cells=sources, metadata=kernel)
    nbformat.write(content, folder / "form.ipynb")
    # on its first start JupyterLab asks in a window whether it may fetch news
    news = folder / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token="]
    command += ["--ip=127.0.0.1", f"--port={port}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    for name in ("LAB_WORKSPACES", "LAB_SETTINGS", "_CONFIG", "_RUNTIME"):
        environment[f"JUPYTER{name}_DIR"] = str(folder)
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


def run_cell(page, number):
    """Runs a cell by the toolbar; returns its output area."""
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.locator(".jp-InputPrompt").click()
    page.locator('[data-command="notebook:run-cell-and-select-next"]').first.click()
    return cell.locator(".jp-OutputArea")
