"""The series runner and the README's examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from helpers import recipes, series

ROOT = Path(__file__).resolve().parent.parent


def write_notebook(path: Path, *cells: str) -> Path:
    cells_of = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells_of), path)
    return path


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", o.get("evalue", "")) for c in cells for o in c.outputs)


def test_a_notebook_is_executed_into_a_copy_and_left_as_it_is(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "a.ipynb", "x = 6 * 7", "print(x)")
    before = source.read_bytes()
    assert series.execute(source, tmp_path / "out" / "a.ipynb") > 0
    assert source.read_bytes() == before
    assert outputs(tmp_path / "out" / "a.ipynb") == "42\n"


def test_a_failing_notebook_leaves_its_copy_with_the_error(tmp_path: Path) -> None:
    source = write_notebook(tmp_path / "a.ipynb", "print(1)", "raise ValueError('no')")
    with pytest.raises(CellExecutionError, match="no"):
        series.execute(source, tmp_path / "copy.ipynb")
    assert outputs(tmp_path / "copy.ipynb") == "1\nno"


@pytest.mark.parametrize(
    ("recipe", "left_out"),
    [
        ("demo", set()),
        ("gsm8k-grpo-llama32-1b", {"02_sft_qlora"}),
        ("dolly-llama2-7b", {"03_grpo_gsm8k"}),
        ("guanaco-llama2-7b", {"03_grpo_gsm8k", "04_evaluation"}),
    ],
)
def test_the_series_of_a_run_leaves_out_what_it_has_no_use_for(
    recipe: str, left_out: set[str]
) -> None:
    run = {path.stem for path in series.notebooks_for(recipes.load(recipe))}
    assert {path.stem for path in series.notebooks()} - run == left_out


def test_our_errors_are_shown_as_a_sentence_and_others_with_their_traceback(
    tmp_path: Path,
) -> None:
    start = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom helpers import runtime"
    )
    ours = "from helpers import data\ndata.load_rows('no.jsonl')"
    for cell, short in ((ours, True), ("def f():\n    int('x')\nf()", False)):
        source = write_notebook(tmp_path / "a.ipynb", start + "; runtime.start()", cell)
        with pytest.raises(CellExecutionError):
            series.execute(source, tmp_path / "copy.ipynb")
        copy = nbformat.read(tmp_path / "copy.ipynb", as_version=4)
        (error,) = (o for o in copy.cells[1].outputs if o.output_type == "error")
        shown = "\n".join(error.traceback)
        assert ("Traceback" not in shown) == short
        assert (shown.count("\n") < 3) == short
        assert not short or shown.startswith("FileNotFoundError: no file no.jsonl")


def test_the_command_line_says_in_a_sentence_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "helpers", "train", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: no config at")
    assert "Traceback" not in done.stderr


def test_the_series_is_the_numbered_notebooks_in_order() -> None:
    names = [path.stem for path in series.notebooks()]
    assert names == sorted(names) and names[0] == "00_setup" and len(names) == 6


def test_the_readmes_example_of_own_data_runs(tmp_path: Path, run_python: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Your own data\n")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    done = run_python("-c", found[1], TUNEBOOK_RUNS=str(tmp_path))
    assert "'steps': 2" in done.stdout
