"""The config form in JupyterLab, driven in a headless Chromium as a user would."""

import json

import pytest

from tests.lab import open_notebook, run_cell

SHOW = """\
from helpers import runs, widgets

form = widgets.ConfigForm(runs.open_run(), "sft")
form"""
READ = "print(form.run.config.sft['max_steps'])"
END_KERNELS = """async () => {
  const headers = {"X-XSRFToken": document.cookie.match(/_xsrf=([^;]*)/)[1]};
  for (const session of await (await fetch("/api/sessions")).json())
    await fetch("/api/sessions/" + session.id, {method: "DELETE", headers});
}"""


@pytest.fixture
def page(runs_home, tmp_path):
    with open_notebook(tmp_path, SHOW, READ, TUNEBOOK_RUN="smoke") as page:
        yield page


def test_a_value_typed_into_the_page_is_what_the_next_cell_and_the_file_have(
    page, runs_home
):
    from playwright.sync_api import expect

    form = run_cell(page, 0)
    area = form.get_by_label("data.train", exact=True)
    label = form.locator(".widget-label", has_text="data.train").first
    area.wait_for()
    right = label.bounding_box()["x"] + label.bounding_box()["width"]
    assert area.bounding_box()["x"] >= right  # beside its label, not below
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
    expect(run_cell(page, 1)).to_contain_text("Save or Discard, then go on")
    expect(form.get_by_label("start from")).to_be_disabled()
    save.click()
    expect(form.get_by_text("saved to")).to_be_visible()
    expect(form.get_by_text("sft.max_steps = 7, not 4")).to_be_visible()
    steps.fill("8")
    steps.press("Tab")
    form.get_by_role("button", name="Discard").click()
    expect(steps).to_have_value("7")

    expect(run_cell(page, 1)).to_have_text("7")
    saved = json.loads((runs_home / "smoke" / "config.json").read_text())
    assert saved["sft"]["max_steps"] == 7
    assert saved["sft"]["gradient_accumulation_steps"] == 3

    table = form.locator(".as-table")
    expect(table).to_be_hidden()
    page.keyboard.press("Control+s")
    page.get_by_text("Saving completed").wait_for()
    page.evaluate(END_KERNELS)
    page.reload()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    expect(table.get_by_role("row", name="sft.max_steps 7")).to_be_visible()


def test_every_field_can_be_read_and_reached_in_400_pixels(page):
    form = run_cell(page, 0)
    form.get_by_role("button", name="Save").wait_for()
    page.keyboard.press("Control+b")  # away with the list of files
    page.set_viewport_size({"width": 400, "height": 1250})
    page.wait_for_timeout(1000)
    right = form.bounding_box()["x"] + form.bounding_box()["width"]
    fields = form.locator("input, select, textarea, button, .widget-label")
    boxes = [field.bounding_box() for field in fields.all() if field.is_visible()]
    assert len(boxes) > 40
    assert max(box["x"] + box["width"] for box in boxes) <= right
    inputs = form.locator("input[type=text], select, textarea").all()
    assert min(field.bounding_box()["width"] for field in inputs) > 150
