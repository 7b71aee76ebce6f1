"""The pages of `make site`."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

soup = pytest.importorskip("bs4")

from benchmarks import pages as builder  # noqa: E402


def test_links_and_pictures_are_there_and_formulas_need_no_network(
    tmp_path: Path,
) -> None:
    builder.main(tmp_path / "site")
    pages = {
        path: soup.BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted((tmp_path / "site").rglob("*.html"))
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
