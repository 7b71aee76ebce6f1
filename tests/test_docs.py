"""README and docs: what they tell a reader to type, and what they quote, exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from benchmarks import outputs
from helpers import __main__ as command_line
from helpers import recipes, runtime

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M))


def read(name):
    return (ROOT / name).read_text("utf-8")


def commands():
    """Every `python -m helpers ...` of the pages, on a line of its own."""
    pattern = r"^ {4}\S*python -m helpers (.*?)(?: +#.*)?$"
    texts = [re.sub(r"\\\n +", "", page.read_text("utf-8")) for page in PAGES]
    return [line for text in texts for line in re.findall(pattern, text, re.M)]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_pages_is_understood(line, monkeypatch):
    seen = []  # what would be executed, hours of it
    monkeypatch.setattr(command_line, "execute", lambda *words: seen.append(words))
    monkeypatch.setattr(runtime, "launch", lambda *words: None)  # no GPUs here
    command_line.main(shlex.split(line))
    ((command, values),) = seen
    assert command in command_line.COMMANDS
    if command == "train":
        assert values["config"] in recipes.NAMES or "." in values["config"]


def test_every_target_of_make_that_is_named_exists():
    named = set()
    for page in PAGES:
        text = page.read_text("utf-8")
        named |= set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.M))
    assert len(named) >= 4
    assert named <= TARGETS


def run_make(terminal):
    # `make test` is one itself, of which this one is not to know
    alone = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))
    }
    options = {"cwd": ROOT, "env": alone, "stdin": terminal}
    done = subprocess.run(["make"], **options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_make_alone_prints_its_choices_without_a_terminal():
    done = run_make(subprocess.DEVNULL)
    choices = re.findall(r"^  ([a-z]+) ", done.stdout, re.M)
    assert len(choices) == 8
    assert set(choices) <= TARGETS
    assert done.stdout.startswith("Python 3.")


def test_make_in_a_terminal_ends_without_a_fault_where_nothing_is_chosen():
    ours, makes = os.openpty()
    os.write(ours, b"\n")
    done = run_make(makes)
    assert done.stdout.endswith("which one? ") and not done.stderr


def test_the_address_is_written_everywhere_and_nothing_else_is_taken_for_one(tmp_path):
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    old = re.search(r'Repository = "https://(.*)"', read("pyproject.toml"))[1]
    command = ["make", "-C", str(tmp_path), "repository"]
    assert subprocess.run([*command, "URL=/some/folder"]).returncode == 2
    assert subprocess.run([*command, "URL=https://github.com/me/mine"]).returncode == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    texts = {path.name: path.read_text("utf-8") for path in files}
    for path in ROOT.glob("notebooks/*.ipynb"):  # their outputs are still theirs
        both = (nbformat.read(p, 4) for p in (path, tmp_path / "notebooks" / path.name))
        ours, other = map(outputs.hash_code, both)
        assert ours == other
    assert [name for name, text in texts.items() if old in text] == []
    assert "https://github.com/me/mine/blob/" in texts["kaggle.md"]


def test_each_symptom_names_the_check_that_detects_it():
    rows = re.findall(r"^\| .* \| (.*) \|$", read("docs/troubleshooting.md"), re.M)[1:]
    assert len(rows) > 12
    for cell in rows:
        place, _, words = cell.partition(": ")
        if place != "PyTorch":
            assert words.strip('"') in read(place.strip("`")), cell


def test_every_model_and_dataset_of_a_recipe_has_its_licence_named():
    text = read("helpers/recipes.toml")
    names = re.findall(r'^(?:model|\w+) = \[?"(\w[\w-]*/[\w.-]+)[":/]', text, re.M)
    names = {name for name in names if not name.startswith("data_samples/")}
    assert len(names) > 5
    listed = read("docs/licences.md")
    assert [name for name in sorted(names) if f"[{name}]" not in listed] == []


def test_every_python_block_is_one_that_a_test_runs():
    blocks = {p.name: len(re.findall("```python", p.read_text("utf-8"))) for p in PAGES}
    ran = {"README.md": 2, "reliability.md": 7}  # by tests of the command line,
    # packaging, reliability and pages
    ran |= {"adding.md": 4, "curves.md": 1, "models.md": 1}
    assert {name: count for name, count in blocks.items() if count} == ran


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def test_the_version_is_that_of_the_project_everywhere():
    (version,) = re.findall(r'^version = "(.*)"', read("pyproject.toml"), re.M)
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert f"\n## {version}\n" in read("CHANGELOG.md")


def test_make_lab_starts_jupyter_for_any_user_with_the_notebooks_open(tmp_path):
    pytest.importorskip("jupyterlab")
    make = ["make", "--no-print-directory", "-n", "lab"]  # make may run this test
    lines = subprocess.check_output(make, cwd=ROOT, text=True)
    python, *words = shlex.split(lines.replace("\\\n", "").splitlines()[-1])
    places = {f"JUPYTER_{name}_DIR": str(tmp_path) for name in ("CONFIG", "RUNTIME")}
    options = {"cwd": ROOT, "env": os.environ | places, "text": True}
    command = [sys.executable, *words, "--no-browser", "--port=0"]
    lab = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    try:
        address = next((line for line in lab.stderr if "?token=" in line), "")
    finally:
        lab.terminate()
        lab.wait()
    assert "/lab/tree/notebooks?token=" in address
