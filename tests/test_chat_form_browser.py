"""The chat form in JupyterLab, driven in a headless Chromium as a user would."""

import re

import pytest

from tests.lab import open_notebook, run_cell

SHOW = """\
import os
from helpers import models, recipes, widgets
from helpers.config import changed

folder = os.environ["FOLDER"]
loaded = models.load_model(folder, adapter=folder + "/adapter")
# with a temperature answers are as long as may be, which is seconds
sampling = {"max_new_tokens": 1900, "min_new_tokens": 1900, "temperature": 1}
config = changed(recipes.load("smoke"), inference=sampling)
form = widgets.ChatForm(*loaded, config)
form"""
READ = "print([len(turns) for turns in form.turns.values()], form.worker.is_alive())"


@pytest.fixture
def page(tiny_model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    from helpers.models import load_model

    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(load_model(str(tiny_model_folder))[0], lora)
    tuned.save_pretrained(tiny_model_folder / "adapter")
    folder = {"FOLDER": str(tiny_model_folder)}
    with open_notebook(tmp_path, SHOW, READ, **folder) as page:
        yield page


def test_a_user_types_reads_stops_changes_sliders_and_compares(page):
    from playwright.sync_api import expect

    form = run_cell(page, 0)
    texts = form.locator(".widget-html")
    base, tuned = (
        texts.filter(has_text=re.compile(f"^{x}")) for x in ("base", "tuned")
    )
    message = form.get_by_label("message", exact=True)
    send, stop = (form.get_by_role("button", name=name) for name in ("Send", "Stop"))

    message.wait_for()
    page.keyboard.press("Control+b")  # away with the list of files
    page.set_viewport_size({"width": 400, "height": 1250})
    right = form.bounding_box()["x"] + form.bounding_box()["width"]
    boxes = [field.bounding_box() for field in form.locator("textarea").all()]
    assert max(box["x"] + box["width"] for box in boxes) <= right
    page.set_viewport_size({"width": 1280, "height": 1250})

    message.fill("Go on for ever, <b id=bold>please</b>")
    send.click()
    expect(tuned).to_contain_text("<b id=bold>please</b>")
    expect(page.locator("#bold")).to_have_count(0)
    expect(message).to_have_value("")
    expect(tuned).to_contain_text("is answering ...")
    message.fill("Another")  # at once: on busy cores the answer may have ended
    send.click()
    expect(form.get_by_text("an answer is being written")).to_be_visible()
    former = tuned.text_content()
    expect(tuned).not_to_have_text(former)  # it grows
    stop.click()
    expect(tuned).to_contain_text(re.compile(r"[1-9]\d* tokens, [\d.]+ tokens/s"))
    assert "1900 tokens" not in tuned.inner_text()
    expect(base).to_have_text("base")

    slider = form.locator(".widget-slider", has_text="max_new_tokens")
    slider.locator(".widget-readout").fill("5")
    slider.locator(".widget-readout").press("Enter")
    send.click()
    for column in (base, tuned):
        expect(column).to_contain_text("Another")
        expect(column).to_contain_text("5 tokens, ")
    form.get_by_label("tuned model alone").check()
    expect(base).to_be_hidden()
    expect(run_cell(page, 1)).to_have_text("[2, 4] False")
