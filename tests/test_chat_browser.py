"""The chat page in a headless Chromium, used as a reader would."""

import os
import re
import time
from pathlib import Path

import pytest

from helpers.inference import chat
from tests.lab import CHROMIUM, WAIT_S

HOSTILE = """<img src="http://evil.test/a.png" onerror="document.title='bad'"> \
<script>document.title='bad'</script> <b>bold</b> $$x^2$$ **strong** \
![image](http://evil.test/b.png) [link](http://evil.test/c) <iframe src="//evil.test">
def f():
    return 1
<think>why</think> &lt;b&gt; http://evil.test/d"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)


def stream(messages, sampling, adapter=True):
    """Answers with hostile text, counts without end, or names what it was given."""
    prompt = messages[-1]["content"]
    if prompt == "count":
        text = ""
        for number in range(sampling["max_new_tokens"]):
            text += f"{number} "
            time.sleep(0.05)
            yield text
    elif prompt == "attack":
        yield HOSTILE
    else:
        roles = " ".join(m["role"] for m in messages)
        yield f"{'tuned' if adapter else 'base'} {roles} {sampling}"


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio")
    settings = {"title": "<i>finetome</i>", "system_prompt": "Be brief."}
    settings |= {"sampling": {"max_new_tokens": 400, "min_p": 0.1}}
    page = chat.build_page(stream, "smollm2, float32, adapter: sft", settings, True)
    chat.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(address, request, tmp_path):
    """The page in a window; no request has gone elsewhere when it is closed."""
    driver = pytest.importorskip("playwright.sync_api")
    driver.expect.set_options(timeout=1000 * WAIT_S)
    with driver.sync_playwright() as play:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = play.chromium.launch(**options)
        page = browser.new_page(viewport={"width": request.param, "height": 900})
        page.set_default_timeout(1000 * WAIT_S)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.get_by_role("textbox", name="Message").wait_for()
        yield page
        folder = Path(os.environ.get("TUNEBOOK_SCREENSHOTS", tmp_path))
        page.screenshot(path=folder / f"{request.node.name}.png", full_page=True)
        browser.close()
    local = (address, "data:", "blob:")
    assert [url for url in requests if not url.startswith(local)] == []


def send(page, text):
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("textbox", name="Message").press("Enter")


def test_hostile_answers_are_shown_as_the_text_they_are(page):
    from playwright.sync_api import expect

    send(page, "attack")
    answer = page.get_by_test_id("bot").first
    expect(answer).to_contain_text("http://evil.test/d")
    assert answer.inner_text().strip() == HOSTILE.strip()
    inside = "img, script, iframe, b, a, strong, .katex, [onerror]"
    assert answer.locator(inside).count() == 0
    assert page.title() == "<i>finetome</i>" and page.locator("h1 i").count() == 0


def test_an_answer_grows_is_stopped_and_a_slider_shortens_the_next(page):
    from playwright.sync_api import expect

    send(page, "count")
    answers = page.get_by_test_id("bot")
    expect(answers.first).to_contain_text("3")
    expect(answers.first).to_contain_text("15")  # the same answer, later
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1000)
    text = answers.first.inner_text()
    page.wait_for_timeout(1000)
    assert answers.first.inner_text() == text and "399" not in text
    page.get_by_label("number input for max_new_tokens").fill("5")
    page.get_by_label("number input for max_new_tokens").press("Tab")
    send(page, "count")
    expect(answers.nth(1)).to_have_text("0 1 2 3 4")
    speed = page.get_by_role("textbox").first
    expect(speed).to_have_value(re.compile("tokens/s, first after"))
    page.get_by_role("button", name="New conversation").click()
    expect(answers).to_have_count(0)


def test_base_and_tuned_answer_the_same_prompt_side_by_side(page):
    from playwright.sync_api import expect

    page.get_by_label("Compare with the base").check()
    expect(page.get_by_text("base", exact=True).first).to_be_visible()
    page.get_by_label("number input for temperature").fill("0.5")
    page.get_by_label("number input for temperature").press("Tab")
    send(page, "hi")
    answers = page.get_by_test_id("bot")
    expect(answers.nth(1)).to_contain_text("base system user")
    for number, label in enumerate(["tuned", "base"]):
        text = answers.nth(number).inner_text()
        assert text.startswith(f"{label} system user")
        assert "'temperature': 0.5" in text and "'min_p': 0.1" in text
