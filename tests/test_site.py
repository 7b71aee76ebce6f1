"""The pages of `make site`."""

import re
from urllib.parse import unquote

import pytest

from tests.test_chat_browser import CHROMIUM

soup = pytest.importorskip("bs4")

from benchmarks import pages as builder  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "site"
    builder.main(folder)
    return folder


def test_links_and_pictures_are_there_and_formulas_need_no_network(site):
    pages = {
        path: soup.BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted(site.rglob("*.html"))
    }
    assert len(pages) >= 13
    broken, followed, formulas = [], 0, 0
    for path, page in pages.items():
        links = [each["href"] for each in page.select("body a[href]")]
        for link in links + [each["src"] for each in page.select("body img[src]")]:
            if link.startswith(("https:", "http:", "data:", "mailto:")):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            followed += 1
            if not target.is_file() or (anchor and not pages[target].find(id=anchor)):
                broken.append(f"{path.name}: {link}")
        formulas += len(page.select("math"))
        tex = " ".join(each.get_text() for each in page.select("math, h1, p"))
        broken += [
            f"{path.name}: {x}" for x in re.findall(r"\$.*\$|\\(?!boxed)\w+", tex)
        ]
        broken += [f"{path.name}: {x}" for x in page.select("script, link[href^=http]")]
        unread = [x for x in page.select("img") if len(x.get("alt", "")) < 12]
        broken += [f"{path.name}: no alt text" for _ in unread]
    assert broken == [], "\n".join(broken)
    assert formulas > 50
    assert followed > 100


CUT = """() => [...document.querySelectorAll("table, pre, .jp-OutputArea-output, div")]
.filter(e => e.scrollWidth > e.clientWidth + 2 || e.scrollHeight > e.clientHeight + 2)
.filter(e => getComputedStyle(e).overflow != "visible").map(e => e.outerHTML)"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_nothing_is_cut_in_print_and_no_page_is_wider_than_a_phone(site):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for path in sorted((site / "notebooks").glob("*.html")):
            page.emulate_media(media="screen")
            page.set_viewport_size({"width": 400, "height": 800})
            page.goto(path.as_uri())
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width == 400, path.name
            page.emulate_media(media="print")
            page.set_viewport_size({"width": 780, "height": 1000})
            assert page.evaluate(CUT) == [], path.name
        browser.close()
