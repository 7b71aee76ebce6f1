"""The pages of `make site`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

soup = pytest.importorskip("bs4")

from benchmarks import pages as builder  # noqa: E402


def test_every_link_and_picture_between_pages_is_there(tmp_path: Path) -> None:
    builder.main(tmp_path / "site")
    pages = {
        path: soup.BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted((tmp_path / "site").rglob("*.html"))
    }
    assert len(pages) >= 13
    broken, followed = [], 0
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
    assert broken == []
    assert followed > 100
