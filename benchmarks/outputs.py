"""Writes what a run's executed notebooks showed into notebooks/*.ipynb, cleaned.

    python benchmarks/outputs.py            # of runs/demo, after `make demo`
    python benchmarks/outputs.py runs/mine

The hash of the code cells is stored beside the outputs, so that a test fails when
the code changes without them.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.files import fingerprint, read_json  # noqa: E402

LIMIT_BYTES = 250_000
TEXT_CHARACTERS, TEXT_BYTES = 6_000, 40_000
WIDEST = 1_000  # pixels: twice what a phone shows
WIDGET, BAR = "application/vnd.jupyter.widget-view+json", re.compile(r"\d+%\|")
NOISE = re.compile(r"^.*(Unsloth|🦥|={2}\(\(|O\^O/|\"-____-\"|it/s\]|\d%\|).*\n?", re.M)
PLACES = re.compile(
    r"(?<![\w:/.])/[\w./-]*/(?=(runs|data_samples|notebooks|results)\b)"
)
ADDRESS = re.compile(r'(?<=^REPOSITORY = "https://)[^"]*', re.M)  # see make repository
MADE = re.compile(r"\n\n\*\*Outputs\*\* made on .*")  # in a title
PICTURE = re.compile(r"(?<=data:image/png;base64,)[\w+/=\n]+")


def hash_code(notebook: Any) -> str:
    """Returns the hash of a notebook's code cells, in order, whatever the address."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return fingerprint([ADDRESS.sub("github.com/OWNER/tunebook", c) for c in code])


def shrink(picture: str) -> str:
    """Returns a PNG (base64) at most `WIDEST` pixels wide, in 64 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(64).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def clean_text(text: str) -> str:
    """Returns text without absolute paths, and cut with a word where it is long."""
    text = PLACES.sub("", text).replace(str(Path.home()), "~")
    if len(text) <= TEXT_CHARACTERS:
        return text
    left_out = f"{len(text) - TEXT_CHARACTERS} characters are left out"
    return f"{text[:TEXT_CHARACTERS]}\n... {left_out}"


def clean_output(output: Any) -> Any | None:
    """Returns an output as it is stored; None for bars, banners and stderr."""
    output.pop("execution_count", None)
    if output.output_type == "stream":
        output.text = clean_text(NOISE.sub("", output.text))
        return output if output.name == "stdout" and output.text.strip() else None
    if output.output_type == "error":
        sys.exit(f"a cell of the run failed with {output.ename}: {output.evalue}")
    data = output.data
    is_widget = data.pop(WIDGET, None) is not None
    if BAR.search(data.get("text/plain", "")) or (is_widget and len(data) == 1):
        return None  # a widget without a static form
    if is_widget:
        data.pop("text/plain", None)
    for name, value in list(data.items()):
        if name == "image/png":
            data[name] = shrink(value)
        elif name == "text/html":
            value = PLACES.sub("", value).replace(str(Path.home()), "~")
            value = PICTURE.sub(lambda m: shrink(m.group()), value)
            data[name] = value
            if len(PICTURE.sub("", value)) > TEXT_BYTES:
                data[name] = f"<p>A table of {len(value):,} bytes is left out.</p>"
        elif name.startswith("text/"):
            data[name] = clean_text(value)
    if output.output_type == "execute_result":
        output.execution_count = None
    return output


def fill(path: Path, executed: Path, conditions: str) -> None:
    """Puts the outputs of an executed copy into a notebook."""
    notebook, copy = (nbformat.read(each, as_version=4) for each in (path, executed))
    if hash_code(notebook) != hash_code(copy):
        sys.exit(f"{executed} ran other code than {path.name} has: run it again")
    copy, _ = CoalesceStreamsPreprocessor().preprocess(copy, {})
    for cell, ran in zip(notebook.cells, copy.cells, strict=True):
        if cell.cell_type != "code":
            continue
        outputs = [clean_output(output) for output in ran.outputs]
        cell.outputs = [output for output in outputs if output is not None]
        alt = cell.metadata.get("alt", "")
        for data, metadata in [
            (x.data, x.metadata) for x in cell.outputs if "data" in x
        ]:
            if not alt and ("image/png" in data or PICTURE.search(str(data))):
                sys.exit(
                    f"{path.name}: {cell.id} draws: say what, in its metadata's alt"
                )
            if "image/png" in data:
                metadata["image/png"] = {"alt": alt}
            if "text/html" in data:
                image = f'<img alt="{escape(alt)}" src="data:'
                data["text/html"] = data["text/html"].replace('<img src="data:', image)
    notebook.metadata["outputs"] = {"code": hash_code(notebook), "made": conditions}
    title = notebook.cells[0]
    title.source = MADE.sub("", title.source) + f"\n\n**Outputs** made on {conditions}."
    text = nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) >= LIMIT_BYTES:
        sys.exit(f"{path.name} would have {len(text.encode()):,} bytes: show less")
    path.write_text(text, encoding="utf-8")


def main(run: Path) -> None:
    place = read_json(run / "report.json")["environment"]
    conditions = f"{place['device']}, {place['dtype']}, {place['engine']}"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        executed = run / "notebooks" / path.name
        if executed.exists():
            fill(path, executed, conditions)
        else:
            print(f"{executed} is missing: {path.name} stays as it is")


if __name__ == "__main__":
    main(Path(*sys.argv[1:]) if len(sys.argv) > 1 else ROOT / "runs" / "demo")
