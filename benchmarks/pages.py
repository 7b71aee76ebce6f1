"""Builds site/: the notebooks with their outputs, README and docs as pages.

python benchmarks/pages.py
"""

from __future__ import annotations

import html as escapes
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
PAGES = ("README.md", "*.md", "notebooks/*.ipynb", "docs/*.md", "results/README.md")
STYLE = """<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { max-width: 60rem; margin: 0 auto !important; padding: 0 1rem 3rem !important; }
nav { padding: .8rem 0; line-height: 2; border-bottom: 1px solid #ccc; }
nav a { margin-right: 1rem; white-space: nowrap; }
.jp-Cell { padding-left: 0; padding-right: 0; }
.jp-OutputArea-child { display: block !important; }
.jp-RenderedHTMLCommon table, .jp-OutputArea-output { max-width: 100%; }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; }
.jp-OutputArea-output { overflow-x: auto; }
.jp-RenderedText pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.jp-RenderedHTMLCommon img, .jp-RenderedSVG svg { max-width: 100%; height: auto; }
.formula { display: block; overflow-x: auto; padding: .5rem 0; font-size: 115%; }
@media (max-width: 40rem) { .jp-RenderedHTMLCommon td { min-width: 5.5rem; } }
@media print {
  nav { display: none; }
  .jp-RenderedHTMLCommon table { display: table; width: 100%; }
  .jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th { overflow-wrap: anywhere; }
  .jp-OutputArea-output, .jp-RenderedHTMLCommon div { overflow: visible !important;
    max-height: none !important; }
  pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
  tr, img, svg { break-inside: avoid; }
}
</style>
</head>"""
SCRIPT = re.compile(r"<script.*?</script>", re.S)  # for formulas, diagrams, widgets
LINK = re.compile(r'(?<=href=")([^":#]*)(\.md|\.ipynb)(?=[#"])')


class Renderer(IPythonRenderer):
    """Writes formulas as MathML, which needs no script and no network."""

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{convert(body, display="block")}</span>'

    def inline_math(self, body: str) -> str:
        return convert(body)


def address(path: Path) -> Path:
    """Returns the page of a notebook or Markdown file, below `site/`."""
    page = path.relative_to(ROOT).with_suffix(".html")
    return page.with_name("index.html") if page.stem == "README" else page


def read_page(path: Path) -> tuple[Any, str]:
    """Returns a file as a notebook, and the title that its first line has."""
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)
    else:
        text = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
        notebook = nbformat.v4.new_notebook(cells=[text])
    first = notebook.cells[0].source if notebook.cells else path.stem
    return notebook, first.lstrip().partition("\n")[0].strip("# ")


def render(text: str) -> str:
    """Returns the HTML of a Markdown cell."""
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)


def describe(output: Any) -> None:
    """Gives a stored picture its alt text, which nbconvert leaves out."""
    picture = output.get("data", {}).pop("image/png", None)
    if picture:
        alt = escapes.escape(output.metadata["image/png"]["alt"])
        picture = f'<img alt="{alt}" src="data:image/png;base64,{picture}">'
        output.data["text/html"] = picture


def to_html(notebook: Any, title: str, navigation: str) -> str:
    """Returns the page: nbconvert's, with links between pages and a narrow layout."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            describe(output)
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", render)
    html, _ = exporter.from_notebook_node(
        notebook, resources={"metadata": {"name": title}}
    )
    html = re.sub(r'<a class="anchor-link".*?</a>', "", SCRIPT.sub("", html))
    html = re.sub(r'(<h\d id=")([^"]*)', lambda m: m[1] + m[2].lower(), html)
    html = html.replace("</head>", STYLE, 1)
    html = re.sub(r"(<body[^>]*>)", rf"\1\n<nav>{navigation}</nav>", html, count=1)
    return LINK.sub(r"\1.html", html).replace("README.html", "index.html")


def main(site: Path = SITE) -> None:
    shutil.rmtree(site, ignore_errors=True)
    found = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    pages = {path: read_page(path) for path in dict.fromkeys(found)}
    for path, (notebook, title) in pages.items():
        page = site / address(path)
        links = [
            f'<a href="{{up}}{address(each)}">{name}</a>'
            for each, (_, name) in pages.items()
            if each.parent == ROOT or each.suffix == ".ipynb" or path.suffix == ".md"
        ]
        up = "../" * (len(address(path).parts) - 1)
        html = to_html(notebook, title, "\n".join(links).replace("{up}", up))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
    for name in ("LICENSE", "CITATION.cff", "notebooks/figures", "configs"):
        source, copy = ROOT / name, site / name
        if source.is_dir():
            shutil.copytree(source, copy)
        elif source.exists():
            shutil.copy(source, copy)


if __name__ == "__main__":
    main()
    sys.stdout.write(f"{SITE / 'index.html'}\n")
