"""What every notebook keeps to, checked without running one."""

from __future__ import annotations

import ast
import copy
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = ROOT / "README.md"
COLAB = "https://colab.research.google.com/github/"

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@cache
def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str) -> list[str]:
    """The texts of all cells of a kind, in order."""
    cells = load(path)["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [c for c in load(path)["cells"] if c["cell_type"] == "code"]


def nodes(path: Path) -> Iterator[ast.AST]:
    for source in sources(path, "code"):
        yield from ast.walk(ast.parse(source))


def repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["urls"]["Repository"]


def defined(tree: ast.Module) -> set[str]:
    """The names that a module binds at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            bound = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            names |= {n.id for n in bound if isinstance(n.ctx, ast.Store)}
    return names


@cache
def helpers() -> dict[str, ast.Module]:
    files = (ROOT / "helpers").rglob("*.py")
    return {f.stem: ast.parse(f.read_text(encoding="utf-8")) for f in files}


def own_names(tree: ast.Module) -> set[str]:
    """The functions and classes that a module defines itself."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in tree.body if isinstance(node, kinds)}


def undefined(code: str) -> str:
    """What ruff says of names that are used before anything binds them."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    command += ["--select", "F821", "--output-format", "concise", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def looks_like_code(text: str) -> bool:
    """Whether a comment would do something if its # were taken away."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return bool(re.match(r"(if|for|while|with|def|class|try)\b.*:$", text))
    return any(
        not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call | ast.Await)
        for node in body
    )


def test_the_notebooks_are_numbered_without_a_gap():
    numbers = [int(path.stem.split("_")[0]) for path in PATHS]
    assert len(numbers) >= 6
    assert numbers == list(range(len(numbers)))


@every_notebook
def test_a_notebook_is_valid_nbformat_4_5(path):
    notebook = copy.deepcopy(load(path))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    nbformat.validate(notebook)
    assert notebook == load(path), "validation had something to repair"


def test_no_cell_id_occurs_twice_in_the_series():
    ids = Counter(cell["id"] for path in PATHS for cell in load(path)["cells"])
    assert [name for name, count in ids.items() if count > 1] == []


@every_notebook
def test_cell_ids_are_names_that_begin_with_the_number_of_the_notebook(path):
    number = path.stem.split("_")[0]
    ids = [cell["id"] for cell in load(path)["cells"]]
    assert [i for i in ids if not re.fullmatch(rf"{number}-[a-z0-9-]+", i)] == []


def test_the_first_code_cell_is_the_same_in_every_notebook():
    assert len({sources(path, "code")[0] for path in PATHS}) == 1


@every_notebook
def test_the_bootstrap_keeps_runs_on_drive_in_one_line_and_asks_before_installing(path):
    code = sources(path, "code")[0]
    assert len(re.findall(r"^KEEP_ON_DRIVE = True  # on Colab: ", code, re.M)) == 1
    opened = code.index("\nruntime.open_drive(KEEP_ON_DRIVE)\n")
    assert opened < code.index("\ninstall.ensure()\n")


@every_notebook
def test_a_promise_to_go_on_after_a_kill_says_where_the_run_lies_on_colab(path):
    promises = [t for t in sources(path, "markdown") if "Killed half-way?" in t]
    assert all("Google Drive" in text for text in promises)
    assert promises or path.stem not in ("02_sft_qlora", "03_grpo_gsm8k")


@every_notebook
def test_the_bootstrap_fetches_the_repository_that_pyproject_names(path):
    found = [
        node.value.value
        for node in ast.parse(sources(path, "code")[0]).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if node.targets[0].id == "REPOSITORY"
    ]
    assert found == [repository()]


@every_notebook
def test_the_badge_opens_this_notebook_of_the_repository(path):
    owner = repository().removeprefix("https://github.com/")
    links = re.findall(rf"\(({COLAB}[^)]*)\)", sources(path, "markdown")[0])
    assert links == [f"{COLAB}{owner}/blob/main/notebooks/{path.name}"]


def test_the_readme_links_only_to_the_repository_that_pyproject_names():
    text = README.read_text(encoding="utf-8")
    owner = repository().removeprefix("https://github.com/")
    badges = re.findall(rf"{COLAB}([\w.-]+/[\w.-]+)/", text)
    clones = re.findall(r"git clone (?:-\S+ )*(\S+)", text)
    assert set(badges) <= {owner}
    assert {url.removesuffix(".git") for url in clones} <= {repository()}


@every_notebook
def test_the_readme_lists_the_notebook_with_its_measured_minutes_and_its_memory(path):
    measured = json.loads((ROOT / "results" / "demo_cpu.json").read_text())
    minutes = f"{measured['notebooks']['seconds'][path.stem] / 60:.1f}"
    (line,) = re.findall(rf"^\| \[{path.stem}\].*", README.read_text(), re.M)
    said, memory_gb = line.strip("| ").split(" | ")[-2:]
    title = "".join(load(path)["cells"][0]["source"])
    assert said == minutes
    assert f"**Takes** {minutes} minutes and {memory_gb} GB on two CPU cores" in title


@every_notebook
def test_the_title_cell_says_what_is_read_and_written(path):
    cell = load(path)["cells"][0]
    text = "".join(cell["source"])
    assert cell["cell_type"] == "markdown"
    assert text.startswith(f"# {int(path.stem.split('_')[0])}. ")
    for word in ("**Takes** ", "**Reads** ", "**Writes** "):
        assert text.count(word) == 1


@every_notebook
def test_the_last_text_is_the_close_and_names_the_next_notebook(path):
    text = sources(path, "markdown")[-1]
    assert text.startswith("## Done")
    for following in PATHS[PATHS.index(path) + 1 :][:1]:
        assert f"**{following.stem}**" in text


@every_notebook
def test_no_code_cell_is_longer_than_forty_lines(path):
    assert max(len(s.splitlines()) for s in sources(path, "code")) <= 40


def test_nine_of_ten_code_cells_have_at_most_25_lines():
    lengths = [len(s.splitlines()) for path in PATHS for s in sources(path, "code")]
    assert sum(length <= 25 for length in lengths) >= 0.9 * len(lengths)


@every_notebook
def test_no_code_line_is_wider_than_88_columns(path):
    lines = [line for s in sources(path, "code") for line in s.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


@every_notebook
def test_no_text_is_longer_than_120_words(path):
    texts = sources(path, "markdown")
    assert [text[:40] for text in texts if len(text.split()) > 120] == []


@every_notebook
def test_no_cell_is_empty(path):
    assert all("".join(cell["source"]).strip() for cell in load(path)["cells"])


@every_notebook
def test_the_code_is_plain_python_without_magics(path):
    for source in sources(path, "code"):
        ast.parse(source)
        assert not re.search(r"^\s*(%|!)", source, flags=re.M)


@every_notebook
def test_no_branch_is_switched_off(path):
    switched = [
        node.lineno
        for node in nodes(path)
        if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Constant)
    ]
    assert switched == []


@every_notebook
def test_nothing_logs_in_or_asks_for_a_token(path):
    for source in sources(path, "code"):
        assert not re.search(r"login|HF_TOKEN|userdata|getpass|\binput\(", source)


@every_notebook
def test_no_code_is_commented_out(path):
    found = []
    for source in sources(path, "code"):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            text = token.string.lstrip("# ")
            if token.type == tokenize.COMMENT and looks_like_code(text):
                found.append(token.string)
    assert found == []


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        ("x = 5", True),
        ("trainer.train()", True),
        ("import torch", True),
        ("if debug:", True),
        ("halve if out of memory", False),
        ("slow", False),
        ("For each row: one label.", False),
    ],
)
def test_code_in_a_comment_is_told_from_prose(comment, expected):
    assert looks_like_code(comment) is expected


@every_notebook
def test_no_function_of_the_helpers_is_defined_again(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    here = {node.name for node in nodes(path) if isinstance(node, kinds)}
    assert here.isdisjoint(set().union(*map(own_names, helpers().values())))


def test_a_name_that_is_used_before_it_is_bound_is_found():
    assert "Undefined name `b`" in undefined("a = 1\nprint(b)\nb = a\n")
    assert undefined("a = 1\nb = a\nprint(b)\n") == ""


@every_notebook
def test_every_name_is_bound_by_a_cell_above(path):
    assert undefined("\n".join(s + "\n" for s in sources(path, "code"))) == ""


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
def test_everything_that_is_asked_of_the_helpers_exists(path):
    modules = {k: v for k, v in imported(path).items() if isinstance(v, ModuleType)}
    absent = [
        f"{node.value.id}.{node.attr}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]
    assert absent == []


@every_notebook
def test_no_imported_helper_module_is_overwritten(path):
    modules = {
        alias.asname or alias.name
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers"
        for alias in node.names
    }
    names = [node for node in nodes(path) if isinstance(node, ast.Name)]
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert modules.isdisjoint(stored)


@every_notebook
def test_no_widget_state_is_stored(path):
    assert "widgets" not in load(path)["metadata"]
    assert "application/vnd.jupyter.widget" not in json.dumps(load(path))


@every_notebook
def test_outputs_carry_no_execution_counts(path):
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [c["id"] for c in cells if c["execution_count"] is not None] == []
    assert [o for o in outputs if o.get("execution_count") is not None] == []


@every_notebook
def test_no_output_is_an_error(path):
    kinds = {o["output_type"] for cell in code_cells(path) for o in cell["outputs"]}
    assert "error" not in kinds


@every_notebook
def test_a_notebook_with_its_outputs_is_under_250_kilobytes(path):
    assert path.stat().st_size < 250_000
