"""What every notebook keeps to, checked without running one."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest

from benchmarks import outputs as stored_outputs
from tests.lessons import answer_code, is_answer, with_answers

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = ROOT / "README.md"
COLAB = "https://colab.research.google.com/github/"

SERIES = [path for path in PATHS if path.stem[0].isdigit()]
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)


@cache
def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str) -> list[str]:
    """The texts of all cells of a kind, in order."""
    cells = load(path)["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def nodes(path: Path) -> Iterator[ast.AST]:
    for source in sources(path, "code"):
        yield from ast.walk(ast.parse(source))


def repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["urls"]["Repository"]


KINDS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undefined(code: str) -> str:
    """What ruff says of names that are used before anything binds them."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    command += ["--select", "F821", "--output-format", "concise", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def test_the_notebooks_are_numbered_without_a_gap():
    numbers = [int(path.stem.split("_")[0]) for path in SERIES]
    assert len(numbers) >= 7
    assert numbers == list(range(len(numbers)))


@every_notebook
def test_a_notebook_is_valid_nbformat_4_5(path):
    notebook = copy.deepcopy(load(path))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    nbformat.validate(notebook)
    assert notebook == load(path), "validation had something to repair"


def test_the_bootstrap_is_the_same_and_asks_before_installing():
    (code,) = {sources(path, "code")[0] for path in PATHS}
    assert len(re.findall(r'^KEEP = "drive"  # on Colab ', code, re.M)) == 1
    opened = code.index("\nruntime.keep_runs(KEEP)\n")
    assert opened < code.index("\ninstall.ensure()\n")
    assert re.findall(r'^REPOSITORY = "(.*)"$', code, re.M) == [repository()]


def test_the_bootstrap_fetches_a_pinned_version_and_says_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = sources(PATHS[0], "code")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = f"v{project['project']['version']}"
    assert re.findall(r'^VERSION = "(.*?)"', code, re.M) == [version]
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    exec(code.partition("\nfrom helpers")[0], {})
    fetch = ["git", "clone", "-q", "--depth=1", "--branch", version, repository()]
    assert commands == [fetch]
    assert capsys.readouterr().out == f"fetches {repository()} at {version}\n"


@every_notebook
def test_the_badge_opens_this_notebook_of_the_repository(path):
    owner = repository().removeprefix("https://github.com/")
    links = re.findall(rf"\(({COLAB}[^)]*)\)", sources(path, "markdown")[0])
    assert links == [f"{COLAB}{owner}/blob/main/notebooks/{path.name}"]


@every_lesson
def test_the_readme_lists_the_notebook_with_its_measured_minutes_and_its_memory(path):
    measured = json.loads((ROOT / "results" / "demo_cpu.json").read_text())
    minutes = f"{measured['notebooks']['seconds'][path.stem] / 60:.1f}"
    (line,) = re.findall(rf"^\| \[{path.stem}\].*", README.read_text(), re.M)
    said, memory_gb = line.strip("| ").split(" | ")[-2:]
    title = "".join(load(path)["cells"][0]["source"])
    assert said == minutes
    assert f"**Takes** {minutes} minutes and {memory_gb} GB on two CPU cores" in title


@every_lesson
def test_the_first_text_says_what_is_read_and_written_and_the_last_what_is_next(path):
    title, *_, close = sources(path, "markdown")
    assert load(path)["cells"][0]["cell_type"] == "markdown"
    assert title.startswith(f"# {int(path.stem.split('_')[0])}. ")
    assert [title.count(f"**{word}** ") for word in ("Takes", "Reads", "Writes")] == [
        1
    ] * 3
    assert close.startswith("## Done")
    for following in SERIES[SERIES.index(path) + 1 :][:1]:
        assert f"**{following.stem}**" in close


@every_notebook
def test_cells_are_short_and_not_empty(path):
    code, texts = sources(path, "code"), sources(path, "markdown")
    assert len(code) <= 45
    assert max(len(source.splitlines()) for source in code) <= 25
    lines = [line for source in code for line in source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []
    prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in texts]
    assert [text[:40] for text in prose if len(text.split()) > 120] == []
    assert all(source.strip() for source in [*code, *texts])


@every_notebook
def test_the_code_is_plain_python_that_asks_for_no_token(path):
    for source in sources(path, "code"):
        ast.parse(source)
        assert not re.search(r"^\s*(%|!)", source, flags=re.M)
        assert not re.search(r"login|HF_TOKEN|userdata|getpass|\binput\(", source)


@every_notebook
def test_no_function_of_the_helpers_is_defined_again(path):
    here = {node.name for node in nodes(path) if isinstance(node, KINDS)}
    for file in (ROOT / "helpers").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert here.isdisjoint({n.name for n in tree.body if isinstance(n, KINDS)})


@every_notebook
def test_every_name_is_bound_by_a_cell_above(path):
    cells = [c for c in with_answers(path).cells if c["cell_type"] == "code"]
    assert undefined("\n".join(cell["source"] + "\n" for cell in cells)) == ""


@every_lesson
def test_two_exercises_have_folded_answers_that_the_notebooks_test_runs(path):
    cells = with_answers(path).cells
    answers = [n for n, cell in enumerate(cells) if is_answer(cell)]
    assert len(answers) == 2
    for n in answers:
        text = cells[n]["source"]
        assert text.startswith("<details><summary>") and text.endswith("</details>")
        assert cells[n + 1]["source"] == answer_code(cells[n])


@every_lesson
def test_the_figure_has_a_description_and_shows_on_any_background(path):
    folder = "figures/"
    if "/OWNER/" not in repository():  # Colab has no files beside a notebook
        address = repository().replace("github.com", "raw.githubusercontent.com")
        folder = f"{address}/main/notebooks/{folder}"
    text = "\n".join(sources(path, "markdown"))
    figures = re.findall(r"!\[(.{40,})\]\((?!http.*badge)(.*?)(\w+\.svg)\)", text)
    assert figures and {place for _, place, _ in figures} == {folder}
    for _, _, name in figures:
        root = ElementTree.parse(ROOT / "notebooks" / "figures" / name).getroot()
        _, _, width, height = map(float, root.get("viewBox", "").split())
        card = next(each for each in root if each.tag.endswith("rect"))
        assert float(card.get("width")) >= width - 2
        assert float(card.get("height")) >= height - 2
        assert re.fullmatch("#[0-9a-f]{6}", card.get("fill"))


@every_lesson
def test_links_to_read_on_are_given(path):
    (reading,) = [s for s in sources(path, "markdown") if "ead on" in s]
    assert len(re.findall(r"\]\(https://", reading)) >= 3


def imported(path: Path) -> dict[str, Any]:
    """What the notebook's cells bind by importing from the helpers, really imported."""
    bound = {}
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers":
            module = import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    import_module(f"{node.module}.{alias.name}")
                bound[alias.asname or alias.name] = getattr(module, alias.name)
    return bound


@every_notebook
def test_what_is_asked_of_the_helpers_exists_and_none_is_overwritten(path):
    bound = imported(path)
    modules = {k: v for k, v in bound.items() if isinstance(v, ModuleType)}
    absent = [
        f"{node.value.id}.{node.attr}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]
    assert absent == []
    names = [node for node in nodes(path) if isinstance(node, ast.Name)]
    assert bound.keys().isdisjoint(n.id for n in names if isinstance(n.ctx, ast.Store))


@every_notebook
def test_what_is_stored_is_small_and_has_no_widgets_counts_or_errors(path):
    assert path.stat().st_size < 250_000
    assert "widgets" not in load(path)["metadata"]
    assert "application/vnd.jupyter.widget" not in json.dumps(load(path))
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    counted = [x for x in cells + outputs if x.get("execution_count") is not None]
    assert counted == []
    assert "error" not in {output["output_type"] for output in outputs}


@every_notebook
def test_stored_outputs_were_made_by_the_code_above_them(path):
    notebook = nbformat.read(path, as_version=4)
    made = notebook.metadata.get("outputs")
    if not made:
        pytest.skip("no outputs are stored")
    assert made["code"] == stored_outputs.hash_code(notebook), "run make outputs"
    assert f"**Outputs** made on {made['made']}." in notebook.cells[0].source
    shown = [output for c in notebook.cells for output in c.get("outputs", [])]
    assert shown
    text = stored_outputs.PICTURE.sub("", json.dumps(shown))
    assert not re.search(r"(?<![\w:/.])/(home|root|tmp|content|Users|usr|work)/", text)
    assert not stored_outputs.BAR.search(text)
